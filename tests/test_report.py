"""The report: what it says, that data stays text, and that it works in a browser."""

import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas
import pytest

from minifuse.errors import MinifuseError
from minifuse.evaluation import report
from minifuse.evaluation.plots import family_of
from minifuse.evaluation.report import MEASURES, write_report
from minifuse.methods import FusionMethod

METHODS = [method.value for method in FusionMethod]
RELATIONS = ("P17", "P19", "P36", "P103", "P407", "P1001")
NASTY = (
    "<script>document.title = 'hacked'</script> is the capital of?",
    "\"Who\" & 'what' costs $5 or $x^2$ in {{ config }}?",
    "日本の首都はどこですか 🗾 ما هي عاصمة اليابان؟",
    "Which\nlines hold \x00 what JSON can bring?",
    "long " * 400,
)
CITIES = ("Paris", "Lyon", "the Hague", "Rome", "")


def make_table(
    num_items: int = 200, counts: tuple[int, ...] = (1, 3, 5), draw: int = 0
) -> pandas.DataFrame:
    """Records as a small model would leave them; all is drawn from one seed."""
    random = np.random.default_rng(draw)
    skill = {method: random.normal(0, 0.3) for method in METHODS}
    records = []
    for item in range(num_items):
        ease = random.normal(-3, 1.5)
        question = NASTY[item] if item < len(NASTY) else f"What is the capital of land {item}?"
        paraphrase_ease = random.normal(0, 0.7, size=max(counts))
        for n in counts:
            for method in METHODS:
                for index in range(n) if method == "per_prompt" else [None]:
                    logprob = ease + skill[method] + random.normal(0, 0.4)
                    logprob += paraphrase_ease[index or 0] / (1 if index is not None else n)
                    is_right = bool(random.random() < math.exp(min(logprob + 1, 0)))
                    wrong = CITIES[1 + random.integers(len(CITIES) - 1)]
                    streams = n if family_of(method) == "ensembles" else 1
                    records.append(
                        {
                            "id": f"item-{item}",
                            "n": n,
                            "draw": draw,
                            "method": method,
                            "paraphrase_index": index,
                            "relation": RELATIONS[item % len(RELATIONS)],
                            "question": question,
                            "paraphrases": [f"{question} (wording {i})" for i in range(n)],
                            "answers": ["Paris", "Paris <b>France</b>"],
                            "prediction": CITIES[0] if is_right else wrong,
                            "match_lemma": is_right,
                            "match_lemma_both": is_right or wrong == "",
                            "match_exact": is_right,
                            "match_first_word": is_right,
                            "f1": float(is_right),
                            "answer_logprob": None if method == "vote" else logprob,
                            "confidence": random.beta(2, 3),
                            "num_tokens": 3,
                            "prompt_tokens": 150 + 15 * streams,
                            "num_streams": streams,
                            "prefill_ms": 20.0,
                            "decode_ms": random.uniform(30, 40),
                        }
                    )
    counts_of = ["n", "draw", "paraphrase_index", "num_tokens", "prompt_tokens", "num_streams"]
    return pandas.DataFrame(records).astype(
        {**dict.fromkeys(counts_of, "Int64"), "answer_logprob": "float64"}
    )


def interval_of(values: pandas.Series) -> dict:
    """Mean and a normal interval: the report draws what it is given."""
    values = values.dropna().astype(float)
    if values.empty:
        return {"mean": None, "low": None, "high": None, "num_items": 0, "note": "no item"}
    mean, half = values.mean(), 1.96 * values.std() / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_items": len(values)}


def measured(rows: pandas.DataFrame) -> dict:
    return {
        method: {measure: interval_of(own[measure]) for measure in MEASURES}
        for method, own in rows.groupby("method")
    }


def calibrated(rows: pandas.DataFrame) -> list[dict]:
    places = (rows["confidence"] * 10).astype(int).clip(upper=9)
    bins = []
    for place in range(10):
        own = rows[places == place]
        means = {"confidence": own["confidence"].mean(), "accuracy": own["match_lemma"].mean()}
        if own.empty:
            means = {"confidence": None, "accuracy": None}
        bins.append({"low": place / 10, "high": (place + 1) / 10, "count": len(own), **means})
    return bins


SHARE = {"reference": "prob_avg", "share": 0.337, "low": -0.041, "high": 0.612}


