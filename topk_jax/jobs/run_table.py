"""Finished training runs side by side: means and spreads over seeds, by set and by class."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from topk_jax import files, metrics
from topk_jax.jobs import benchmark

_SEED = "seed"


def run(
    folders: Sequence[str | os.PathLike[str]],
    *,
    per_class: bool = False,
    output: str | os.PathLike[str] | None = None,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Prints a Markdown table with a row for runs that differ by their seed alone.

    Args:
        folders: Work folders of finished runs of `jobs.train`.
        per_class: Add a table of the accuracies of each class of the first set, and their rank
            agreement with the numbers of training images (Spearman).
        output: A file that gets the tables too.
        report: Gets each line.

    Returns:
        A group a row: `settings` (what distinguishes it), `seeds`, `accuracy` (by set, a value a
        seed), `per_class` (seeds x classes, of the first set), `class_counts`.

    Raises:
        ValueError: No folders, one that is no finished run, or runs of other validation sets.
    """
    if not folders:
        raise ValueError("no runs: name their folders, for example --runs=runs/plain_0,runs/topk_0")
    groups = _grouped([_read(pathlib.Path(folder)) for folder in folders])
    lines = _accuracy_table(groups)
    if per_class:
        lines += ["", *_class_table(groups)]
    for line in lines:
        report(line)
    if output:
        with files.atomic_write(output, "w") as file:
            file.write("\n".join(lines) + "\n")
    return groups


def _read(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / files.SUMMARY
    if not path.is_file():
        raise ValueError(f"{folder}: no {files.SUMMARY}, so not the folder of a run")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if "accuracy" not in summary.get("result", {}):
        raise ValueError(f"{folder}: not a finished training run; start its command again")
    return summary


def _grouped(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one config but for the seed, in the order in which they come up."""
    found: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        result = summary["result"]
        settings = {name: value for name, value in summary["flags"].items() if name != _SEED}
        group = found.setdefault(
            json.dumps(settings, sort_keys=True),
            {"settings": settings, "seeds": [], "accuracy": {}, "per_class": []},
        )
        seed = summary["flags"].get(_SEED, 0)
        if seed in group["seeds"]:
            raise ValueError(f"two runs of one config have the seed {seed}: name one of them")
        group["seeds"].append(seed)
        for name, value in result["accuracy"].items():
            group["accuracy"].setdefault(name, []).append(value)
        group["per_class"].append(next(iter(result["per_class"].values())))
        group["class_counts"] = result.get("class_counts")
        group["classes"] = result.get("classes")
    groups = list(found.values())
    sets = [list(group["accuracy"]) for group in groups]
    if any(names != sets[0] for names in sets):
        raise ValueError("the runs were validated on different sets: compare those with the same")
    everywhere = [group["settings"] for group in groups]
    names = {name for settings in everywhere for name in settings}
    differing = sorted(
        name
        for name in names
        if len({json.dumps(settings.get(name)) for settings in everywhere}) > 1
    )
    for group in groups:
        group["settings"] = {name: group["settings"].get(name) for name in differing}
    return groups


def _label(group: Mapping[str, Any]) -> str:
    """What distinguishes the group, without the settings that it leaves empty."""
    if not group["settings"]:
        return "all"
    shown = (
        f"{name} {value}"
        for name, value in group["settings"].items()
        if value not in (None, "", {}, [])
    )
    return ", ".join(shown) or "none of these"


def _accuracy_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean (smallest to largest) over seeds; behind a slash the mean ratio to the first set."""
    sets = list(groups[0]["accuracy"])
    rows = []
    for group in groups:
        first = np.array(group["accuracy"][sets[0]])
        cells = [_spread(first)]
        for name in sets[1:]:
            values = np.array(group["accuracy"][name])
            ratio = float(np.mean(values / first)) if np.all(first > 0) else math.nan
            cells.append(f"{_spread(values)} / {ratio:.2f}")
        rows.append([_label(group), str(len(group["seeds"])), *cells])
    titles = ["runs", "seeds", sets[0], *(f"{name} / ratio" for name in sets[1:])]
    return benchmark.format_table(titles, rows)


def _class_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    classes = groups[0]["classes"] or [str(i) for i in range(len(groups[0]["per_class"][0]))]
    rows = []
    for group in groups:
        values = np.array(group["per_class"], np.float64)
        cells = [f"{value:.3f}" for value in values.mean(axis=0)]
        agreement = "none"
        if group["class_counts"]:
            found = [metrics.rank_correlation(row, group["class_counts"]) for row in values]
            agreement = f"{np.mean(found):.2f}"
        rows.append([_label(group), *cells, agreement])
    if groups[0]["class_counts"]:
        counts = [str(count) for count in groups[0]["class_counts"]]
        rows.insert(0, ["training images", *counts, ""])
    return benchmark.format_table(["runs", *classes, "rank agreement"], rows)


def _spread(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})"
