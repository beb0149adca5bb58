"""Shape bias of several observers, as the benchmark draws it, with what it leaves out.

After the figures of Geirhos et al. (ICLR 2019 and NeurIPS 2021): categories in rows, the fraction
of texture decisions to the right, so that observers who go by shape stand at the left. Added here:
a legend, the names of the categories, the counts, and the decided fraction of each observer with
the level of guessing. An observer who decides no more often than a guesser is drawn hollow and
dotted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from topk_jax.figures.style import HUMANS, Style, new_figure, shortened, styles_for
from topk_jax.metrics import ShapeBias

_EDGE = (0.3, 0.3, 0.3, 0.6)
_BAR = 0.3  # of the distance between observers
_TICKS = np.arange(11) / 10


def shape_bias_matrix(
    results: Mapping[str, ShapeBias],
    *,
    styles: Mapping[str, Style] | None = None,
    category_order: Sequence[str] | None = None,
) -> Figure:
    """Draws the shape bias of each category and observer, and the decided fractions beside it.

    A vertical line is an observer's pooled shape bias, a marker that of one category; points and
    lines without a decision are left out.

    Args:
        results: observers in the order of the legend; "humans" are people pooled.
        styles: of some or all observers; None and what is missing: `styles_for`.
        category_order: categories from bottom to top; None sorts them by the shape bias of
            "humans", or of the first observer if there are no humans, the largest at the bottom.

    Returns:
        The figure: matrix, legend and decided fractions.

    Raises:
        ValueError: no observers, observers with different categories, or an order that is not
            made of these categories.
    """
    categories = _common_categories(results)
    order = _order(results) if category_order is None else list(category_order)
    if sorted(order) != sorted(categories):
        raise ValueError(
            f"category_order {', '.join(order)}: expected each of {', '.join(categories)} once"
        )
    drawn = styles_for(results) | dict(styles or {})
    handles = _legend_handles(results, drawn)
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, 140 // (longest + 8)))
    legend_rows = -(-len(handles) // columns)
    height = 2.2 + 0.28 * legend_rows + max(4.5, 0.5 * len(order), 0.6 * len(results))
    figure = new_figure(15.0, height)
    matrix, decided = figure.subplots(1, 2, width_ratios=(1.7, 1))
    _draw_matrix(matrix, results, drawn, order)
    _draw_decided(decided, results, drawn)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=11, frameon=False
    )
    return figure


def shape_bias_boxplot(
    results: Mapping[str, ShapeBias | Sequence[ShapeBias]],
    *,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Draws the spread of each observer's shape bias over the shape categories.

    Args:
        results: observers from left to right. A sequence stands for people: each value of its box
            is the mean over people of their shape bias in one category.
        styles: of some or all observers; None and what is missing: `styles_for`.

    Returns:
        The figure: a box from the lower to the upper quartile with the median, whiskers to the
        furthest value within 1.5 box lengths, no outliers; a cross is the pooled shape bias (of
        people, the mean of theirs). Boxes of guessers are hollow.

    Raises:
        ValueError: no observers, or a sequence without people.
    """
    if not results or not all(isinstance(r, ShapeBias) or len(r) for r in results.values()):
        raise ValueError("no results to draw: expected at least one observer")
    drawn = styles_for(results) | dict(styles or {})
    labels = [shortened(name) for name in results]
    width, height = 1.6 + 0.7 * len(results), 4.0 + 0.09 * max(map(len, labels))
    figure = new_figure(max(4.0, width), height)
    axes = figure.add_subplot()
    for position, (name, result) in enumerate(results.items(), start=1):
        hollow = all(r.at_chance for r in ([result] if isinstance(result, ShapeBias) else result))
        _draw_box(axes, position, _category_biases(result), drawn[name], hollow=hollow)
        axes.scatter(
            position, _pooled(result), marker="x", s=45, color="black", zorder=4, linewidths=1.5
        )
    axes.set_xlim(0.4, len(results) + 0.6)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("shape bias", fontsize=12)
    axes.set_xticks(range(1, len(results) + 1), labels=labels, rotation=90)
    for label, name in zip(axes.get_xticklabels(), results, strict=True):
        label.set_color(drawn[name].color)
    axes.yaxis.grid(True, linestyle=":", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(facecolor="0.8", edgecolor="black", label="shape categories"),
            Line2D([], [], linestyle="", marker="x", color="black", label="pooled"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
    )
    return figure


def _common_categories(results: Mapping[str, ShapeBias]) -> list[str]:
    if not results:
        raise ValueError("no results to draw: expected at least one observer")
    (first, reference), *others = results.items()
    for name, result in others:
        if set(result.per_category) != set(reference.per_category):
            odd = sorted(set(result.per_category) ^ set(reference.per_category))
            raise ValueError(
                f"{first!r} and {name!r} have different categories ({', '.join(odd)} in one only);"
                " give both the same `categories` when computing the shape bias"
            )
    return list(reference.per_category)


def _order(results: Mapping[str, ShapeBias]) -> list[str]:
    """Categories from the most shape-biased to the least, undecided ones last."""
    leader = results.get(HUMANS) or next(iter(results.values()))
    rows = leader.per_category
    return sorted(rows, key=lambda name: -np.nan_to_num(rows[name].shape_bias, nan=-1.0))


def _draw_matrix(
    axes: Axes,
    results: Mapping[str, ShapeBias],
    styles: Mapping[str, Style],
    order: Sequence[str],
) -> None:
    rows = np.arange(len(order))
    for row in rows[:-1]:
        axes.axhline(row + 0.5, linestyle=":", color="grey", alpha=0.4, zorder=0)
    for name, result in results.items():
        style = styles[name]
        if not np.isnan(result.shape_bias):
            line = ":" if result.at_chance else style.line
            axes.axvline(1 - result.shape_bias, color=style.color, linestyle=line, zorder=2)
        texture = np.array([1 - result.per_category[category].shape_bias for category in order])
        shown = ~np.isnan(texture)
        _scatter(axes, texture[shown], rows[shown], style, hollow=result.at_chance, size=160)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(order) - 0.5)
    axes.set_xticks(_TICKS, labels=[f"{tick:g}" for tick in _TICKS], fontsize=14)
    axes.set_yticks(rows, labels=list(order), fontsize=14)
    axes.tick_params(axis="x", length=8)
    axes.tick_params(axis="y", length=0, pad=12)
    axes.set_xlabel("Fraction of 'texture' decisions  →", fontsize=16)
    axes.set_ylabel("Shape categories", fontsize=16)
    top = axes.secondary_xaxis("top", functions=(_complement, _complement))
    top.set_xticks(_TICKS, labels=[f"{tick:g}" for tick in _TICKS], fontsize=14)
    top.tick_params(axis="x", length=8)
    top.set_xlabel("←  Fraction of 'shape' decisions", fontsize=16, labelpad=10)


