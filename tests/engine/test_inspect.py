"""A request laid open: tables by the definition, blocks by counting, pictures that can be read."""

import json
import math
from xml.etree import ElementTree

import pytest
import torch
from engine_cases import REQUEST

from minifuse import inspect
from minifuse.inspection import FULL, PARTIAL, SKIPPED
from minifuse.layout import Part
from minifuse.model import KV_BLOCK
from minifuse.pictures import MAX_TEXT_TOKENS, draw_inspection, format_inspection, visible_text

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def inspection(fuser):
    return fuser.inspect(**REQUEST, methods=["fused", "logit_avg"], max_new_tokens=NEW_TOKENS)


def by_name(inspection):
    return {piece.name: piece for piece in inspection.pieces}


def rule_of(inspection, query, key) -> float | None:
    """The bias of a query piece's last token on a key piece's first; None where it is hidden."""
    slots = sorted(slot for piece in inspection.pieces for slot in piece.slots)
    value = float(inspection.bias[slots.index(query.slots[-1]), slots.index(key.slots[0])])
    return None if value == -math.inf else value


def test_pieces_are_where_the_results_say(inspection):
    entries = inspection.results["fused"].layout
    pieces = {piece.slots: piece for piece in inspection.pieces}
    for entry in entries:
        piece = pieces[tuple(entry.slots)]
        assert piece.kind == entry.part
        assert (piece.positions[0], piece.positions[-1] + 1) == entry.positions
        assert piece.token_ids == entry.token_ids
    assert len({piece.name for piece in inspection.pieces}) == len(inspection.pieces)


def test_the_table_is_the_definition_of_fused(fuser):
    found = fuser.inspect(**REQUEST, methods="fused", max_new_tokens=NEW_TOKENS)
    pieces = by_name(found)
    share = pytest.approx(-math.log(3))
    answer = pieces["answer of fused"]
    read = [p for p in pieces.values() if p.kind is Part.SEGMENT]
    moved = {p.name.removesuffix(", moved") for p in read if p.name.endswith(", moved")}
    seen = [p for p in read if p.name not in moved]  # of a moved one the copy is what is read
    assert len(seen) == 3
    for query in (pieces["suffix"], answer):
        assert rule_of(found, query, pieces["prefix"]) == 0
        for segment in read:
            wanted = share if segment in seen else None
            assert rule_of(found, query, segment) == wanted
    assert rule_of(found, answer, pieces["suffix"]) == 0
    assert rule_of(found, pieces["suffix"], answer) is None
    for segment in read:
        assert rule_of(found, segment, pieces["prefix"]) == 0
        for other in read:
            assert rule_of(found, segment, other) == (0 if other is segment else None)
    # A token sees nothing that comes later.
    later = torch.ones_like(found.bias, dtype=torch.bool).triu(1)
    assert (found.bias[later] == -torch.inf).all()


def test_attention_is_that_of_the_attribution(inspection):
    names = [found.name for found in inspection.attention]
    assert names == ["fused", *(f"logit_avg, stream {n}" for n in (1, 2, 3))]
    for found in inspection.attention:
        torch.testing.assert_close(found.mass.sum(-1), torch.ones(found.mass.shape[:2]))
    fused = inspection.attention[0]
    shares = dict(zip(fused.parts, fused.mass.mean((0, 1)).tolist(), strict=True))
    told = inspection.results["fused"].attribution
    assert [shares[f"segment {n}"] for n in (1, 2, 3)] == pytest.approx(told.segments)
    assert (shares["prefix"], shares["suffix"]) == pytest.approx((told.prefix, told.suffix))


def test_blocks_by_counting(fuser):
    """A prefix of more than two blocks, and rows that do not come out even."""
    request = REQUEST | {"prefix": "def answer(question):\n" * 40}
    found = fuser.inspect(**request, methods="fused", max_new_tokens=2)
    assert found.num_tokens > 2 * KV_BLOCK
    rows, visible = 48, found.bias > -torch.inf
    states = found.blocks(rows, found.bias)
    kinds = set()
    for row in range(len(states)):
        for block in range(found.num_key_blocks):
            keys = [i for i, place in enumerate(found.key_blocks) if place == block]
            pairs = visible[row * rows : (row + 1) * rows][:, keys]
            wanted = PARTIAL if pairs.any() else SKIPPED
            if len(keys) == KV_BLOCK and pairs.all():
                wanted = FULL
            assert states[row, block] == wanted
            kinds.add(wanted)
    assert kinds == {SKIPPED, PARTIAL, FULL}


def test_text_says_it_all(inspection):
    text = format_inspection(inspection, by_layer=True)
    assert inspection.num_tokens <= MAX_TEXT_TOKENS
    for piece in inspection.pieces:
        assert piece.name in text
    assert "a seen, -1.10 (weighs 0.333)" in text
    assert "layer 1" in text
    assert text.endswith("nothing")
    assert visible_text("a b\n\x00") == "a␣b↵\\x00"


def test_plain_fusion_comes_with_its_faults(fuser):
    found = fuser.inspect(**REQUEST, methods="fused_plain", max_new_tokens=2)
    text = format_inspection(found)
    assert "jump: segment 2" in text
    assert "no balance: 3 segments weigh as 3 prompts" in text


def test_too_many_tokens_for_a_terminal(fuser):
    request = REQUEST | {"prefix": "def answer(question):\n" * 40}
    text = format_inspection(fuser.inspect(**request, methods="fused", max_new_tokens=2))
    assert "too many to draw here" in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_figures(inspection, tmp_path, suffix):
    path = tmp_path / f"it.{suffix}"
    draw_inspection(inspection, path)
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(content).tag.endswith("svg")


def test_layers_with_a_window_have_a_table_of_their_own(family_fuser, tmp_path):
    found = family_fuser.inspect(**REQUEST, methods="fused", max_new_tokens=2)
    if not family_fuser.model.config.sliding_layers:
        assert found.near_bias is None
        assert list(found.to_json()["blocks"]) == ["all layers"]
        return
    hidden = (found.near_bias == -torch.inf) & (found.bias > -torch.inf)
    assert hidden.any()
    titles = ["layers without a window", "layers with a sliding window"]
    assert list(found.tables) == titles
    assert [format_inspection(found).count(title) for title in titles] == [2, 2]  # tokens, blocks
    content = found.to_json()
    assert list(content["blocks"]) == titles
    for name in ("bias", "near_bias"):
        there = [[value is not None for value in row] for row in content[name]]
        assert torch.equal(torch.tensor(there), getattr(found, name) > -torch.inf)
    draw_inspection(found, tmp_path / "it.svg")
    drawn = (tmp_path / "it.svg").read_text()
    assert all(f"Who sees whom, {title}" in drawn for title in titles)


def test_the_command(folder, tmp_path, capsys):
    flags = ["--model", str(folder), "--max-new-tokens", "3", "Q one?", "Is it one?"]
    path = tmp_path / "it.svg"
    assert inspect.main([*flags, "--output", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("LAYOUT\n")
    assert path.is_file()
    assert inspect.main([*flags, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    size = sum(len(piece["slots"]) for piece in content["pieces"])
    assert [len(row) for row in content["bias"]] == [size] * size
    assert content["results"][0]["attribution"]
    assert inspect.main([*flags, "--output", str(tmp_path / "it.txt")]) == 2
    assert "wanted a name that ends in" in capsys.readouterr().err
    assert inspect.main(flags[:4]) == 2
    assert "no paraphrase given" in capsys.readouterr().err