def make_summary(table: pandas.DataFrame) -> dict:
    """What `summary.summarise` gives for such a table, in shape; the numbers are simple."""
    n = int(table["n"].max())
    main = table[table["n"] == n]
    singles = main[main["method"] == "per_prompt"]
    flips = {"right_to_wrong": 12, "wrong_to_right": 17, "num_cells": 200}
    costs = ("num_streams", "prompt_tokens", "num_tokens", "prefill_ms", "decode_ms")

    def spread_by(measure: str) -> dict:
        places = singles.groupby("paraphrase_index")[measure].mean().astype(float)
        found = {"mean": places.mean(), "best": places.max(), "worst": places.min()}
        items = singles.groupby("id")[measure]
        found |= {"item_best": items.max().mean(), "item_worst": items.min().mean()}
        return {**found, "sd": places.std(), "by_paraphrase": list(places)}

    def of_items(how: str) -> dict:
        items = singles.groupby("id")[list(MEASURES)].agg(how).astype(float)
        return {measure: interval_of(items[measure]) for measure in MEASURES}

    spread = {**spread_by("match_lemma"), "measure": "match_lemma"}
    spread["answer_logprob"] = spread_by("answer_logprob")
    methods = {}
    for method, values in measured(main).items():
        rows, is_single = main[main["method"] == method], method == "per_prompt"
        methods[method] = {
            **values,
            "spread": spread if is_single else None,
            "consistency": 0.617 if is_single else None,
            "share_of_distance": SHARE if method == "fused" else None,
            "flips_vs_origin": None if method == "origin" else flips,
            "flips_vs_mean_single": None if is_single else flips | {"right_to_wrong": 14.4},
            "ece": 0.123,
            "calibration": calibrated(rows),
            "cost": {name: float(rows[name].mean()) for name in costs},
        }
    comparison = {
        "first": "fused",
        "second": "prob_avg",
        "measure": "answer_logprob",
        "difference": -0.0421,
        "low": -0.081,
        "high": -0.003,
        "p_bootstrap": 0.0416,
        "p_mcnemar": None,
        "p_holm": 0.0832,
        "detectable": 0.056,
        "by_draw": [-0.0421],
    }
    by_relation = {
        relation: {"num_items": int(rows["id"].nunique()), "methods": measured(rows)}
        for relation, rows in main.groupby("relation")
    }
    return {
        "num_items": int(main["id"].nunique()),
        "n": n,
        "rule": "match_lemma",
        "interval": "95% percentile bootstrap over questions",
        "methods": methods,
        "intervals": {"any_of_n": of_items("max"), "all_of_n": of_items("min")},
        "by_relation": by_relation,
        "family": ["fused - prob_avg"],
        "comparisons": [
            comparison,
            comparison | {"measure": "match_lemma", "p_mcnemar": 0.0123},
        ],
        "by_n": {str(count): measured(rows) for count, rows in table.groupby("n")},
        "left_out": {"items_without_n": 3, "per_prompt_incomplete": 0},
    }


CONFIG = {
    "format": 1,
    "command": [
        "python",
        "-m",
        "minifuse.evaluate",
        "--fields",
        "id=a b",
        "--output",
        "runs/\udcff",
    ],
    "dataset": "capitals <1>",
    "model": "smollm2-135m-instruct",
    "dtype": "float32",
    "methods": METHODS,
    "n": [1, 3, 5],
    "shots": 5,
    "shot_ids": [f"shot-{i}" for i in range(5)],
    "limit": None,
}
ENVIRONMENT = {"python": "3.11.2", "torch": "2.13.0", "cpu": "<any>", "num_threads": 2}


@pytest.fixture(scope="module")
def run() -> tuple[pandas.DataFrame, dict]:
    table = make_table()
    return table, make_summary(table)


@pytest.fixture(scope="module")
def page_path(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, *run, CONFIG, ENVIRONMENT)
    return path