def _complement(x: ArrayLike) -> np.ndarray:
    return 1 - np.asarray(x)


def _scatter(
    axes: Axes,
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    style: Style,
    *,
    hollow: bool,
    size: float,
) -> PathCollection:
    return axes.scatter(
        x,
        y,
        marker=style.marker,
        s=size,
        facecolors="white" if hollow else style.color,
        edgecolors=style.color if hollow else _EDGE,
        linewidths=1.5 if hollow else 0.5,
        zorder=3,
        clip_on=False,
    )


def _draw_decided(
    axes: Axes, results: Mapping[str, ShapeBias], styles: Mapping[str, Style]
) -> None:
    """A bar for each observer: S, then X in a paler tone, with the interval of their sum."""
    for row, (name, result) in enumerate(results.items()):
        style = styles[name]
        shape, texture = np.nan_to_num([result.shape_fraction, result.texture_fraction])
        bar = {"height": _BAR, "edgecolor": style.color, "linewidth": 1.0}
        axes.barh(row, shape, color=style.color, **bar)
        axes.barh(row, texture, left=shape, color=(*style.color, 0.25), **bar)
        low, high = result.decided_fraction_ci95
        if not np.isnan(low):
            axes.plot([low, high], [row, row], color="black", linewidth=1.5)
            axes.plot([low, high], [row, row], color="black", linestyle="", marker="|")
        _note(axes, (0, row - _BAR / 2), 2, shortened(name), fontsize=11)
        low, high = result.shape_bias_ci95
        counts = f"S {result.n_shape}, X {result.n_texture} of {result.n_conflict}"
        if not np.isnan(result.shape_bias):
            counts += f"; shape bias {result.shape_bias:.3f} [{low:.3f}, {high:.3f}]"
        _note(axes, (0, row + _BAR / 2), -3, counts, fontsize=9, color="0.35")
    chance = next(iter(results.values())).chance_decided
    axes.axvline(chance, linestyle="--", color="0.3", linewidth=1.2, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(results), 5) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_xticks(_TICKS[::2], labels=[f"{tick:g}" for tick in _TICKS[::2]], fontsize=14)
    axes.set_xlabel("Fraction of conflict images", fontsize=16)
    axes.set_title("Decided: shape (full) + texture (pale)", fontsize=14)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _note(axes: Axes, xy: tuple[float, float], points: float, text: str, **font: Any) -> None:
    """Text some points above (or below) a place, on white so that no line runs through it."""
    axes.annotate(
        text,
        xy,
        (0, points),
        textcoords="offset points",
        va="bottom" if points > 0 else "top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        **font,
    )


