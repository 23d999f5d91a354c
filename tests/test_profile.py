"""`python -m tools.profile_latency`: its measures, table, plots, and why graphs were made anew."""

import contextlib
import json
import math
import xml.etree.ElementTree as ElementTree
from types import FunctionType

import pytest
import torch
from torch._dynamo.utils import clear_compilation_metrics

import minifuse
from minifuse import linear, profiling
from minifuse.config import ModelConfig
from minifuse.profile_report import bars_of, format_profile, plot_profile
from minifuse.profiling import (
    ProfileOptions,
    linear_parameters,
    measure_ceilings,
    percentiles,
    profile,
    weight_bytes,
)
from minifuse.recompiles import explain_cause, explain_recompiles
from minifuse.stages import listen, stage
from minifuse.trials import TrialSize
from tools.profile_latency import build_parser, main

SIZE = TrialSize(segments=2, prefix_tokens=20, segment_tokens=6, new_tokens=3)


@pytest.fixture(scope="module")
def report(tiny_llama_folder):
    """A profile of the tiny model, run eagerly."""
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    args = build_parser().parse_args(["--model", str(tiny_llama_folder), "--no-compile"])
    options = ProfileOptions(batch=2, repeats=2, contexts=(10, 40, 100))
    return profile(fuser, SIZE, options, args)


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers_in(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    return [value] if isinstance(value, int | float) else []


def test_the_report_is_json_and_sane(report):
    assert json.loads(json.dumps(report)) == report
    found = numbers_in(report)
    assert all(math.isfinite(number) and number >= 0 for number in found)
    assert list(report) == [
        "conditions",
        "model",
        "request",
        "load_s",
        "first_request_s",
        "first_compile_s",
        "request_ms",
        "batch",
        "context",
        "timeline",
        "peak_memory_bytes",
        "compile",
        "ceilings",
        "step",
        "masks_ms",
        "operators",
    ]
    request, batch = report["request_ms"], report["batch"]
    assert 0 < request["first_token_prefix_stored"] < request["whole_prefix_stored"]
    assert 0 < batch["step_ms"]["p50"] <= batch["step_ms"]["p90"] <= batch["step_ms"]["p99"]
    # Two steps a run behind the first token.
    assert batch["num_steps"] == 2 * 2
    assert 0 < batch["tokens_per_s"] < 2 * 3 / (2 * batch["step_ms"]["p50"] / 1000) * 2
    # Ten live tokens are fewer than the segments have.
    assert [point["live_tokens"] for point in report["context"]] == [40, 100]
    assert report["peak_memory_bytes"] > 50e6
    assert report["compile"] == {
        "compile_s": 0.0,
        "graphs": [],
        "recompiles": 0,
        "graph_breaks": 0,
        "explained": [],
    }


def test_conditions_are_complete(report):
    conditions = report["conditions"]
    assert conditions["torch"] == torch.__version__
    assert conditions["threads"] == torch.get_num_threads()
    assert len(conditions["load_average"]) == len(conditions["load_average_after"]) == 3
    assert conditions["cpu"]
    assert report["model"]["dtype"] == "float32"
    assert report["model"]["quantize"] == "none"


def test_bytes_and_flops_of_a_step(report, tiny_llama_folder):
    fuser = minifuse.load(tiny_llama_folder, compile=False)
    params, config = fuser.model.params, fuser.model.config
    matrices = [
        weight
        for layer in params.layers
        for weight in (layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down)
    ] + [params.lm_head]
    assert linear_parameters(config) == sum(weight.numel() for weight in matrices)
    norms = [n for layer in params.layers for n in (layer.attn_norm, layer.mlp_norm)]
    everything = [*matrices, *norms, params.final_norm]
    assert weight_bytes(fuser) == sum(4 * weight.numel() for weight in everything)
    step = report["step"]
    assert step["weight_bytes"] == weight_bytes(fuser)
    # One prefix for two requests; of each two segments, a suffix, and the token sampled first.
    assert step["live_tokens"] == 2 * (SIZE.prompt_tokens + 1) - SIZE.prefix_tokens
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert step["cache_bytes"] == step["live_tokens"] * per_token
    assert step["flops"] > step["rows"] * 2 * linear_parameters(config)
    seconds = report["batch"]["step_ms"]["p50"] / 1000
    assert step["compute_fraction"] == pytest.approx(
        step["flops"] / seconds / report["ceilings"]["flops_per_s"]
    )
    assert 0 < step["memory_fraction"] < 1


def test_a_tied_head_is_read_whole():
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
        }
    )
    assert linear_parameters(config) == 3 * (4 * 4 * 8 + 8 * 8 + 3 * 12 * 8) + 100 * 8


