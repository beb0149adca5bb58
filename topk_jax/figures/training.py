"""Curves of a training run: loss and accuracies, and the shape bias where it was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from topk_jax.figures.style import new_figure, shortened

_TRAIN_COLOR = "0.55"


def training_curves(records: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Draws a run from the records of `metrics.jsonl`.

    Args:
        records: `kind` "train" with `step`, `epoch` (passes, a fraction), `loss` and `accuracy`;
            `kind` "validation" with `epoch` and `accuracy` by set and, if it was measured,
            `shape_bias` and `decided_fraction`.
        title: Above the panels.

    Returns:
        A figure of two panels, or three with a shape bias. In the last, the decided fraction goes
        along: a bias among few decisions says little.

    Raises:
        ValueError: There is no record.
    """
    train = [record for record in records if record["kind"] == "train"]
    checks = [record for record in records if record["kind"] == "validation"]
    if not train:
        raise ValueError("no records of training to draw")
    biased = [record for record in checks if record.get("decided_fraction") is not None]
    count = 3 if biased else 2
    figure = new_figure(4.2 * count, 3.6)
    panels = figure.subplots(1, count)
    if title:
        figure.suptitle(title)
    loss, accuracy = panels[0], panels[1]
    epochs = [record["epoch"] for record in train]
    loss.plot(epochs, [record["loss"] for record in train], color=_TRAIN_COLOR, linewidth=1)
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    accuracy.plot(
        epochs, [record["accuracy"] for record in train], color=_TRAIN_COLOR, linewidth=1,
        label="training (with augmentation)",
    )  # fmt: skip
    for name in checks[0]["accuracy"] if checks else ():
        values = [record["accuracy"].get(name, math.nan) for record in checks]
        _line(accuracy, checks, values, shortened(name))
    accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    accuracy.legend(fontsize="small")
    last = max(epochs)
    for panel in panels:
        panel.set_xlim(0, 1.02 * last)
    if biased:
        for name in ("shape_bias", "decided_fraction"):
            values = [math.nan if record[name] is None else record[name] for record in biased]
            _line(panels[2], biased, values, name.replace("_", " "))
        panels[2].axhline(0.5, color="0.8", linewidth=1, zorder=0)
        panels[2].set(xlabel="epoch", ylabel="cue conflicts", ylim=(0, 1))
        panels[2].legend(fontsize="small")
    return figure


def _line(
    axes: Axes, records: Sequence[Mapping[str, Any]], values: Sequence[float], label: str
) -> None:
    axes.plot(
        [record["epoch"] for record in records], values, marker="o", markersize=3, linewidth=1.5,
        label=label,
    )  # fmt: skip
