"""Fixtures that several files share."""

import os
from pathlib import Path

# No test asks the real hub; those of the hub start processes with settings of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests that run at the same time share the cores: two that each take all of them would spend most
# of their time in waiting for each other's threads. Not in the process that starts the workers:
# they would find its number set, and keep it.
if _workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(_workers))))

import pytest
import torch
from hypothesis import settings
from tiny_files import make_model, write_hub_folder

import minifuse

# The same examples in every run: a failure in CI is one that anybody can repeat.
settings.register_profile("minifuse", deadline=None, derandomize=True, database=None)
settings.load_profile("minifuse")

KNOWN_WARNINGS = (
    # Tiny models run eagerly on purpose; torch advises against it.
    "ignore:flex_attention called without torch.compile:UserWarning",
    # Torch's own use of what it deprecates, whenever something is compiled.
    "ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning",
)
DEFAULT_FUSERS = {"default_fuser", "default_fuser_bf16"}


def pytest_configure(config: pytest.Config) -> None:
    for line in KNOWN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the default model is marked so."""
    for item in items:
        if DEFAULT_FUSERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in hub layout with a context of 2048."""
    model = make_model("llama", max_position_embeddings=2048)
    return write_hub_folder(tmp_path_factory.mktemp("tiny") / "llama", model)


@pytest.fixture(scope="session")
def single_layer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least that can be compiled, for tests that compile several times."""
    model = make_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    return write_hub_folder(tmp_path_factory.mktemp("tiny") / "single", model)


@pytest.fixture(scope="session")
def default_fuser() -> "minifuse.Fuser":
    """The default model in float32, compiled."""
    return minifuse.load(dtype="float32")


@pytest.fixture(scope="session")
def default_fuser_bf16() -> "minifuse.Fuser":
    """The default model as its checkpoint has it, compiled."""
    return minifuse.load(dtype="bfloat16")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets that lie beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("shared/data does not lie beside the repository")
    return folder
