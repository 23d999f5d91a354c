"""`python -m minifuse.generate`: output, exit status, error text."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from json_lines import read_lines, write_lines

import minifuse
from minifuse.config import FusionConfig, GenerationConfig
from minifuse.generate import build_parser, main, read_input
from minifuse.jsonl import ResultsFile

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("What is the capital of France?", "France's capital is?", "Capital of France?")
RESULT_FIELDS = [
    "id",
    "method",
    "paraphrase_index",
    "text",
    "token_ids",
    "logprobs",
    "finish_reason",
    "prompt_tokens",
    "weights",
    "model",
    "source",
    "dtype",
    "quantize",
    "positions",
    "seed",
    "timings",
    "recompiles",
]
REQUESTS = (
    {"id": "paris", "segments": ["Q: one\n", "Q: uno\n"], "weights": [2, 1]},
    {"prefix": "Shots.\n", "segments": ["Q: two\n"], "suffix": "Answer:"},
    {"id": 7, "segments": ["Q: three\n", "Q: tres\n", "Q: drei\n"], "weights": "confidence"},
)


def lines_of(output: str) -> list[str]:
    """By line feeds alone: a random model writes other line breaks too."""
    assert output.endswith("\n")
    return output[:-1].split("\n")


def untimed(results: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("timings", "recompiles")} for r in results]


@pytest.fixture
def generate(tiny_llama_folder, capsys):
    """Run the command on the tiny model; returns (exit status, output, error output)."""
    model = ["--model", str(tiny_llama_folder), "--no-compile", "--max-new-tokens", "5"]

    def run(*args: str) -> tuple[int, str, str]:
        status = main([*model, *args])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def requests(tmp_path):
    return write_lines(tmp_path / "in.jsonl", REQUESTS)


# Usage


def test_help_loads_neither_torch_nor_spacy():
    code = (
        "import sys\n"
        "from minifuse.generate import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "heavy = {'torch', 'spacy', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "--no-compile" in done.stdout


def test_defaults_are_those_of_the_configs():
    args = vars(build_parser().parse_args([]))
    for config in (GenerationConfig(), FusionConfig()):
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
            assert args[name] == getattr(config, name, args[name])
        for name in ("positions", "beta", "balance"):
            assert args[name] == getattr(config, name, args[name])
    assert args["compile"] is True
    assert args["dtype"] == args["device"] == "auto"


BAD_USAGE = [
    ([], "no paraphrase given"),
    ([""], "paraphrase 1 is empty"),
    (["a", " \t"], "paraphrase 2 is empty"),
    (["a\udcff"], "paraphrase 1 holds the lone surrogate U+DCFF"),
    (["a", "--prefix", "\udc80"], "--prefix holds the lone surrogate"),
    (["a", "--suffix", "\udc80"], "--suffix holds the lone surrogate"),
    (["a", "--stop", "\udc80"], "--stop holds the lone surrogate"),
    (["a", "--template", "Q:"], "with 0 places"),
    (["a", "--template", "{}{}"], "with 2 places"),
    (["a", "--prefix", "@/nowhere/file"], "--prefix cannot read /nowhere/file: No such file"),
    (["a", "--method", "fused,guess"], "guess"),
    (["a", "--method", ""], "method"),
    (["a", "--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
    (["a", "--positions", "sideways"], "--positions: invalid choice: 'sideways'"),
    (["a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    (["a", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
    (["a", "--max-new-tokens", "many"], "invalid int value: 'many'"),
    (["a", "--temperature", "-1"], "temperature is -1"),
    (["a", "--temperature", "nan"], "temperature is nan"),
    (["a", "--top-k", "-1"], "top_k is -1"),
    (["a", "--top-p", "0"], "top_p is 0"),
    (["a", "--top-p", "1.5"], "top_p is 1.5"),
    (["a", "--seed", "-1"], "seed is -1"),
    (["a", "--beta", "inf"], "beta is inf"),
    (["a", "--balance", "nan"], "balance is nan"),
    (["a", "--stop", ""], "stop holds ''"),
    (["a", "--stop", "none", "--stop", "."], "--stop none stands beside another"),
    (["a", "b", "--weights", "1"], "--weights holds 1 numbers for 2 segments"),
    (["a", "b", "--weights", "1,-1"], "--weights holds 1, -1"),
    (["a", "b", "--weights", "0,0"], "--weights holds 0, 0"),
    (["a", "b", "--weights", "nan,1"], "--weights holds nan, 1"),
    (["a", "b", "--weights", "1,inf"], "--weights holds 1, inf"),
    (["a", "b", "--weights", "1,"], "--weights is '1,'"),
    (["a", "b", "--weights", "guess"], "wanted numbers with commas between them or one of"),
    (["a", "--quantize", "int3"], "invalid choice: 'int3'"),
    (["a", "--system", "x"], "--system is for a chat template; wanted --chat beside it"),
    (["a", "--chat-variable", "x=1"], "--chat-variable is for a chat template"),
    (["a", "--chat", "--chat-variable", "x"], "--chat-variable is 'x'; wanted NAME=VALUE"),
    (["a", "--chat"] + ["--chat-variable", "x=1"] * 2, "--chat-variable x is given twice"),
    (["a", "--chat", "--chat-variable", "=x"], "--chat-variable is '=x'; wanted NAME=VALUE"),
    (["a", "--chat", "--system", "\udc80"], "--system holds the lone surrogate"),
    (["a", "--temp", "1"], "unrecognized arguments"),
    (["--input", "/nowhere/file"], "--input cannot read /nowhere/file: No such file"),
    (["a", "--input", "x.jsonl"], "1 paraphrases stand beside --input"),
    (["--input", "x.jsonl", "--template", "{}"], "--template stands beside --input"),
    (["--input", "x.jsonl", "--stream"], "--stream shows one request"),
]


@pytest.mark.parametrize(("args", "message"), BAD_USAGE)
def test_bad_usage_is_one_line_and_status_2(args, message, capsys):
    assert main(args) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_bad_usage_is_found_without_torch():
    code = (
        "import json, sys\n"
        "from minifuse.generate import main\n"
        "for args in json.loads(sys.argv[1]):\n    assert main(args) == 2, args\n"
        "assert 'torch' not in sys.modules"
    )
    rows = json.dumps([args for args, _ in BAD_USAGE])
    subprocess.run(
        [sys.executable, "-c", code, rows], capture_output=True, text=True, cwd=ROOT, check=True
    )


BAD_LINES = [
    ("{", "not JSON"),
    pytest.param("[" * 100_000, "not JSON", id="deep"),
    ("3", "int; wanted a JSON object"),
    ('{"segments": ["a"], "sufix": "b"}', "unknown key 'sufix'"),
    ("{}", "segments is None"),
    ('{"segments": []}', "segments is []"),
    ('{"segments": "a"}', "segments is 'a'"),
    ('{"segments": ["a", ""]}', "segments[1] is empty"),
    ('{"segments": ["a", 3]}', "segments[1] is 3"),
    ('{"segments": ["\\ud800"]}', "segments[0] holds the lone surrogate U+D800"),
    ('{"segments": ["a"], "prefix": null}', "prefix is None"),
    ('{"segments": ["a"], "suffix": 1}', "suffix is 1"),
    ('{"segments": ["a"], "id": true}', "id is True"),
    ('{"segments": ["a"], "id": 1.5}', "id is 1.5"),
    ('{"segments": ["a"], "id": "\\udc00"}', "id holds the lone surrogate"),
    ('{"segments": ["a"], "weights": "guess"}', "weights is 'guess'"),
    ('{"segments": ["a"], "weights": [true]}', "weights is [True]"),
    ('{"segments": ["a"], "weights": [1, 2]}', "weights holds 2 numbers for 1 segments"),
    ('{"segments": ["a"], "weights": [NaN]}', "weights holds nan"),
    ('{"segments": ["a"], "weights": [1e999]}', "weights holds inf"),
    pytest.param(
        '{"segments": ["a"], "weights": [1%s]}' % ("0" * 400), "no float can hold", id="large"
    ),
    ('{"segments": ["a"], "weights": [-1]}', "weights holds -1"),
    ('{"segments": ["a"], "weights": [0]}', "weights holds 0"),
    ('{"segments": ["a"], "id": 1}', "id 1 is taken by line 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(line, message, tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", [{"segments": ["fine"]}, "\n", line])
    assert main(["--input", str(path)]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"error: {path}, line 3: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_input_without_requests_is_an_error(tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", ["\n"])
    assert main(["--input", str(path)]) == 2
    assert "holds no request" in capsys.readouterr().err


def test_files_that_are_not_utf8_are_named(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(b"ab\xff")
    for args in (["--input", str(path)], ["a", "--prefix", f"@{path}"]):
        assert main(args) == 2
        assert f"{path} is not UTF-8 (byte 2)" in capsys.readouterr().err


def test_lines_take_what_they_leave_out_from_the_command_line(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", ["\n", *REQUESTS])
    first, second, third = read_input(path, prefix="P", suffix="S", weights="likelihood")
    assert (first.id, first.prefix, first.suffix, first.weights) == ("paris", "P", "S", (2.0, 1.0))
    assert (second.id, second.prefix, second.suffix) == (3, "Shots.\n", "Answer:")
    assert (second.weights, third.weights, third.id) == ("likelihood", "confidence", 7)
    assert first.segments == ("Q: one\n", "Q: uno\n")


@pytest.mark.parametrize("place", ["missing/out.jsonl", "."])
def test_an_output_that_cannot_be_written_is_status_1(place, tmp_path, capsys):
    output = tmp_path / place
    assert main(["a", "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {output} cannot be written: ")
    assert error.count("\n") == 1


def test_a_failed_start_leaves_no_files(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(["a", "--model", str(tmp_path / "nowhere"), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Answers


def test_json_prints_exactly_the_promised_fields(generate):
    status, output, error = generate(*QUESTIONS, "--json", "--method", "fused,per_prompt,avg,vote")
    results = [json.loads(line) for line in lines_of(output)]
    assert status == 0
    assert [(r["method"], r["paraphrase_index"]) for r in results] == [
        ("fused", None),
        ("per_prompt", 0),
        ("per_prompt", 1),
        ("per_prompt", 2),
        ("logit_avg", None),
        ("vote", None),
    ]
    for result in results:
        assert sorted(result) == sorted(RESULT_FIELDS)
        assert sorted(result["timings"]) == ["compile_s", "decode_ms", "load_s", "prefill_ms"]
        assert result["id"] is None
    assert "prefill" in error


def test_the_prompt_is_prefix_template_and_suffix(generate, tiny_llama_folder, tmp_path):
    import minifuse

    shots = tmp_path / "shots.txt"
    shots.write_text("Q: 1+1?\\n\nA: 2\n", encoding="utf-8")
    args = ["--template", r"Ask\t{}\\ {{\n", "--suffix", r"\nSay:", "--max-new-tokens", "6"]
    status, output, _ = generate(
        "a {} b", "c", "--prefix", f"@{shots}", *args, "--stop", "none", "--json"
    )
    assert status == 0
    fuser = minifuse.load(model=str(tiny_llama_folder), compile=False)
    expected = fuser.generate(
        prefix="Q: 1+1?\\n\nA: 2\n",
        segments=["Ask\ta {} b\\ {{\n", "Ask\tc\\ {{\n"],
        suffix="\nSay:",
        methods=["fused"],
        max_new_tokens=6,
    )["fused"]
    result = json.loads(output)
    assert result["token_ids"] == list(expected.token_ids)
    assert result["prompt_tokens"] == expected.prompt_tokens
    assert result["text"] == expected.text


CHAT = (
    "{%- for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{%- endfor %}<|start|>assistant\n{{ opening }}"
)


@pytest.fixture
def chat_folder(tiny_llama_folder, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def test_chat_puts_the_message_into_the_template(chat_folder, tmp_path, capsys):
    """No default of plain prompts is left: no `Q:`, no `A:`, no stop at a newline."""
    args = ["Who?", "Which?", "--prefix", "About x.\n", "--chat", "--system", "Be brief."]
    args += ["--chat-variable", 'opening="Well"', "--chat-variable", "n=3", "--suffix", ", "]
    args += ["--model", str(chat_folder), "--no-compile", "--json", "--max-new-tokens", "3"]
    assert main([*args, "--output", str(tmp_path / "out.jsonl")]) == 0
    result = json.loads(capsys.readouterr().out)
    fuser = minifuse.load(chat_folder, compile=False)
    tokenizer = fuser.model.tokenizer
    generation = fuser.generate(
        prefix="About x.\n",
        segments=["Who?", "Which?"],
        suffix=", ",
        chat=True,
        system="Be brief.",
        chat_variables={"opening": "Well", "n": 3},
        max_new_tokens=3,
    )["fused"]
    assert result["token_ids"] == list(generation.token_ids)
    texts = {}
    for entry in generation.layout:
        ids = entry.token_ids
        controls = "".join(
            tokenizer.token_of(i) if i in tokenizer.control_ids else tokenizer.decode([i])
            for i in ids
        )
        texts[entry.part, entry.index] = controls
    assert texts["prefix", None] == "<|start|>system\nBe brief.<|end|><|start|>user\nAbout x.\n"
    assert texts["segment", 0] == "Who?"
    assert texts["suffix", None] == "<|end|><|start|>assistant\nWell, "
    run = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert "Be brief." in json.dumps(run)


def test_another_system_message_is_another_run(chat_folder, requests, tmp_path, capsys):
    output = str(tmp_path / "out.jsonl")
    args = ["--input", str(requests), "--output", output, "--model", str(chat_folder), "--chat"]
    args += ["--no-compile", "--max-new-tokens", "2"]
    assert main([*args, "--system", "One."]) == 0
    assert main([*args, "--system", "One."]) == 0
    capsys.readouterr()
    assert main([*args, "--system", "Two."]) == 2
    assert "system" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "status", "message"),
    [
        (None, 2, "the model has no chat template"),
        ("{{ messages[0].content", 1, "syntax error"),
        ("{{ raise_exception('no users here') }}", 2, "refuses the conversation: no users here"),
        (
            "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}",
            1,
            "CPU",
        ),
    ],
    ids=["none", "syntax", "refusal", "loop"],
)
def test_chat_templates_that_do_not_work(template, status, message, chat_folder, capsys):
    path = chat_folder / "chat_template.jinja"
    path.unlink()
    if template is not None:
        path.write_text(template)
    assert main(["a", "--chat", "--model", str(chat_folder), "--no-compile"]) == status
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_prefix_may_begin_with_an_at_sign(generate):
    _, escaped, _ = generate("a", "--prefix", r"\@x\n", "--json")
    _, plain, _ = generate("a", "--prefix", r"!x\n", "--json")
    assert json.loads(escaped)["prompt_tokens"] == json.loads(plain)["prompt_tokens"]


def test_people_get_a_line_for_each_answer(generate):
    status, output, error = generate(*QUESTIONS, "--methods", "fused,per_prompt", "--method", "max")
    assert status == 0
    names = [line.split(":")[0] for line in lines_of(output)]
    assert names == ["fused", "per_prompt[0]", "per_prompt[1]", "per_prompt[2]", "prob_max"]
    assert "decode" in error


def test_flags_may_stand_between_paraphrases(generate):
    _, apart, _ = generate("a", "--json", "b", "--seed", "3", "c")
    _, together, _ = generate("a", "b", "c", "--json", "--seed", "3")
    assert untimed([json.loads(apart)]) == untimed([json.loads(together)])


def test_all_methods_run_together(generate):
    from minifuse.methods import FusionMethod

    status, output, _ = generate(*QUESTIONS, "--method", "all", "--json", "--max-new-tokens", "3")
    assert status == 0
    methods = {json.loads(line)["method"] for line in lines_of(output)}
    assert methods == set(FusionMethod)


def test_a_seed_repeats_a_run(generate):
    args = (*QUESTIONS, "--temperature", "1.5", "--json", "--stop", "none")
    runs = [json.loads(generate(*args, "--seed", seed)[1]) for seed in ("1", "1", "2")]
    assert runs[0]["token_ids"] == runs[1]["token_ids"] != runs[2]["token_ids"]


def test_a_stop_string_ends_the_answer(generate):
    args = (*QUESTIONS, "--json", "--max-new-tokens", "9")
    free = json.loads(generate(*args, "--stop", "none")[1])
    assert free["finish_reason"] == "length"
    stop = free["text"][3:5]
    cut = json.loads(generate(*args, "--stop", "none!", "--stop", stop)[1])
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == free["text"][: free["text"].index(stop)]


def test_a_streamed_answer_is_the_answer(generate):
    args = (*QUESTIONS, "--stop", "none")
    _, plain, _ = generate(*args)
    status, streamed, error = generate(*args, "--stream")
    assert status == 0
    assert streamed.rstrip() == plain.rstrip()
    assert "prefill" in error


def test_several_streamed_answers_come_in_lines(generate):
    args = (*QUESTIONS, "--method", "origin,fused,per_prompt,vote")
    _, plain, _ = generate(*args)
    _, streamed, _ = generate(*args, "--stream")
    assert sorted(lines_of(streamed)) == sorted(lines_of(plain))


def test_streamed_events_are_json_before_the_results(generate):
    args = (*QUESTIONS, "--json", "--method", "fused,avg", "--stop", "none")
    _, plain, _ = generate(*args)
    _, streamed, _ = generate(*args, "--stream")
    lines = [json.loads(line) for line in lines_of(streamed)]
    events = [line for line in lines if line.get("event") == "token"]
    assert lines[len(events) :] == [line for line in lines if "event" not in line]
    results = untimed(lines[len(events) :])
    assert results == untimed([json.loads(line) for line in lines_of(plain)])
    for result in results:
        own = [event for event in events if event["method"] == result["method"]]
        assert "".join(event["text"] for event in own) == result["text"]
        ids = [event["token_id"] for event in own]  # the end token among them, if it came
        assert ids[: len(result["token_ids"])] == result["token_ids"]


# Files of requests

METHODS = ("--method", "fused,per_prompt,weighted_avg", "--max-new-tokens", "2")


def expected_keys(methods=("fused", "per_prompt", "weighted_avg")) -> list[tuple]:
    keys = []
    for id, count in (("paris", 2), (2, 1), (7, 3)):
        for method in methods:
            indices = range(count) if method == "per_prompt" else [None]
            keys += [(id, method, index) for index in indices]
    return keys


def keys_of(results: list[dict]) -> list[tuple]:
    return [(r["id"], r["method"], r["paraphrase_index"]) for r in results]


def test_a_file_of_requests_is_answered_in_order(generate, requests):
    status, output, error = generate("--input", str(requests), *METHODS, "--json")
    assert status == 0
    results = [json.loads(line) for line in lines_of(output)]
    assert keys_of(results) == expected_keys()
    assert "3/3" in error
    _, people, _ = generate("--input", str(requests), *METHODS)
    assert [line.split(": ")[0] for line in lines_of(people)] == [
        str(id) for id, *_ in expected_keys()
    ]


def test_each_line_is_answered_as_if_alone(generate, requests, tiny_llama_folder):
    import minifuse

    _, output, _ = generate("--input", str(requests), "--json")
    fuser = minifuse.load(model=str(tiny_llama_folder), compile=False)
    for request, line in zip(REQUESTS, lines_of(output), strict=True):
        request = {"suffix": "A:", **request}
        request.pop("id", None)
        alone = fuser.generate(**request, methods=["fused"], stop=["\n"], max_new_tokens=5)["fused"]
        assert json.loads(line)["token_ids"] == list(alone.token_ids)


def test_an_interrupted_output_is_completed(generate, requests, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--input", str(requests), *METHODS, "--output", str(output))
    assert generate(*args)[:2] == (0, "")
    whole = output.read_bytes()
    results = read_lines(output)
    assert keys_of(results) == expected_keys()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (1, ends[3] - 5, ends[3], ends[-1] - 1):
        output.write_bytes(whole[:cut])
        status, _, error = generate(*args)
        assert status == 0
        assert untimed(read_lines(output)) == untimed(results)
        assert "3/3" in error
    before = output.read_bytes()
    status, _, error = generate(*args)
    assert (status, output.read_bytes()) == (0, before)
    assert "every request is answered" in error


def test_an_input_that_grew_is_continued(generate, requests, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--input", str(requests), "--max-new-tokens", "2", "--output", str(output))
    generate(*args)
    write_lines(requests, [*REQUESTS, {"id": "more", "segments": ["Q: more\n"]}])
    assert generate(*args)[0] == 0
    assert [result["id"] for result in read_lines(output)] == ["paris", 2, 7, "more"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", "1"), "made with seed 0, and this call has 1"),
        (("--temperature", "0.5"), "made with temperature 0.0, and this call has 0.5"),
        (("--stop", "x"), "made with stop"),
        (("--method", "fused,avg"), "made with methods ['fused']"),
        (("--positions", "restart"), "made with positions 'aligned'"),
        (("--dtype", "float32"), "made with dtype 'auto'"),
        (("--balance", "2"), "made with balance None"),
        (("--suffix", "B:"), "answers another request under id 'paris'"),
        (("--weights", "likelihood"), "answers another request under id 2"),
    ],
)
def test_another_configuration_is_refused(flags, message, generate, requests, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--input", str(requests), "--max-new-tokens", "2", "--output", str(output))
    assert generate(*args)[0] == 0
    before = output.read_bytes()
    status, _, error = generate(*args, *flags)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert output.read_bytes() == before


def test_quantized_weights_are_another_run_and_none_is_the_same(generate, requests, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--input", str(requests), "--output", str(output))
    assert generate(*args, "--quantize", "int8")[0] == 0
    results = read_lines(output)
    assert {(r["quantize"], r["dtype"]) for r in results} == {("int8", "bfloat16")}
    status, _, error = generate(*args)
    assert status == 2
    assert "was made with quantize 'int8', and this call has None" in error
    output = tmp_path / "plain.jsonl"
    args = ("--input", str(requests), "--output", str(output))
    assert generate(*args, "--quantize", "none")[0] == 0
    assert {result["quantize"] for result in read_lines(output)} == {None}
    status, _, error = generate(*args)
    assert (status, "nothing to do" in error) == (0, True)
    status, _, error = generate("a", "--quantize", "int4", "--dtype", "float32")
    assert status == 2
    assert error.startswith("error: dtype is 'float32', but int4 weights run in bfloat16")
    assert error.count("\n") == 1


def test_another_model_under_the_same_path_is_refused(generate, requests, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--input", str(requests), "--max-new-tokens", "2", "--output", str(output))
    generate(*args)
    results = read_lines(output)[:1]
    write_lines(output, [{**results[0], "source": "elsewhere"}])
    status, _, error = generate(*args)
    assert status == 2
    assert "made with source 'elsewhere'" in error
    assert len(read_lines(output)) == 1


@pytest.mark.parametrize(
    "content", ["not ours\n", '{"id": "paris"}\n{"id": "paris"}\n', '{"a": 1}\n' * 3]
)
def test_a_foreign_file_is_left_alone(content, generate, requests, tmp_path):
    output = tmp_path / "out.jsonl"
    args = ("--input", str(requests), "--max-new-tokens", "2", "--output", str(output))
    output.write_text(content)
    status, _, error = generate(*args)
    assert status == 2
    assert "does not say which call made it" in error
    assert output.read_text() == content
    output.unlink()
    generate(*args)
    broken = content + output.read_text()
    output.write_text(broken)
    status, _, error = generate(*args)
    assert status == 2
    assert "out.jsonl, line 1: not a result that this call would write" in error
    assert output.read_text() == broken


def test_one_request_can_be_written_too(generate, tmp_path):
    output = tmp_path / "out.jsonl"
    args = (*QUESTIONS, "--method", "fused,per_prompt", "--output", str(output))
    status, printed, _ = generate(*args, "--json")
    assert status == 0
    assert read_lines(output) == [json.loads(line) for line in lines_of(printed)]
    before = output.read_bytes()
    assert generate(*args)[0] == 0
    assert output.read_bytes() == before


def test_an_engine_error_names_the_line(generate, tmp_path):
    lines = [{"segments": ["fine\n"]}, {"segments": ["long " * 20_000]}]
    path = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    status, _, error = generate("--input", str(path), "--output", str(output))
    assert status == 2
    assert f"error: {path}, line 2: " in error
    assert [result["id"] for result in read_lines(output)] == [1]


# Processes


def command(folder: Path, *args: str) -> list[str]:
    own = ["--model", str(folder), "--no-compile"]
    return [sys.executable, "-m", "minifuse.generate", *args, *own]


def test_ctrl_c_leaves_whole_requests(tiny_llama_folder, tmp_path, generate):
    lines = [{"segments": [f"Q: {number}\n", f"N: {number}\n"]} for number in range(400)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    args = ("--input", str(path), "--output", str(output), "--method", "fused,per_prompt")
    args = (*args, "--max-new-tokens", "3", "--stop", "none")
    process = subprocess.Popen(
        command(tiny_llama_folder, *args), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        # Two requests are there: an interrupt while the second is written takes only that one back.
        if output.exists() and output.read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    done = read_lines(output)
    assert 0 < len(done) < 1200
    assert len(done) % 3 == 0
    write_lines(path, lines[: len(done) // 3 + 2])
    assert generate(*args)[0] == 0
    results = read_lines(output)
    assert results[: len(done)] == done
    assert len(results) == len(done) + 6


def test_ctrl_c_that_is_swallowed_comes_again(generate, tmp_path, monkeypatch):
    """Python ignores what a destructor raises; torch runs many of them."""

    class Falls:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):  # the signal's handler runs between two of these
                pass

    def append(self, results):
        original(self, results)
        Falls()

    original = ResultsFile.append
    monkeypatch.setattr(ResultsFile, "append", append)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: swallowed.append(unraisable))
    swallowed = []
    path = write_lines(tmp_path / "in.jsonl", [{"segments": [f"Q: {n}\n"]} for n in range(3)])
    output = tmp_path / "out.jsonl"
    status, _, error = generate("--input", str(path), "--output", str(output))
    assert len(swallowed) == 1
    assert status == 130
    assert "interrupted: results so far are whole" in error
    assert len(read_lines(output)) == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes break in another way")
def test_a_broken_pipe_is_quiet(tiny_llama_folder, tmp_path):
    lines = [{"segments": [f"Q: {number}\n"]} for number in range(50)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    args = command(tiny_llama_folder, "--input", str(path), "--json", "--max-new-tokens", "2")
    process = subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert json.loads(process.stdout.readline())["id"] == 1
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


def test_attribution(generate):
    status, output, _ = generate(*QUESTIONS, "--attribution", "--method", "fused,origin")
    lines = lines_of(output)
    assert status == 0
    assert sum("attention" in line for line in lines) == 2 * (len(QUESTIONS) + 1)
    assert "nothing is left without it" in output  # of the first prompt alone
    status, output, _ = generate(*QUESTIONS, "--attribution", "--json")
    (result,) = map(json.loads, lines_of(output))
    found = result["attribution"]
    shares = found["attention"]
    assert list(result) == [*RESULT_FIELDS, "attribution"]
    assert sum([*shares["segments"], shares["prefix"], shares["suffix"], shares["answer"]]) == (
        pytest.approx(1, abs=1e-5)
    )
    assert len(found["without"]) == len(found["alone"]) == len(QUESTIONS)
    status, output, _ = generate(*QUESTIONS, "--attribution", "--stream")
    assert status == 0
    assert "nats" in output


def test_attribution_is_an_option_of_the_run(generate, tmp_path):
    output = str(tmp_path / "answers.jsonl")
    assert generate(*QUESTIONS, "--output", output)[0] == 0
    status, _, error = generate(*QUESTIONS, "--output", output, "--attribution")
    assert status == 2
    assert "attribution" in error
