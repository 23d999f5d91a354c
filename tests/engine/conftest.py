"""Tiny models that the tests of the engine share."""

import json

import pytest
import reference
from engine_cases import make_sharp_model, sharpen
from tiny_files import CONTROLS, make_model, write_hub_folder

import minifuse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp("engine") / "sharp", make_sharp_model())


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory):
    """The same model; its tokenizer puts <|start|> before a text."""
    path = write_hub_folder(tmp_path_factory.mktemp("engine") / "bos", make_sharp_model())
    raw = json.loads((path / "tokenizer.json").read_text())
    start = CONTROLS[1]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": start, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {start: {"id": start, "ids": [1], "tokens": [start]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="module")
def fuser(folder):
    return minifuse.load(folder, compile=False)


@pytest.fixture(scope="module")
def bos_fuser(bos_folder):
    return minifuse.load(bos_folder, compile=False)


@pytest.fixture(scope="module")
def compiled(folder):
    return minifuse.load(folder, compile=True)


@pytest.fixture(scope="module")
def truth(fuser):
    return reference.Reference(fuser.model.config, fuser.model.params)


SCALED = {"rope_theta": 10000.0, "factor": 3.0}
# What changes who sees whom, or how keys turn: family, config, and whether frequencies depend on
# the request (its context is exceeded on purpose).
FAMILIES = {
    "mistral": ("mistral", {"sliding_window": 19}),
    "qwen2, one layer slides": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {**SCALED, "rope_type": "dynamic", "factor": 8.0},
            "max_position_embeddings": 40,
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                **SCALED,
                "rope_type": "yarn",
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request, tmp_path_factory):
    family, changes = FAMILIES[request.param]
    model = sharpen(make_model(family, **changes))
    return write_hub_folder(tmp_path_factory.mktemp("engine") / family, model)


@pytest.fixture(scope="module")
def family_fuser(family_folder):
    return minifuse.load(family_folder, compile=False)
