"""Sixteen shapes, drawn as silhouettes.

Data contract: an outline is a list of `Part`s, drawn one after the other. Coordinates are (x, y)
float arrays [n, 2] in a box of about [-1, 1], y downwards as in images; a part with `fill=False`
cuts a hole. A silhouette is float32 [size, size] in [0, 1], the fraction of each pixel that is
covered. Everything random comes from the `numpy.random.Generator` that is passed in.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

_SUPERSAMPLING = 4
_MARGIN = 0.04  # of the image, kept free around the figure


class Part(NamedTuple):
    """A polygon that is filled, or cut out of what has been drawn before."""

    points: Float[np.ndarray, "n 2"]
    fill: bool = True


Outline = list[Part]


def _polygon(*points: tuple[float, float]) -> Float[np.ndarray, "n 2"]:
    return np.array(points, np.float64)


def _ellipse(
    x: float, y: float, width: float, height: float, *, start: float = 0, stop: float = 1
) -> Float[np.ndarray, "n 2"]:
    """Ellipse with half axes `width`, `height`, or its arc between two fractions of a turn."""
    turn = 2 * np.pi * np.linspace(start, stop, 48)
    return np.stack([x + width * np.cos(turn), y + height * np.sin(turn)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> Float[np.ndarray, "n 2"]:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _arrow(rng: np.random.Generator) -> Outline:
    half, wings, neck = rng.uniform(0.16, 0.3), rng.uniform(0.6, 0.8), rng.uniform(-0.05, 0.3)
    outline = _polygon(
        (-1, -half), (neck, -half), (neck, -wings), (1, 0), (neck, wings), (neck, half), (-1, half)
    )
    return [Part(outline)]


def _bolt(rng: np.random.Generator) -> Outline:
    a, b = rng.uniform(0.1, 0.2), rng.uniform(0.0, 0.12)
    outline = _polygon(
        (0.15 + b, -1), (0.7, -1), (0.3 - b, -a - 0.05), (0.75, -a - 0.05),
        (-0.45, 1), (-0.1 - b, 0.15 + a), (-0.65, 0.15 + a),
    )  # fmt: skip
    return [Part(outline)]


def _cross(rng: np.random.Generator) -> Outline:
    a, b = rng.uniform(0.2, 0.32), rng.uniform(0.2, 0.32)
    return [Part(_box(-1, -a, 1, a)), Part(_box(-b, -1, b, 1))]


def _crown(rng: np.random.Generator) -> Outline:
    valley, side = rng.uniform(-0.15, 0.15), rng.uniform(-0.65, -0.45)
    outline = _polygon(
        (-0.8, 0.75), (-1, side), (-0.42, valley), (0, -0.8), (0.42, valley), (1, side), (0.8, 0.75)
    )
    balls = [_ellipse(x, y, 0.15, 0.15) for x, y in ((-1, side), (0, -0.85), (1, side))]
    return [Part(outline), *map(Part, balls)]


def _cup(rng: np.random.Generator) -> Outline:
    narrow, top, thick = rng.uniform(0, 0.2), rng.uniform(-0.8, -0.65), rng.uniform(0.13, 0.18)
    body = _polygon((-0.85, top), (0.4, top), (0.4 - narrow, 0.8), (-0.85 + narrow, 0.8))
    handle = (0.4 - narrow / 2, -0.02, 0.52, 0.5)
    hole = (0.4 - narrow / 2, -0.02, 0.52 - thick, 0.5 - thick)
    return [Part(_ellipse(*handle)), Part(_ellipse(*hole), fill=False), Part(body)]


def _fish(rng: np.random.Generator) -> Outline:
    height, tail = rng.uniform(0.42, 0.58), rng.uniform(0.4, 0.6)
    body = _ellipse(0.25, 0, 0.75, height)
    fin = _polygon((-0.25, -tail / 4), (-1, -tail), (-0.8, 0), (-1, tail), (-0.25, tail / 4))
    back = _polygon((0.45, -height * 0.8), (-0.1, -height - 0.25), (-0.15, -height * 0.7))
    eye = _ellipse(0.62, -0.12, 0.08, 0.08)
    return [Part(body), Part(fin), Part(back), Part(eye, fill=False)]


def _flower(rng: np.random.Generator) -> Outline:
    petals, reach = int(rng.integers(5, 8)), rng.uniform(0.6, 0.66)
    width = reach * np.sin(np.pi / petals) * rng.uniform(0.82, 0.95)
    parts = []
    for turn in 2 * np.pi * np.arange(petals) / petals:
        circle = _ellipse(0, -reach, width, 0.38)
        parts.append(Part(circle @ _rotation(turn).T))
    heart = rng.uniform(0.16, 0.24)
    core = _ellipse(0, 0, 0.45, 0.45)
    return [*parts, Part(core), Part(_ellipse(0, 0, heart, heart), fill=False)]


def _heart(rng: np.random.Generator) -> Outline:
    t = 2 * np.pi * np.linspace(0, 1, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    height = rng.uniform(0.85, 1.1)
    return [Part(np.stack([x / 17, -height * (y + 2.5) / 17], axis=1))]


def _house(rng: np.random.Generator) -> Outline:
    eaves, overhang = rng.uniform(-0.2, 0.05), rng.uniform(0.08, 0.2)
    walls = _box(-0.75, eaves - 0.1, 0.75, 0.9)
    roof = _polygon((-0.75 - overhang, eaves), (0, -0.95), (0.75 + overhang, eaves))
    chimney = _box(0.32, -0.85, 0.58, eaves)
    door = rng.uniform(-0.4, 0.15)
    return [
        Part(walls), Part(roof), Part(chimney), Part(_box(door, 0.3, door + 0.3, 0.91), fill=False)
    ]  # fmt: skip


def _key(rng: np.random.Generator) -> Outline:
    bow, half = rng.uniform(0.4, 0.5), rng.uniform(0.1, 0.14)
    hole = bow * rng.uniform(0.45, 0.55)
    x, length = bow - 1, rng.uniform(0.3, 0.42)
    return [
        Part(_ellipse(x, 0, bow, bow)),
        Part(_ellipse(x, 0, hole, hole), fill=False),
        Part(_box(x + bow - 0.05, -half, 1, half)),
        Part(_box(0.78, 0, 1, half + length)),
        Part(_box(0.4, 0, 0.6, half + length * 0.75)),
    ]


def _leaf(rng: np.random.Generator) -> Outline:
    # An almond on a stem, its ribs cut out.
    width, ribs = rng.uniform(0.42, 0.55), int(rng.integers(2, 4))
    t = np.linspace(0, 1, 32)
    rim, y = width * np.sin(np.pi * t) ** 0.85, -1 + 1.5 * t
    right = np.stack([rim, y], axis=1)
    blade = np.concatenate([right, right[::-1] * (-1, 1)])
    stem = _polygon((-0.08, 0.4), (0.08, 0.4), (0.22, 1), (0.06, 1))
    cuts = [_polygon((-0.02, -0.7), (0.02, -0.7), (0.06, 0.3), (-0.06, 0.3))]
    for foot in np.linspace(-0.15, 0.25, ribs):
        for side in (-1, 1):
            tip = (side * width * 0.75, foot - 0.4)
            cuts.append(_polygon((0, foot - 0.05), tip, (0, foot + 0.06)))
    return [Part(blade), Part(stem), *(Part(cut, fill=False) for cut in cuts)]


def _moon(rng: np.random.Generator) -> Outline:
    shift, radius = rng.uniform(0.38, 0.55), rng.uniform(0.74, 0.84)
    return [Part(_ellipse(0, 0, 1, 1)), Part(_ellipse(shift, 0, radius, radius), fill=False)]


def _mushroom(rng: np.random.Generator) -> Outline:
    rim, foot, half = rng.uniform(-0.05, 0.15), rng.uniform(0.85, 0.95), rng.uniform(0.2, 0.32)
    cap = _ellipse(0, rim, 1, 0.95, start=0.5, stop=1)
    stem = _polygon((-half, rim - 0.05), (half, rim - 0.05), (half * 1.35, foot))
    stem = np.concatenate([stem, [(-half * 1.35, foot)]])
    return [Part(cap), Part(stem)]


def _ring(rng: np.random.Generator) -> Outline:
    hole = rng.uniform(0.5, 0.68)
    return [Part(_ellipse(0, 0, 1, 1)), Part(_ellipse(0, 0, hole, hole), fill=False)]


def _star(rng: np.random.Generator) -> Outline:
    radius = np.where(np.arange(10) % 2, rng.uniform(0.36, 0.48), 1)
    turn = 2 * np.pi * np.arange(10) / 10
    return [Part(np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1))]


def _tree(rng: np.random.Generator) -> Outline:
    tiers, trunk = int(rng.integers(2, 4)), rng.uniform(0.1, 0.18)
    parts = [Part(_box(-trunk, 0.5, trunk, 1))]
    tops, height = np.linspace(-1, -0.1, tiers), 0.3 + 1.2 / tiers
    for tier, top in enumerate(tops):
        half = 0.45 + 0.3 * (tier + 1) / tiers
        parts.append(Part(_polygon((0, top), (half, top + height), (-half, top + height))))
    return parts


SHAPES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "arrow": _arrow,
    "bolt": _bolt,
    "cross": _cross,
    "crown": _crown,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "heart": _heart,
    "house": _house,
    "key": _key,
    "leaf": _leaf,
    "moon": _moon,
    "mushroom": _mushroom,
    "ring": _ring,
    "star": _star,
    "tree": _tree,
}


def _rotation(turn: float) -> Float[np.ndarray, "2 2"]:
    cos, sin = np.cos(turn), np.sin(turn)
    return np.array([[cos, -sin], [sin, cos]])


def draw_silhouette(
    shape: str,
    rng: np.random.Generator,
    *,
    size: int = 64,
    max_rotation: float = 25.0,
    scale: tuple[float, float] = (0.6, 0.92),
) -> Float[np.ndarray, "size size"]:
    """Draws one exemplar of a shape somewhere in the image.

    Args:
        shape: A key of `SHAPES`.
        rng: Decides proportions, mirror image, rotation, aspect ratio, scale and position.
        size: Side of the image in pixels.
        max_rotation: Largest rotation either way, in degrees.
        scale: Smallest and largest extent of the figure as a fraction of the image.

    Returns:
        float32 [size, size] in [0, 1]: how much of each pixel the figure covers.
    """
    outline = SHAPES[shape](rng)
    mirror = rng.choice((-1.0, 1.0))
    turn = np.deg2rad(rng.uniform(-max_rotation, max_rotation))
    stretch = np.exp(rng.uniform(-0.12, 0.12))
    transform = _rotation(turn) @ np.diag([mirror * stretch, 1 / stretch])
    parts = [(part.points @ transform.T, part.fill) for part in outline]

    filled = np.concatenate([points for points, fill in parts if fill])
    low, high = filled.min(axis=0), filled.max(axis=0)
    room = size * (1 - 2 * _MARGIN)
    factor = min(rng.uniform(*scale) * size, room) / (high - low).max()
    slack = room - factor * (high - low)
    corner = size * _MARGIN + slack * rng.uniform(0, 1, 2)

    large = size * _SUPERSAMPLING
    image = Image.new("L", (large, large))
    draw = ImageDraw.Draw(image)
    for points, fill in parts:
        pixels = ((points - low) * factor + corner) * _SUPERSAMPLING
        draw.polygon(pixels.ravel().tolist(), fill=255 if fill else 0)
    return np.asarray(image.reduce(_SUPERSAMPLING), np.float32) / np.float32(255)