def test_percentiles_are_values_that_occurred():
    assert percentiles([]) is None
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    values = [float(n) for n in range(101)]
    assert percentiles(values[::-1]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_ceilings_are_measured():
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < found["bytes_per_s"] < 1e13
    assert 1e8 < found["flops_per_s"] < 1e15


def test_the_ceiling_of_products_is_that_of_the_dtype_they_are_computed_in(monkeypatch):
    """Or steps would reach several times of it."""
    dtypes = []

    def ones(*shape, dtype=torch.float32, device=None):
        dtypes.append(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(profiling, "READ_BYTES", 64)
    monkeypatch.setattr(profiling, "PRODUCT_SIZES", (8,))
    for has_products, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(linear, "HAS_BF16_PRODUCTS", has_products)
        measure_ceilings(torch.device("cpu"), torch.bfloat16)
        assert dtypes[-1] == wanted


# Stages


def test_stages_of_a_request(report):
    names = [span["name"] for span in report["timeline"] if span["depth"] == 0]
    order = [name for i, name in enumerate(names) if name not in names[:i]]
    assert order == ["prefix", "segments", "moves", "views", "step"]
    assert names.count("step") == SIZE.new_tokens - 1
    inner = {span["name"].split()[0] for span in report["timeline"] if span["depth"]}
    assert inner == {"prefill", "decode"}


def test_stages_nest_and_nobody_has_to_listen():
    marks = []

    def mark(name):
        marks.append(name)
        return contextlib.nullcontext()

    @stage("outer")
    def work():
        with stage("inner"):
            pass

    work()
    with listen(mark) as spans:
        work()
        with pytest.raises(ValueError, match="x"), stage("fails"):
            raise ValueError("x")
        work()
    work()
    assert [(s.name, s.depth) for s in spans] == [
        ("inner", 1),
        ("outer", 0),
        ("fails", 0),
        ("inner", 1),
        ("outer", 0),
    ]
    assert marks == ["outer", "inner", "fails", "outer", "inner"]
    assert spans[1].start <= spans[0].start <= spans[0].end <= spans[1].end


def test_bars_fill_the_time_between_stages():
    def span(name, start, end, depth=0):
        return {"name": name, "start_ms": start, "end_ms": end, "depth": depth}

    timeline = [span("prefix", 2, 5), span("prefill 128", 3, 4, 1), span("step", 7, 9)]
    assert bars_of(timeline) == [
        ("other", 0.0, 2),
        ("prefix", 2, 3),
        ("other", 5, 2),
        ("step", 7, 2),
    ]


# The table and the plots


def test_the_table_begins_with_conditions(report):
    lines = format_profile(report).splitlines()
    assert lines[0].startswith(report["conditions"]["cpu"])
    assert "load average" in lines[1]
    assert "float32" in lines[2]
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    for word in ("peak memory", "tokens/s", "p99", "GB/s", "GFLOP", "graph breaks", "self CPU"):
        assert word in text


def test_a_recompilation_stands_in_the_table(report):
    cause = {"function": "decode_step", "cause": "n is no longer 1", "planned": False}
    changed = {**report, "compile": {**report["compile"], "recompiles": 1, "explained": [cause]}}
    text = format_profile(changed)
    assert "1 recompiles" in text
    assert "RECOMPILED of decode_step: n is no longer 1" in text


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_images(report, tmp_path, suffix):
    path = tmp_path / f"plot{suffix}"
    plot_profile(report, path)
    if suffix == ".png":
        from matplotlib.image import imread

        image = imread(path)
        assert image.shape[0] > 500
        assert image.std() > 0.05
    else:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


# Recompilations


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (
            "0/0: tensor 'x' size mismatch at index 1. expected 4, actual 5",
            "the size of x along dimension 1 was 4 and is 5",
        ),
        (
            "0/2: tensor 'x' stride mismatch at index 0. expected 4, actual 1",
            "the stride of x along dimension 0 was 4 and is 1: another memory layout",
        ),
        (
            "1/0: tensor 'x' dtype mismatch. expected Float, actual BFloat16",
            "the dtype of x was Float and is BFloat16",
        ),
        ("tensor 'x' rank mismatch. expected 2, actual 1", "the rank of x was 2 and is 1"),
        ("0/6: GLOBAL_STATE changed: grad_mode ", "torch's state changed: grad_mode"),
        ("0/5: len(l) == 2    # def f\nUser stack:\n  f", "the length of l is no longer 2"),
        ("0/3: what nobody foresaw\nand more", "what nobody foresaw"),
    ],
)
def test_causes_in_words(reason, cause):
    assert explain_cause(reason) == cause


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("size", "the size of x along dimension 0 was 4 and is 5"),
        ("dtype", "the dtype of x was Float and is BFloat16"),
        ("layout", "the stride of x along dimension 0 was 3 and is 1: another memory layout"),
        ("number", "n is no longer 1: a Python value, a graph for each"),
        ("length", "the length of items is no longer 1"),
        ("mode", "torch's state changed: grad_mode"),
    ],
)
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_planted_recompilation_is_explained(change, cause, is_planned):
    def planted(x, n, items):
        return x * n + len(items)

    # Dynamo keeps graphs with the code object, which all cases of this test would share.
    own = FunctionType(planted.__code__.replace(), globals())
    compiled = torch.compile(own, dynamic=False, backend="eager")
    x = torch.ones(4, 3)
    other = {
        "size": (torch.ones(5, 3), 1, [0]),
        "dtype": (x.bfloat16(), 1, [0]),
        "layout": (torch.ones(3, 4).t(), 1, [0]),
        "number": (x, 2, [0]),
        "length": (x, 1, [0, 0]),
        "mode": (x, 1, [0]),
    }[change]
    compiled(x, 1, [0])
    clear_compilation_metrics()  # torch keeps the latest 64
    with listen() as spans, stage("compile planted" if is_planned else "step"):
        compiled(x, 1, [0])  # fits
        with torch.set_grad_enabled(change != "mode"):
            compiled(*other)
    (found,) = explain_recompiles(spans)
    assert (found["function"], found["cause"]) == ("planted", cause)
    assert found["planned"] is is_planned
    assert found["seconds"] > 0