def _legend_handles(results: Mapping[str, ShapeBias], styles: Mapping[str, Style]) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            color=styles[name].color,
            linestyle=styles[name].line,
            marker=styles[name].marker,
            markersize=11,
            markerfacecolor="white" if result.at_chance else styles[name].color,
            label=shortened(name),
        )
        for name, result in results.items()
    ]
    handles.append(Line2D([], [], color="0.3", linestyle="--", label="decided by guessing"))
    if any(result.at_chance for result in results.values()):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                markersize=11,
                color="0.3",
                markerfacecolor="white",
                label="hollow: no better than guessing",
            )
        )
    return handles


def _draw_box(
    axes: Axes, position: int, sample: Float[np.ndarray, " n"], style: Style, *, hollow: bool
) -> None:
    """One box with whiskers."""
    # Axes.boxplot would load pyplot, and with it the user's window system.
    sample = sample[~np.isnan(sample)]
    if not len(sample):
        return
    low, middle, high = np.quantile(sample, (0.25, 0.5, 0.75))
    reach = 1.5 * (high - low)
    ends = sample[(sample >= low - reach) & (sample <= high + reach)]
    bottom, top = min(ends.min(), low), max(ends.max(), high)
    left, right = position - 0.3, position + 0.3
    axes.vlines([position] * 2, [bottom, high], [low, top], color="black", linewidth=1)
    axes.hlines([bottom, top], position - 0.15, position + 0.15, color="black", linewidth=1)
    axes.bar(
        position,
        high - low,
        bottom=low,
        width=0.6,
        color="white" if hollow else (*style.color, 0.8),
        edgecolor=style.color if hollow else "black",
        zorder=2,
    )
    axes.hlines(middle, left, right, color="black", linewidth=2, zorder=3)


def _category_biases(result: ShapeBias | Sequence[ShapeBias]) -> Float[np.ndarray, " categories"]:
    """Shape bias of each category; of people, the mean over those who decided in it."""
    if isinstance(result, ShapeBias):
        return np.array([row.shape_bias for row in result.per_category.values()])
    table = np.stack([_category_biases(person) for person in result])
    known = ~np.isnan(table)
    count = known.sum(axis=0)
    total = np.where(known, table, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _pooled(result: ShapeBias | Sequence[ShapeBias]) -> float:
    if isinstance(result, ShapeBias):
        return result.shape_bias
    known = [person.shape_bias for person in result if not np.isnan(person.shape_bias)]
    return float(np.mean(known)) if known else float("nan")
