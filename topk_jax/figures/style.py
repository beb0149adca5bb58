"""What all figures share: the marker and colour of each observer, and how a figure is saved.

Where the Top-K paper's authors chose (AlexNet, VGG-16, ViT-L, CLIP, people), their choice is taken;
other networks follow the same idea: a disc for the plain network, triangles for its Top-K versions,
darker the more is kept. Colours depend on the name, the fraction kept and the order in which
networks come up, never on how many there are.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from topk_jax.files import atomic_write

Color = tuple[float, float, float]

DPI = 200
"""Dots per inch of PNG files, and of pictures inside PDF files."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How an observer is drawn.

    Attributes:
        marker: a marker of matplotlib.
        color: red, green and blue in [0, 1].
        line: solid or dashed.
    """

    marker: str
    color: Color
    line: Literal["-", "--"] = "-"


def _rgb(red: float, green: float, blue: float) -> Color:
    return red / 255, green / 255, blue / 255


# Percentage kept -> colour.
_Ramp = dict[float, Color]

_Version = Literal["plain", "topk", "rest"]

_ALEXNET: _Ramp = {
    5: _rgb(80, 210, 210),
    10: _rgb(70, 180, 180),
    20: _rgb(55, 130, 130),
    30: _rgb(50, 100, 100),
    40: _rgb(45, 70, 70),
    50: _rgb(40, 30, 30),
}
_VGG16: _Ramp = {
    5: _rgb(210, 210, 80),
    10: _rgb(180, 180, 70),
    20: _rgb(130, 130, 55),
    30: _rgb(100, 100, 50),
    40: _rgb(70, 70, 45),
    50: _rgb(30, 30, 40),
}

HUMANS = "humans"
"""Name under which people are pooled."""

_SINGLE = {
    HUMANS: Style("D", _rgb(165, 30, 55)),
    "clip": Style("X", _rgb(40, 183, 62)),
    "vitl": Style("*", _rgb(220, 50, 50)),
}

# Plain network, and its Top-K versions by percentage kept.
_KNOWN: dict[str, tuple[Color, _Ramp]] = {
    "alexnet": (_rgb(255, 99, 70), _ALEXNET),
    "vgg16": (_rgb(100, 100, 210), _VGG16),
}
_OTHERS: tuple[tuple[Color, _Ramp], ...] = (
    (_rgb(225, 120, 20), {5: _rgb(110, 185, 245), 15: _rgb(50, 110, 190), 50: _rgb(15, 30, 70)}),
    (_rgb(135, 75, 165), {5: _rgb(120, 205, 120), 15: _rgb(50, 140, 70), 50: _rgb(15, 50, 30)}),
    (_rgb(85, 85, 85), {5: _rgb(240, 150, 205), 15: _rgb(200, 70, 150), 50: _rgb(75, 10, 55)}),
    (_rgb(0, 125, 115), {5: _rgb(245, 185, 90), 15: _rgb(190, 115, 30), 50: _rgb(80, 45, 10)}),
)

# The second row is for networks that have to share the colours of earlier ones.
_MARKERS: tuple[dict[_Version, str], ...] = (
    {"plain": "o", "topk": "v", "rest": "^"},
    {"plain": "s", "topk": "<", "rest": ">"},
)
_LINES: dict[_Version, Literal["-", "--"]] = {"topk": "-", "rest": "--"}

# alexnet-topk-10, AlexNet_topK_10, vgg16-rest-5, sparseAlexNet_5%, AlexNet_topK_5_Revert
_VERSION_NAME = re.compile(
    r"(?:sparse)?(?P<base>.+?)[-_](?:(?P<kind>topk|rest)[-_]?)?(?P<percent>\d+(?:\.\d+)?)%?"
    r"(?P<revert>[-_]revert)?",
    re.IGNORECASE,
)


def styles_for(names: Iterable[str]) -> dict[str, Style]:
    """Styles of observers drawn together.

    Args:
        names: the observers; a network's Top-K versions are known by `<network>-topk-<percent>`,
            their complements by `<network>-rest-<percent>` (the spellings of published tables are
            understood too). "humans" and `subject-NN` are people.

    Returns:
        A style for each name, in order.
    """
    found: dict[str, Style] = {}
    others: list[str] = []
    for name in names:
        base, kind, percent = _taken_apart(name)
        key = re.sub(r"[-_ ]|normal", "", base.lower())
        key = {"vgg": "vgg16", "vitlargepatch16224": "vitl"}.get(key, key)
        if re.fullmatch(r"subject-\d+", name):
            key = HUMANS
        if key in _SINGLE:
            found[name] = _SINGLE[key]
            continue
        again = 0
        if key in _KNOWN:
            plain, ramp = _KNOWN[key]
        else:
            if key not in others:
                others.append(key)
            again, number = divmod(others.index(key), len(_OTHERS))
            plain, ramp = _OTHERS[number]
        markers = _MARKERS[again % len(_MARKERS)]
        if percent is None:
            found[name] = Style(markers["plain"], plain)
        else:
            found[name] = Style(markers[kind], _along(ramp, percent), _LINES[kind])
    return found


def _taken_apart(name: str) -> tuple[str, _Version, float | None]:
    """Network, version and percentage kept; None for a plain network."""
    match = _VERSION_NAME.fullmatch(name)
    sparse = name.lower().startswith("sparse")
    if match is None or not (match["kind"] or sparse):
        return name, "plain", None
    rest = match["revert"] or (match["kind"] or "").lower() == "rest"
    return match["base"], "rest" if rest else "topk", float(match["percent"])


def _along(ramp: _Ramp, percent: float) -> Color:
    """Colour of a percentage, between those of its neighbours."""
    known = sorted(ramp)
    red, green, blue = (
        float(np.interp(percent, known, [ramp[p][channel] for p in known])) for channel in range(3)
    )
    return red, green, blue


def shortened(name: str, *, length: int = 40) -> str:
    """`name`, without its middle where it is too long for a label; the ends tell versions apart."""
    if len(name) <= length:
        return name
    tail = length // 2 - 1
    return f"{name[: length - tail - 1]}…{name[-tail:]}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width and height in inches, whose layout keeps labels from overlapping."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, stem: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes `<stem>.png` and `<stem>.pdf`, each atomically; equal figures give equal bytes.

    Args:
        figure: any figure.
        stem: path without extension; dots in its name stay.

    Returns:
        The two paths.

    Raises:
        OSError: a file cannot be written.
    """
    # No date and no program's version: figures of the same numbers are the same files.
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}
    paths = [pathlib.Path(f"{os.fspath(stem)}.{kind}") for kind in metadata]
    for path, (kind, entries) in zip(paths, metadata.items(), strict=True):
        with atomic_write(path) as file:
            figure.savefig(file, format=kind, dpi=DPI, metadata=entries)
    return paths[0], paths[1]
