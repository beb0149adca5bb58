"""How speed is measured here, side by side, and how the numbers are kept.

All candidates run in one process, in rounds that alternate over them. Each timed call is preceded
by an untimed call of the same candidate: worker threads of the one before still spin and have
emptied the caches, which would cost whoever comes next up to 1.7 times its own time. What is
compared are the ratios within a round, so that a slow moment of the machine hits both sides.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from topk_jax import files

NOISY = 1.5
"""Slowest round over fastest round of a candidate; above it a measurement is to be repeated."""

NOISE_NOTE = (
    f"`*`: the slowest round took more than {NOISY} times as long as the fastest: to be repeated "
    "on a quiet machine."
)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long another candidate took: above 1, ours is faster.

    Attributes:
        median: Of the ratios within each round.
        low: The smallest of them.
        high: The largest of them.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def cpu_count() -> int:
    """Number of processors that this process may use, which is what XLA uses on a CPU."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
    """Times each candidate once a round.

    Args:
        candidates: Functions that return when all of their work is done; compiled already.
        rounds: Number of rounds, at least 1.
        clock: Gives seconds.

    Returns:
        Seconds of each round by candidate.

    Raises:
        ValueError: `rounds` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            call()
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: tuple(values) for name, values in seconds.items()}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Ratios of the seconds of one run of `measure`, round by round."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def is_noisy(seconds: Sequence[float]) -> bool:
    """Whether the rounds of a candidate differ so much that they should be measured again."""
    return max(seconds) > NOISY * min(seconds)


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def setting(packages: Iterable[str]) -> dict[str, Any]:
    """Date, kind of machine, number of processors and versions of the packages that are there."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cpu_count()} threads",
        "versions": versions,
    }


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns, the first to the left, the others right."""
    widths = [max(len(line[i]) for line in (titles, *rows)) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join((first, *others))} |"

    rule = [
        "-" * width if i == 0 else f"{'-' * max(width - 1, 1)}:" for i, width in enumerate(widths)
    ]
    return [line(titles), line(rule), *map(line, rows)]


def section(title: str, result: Mapping[str, Any], note: str, table: Sequence[str]) -> list[str]:
    """Lines of a Markdown section: date, command, machine and versions above the table.

    Args:
        title: What was measured.
        result: Holds the fields of `setting` and `command`.
        note: The conditions, in a few words.
        table: Lines of the table and what follows it.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        f"### {title}, {result['date']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['machine']}; {note}; {versions}.",
        "",
        *table,
    ]


def check_output(path: str | os.PathLike[str]) -> pathlib.Path:
    """Refuses an output that `append` could not extend; to be called before hours of measuring.

    Raises:
        ValueError: Another ending than .md or .json, or a JSON file that is not a list.
        OSError: The file is there but cannot be read.
    """
    path = files.local_path(path)
    if path.suffix not in (".md", ".json"):
        raise ValueError(f"{path}: expected a name that ends in .md or .json")
    _earlier(path)
    return path


def append(path: str | os.PathLike[str], result: Mapping[str, Any], section: Sequence[str]) -> None:
    """Adds a measurement to a file, atomically.

    Args:
        path: A JSON file, a list of results; or a Markdown file.
        result: What the JSON file gets.
        section: Lines that the Markdown file gets at its end.

    Raises:
        ValueError, OSError: As `check_output`, or the file cannot be written.
    """
    path = check_output(path)
    earlier = _earlier(path)
    if isinstance(earlier, list):
        files.write_json(path, [*earlier, result])
        return
    before = f"{earlier.rstrip()}\n\n" if earlier.strip() else ""
    with files.atomic_write(path, "w") as file:
        file.write(before + "\n".join(section) + "\n")


def _earlier(path: pathlib.Path) -> list[Any] | str:
    """What the file holds: the list of a JSON file, the text of a Markdown file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if path.suffix == ".md":
        return text
    try:
        results = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON (line {error.lineno}); nothing can be added") from error
    if not isinstance(results, list):
        raise ValueError(f"{path}: not a list of results; choose another file")
    return results
