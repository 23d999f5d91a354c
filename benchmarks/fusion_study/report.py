"""Tables of a study, side by side."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.fusion_study.configs import ENSEMBLES, UNIFORM_ENSEMBLES, WEIGHTED_ENSEMBLES
from minifuse.errors import UsageError
from minifuse.evaluation.extras import import_extra
from minifuse.evaluation.statistics import resample_means

RESAMPLES = 2000


class Cube(NamedTuple):
    """What was found on one data set, or a half of it.

    logprobs: f64[draws, items, configs]
    """

    title: str
    names: tuple[str, ...]
    logprobs: np.ndarray


def read_cubes(paths: Sequence[Path]) -> list[Cube]:
    """A cube for each data set and half; files that share these are put together.

    Items that one of the draws lacks are left out, and so are configurations.
    raises: UsageError for a file that is not of this study
    """
    pandas = import_extra("pandas")
    tables = []
    for path in paths:
        try:
            tables.append(pandas.read_parquet(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as parquet: {error}") from None
        if not {"dataset", "half", "seed", "draw", "item", "config"} <= set(tables[-1].columns):
            raise UsageError(f"{path} is not of this study: it lacks columns")
    everything = pandas.concat(tables, ignore_index=True)
    cubes = []
    for (dataset, half), table in everything.groupby(["dataset", "half"], sort=False):
        if table.duplicated(["seed", "draw", "item", "config"]).any():
            raise UsageError(f"{dataset} {half}: two files hold the same draw; wanted each once")
        wide = table.pivot(index=["seed", "draw", "item"], columns="config", values="logprob")
        wide = wide[list(dict.fromkeys(table["config"]))].dropna(axis=1)
        draws = [group.droplevel(["seed", "draw"]) for _, group in wide.groupby(["seed", "draw"])]
        items = functools.reduce(
            lambda one, other: one.intersection(other.index), draws[1:], draws[0].index
        )
        logprobs = np.stack([draw.loc[items].to_numpy(float) for draw in draws])
        cubes.append(Cube(f"{dataset} {half}", tuple(wide.columns), logprobs))
    return cubes


def same_weights_of(name: str, names: Sequence[str]) -> list[str]:
    """The ensembles that weigh paraphrases as a fused configuration does.

    Where it turns more attention to the segments, those of prompts that do so, too.
    """
    head, *rest = name.split(" ")
    if head != "fused":
        return []
    terms = next((part for part in rest if "@" in part), None)
    wanted = [f"{ensemble} {terms}" for ensemble in WEIGHTED_ENSEMBLES]
    if terms is None:
        wanted = list(UNIFORM_ENSEMBLES)
    tag = "".join(f" {part}" for part in rest if part.startswith(("balance=", "sharpness=")))
    tags = dict.fromkeys(["", tag])
    return [f"{other}{tag}" for other in wanted for tag in tags if f"{other}{tag}" in names]


def summarise_cube(cube: Cube) -> dict[str, list[str]]:
    """The cells of each configuration's line, see COLUMNS."""
    column = {name: index for index, name in enumerate(cube.names)}
    means = cube.logprobs.mean((0, 1))
    resampled = resample_means(cube.logprobs.swapaxes(0, 1), num_resamples=RESAMPLES)

    def best_of(names: Sequence[str]) -> str:
        return max(names, key=lambda name: means[column[name]])

    def difference(name: str, other: str) -> str:
        one, two = column[name], column[other]
        low, high = np.quantile(resampled[:, one] - resampled[:, two], (0.025, 0.975))
        return f"{means[one] - means[two]:+.3f} [{low:+.3f}, {high:+.3f}]"

    best = best_of([name for name in ENSEMBLES if name in column])
    distance = means[column["best single"]] - means[column[best]]
    cells = {}
    for name in cube.names:
        same = same_weights_of(name, cube.names)
        share = (means[column[name]] - means[column[best]]) / distance if distance else math.nan
        cells[name] = [
            f"{means[column[name]]:.3f}",
            difference(name, "prob_avg"),
            difference(name, "logit_avg"),
            difference(name, best),
            difference(name, best_of(same)) if same else "",
            f"{100 * share:.0f} %",
        ]
    return cells


COLUMNS = ("mean", "- prob_avg", "- logit_avg", "- best ensemble", "- same weights", "share")


def make_report(cubes: Sequence[Cube]) -> str:
    """Markdown: a line for each configuration, side by side what each cube says of it."""
    cells = [summarise_cube(cube) for cube in cubes]
    gains: dict[str, list[float]] = {}
    for cube in cubes:
        means = dict(zip(cube.names, cube.logprobs.mean((0, 1)), strict=True))
        for name in cube.names:
            gains.setdefault(name, []).append(means[name] - means["prob_avg"])
    order = sorted(gains, key=lambda name: np.mean(gains[name]), reverse=True)
    lines = [
        "Log-probability of the best gold answer in nats; differences with 95% intervals of "
        f"{RESAMPLES:,} two-way bootstrap resamples over draws and items. Best ensemble: of "
        f"{', '.join(ENSEMBLES)}. Same weights: the best of the ensembles with the weights of the "
        "line, and where it sharpens, of those that do as well. Share: of the distance from the "
        "best ensemble to the best single paraphrase of each item. Sorted by the mean difference "
        "to prob_avg.",
        "",
    ]
    for cube in cubes:
        num_draws, num_items, _ = cube.logprobs.shape
        lines.append(f"- {cube.title}: {num_draws} draws of {num_items} items")
    heads = [f"{cube.title}: {name}" for cube in cubes for name in COLUMNS]
    lines += ["", _line(["configuration", *heads]), _line(["---", *["---:"] * len(heads)])]
    for name in order:
        own = [cell for part in cells for cell in part.get(name, [""] * len(COLUMNS))]
        lines.append(_line([name, *own]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
