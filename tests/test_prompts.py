"""Prompts: texts verbatim, no gold answer in them, draws that are the same everywhere."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifuse.errors import UsageError
from minifuse.evaluation.datasets import MASK, Dataset, Item, load_dataset
from minifuse.evaluation.prompts import (
    FORMATS,
    Prompt,
    PromptBuilder,
    PromptTemplate,
    check_choice,
    choose_draws,
    choose_items,
    choose_paraphrases,
    choose_shots,
    continuation_of,
    find_template,
    kinds_needed,
    paraphrases_needed,
    read_template,
)
from minifuse.request import Request

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = PromptTemplate("Do.\n", "Q: {question}\nA: {answer}\n", "Q: {question}\n", "A:", ("\n",))
SHOTS = (
    Item("s1", "s1", ("s1", "s1b", "s1c"), ("a1", "other")),
    Item("s2", "s2", ("s2", "s2b"), ("a2",)),
)
ITEM = Item("i", "p1", ("p1", "p2"), ("gold",))


def items_of(relations: str) -> tuple[Item, ...]:
    """One item for each letter, which is its relation; a dot has none."""
    return tuple(
        Item(f"{letter}{number}", f"q{number}", (f"q{number}",), ("x",), letter.strip(".") or None)
        for number, letter in enumerate(relations)
    )


@pytest.mark.parametrize(
    ("format", "prompt"),
    [
        (
            "prefix",
            Prompt("Do.\nQ: s1\nA: a1\nQ: s2\nA: a2\n", ("Q: p1\n", "Q: p2\n"), "A:"),
        ),
        (
            "full",
            Prompt(
                "",
                (
                    "Do.\nQ: s1\nA: a1\nQ: s2\nA: a2\nQ: p1\n",
                    "Do.\nQ: s1\nA: a1\nQ: s2\nA: a2\nQ: p2\n",
                ),
                "A:",
            ),
        ),
        (
            "shot-paraphrases",
            Prompt(
                "Do.\n",
                (
                    "Q: s1\nA: a1\nQ: s2\nA: a2\nQ: p1\n",
                    "Q: s1b\nA: a1\nQ: s2b\nA: a2\nQ: p2\n",
                ),
                "A:",
            ),
        ),
        (
            "in-prompt",
            Prompt("Do.\nQ: s1\nA: a1\nQ: s2\nA: a2\n", ("Q: p1\nQ: p2\n",), "A:"),
        ),
    ],
)
def test_formats(format, prompt):
    builder = PromptBuilder(TEMPLATE, SHOTS, format)
    assert builder.build(ITEM, ITEM.paraphrases) == prompt
    chat = replace(builder, chat=True)
    assert chat.build(ITEM, ITEM.paraphrases) == replace(prompt, suffix="")


def test_formats_but_one_say_the_same_to_one_paraphrase():
    texts = set()
    for format in FORMATS:
        prompt = PromptBuilder(TEMPLATE, SHOTS, format).build(ITEM, ["p2"])
        [segment] = prompt.segments
        texts.add(prompt.prefix + segment + prompt.suffix)
    assert texts == {"Do.\nQ: s1\nA: a1\nQ: s2\nA: a2\nQ: p2\nA:"}


def test_prompts_become_requests():
    assert {field.name for field in fields(Prompt)} <= {field.name for field in fields(Request)}
    prompt = PromptBuilder(TEMPLATE).build(ITEM, ITEM.paraphrases)
    assert Request(**asdict(prompt), id=ITEM.id).segments == ("Q: p1\n", "Q: p2\n")


def test_braces_in_texts_stay():
    item = Item("i", "{answer} {question}", ("{answer} {question} {x}",), ("{question}",))
    prompt = PromptBuilder(TEMPLATE, (item,)).build(item, item.paraphrases)
    assert prompt.prefix == "Do.\nQ: {answer} {question} {x}\nA: {question}\n"
    assert prompt.segments == ("Q: {answer} {question} {x}\n",)


def test_shots_may_be_too_short_for_their_paraphrases():
    builder = PromptBuilder(TEMPLATE, SHOTS, "shot-paraphrases")
    with pytest.raises(UsageError, match=r"shot 's2' has 2 paraphrases; .*takes 3 from each"):
        builder.build(ITEM, ["p1", "p2", "p3"])


def test_unknown_formats():
    with pytest.raises(UsageError, match="format is 'chat'; wanted one of prefix, full"):
        PromptBuilder(TEMPLATE, (), "chat")


def test_continuations():
    assert continuation_of("Paris") == " Paris"
    assert continuation_of("Paris", chat=True) == "Paris"


@pytest.mark.parametrize("dataset", ["webqa", "myriadlama", "pararel", "graphquestions", "f.csv"])
def test_every_data_set_has_a_template(dataset):
    template = read_template(find_template(dataset))
    prompt = PromptBuilder(template, SHOTS).build(ITEM, ITEM.paraphrases)
    text = prompt.prefix + prompt.segments[0] + prompt.suffix
    # A line of its own for the answer, in shots as in the question.
    assert text.count(f"\n{prompt.suffix}") == 3
    assert f"\n{prompt.suffix} a1\n" in text
    assert template.stop == ("\n",)
    is_cloze = dataset in ("myriadlama", "pararel")
    assert (MASK in template.instruction) == is_cloze
    assert MASK in prompt.prefix or not is_cloze


GOOD = {
    "instruction": '"Do."',
    "shot": '"{question} {answer}"',
    "segment": '"{question}"',
    "suffix": '"A:"',
    "stop": '["\\n"]',
}


def write_template(path: Path, values: dict[str, str]) -> Path:
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return path


def test_templates_can_be_copied_and_edited(tmp_path):
    path = write_template(tmp_path / "mine.toml", GOOD)
    expected = PromptTemplate("Do.", "{question} {answer}", "{question}", "A:", ("\n",))
    assert read_template(path) == expected
    assert read_template(write_template(path, GOOD | {"stop": "[]"})).stop == ()
    braces = "Write {} or {a: 1}."
    assert read_template(write_template(path, GOOD | {"suffix": f"'{braces}'"})).suffix == braces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({key: None}, f"lacks the key {key}; wanted instruction") for key in GOOD),
        ({"preamble": '""'}, "has the unknown key preamble; wanted instruction, shot"),
        ({"shot": '"{question}"'}, r"shot is .*; wanted \{question\} and \{answer\} in it"),
        ({"shot": '"{question} {anwser}"'}, r"shot is .*; wanted \{question\} and \{answer\}"),
        ({"segment": '"Q"'}, r"segment is 'Q'; wanted \{question\} in it"),
        ({"segment": '"{question} {answer}"'}, r"segment is .*; wanted \{question\} in it"),
        ({"segment": '"{question} { question }"'}, r"segment has '\{ question \}'; wanted a name"),
        ({"segment": '"{question} {question!r}"'}, r"segment has '\{question!r\}'; wanted a name"),
        ({"instruction": '"{answer:>3}"'}, r"instruction has '\{answer:>3\}'; wanted a name"),
        ({"instruction": '"{question}"'}, "instruction is .*; wanted no placeholder"),
        ({"suffix": '"{answer}"'}, "suffix is .*; wanted no placeholder"),
        ({"suffix": "1"}, "suffix is 1; wanted a string"),
        ({"stop": '"x"'}, "stop is 'x'; wanted a list of strings"),
        ({"stop": '["x", ""]'}, "stop is .*none of them empty"),
        ({"stop": "[1]"}, "wanted a list of strings"),
        ({"suffix": "A:"}, "is not TOML"),
    ],
)
def test_templates_that_are_none(tmp_path, change, message):
    values = {key: value for key, value in (GOOD | change).items() if value is not None}
    path = write_template(tmp_path / "mine.toml", values)
    with pytest.raises(UsageError, match=rf"mine\.toml:? .*{message}"):
        read_template(path)


def test_templates_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"template .* cannot be read: No such file"):
        read_template(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not TOML in UTF-8"):
        read_template(tmp_path / "mine.toml")


def mixed_item(id: str, manual: int = 5, automatic: int = 20) -> Item:
    texts = tuple(f"p{number}" for number in range(manual + automatic))
    flags = (True,) * manual + (False,) * automatic
    return Item(id, texts[0], texts, ("x",), is_manual=flags)


@pytest.mark.parametrize(
    ("how", "count", "expected"),
    [
        ("first", 3, (0, 1, 2)),
        ("indices:4,0,2", 3, (4, 0, 2)),
        ("indices:4,0,2", 2, (4, 0)),
        ("repeat", 3, (0, 0, 0)),
    ],
)
def test_choices_without_a_draw(how, count, expected):
    assert choose_paraphrases(mixed_item("i"), count, how, seed=1) == expected
    assert paraphrases_needed(how, count) == max(expected) + 1


@given(
    st.integers(0, 5),
    st.integers(0, 20),
    st.integers(1, 25),
    st.integers(0, 3),
    st.text(max_size=3),
)
def test_mixed_sets_are_drawn_from_as_many_of_each_kind(manual, automatic, count, seed, id):
    how = f"mixed:{manual}+{automatic}"
    item = mixed_item(id)
    if count > manual + automatic:
        with pytest.raises(UsageError, match="draws"):
            choose_paraphrases(item, count, how, seed)
        return
    everything = choose_paraphrases(item, manual + automatic, how, seed)
    assert len(set(everything)) == manual + automatic == paraphrases_needed(how, count)
    assert sum(item.is_manual[index] for index in everything) == manual
    assert kinds_needed(how) == (manual, automatic)
    chosen = choose_paraphrases(item, count, how, seed)
    assert chosen == everything[:count]
    assert chosen == choose_paraphrases(replace(item, answers=("y",)), count, how, seed)


def test_mixed_sets_differ_by_item_and_seed_and_are_even():
    how = "mixed:2+2"
    sets = {
        (id, seed): choose_paraphrases(mixed_item(str(id), 4, 4), 4, how, seed)
        for id in range(200)
        for seed in range(5)
    }
    assert len(set(sets.values())) > 300  # of 36 pairs in 24 orders each
    for id in range(20):
        assert len({sets[id, seed] for seed in range(5)}) > 1
    # 1000 draws of 4 from 8, each index with probability 1/2: 5 standard deviations are 79. A
    # place goes to a given index with probability 1/8: 5 standard deviations are 52.
    for index in range(8):
        assert abs(sum(index in chosen for chosen in sets.values()) - 500) < 79
        for place in range(4):
            assert abs(sum(chosen[place] == index for chosen in sets.values()) - 125) < 53


@pytest.mark.parametrize(
    ("item", "count", "how", "message"),
    [
        (mixed_item("seven", 2, 2), 5, "first", "item 'seven' has 4 .*first of 5 wants 5"),
        (mixed_item("seven", 2, 2), 1, "indices:9", "item 'seven' has 4 paraphrases.* wants 10"),
        (mixed_item("seven", 1, 9), 2, "mixed:2+2", "item 'seven' has 1 manual .* wants 2"),
        (mixed_item("seven", 5, 3), 5, "mixed:5+5", "item 'seven' has 3 automatic .* wants 5"),
        (ITEM, 1, "mixed:1+1", "item 'i' does not tell manual from automatic"),
    ],
)
def test_items_that_have_too_few(item, count, how, message):
    with pytest.raises(UsageError, match=message):
        choose_paraphrases(item, count, how, seed=0)


@pytest.mark.parametrize(
    ("how", "count", "message"),
    [
        ("last", 1, "'last'; wanted first, indices:0,2,3, mixed:M.A or repeat"),
        ("indices:", 1, "wanted first"),
        ("indices:1,-2", 1, "wanted first"),
        ("indices:0,1,0", 2, "names an index twice"),
        ("indices:0,1", 3, "names 2 paraphrases; 3 are asked for"),
        ("mixed:5", 1, "wanted first"),
        ("mixed:1+1", 3, "draws 2 paraphrases; 3 are asked for"),
        ("first", 0, "0 paraphrases are asked for; wanted at least 1"),
    ],
)
def test_choices_that_are_none(how, count, message):
    with pytest.raises(UsageError, match=message):
        check_choice(how, count)
    with pytest.raises(UsageError, match=message):
        choose_paraphrases(ITEM, count, how, seed=0)


@given(st.text("abc.", min_size=1, max_size=20), st.integers(0, 12), st.integers(0, 3))
def test_shots_out_of_the_items_are_balanced_and_left_out(relations, count, seed):
    items = items_of(relations)
    data = Dataset("set", items, (), "")
    if count >= len(items):
        with pytest.raises(UsageError, match=f"{count} shots are asked for"):
            choose_shots(data, count, seed)
        return
    shots, left_out = choose_shots(data, count, seed)
    assert left_out == {shot.id for shot in shots}
    assert len(left_out) == len(shots) == count
    there, taken = Counter(relations), Counter(shot.id[0] for shot in shots)
    most = max(taken.values(), default=0)
    for relation, number in there.items():
        assert taken[relation] >= min(number, most - 1)
    if count:
        assert choose_shots(data, count - 1, seed)[0] == shots[:-1]
    # Where an item stands in its file settles nothing.
    assert choose_shots(replace(data, items=items[::-1]), count, seed)[0] == shots


def test_shots_differ_by_seed():
    data = Dataset("set", items_of("." * 50), (), "")
    assert len({tuple(s.id for s in choose_shots(data, 5, seed)[0]) for seed in range(5)}) == 5


def test_draws_of_shots_differ_and_all_are_left_out():
    data = Dataset("set", items_of("." * 50), (), "")
    draws, left_out = choose_draws(data, 5, 3, 4)
    assert [len(shots) for shots in draws] == [5] * 4
    ids = [tuple(shot.id for shot in shots) for shots in draws]
    assert len(set(ids)) == 4
    assert left_out == {id for of_draw in ids for id in of_draw}
    # The first is that of the seed, and more draws leave the others as they are.
    shots, ids_of_shots = choose_shots(data, 5, 3)
    assert choose_draws(data, 5, 3, 1) == ([shots], ids_of_shots)
    assert choose_draws(data, 5, 3, 2)[0] == draws[:2]
    assert choose_draws(data, 5, 4, 4)[0][1:] != draws[1:]


def test_draws_of_a_training_side_leave_no_item_out():
    items = items_of("." * 20)
    data = Dataset("set", items[:2], items[2:], "")
    draws, left_out = choose_draws(data, 2, 0, 3)
    assert left_out == frozenset()
    assert len({tuple(shot.id for shot in shots) for shots in draws}) == 3


def test_draws_that_nothing_tells_apart():
    data = Dataset("set", items_of("." * 9), (), "")
    assert choose_draws(data, 0, 0, 1) == ([[]], frozenset())
    with pytest.raises(UsageError, match="2 draws of 0 shots are asked for; draws differ in"):
        choose_draws(data, 0, 0, 2)


def test_shots_of_a_training_side_ask_nothing_that_is_evaluated():
    evaluated = (Item("e", "Same?", ("Same?",), ("x",)), Item("f", "y", ("Y too",), ("x",)))
    train = (
        Item("1", "same?", ("same?",), ("x",)),
        Item("2", "other", ("y TOO",), ("x",)),
        Item("3", "fine", ("fine",), ("x",)),
    )
    data = Dataset("set", evaluated, train, "")
    shots, left_out = choose_shots(data, 1, 0)
    assert [shot.id for shot in shots] == ["3"]
    assert left_out == frozenset()
    with pytest.raises(UsageError, match=r"2 shots are asked for; set has 1 .*training side"):
        choose_shots(data, 2, 0)


def test_questions_that_stand_twice_are_no_shots():
    twins = (Item("1", "Twice", ("Twice",), ("x",)), Item("2", "twice", ("twice",), ("y",)))
    single = (Item("3", "once", ("once",), ("x",)),)
    data = Dataset("set", twins + single, (), "")
    for seed in range(10):
        assert choose_shots(data, 1, seed) == ([single[0]], frozenset({"3"}))


def test_shots_with_paraphrases():
    data = Dataset("set", items_of("..."), SHOTS, "")
    assert choose_shots(data, 1, 0, min_paraphrases=3)[0] == [SHOTS[0]]
    message = "set has 0 that can be, among the training side; .* and has 4 paraphrases, one for "
    with pytest.raises(UsageError, match=message):
        choose_shots(data, 1, 0, min_paraphrases=4)


@pytest.mark.parametrize("count", [-1, 3])
def test_shots_that_cannot_be_had(count):
    with pytest.raises(UsageError, match=f"{count} shots are asked for"):
        choose_shots(Dataset("set", items_of("..."), (), ""), count, 0)


def test_samples_are_nested_and_balanced(shared_data):
    data = load_dataset("pararel", data_dir=shared_data / "pararel", min_paraphrases=5)
    few, many = (choose_items(data.items, count, seed=3) for count in (1000, 2000))
    assert [len(few), len(many)] == [1000, 2000]
    assert {item.id for item in few} < {item.id for item in many}
    order = {item.id: place for place, item in enumerate(data.items)}
    places = [order[item.id] for item in few]
    assert places == sorted(places)
    there = Counter(item.relation for item in data.items)
    taken = Counter(item.relation for item in few)
    most = max(taken.values())
    assert len(taken) == len(there)
    assert all(taken[relation] >= min(there[relation], most - 1) for relation in there)
    assert choose_items(data.items, 10**6, seed=3) == list(data.items)


@pytest.mark.parametrize("name", ["webqa", "myriadlama", "pararel", "graphquestions"])
def test_prompts_hold_no_gold_answer_of_their_item(shared_data, name):
    folder = {"webqa": "webquestions", "myriadlama": "pararel_as_myriadlama"}.get(name, name)
    path = shared_data / folder
    if name == "myriadlama":
        path /= "pararel_as_myriadlama_sample300facts.jsonl"
    data = load_dataset(name, data_dir=path)
    shots, left_out = choose_shots(data, 5, seed=2)
    items = [item for item in data.items if item.id not in left_out]
    assert not {shot.id for shot in shots} & {item.id for item in items}
    assert len(items) == len(data.items) - len(left_out)
    marked = "<gold>"
    for format in ("prefix", "full", "in-prompt"):
        builder = PromptBuilder(read_template(find_template(name)), tuple(shots), format)
        for item in choose_items(items, 300, seed=0):
            prompt = builder.build(item, item.paraphrases)
            # Were an answer taken from the item, another answer would change the prompt.
            assert builder.build(replace(item, answers=(marked,)), item.paraphrases) == prompt
            for segment in prompt.segments:
                is_cloze = name in ("myriadlama", "pararel")
                assert (MASK in segment) == is_cloze
                assert "[Y]" not in segment


DRAWS = """
import json, sys
from pathlib import Path
from minifuse.evaluation.datasets import load_dataset
from minifuse.evaluation.prompts import choose_draws, choose_items, choose_paraphrases
data = load_dataset("myriadlama", data_dir=Path(sys.argv[1]), min_paraphrases=8)
draws, left_out = choose_draws(data, 5, 7, 2)
items = choose_items([item for item in data.items if item.id not in left_out], 40, 7)
sets = [choose_paraphrases(item, 4, "mixed:3+2", 7) for item in items]
shots = [[shot.id for shot in draw] for draw in draws]
print(json.dumps([shots, [i.id for i in items], sets, data.data_hash]))
assert "torch" not in sys.modules
"""

DRAWN_SHOTS = [
    [
        "bf3ab2f61698af2-647294383b2cbc2",
        "f6d6697b9013f73-7458199fe97a184",
        "0f4f4fc21425165-56ac628a2f10b3b",
        "955aab8849a5ab2-a06522bc4aab38e",
        "4bba2a35b0eea30-ba118bf7fc9c1ae",
    ],
    [
        "b211d3d4ca702a5-c17ac113230f5f3",
        "5deb5e6a00b3763-7b7f15f9ffbeb90",
        "0f4f4fc21425165-56ac628a2f10b3b",
        "9432d0ca782b60f-c7a11e9a55de2b1",
        "835a6d167122b2e-9c633c81c4f7d3a",
    ],
]
DRAWN_SETS = [[4, 0, 10, 7], [1, 6, 8, 2], [5, 4, 0, 1]]


def test_every_process_draws_the_same(shared_data):
    path = shared_data / "pararel_as_myriadlama" / "pararel_as_myriadlama_sample300facts.jsonl"
    outputs = set()
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", DRAWS, str(path)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    [output] = outputs
    shots, items, sets, _ = json.loads(output)
    assert [len(shots[0]), len(shots[1]), len(items), len(sets)] == [5, 5, 40, 40]
    # Written down once: with other draws, runs that were published could not be repeated.
    assert shots == DRAWN_SHOTS
    assert sets[:3] == DRAWN_SETS
