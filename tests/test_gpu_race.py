"""The race on a GPU, as far as it can be run without one: a tiny shape, eagerly, on the CPU."""

import pytest
import torch

from benchmarks.gpu.__main__ import NAMES, main
from benchmarks.gpu.race import SHAPES, make_engines, make_question, measure

TINY = SHAPES["llama-3.2-1b"] | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
}
CPU = torch.device("cpu")


def test_the_command_knows_every_shape():
    assert tuple(SHAPES) == NAMES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: torch sees no CUDA device")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--shapes", "gpt"], ["--contexts", "many"]])
def test_wrong_flags_are_named(flags, capsys):
    assert main(flags) == 2
    assert flags[1] in capsys.readouterr().err


def test_both_engines_have_the_same_weights():
    """The likeliest next tokens are as likely; each engine rounds at places of its own."""
    theirs, ours = make_engines(TINY, CPU, compile=False)
    question = make_question(ours.fuser.model.tokenizer, prefix=7, segments=3, each=4)
    assert [len(prompt) for prompt in question.prompts] == [12] * 3
    with torch.inference_mode():
        logits = theirs.model(torch.tensor(question.prompts), logits_to_keep=1).logits[:, -1]
    wanted = logits.float().log_softmax(-1).amax(-1)
    found = ours.fuser.score(
        segments=question.segments,
        prefix=question.prefix,
        suffix=question.suffix,
        methods=["per_prompt"],
        continuations=[str(int(token)) for token in logits.argmax(-1)],
    )["per_prompt"]
    own = torch.tensor(found).diagonal()
    # Log-probabilities of order 6, in numbers of 8 bits: a few roundings of 2^-9 each.
    torch.testing.assert_close(own, wanted, rtol=0, atol=0.1)


def test_a_race_gives_every_row(capsys):
    ceilings = {"copy_bytes_per_s": 1e9, "product_flops_per_s": 1e9}
    rows, outcomes, shares = measure("tiny", TINY, [60], 1, CPU, ceilings, compile=False)
    assert [row.key.scenario for row in rows] == ["S1"] * 7 + ["S3"] * 2 + ["S4"] * 2
    assert all(row.median > 0 for row in rows)
    assert [outcome.target for outcome in outcomes] == [0.8, 0]
    assert list(shares) == ["tiny, 60"]
