"""Imports run one way, transformers stays out, and `--help` is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module imports those above it alone: the design's list, as far as it is built. The decoder
# comes after layout and methods, and imports neither all the same.
ORDER = """
    errors config command files wheels hub cards
    layout lint methods
    rope cache linear model dense definition diagnosis attention_mass masks memory pool figures
    stages precompiled tokenizer sandbox chat quantize checkpoint saving gguf_tokenizer gguf
    loader convert
    normalize results sampling
    executor request answers prefill scoring attribution inspection engine jsonl generate
    pictures inspect
    artifacts trials warmup recompiles profiling profile_report checks verify
    soak.calls soak.watch soak.judges soak.running
    evaluation.extras evaluation.rows evaluation.datasets evaluation.prompts evaluation.records
    evaluation.matching evaluation.lemmas evaluation.tables evaluation.statistics
    evaluation.summary evaluation.plots evaluation.report evaluation.flags evaluation.batches
    evaluation.paraphrasing evaluation.confidences evaluation.runner
    evaluate paraphrase confidence
""".split()
DECODER = ("rope", "cache", "linear", "model")
SOURCES = sorted((ROOT / "minifuse").rglob("*.py")) + sorted((ROOT / "tools").rglob("*.py"))
COMMANDS = (
    "minifuse.cards",
    "minifuse.generate",
    "minifuse.evaluate",
    "minifuse.paraphrase",
    "minifuse.confidence",
    "minifuse.warmup",
    "minifuse.verify",
    "minifuse.inspect",
    "tools.profile_latency",
    "tools.convert_weights",
    "tools.soak",
    "benchmarks.peers",
    "benchmarks.gpu",
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path, *, typing_too: bool = False) -> set[str]:
    """Modules that a file imports anywhere, in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in for_types and not typing_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_place():
    names = {name_of(path).removeprefix("minifuse.") for path in SOURCES}
    modules = {n for n in names if "__init__" not in n and not n.startswith("tools.")}
    assert modules == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    path = ROOT / "minifuse" / f"{module.replace('.', '/')}.py"
    imported = {n.removeprefix("minifuse.") for n in imports_of(path) if n.startswith("minifuse.")}
    later = set(ORDER[ORDER.index(module) :])
    assert not imported & later


@pytest.mark.parametrize("module", DECODER)
def test_the_decoder_knows_neither_text_nor_methods(module):
    names = imports_of(ROOT / "minifuse" / f"{module}.py", typing_too=True)
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "minifuse"}
    own = {name.split(".")[1] for name in names if name.startswith("minifuse.")}
    assert own <= {"config", *DECODER}


@pytest.mark.parametrize(
    "module", ["errors", "command", "files", "config", "cards", "layout", "methods", "normalize"]
)
def test_plain_data_needs_the_standard_library_alone(module):
    names = imports_of(ROOT / "minifuse" / f"{module}.py", typing_too=True)
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "minifuse"}


def test_the_sandbox_stands_alone():
    names = imports_of(ROOT / "minifuse" / "sandbox.py", typing_too=True)
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "jinja2"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_no_file_of_the_package_imports(path):
    imported = {name.split(".")[0] for name in imports_of(path, typing_too=True)}
    # `verify` compares with transformers where a user has it, by name.
    assert not imported & {"transformers", "tests", "benchmarks", "pickle"}
    assert "spacy" not in imported or path.stem == "lemmas"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_package_imports_nothing_from_tools(path):
    if path.parent.name != "tools":
        assert "tools" not in {name.split(".")[0] for name in imports_of(path)}


HELP = """
import runpy, sys
sys.argv = [{name!r}, "--help"]
try:
    runpy.run_module({name!r}, run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
heavy = {{"torch", "spacy", "transformers", "tokenizers", "numpy", "huggingface_hub", "pandas"}}
heavy &= set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_neither_torch_nor_spacy(name):
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(name=name)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_importing_the_package_loads_no_torch():
    code = "import sys, minifuse; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names_are_there():
    import minifuse

    for name in minifuse.__all__:
        assert getattr(minifuse, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'weigh'"):
        minifuse.weigh  # noqa: B018