# The command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--segments", "0"], "--segments is 0; wanted at least 1"),
        (["--segments", "1,2"], "invalid int value"),
        (["--batch", "0"], "--batch is 0; wanted at least 1"),
        (["--repeats", "0"], "--repeats is 0; wanted at least 1"),
        (["--top", "-1"], "--top is -1; wanted at least 0"),
        (["--contexts", "0"], "--contexts has 0; wanted numbers of at least 1"),
        (["--contexts", "a"], "'a'; wanted numbers with commas"),
        (["--plot", "a.pdf"], "wanted a name that ends in .png or .svg"),
        (["--plot", "missing/a.png"], "a folder that can be written"),
        (["--trace", "a.txt"], "wanted a name that ends in .json"),
        (["--compile-times", "--no-compile"], "--compile-times needs the compiler"),
        (["--methods", "fussed"], "fussed"),
        (["--quantize", "int5"], "int5"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_the_command_prints_a_table_and_one_json_line(tiny_llama_folder, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    argv = ["--model", str(tiny_llama_folder), "--no-compile", "--repeats=1", "--contexts=30"]
    argv += ["--segments=2", "--prefix-tokens=10", "--segment-tokens=4", "--new-tokens=2"]
    argv += ["--top=0", "--trace", str(trace), "--plot", str(tmp_path / "plot.svg")]
    assert main(argv) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "operators" not in found
    assert found["request"]["segments"] == 2
    assert table[0].startswith(found["conditions"]["cpu"])
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"prefix", "segments", "views", "step"} <= names
    assert (tmp_path / "plot.svg").stat().st_size > 1000


@pytest.mark.slow
def test_a_compiled_profile_knows_its_graphs(single_layer_folder, capsys):
    argv = ["--model", str(single_layer_folder), "--repeats=1", "--contexts=40", "--compile-times"]
    argv += ["--segments=2", "--prefix-tokens=10", "--segment-tokens=4", "--new-tokens=3"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    kinds = [graph["key"]["kind"] for graph in found["compile"]["graphs"]]
    assert sorted(kinds) == ["decode", "prefill"]
    assert found["compile"]["recompiles"] == found["compile"]["graph_breaks"] == 0
    assert found["compile"]["compile_s"] > 0
    times = found["compile_times"]
    assert not any(graph["is_stored"] for graph in times["empty"]["graphs"])
    assert all(graph["is_stored"] for graph in times["warm"]["graphs"])
    assert times["warm"]["process_s"] < times["empty"]["process_s"]
    assert found["eager"]["ratio"] > 0
    assert any("cpp" in operator["name"] for operator in found["operators"])