class Page(HTMLParser):
    """Elements, their attributes, and the text of every row of every table."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(page_path) -> Page:
    return Page(page_path.read_text(encoding="utf-8"))


def svgs_of(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_main_table_holds_the_summary_log_probability_first(page, run):
    _, summary = run
    rows = {row[0]: row for row in reversed(page.rows) if len(row) == 1 + len(MEASURES)}
    assert rows["method"][1] == "answer log-probability"
    for method in METHODS:
        for cell, measure in zip(rows[method][1:], MEASURES, strict=True):
            found = [
                float(text) for text in re.findall(r"[\d.-]+", cell.replace("\N{MINUS SIGN}", "-"))
            ]
            entry = summary["methods"][method][measure]
            wanted = [entry["mean"], entry["low"], entry["high"]]
            if wanted[0] is None:
                assert cell.strip() == "\N{EN DASH}"
            else:
                assert found == [round(value, 3) for value in wanted]


def test_every_part_is_there(page, page_path):
    headings = {attributes.get("id") for attributes in page.all("section")}
    assert headings == set(
        "run results by-n comparisons paraphrases agreement cost relations calibration "
        "disagreement".split()
    )
    text = page_path.read_text(encoding="utf-8")
    # What UTF-8 cannot hold is replaced; what a shell must quote is quoted.
    assert "python -m minifuse.evaluate --fields &#39;id=a b&#39; --output &#39;runs/?&#39;" in text
    assert "Left out: items without n: 3." in text
    assert "per prompt incomplete" not in text
    rows = [
        [" ".join(cell.replace("\N{MINUS SIGN}", "-").split()) for cell in row] for row in page.rows
    ]
    assert [
        *["fused - prob_avg", "lemmas", "-0.042 [-0.081, -0.003]"],
        *["0.0123", "0.0416", "0.0832", "0.056"],
    ] in rows
    assert ["fused", "0.337 [-0.041, 0.612]"] in rows
    assert "from the best ensemble of the run (prob_avg)" in text
    assert not re.search(r"draws of shots|by draw|of the shots", text)
    for relation in RELATIONS:
        assert sum(row[0] == relation for row in page.rows) == 2


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[pandas.DataFrame, str]:
    """A table of three draws of shots, and its page."""
    table = pandas.concat([make_table(40, (3,), draw) for draw in (0, 1, 2)], ignore_index=True)
    summary = make_summary(table)
    summary |= {"interval": "95% percentile bootstrap over questions and 3 draws of shots"}
    for row in summary["comparisons"]:
        row["by_draw"] = [0.0301, -0.1523, None]
    path = tmp_path_factory.mktemp("drawn") / "report.html"
    write_report(path, table, summary, CONFIG, ENVIRONMENT)
    return table, path.read_text(encoding="utf-8")


def test_draws_of_shots_are_named(drawn):
    _, text = drawn
    plain = " ".join(text.split())
    assert "40 items, 3 paraphrases, 3 draws of shots, 14 methods." in plain
    assert "means over items and 3 draws of shots" in plain
    assert "In brackets: 95% percentile bootstrap over questions and 3 draws of shots" in plain
    assert "Each paraphrase alone, in draw 0 of the shots." in plain
    assert "others wrong (lemmas), in draw 0 of the shots." in plain
    rows = [
        [" ".join(cell.replace("\N{MINUS SIGN}", "-").split()) for cell in row]
        for row in Page(text).rows
    ]
    # McNemar's test is for one draw alone.
    assert [
        *["fused - prob_avg", "lemmas", "-0.042 [-0.081, -0.003]", "0.030, -0.152, \N{EN DASH}"],
        *["0.0416", "0.0832", "0.056"],
    ] in rows
    assert "McNemar" not in plain


def test_pictures_of_single_items_are_those_of_the_first_draw(drawn, tmp_path):
    """Heat map and examples are those of a report on that draw alone; agreement is over all."""
    table, text = drawn
    write_report(tmp_path / "one.html", table[table["draw"] == 0], {}, CONFIG, ENVIRONMENT)
    alone = (tmp_path / "one.html").read_text(encoding="utf-8")
    pattern = re.compile(r'<ol id="examples">.*?</ol>\n\s*</section>', re.DOTALL)
    assert pattern.search(text)[0] == pattern.search(alone)[0]
    told = [
        {svg.get("aria-label"): svg.findtext("desc") for svg in svgs_of(page)}
        for page in (text, alone)
    ]
    heat = "Log-probability of the answer and correctness of each paraphrase of each item"
    assert told[0][heat] == told[1][heat]
    label = "Share of items on which two methods agree"
    pairs = [dict(line.rsplit(": ", 1) for line in found[label].split("; ")) for found in told]
    assert pairs[0] != pairs[1]
    by_cell = {
        method: own.set_index(["id", "draw"])["prediction"]
        for method, own in table.groupby("method")
    }
    first, second = by_cell["fused"], by_cell["vote"]
    wanted = ((first == second[first.index]) & (first != "")).mean()
    shares = {frozenset(pair.split(" and ")): float(share) for pair, share in pairs[0].items()}
    assert abs(shares[frozenset(["fused", "vote"])] - wanted) < 0.005 + 1e-9


def test_nothing_is_fetched(page):
    links = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "srcset", "action")
    ]
    assert links
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert not {"img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}


def test_ids_are_unique_and_references_hold(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key, value in attributes.items():
            if key == "href" and value.startswith("#"):
                assert value[1:] in ids
            for reference in re.findall(r"url\(#(.*?)\)", value or ""):
                assert reference in ids


def test_plots_have_text_alternatives_and_text_that_is_text(page_path):
    svgs = svgs_of(page_path.read_text(encoding="utf-8"))
    assert len(svgs) == 5
    for svg in svgs:
        assert svg.get("role") == "img"
        assert svg.get("aria-label") == svg.findtext("title")
        assert len(svg.findtext("desc")) > 50
        assert svg.find("desc").get("id") == svg.get("aria-describedby")
        assert svg.findall(".//text")
        assert svg.find(".//style") is None
        assert "currentColor" in ElementTree.tostring(svg, encoding="unicode")
    labels = {text.text for svg in svgs for text in svg.iter("text")}
    assert set(METHODS) <= labels


def test_markup_in_data_stays_text(page_path, page):
    text = page_path.read_text(encoding="utf-8")
    assert len(page.all("script")) == 1
    assert "<script>document" not in text
    assert "&lt;script&gt;document.title" in text
    assert not page.all("b")
    assert "capitals &lt;1&gt;" in text
    assert "{{ config }}" in text


def test_same_input_gives_same_bytes_whatever_matplotlib_is_set_to(run, page_path, tmp_path):
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "svg.fonttype": "path"}):
        write_report(tmp_path / "report.html", *run, CONFIG, ENVIRONMENT)
    assert (tmp_path / "report.html").read_bytes() == page_path.read_bytes()


def test_agreement_is_that_of_a_plain_count(page_path, run):
    table, _ = run
    rows = table[table["n"] == 5]
    (svg,) = [
        svg
        for svg in svgs_of(page_path.read_text(encoding="utf-8"))
        if svg.get("aria-label").startswith("Share of items")
    ]
    told = dict(line.rsplit(": ", 1) for line in svg.findtext("desc").split("; "))
    by_method = {
        method: own.groupby("id")["prediction"].apply(list)
        for method, own in rows.groupby("method")
    }
    assert len(told) == len(METHODS) * (len(METHODS) - 1) / 2
    for pair, share in told.items():
        first, second = (by_method[method] for method in pair.split(" and "))
        shares = []
        for id in first.index:
            # All that normalisation changes in CITIES is "the Hague", everywhere alike.
            pairs = [(a, b) for a in first[id] for b in second[id]]
            shares.append(sum(a == b != "" for a, b in pairs) / len(pairs))
        # Two digits are told.
        assert abs(float(share) - sum(shares) / len(shares)) < 0.005 + 1e-9


def test_examples_are_the_items_on_which_methods_differ(page, run):
    table, _ = run
    rows = table[(table["n"] == 5) & (table["method"] != "per_prompt")]
    differing = [
        id for id, own in rows.groupby("id", sort=False) if own["match_lemma"].nunique() > 1
    ]
    examples = [attributes for attributes in page.all("li") if "data-right" in attributes]
    assert len(examples) == len(differing) <= report.MAX_EXAMPLES
    for id, example in zip(differing, examples, strict=True):
        own = rows[rows["id"] == id]
        right = set(own[own["match_lemma"]]["method"])
        assert set(example["data-right"].split()) - {"per_prompt"} == right
        wrong = set(METHODS) - right - {"per_prompt"}
        assert set(example["data-wrong"].split()) - {"per_prompt"} == wrong


def test_what_is_drawn_and_listed_is_bounded_and_said(run, page_path, tmp_path, monkeypatch):
    text = page_path.read_text(encoding="utf-8")
    assert "100 of 200 items are drawn, evenly spaced" in text
    assert "long " * 59 in text
    assert "long " * 60 not in text
    for name, limit in {"MAX_HEAT_ITEMS": 7, "MAX_EXAMPLES": 5, "MAX_RELATIONS": 2}.items():
        monkeypatch.setattr(report, name, limit)
    write_report(tmp_path / "report.html", *run, CONFIG, ENVIRONMENT)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "7 of 200 items are drawn, evenly spaced" in text
    assert sum("item-" in (label.text or "") for label in svgs_of(text)[1].iter("text")) == 7
    assert len([item for item in page.all("li") if "data-right" in item]) == 5
    assert re.search(r"5 of \d+ are listed, evenly spaced", text)
    assert "The 2 largest of 6 relations." in text
    assert sum(row[0] in RELATIONS for row in page.rows) == 2 * 2


def without_values(tree: object) -> object:
    """The same with null in place of every number."""
    if isinstance(tree, dict):
        return {key: without_values(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_values(value) for value in tree]
    return tree if isinstance(tree, str) else None


@pytest.mark.parametrize("kind", ["no summary", "nulls", "one method", "no logprobs", "no rows"])
def test_parts_without_data_are_left_out(kind, run, tmp_path):
    table, summary = run
    if kind == "no summary":
        summary = {}
    elif kind == "nulls":
        summary = without_values(summary)
    elif kind == "one method":
        table = table[(table["method"] == "fused") & (table["n"] == 3)].assign(relation=None)
        summary = {"methods": {"fused": measured(table)["fused"]}}
    elif kind == "no logprobs":
        table = table.assign(answer_logprob=math.nan)
    else:
        table, summary = table.iloc[:0], {}
    path = tmp_path / "report.html"
    write_report(path, table, summary, {}, {})
    text = path.read_text(encoding="utf-8")
    sections = {attributes["id"] for attributes in Page(text).all("section")}
    assert {"run", "results", "comparisons", "paraphrases", "disagreement"} <= sections
    assert ("agreement" in sections) == (kind not in ("one method", "no rows"))
    assert ("by-n" in sections) == (kind == "no logprobs")
    assert ("Heat map" in text) == (kind in ("no summary", "nulls"))
    assert not re.search(r"\b(None|nan|NaN|null)\b", re.sub(r"<script>.*?</script>", "", text))
    for link in re.findall(r'href="#([a-z-]+)"', text.partition("<main>")[0]):
        assert link in sections


def test_a_folder_that_is_not_there(run, tmp_path):
    with pytest.raises(MinifuseError, match=r"cannot be written: No such file or directory"):
        write_report(tmp_path / "missing" / "report.html", *run, CONFIG, ENVIRONMENT)


def test_every_method_has_a_family():
    families = {method: family_of(method) for method in METHODS}
    assert families["weighted_max"] == families["origin"] == "single prompts"
    assert families["vote"] == families["prob_max"] == "ensembles"
    assert families["concat"] == families["fused_auto"] == "one-pass fusion"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium through its own driver, as Debian packages both."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: wanted chromium and chromedriver (Debian: chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Without a sandbox it starts for root and in containers; the page is our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome


@pytest.fixture
def opened(browser, page_path):
    browser.get(page_path.as_uri())
    return browser


def shown_examples(browser) -> list[dict]:
    return browser.execute_script(
        """return [...document.querySelectorAll("#examples > li")]
        .filter((item) => item.offsetHeight > 0).map((item) => ({...item.dataset}))"""
    )


def test_filters_work_in_a_browser(opened):
    from selenium.webdriver.support.ui import Select

    everything = shown_examples(opened)
    form = opened.find_element("id", "filters")
    count = form.find_element("tag name", "output")
    right, wrong, relation, text = (
        form.find_element("name", name) for name in ("right", "wrong", "relation", "text")
    )
    assert count.text == f"{len(everything)} of {len(everything)} shown"

    def expected(has_right: str = "", has_wrong: str = "", of: str = "") -> list[dict]:
        return [
            example
            for example in everything
            if (not has_right or has_right in example["right"].split())
            and (not has_wrong or has_wrong in example["wrong"].split())
            and (not of or example["relation"] == of)
        ]

    Select(right).select_by_visible_text("fused")
    assert shown_examples(opened) == expected("fused")
    Select(wrong).select_by_visible_text("prob_avg")
    assert shown_examples(opened) == expected("fused", "prob_avg")
    Select(relation).select_by_visible_text("P36")
    found = expected("fused", "prob_avg", "P36")
    assert 0 < len(found) < len(expected("fused", "prob_avg")) < len(everything)
    assert shown_examples(opened) == found
    assert count.text == f"{len(found)} of {len(everything)} shown"
    for select in (right, wrong, relation):
        Select(select).select_by_index(0)
    text.send_keys("COSTS $5\n")  # the enter key must not send the form away
    assert [example["relation"] for example in shown_examples(opened)] == ["P19"]


def test_console_is_silent_and_nothing_is_loaded(opened):
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.title == "minifuse: capitals <1>"
    # The log would have held an error.
    opened.execute_script("console.error('a word')")
    assert "a word" in opened.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", [390, 1200])
def test_only_boxes_scroll_sideways(opened, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        boxes = opened.execute_script(
            """return [...document.querySelectorAll(".scroll")]
            .map((box) => [box.clientWidth, box.scrollWidth])"""
        )
        assert all(shown <= width for shown, _ in boxes)
        assert any(content > shown for shown, content in boxes)
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_scripts_the_list_is_plain(browser, page_path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page_path.as_uri())
        assert not browser.find_element("id", "filters").is_displayed()
        assert browser.find_element("css selector", "#examples > li").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
