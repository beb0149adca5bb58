"""Sixteen textures: stationary patterns without a figure.

Data contract: a texture is float32 [height, width] in [0, 1], dark to light. Where the pattern
falls, how large it is and how it is turned come from the `numpy.random.Generator` that is passed
in. Two halves of one wide field are two samples of the same texture.

Regular patterns are formulas of cell coordinates (u, v), one cell being the pattern's period;
random ones are marks drawn with Pillow, or smoothed noise. Both are drawn finer than the pixels
and averaged.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

Field = Float[np.ndarray, "height width"]
_FINE = 2  # fine samples along a pixel's side


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Field:
    """Smooth noise with mean 0 and variance of about 1; `cell` is its grain in samples."""
    height, width = shape
    grid = rng.standard_normal((int(height / cell) + 3, int(width / cell) + 3), np.float32)
    image = Image.fromarray(grid)
    box = (1.0, 1.0, 1 + width / cell, 1 + height / cell)
    smooth = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    return smooth * np.float32(1.4)


def _fraction(x: Field) -> Field:
    return x - np.floor(x)


# Formulas: (u, v, rng) -> field. Comparisons give hard edges; averaging the samples softens them.


def _stripes(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return _fraction(u) < rng.uniform(0.4, 0.6)


def _zigzag(u: Field, v: Field, rng: np.random.Generator) -> Field:
    fold = np.abs(_fraction(v / np.float32(rng.uniform(1.3, 1.7))) - np.float32(0.5))
    return _fraction(u + 2 * fold) < rng.uniform(0.4, 0.6)


def _grid(u: Field, v: Field, rng: np.random.Generator) -> Field:
    line = rng.uniform(0.16, 0.26)
    return (_fraction(u) < line) | (_fraction(v) < line)


def _triangles(u: Field, v: Field, rng: np.random.Generator) -> Field:
    row = v * np.float32(2 / 3**0.5)
    return _fraction(u - row / 2) + _fraction(row) < rng.uniform(0.9, 1.0)


def _checks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return (_fraction(u / 2) < 0.5) ^ (_fraction(v / 2) < 0.5)


def _bricks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    row = np.floor(v)
    along = u / 2 + row / 2
    joint = np.float32(rng.uniform(0.16, 0.24))
    mortar = (_fraction(along) < joint / 2) | (v - row < joint)
    shades = rng.uniform(0.0, 0.45, (16, 16)).astype(np.float32)
    brick = shades[row.astype(np.int32) % 16, np.floor(along).astype(np.int32) % 16]
    return np.where(mortar, np.float32(1), brick)


def _woven(u: Field, v: Field, rng: np.random.Generator) -> Field:
    strands = int(rng.integers(2, 4))
    over = (_fraction(u / 2) < 0.5) ^ (_fraction(v / 2) < 0.5)
    return _fraction(np.where(over, u, v) * strands) < rng.uniform(0.5, 0.7)


def _dots(u: Field, v: Field, rng: np.random.Generator) -> Field:
    row = np.round(v * np.float32(2 / 3**0.5))
    along = u + row / 2
    across = v - row * np.float32(3**0.5 / 2)
    return (along - np.round(along)) ** 2 + across**2 < rng.uniform(0.26, 0.36) ** 2


def _honeycomb(u: Field, v: Field, rng: np.random.Generator) -> Field:
    tall = np.float32(3**0.5)

    def to_wall(x: Field, y: Field) -> Field:
        """Hexagonal distance from the nearest centre of one of the two lattices."""
        x, y = np.abs(x - np.round(x)), np.abs(y - tall * np.round(y / tall))
        return np.maximum(x, x / 2 + y * (tall / 2))

    distance = np.minimum(to_wall(u, v), to_wall(u + np.float32(0.5), v + tall / 2))
    return distance > 0.5 * rng.uniform(0.76, 0.86)


def _scales(u: Field, v: Field, rng: np.random.Generator) -> Field:
    radius, rim = 0.56, rng.uniform(0.68, 0.78)
    lowest = np.floor(2 * v) - 1
    field = np.ones_like(u)
    for ahead in range(4):  # later rows lie over earlier ones
        row = lowest + ahead
        along = u + row / 2
        distance = np.sqrt((along - np.round(along)) ** 2 + (v - row / 2) ** 2) / np.float32(radius)
        shade = np.where(distance > rim, np.float32(0), np.float32(0.5) + distance / 2)
        field = np.where(distance < 1, shade, field)
    return field


def _marble(u: Field, v: Field, rng: np.random.Generator) -> Field:
    cell = u.shape[0] / np.ptp(u)
    turbulence = _noise(rng, u.shape, 1.6 * cell) + _noise(rng, u.shape, 0.7 * cell) / 2
    veins = np.abs(_fraction(u / 3 + np.float32(0.32) * turbulence) - np.float32(0.5))
    return np.sqrt(2 * veins)


def _crackle(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Distance between the nearest and the second nearest of one random point a cell."""
    jitter = rng.uniform(0.1, 0.9, (2, 16, 16)).astype(np.float32)
    column, row = np.floor(u), np.floor(v)
    x, y = u - column, v - row
    cell = (row.astype(np.int32) % 16) * 16 + column.astype(np.int32) % 16
    first = np.full_like(u, 9)
    second = np.full_like(u, 9)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            neighbour = np.roll(jitter, (-down, -right), axis=(1, 2)).reshape(2, -1)
            distance = (x - (neighbour[0] + np.float32(right)).take(cell)) ** 2
            distance += (y - (neighbour[1] + np.float32(down)).take(cell)) ** 2
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    wall = (np.sqrt(second) - np.sqrt(first)) / np.float32(rng.uniform(0.24, 0.34))
    return np.clip(wall * 2 - np.float32(0.5), 0, 1)


# Marks and noise: (rng, shape of the fine field, cell in fine samples) -> field.


def _straw(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Field:
    height, width = shape
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    count = int(4.0 * height * width / cell**2)
    centre = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
    turn, reach = rng.uniform(0, np.pi, count), cell * rng.uniform(0.5, 0.9, count)
    tip = np.stack([np.cos(turn), np.sin(turn)], axis=1) * reach[:, None]
    ends = np.concatenate([centre - tip, centre + tip], axis=1).tolist()
    thickness = max(2, round(cell / 7))
    for line, shade in zip(ends, rng.integers(0, 2, count).tolist(), strict=True):
        draw.line(line, fill=255 * shade, width=thickness)
    return np.asarray(image, np.float32) / np.float32(255)


def _bubbles(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Field:
    height, width = shape
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    count = int(1.7 * height * width / cell**2)
    centre = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
    radius = cell * np.sort(rng.uniform(0.22, 0.75, count))[::-1]
    boxes = np.concatenate([centre - radius[:, None], centre + radius[:, None]], axis=1).tolist()
    thickness = max(2, round(cell / 7))
    for box in boxes:  # large ones first, so that small ones stay whole
        draw.ellipse(box, fill=0, outline=255, width=thickness)
    return np.asarray(image, np.float32) / np.float32(255)


def _speckle(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Field:
    return _noise(rng, shape, 0.24 * cell) > rng.uniform(0.2, 0.6)


def _camouflage(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Field:
    return _noise(rng, shape, 0.55 * cell) > rng.uniform(-0.2, 0.2)


PATTERNS: dict[str, Callable[[Field, Field, np.random.Generator], Field]] = {
    "bricks": _bricks,
    "checks": _checks,
    "crackle": _crackle,
    "dots": _dots,
    "grid": _grid,
    "honeycomb": _honeycomb,
    "marble": _marble,
    "scales": _scales,
    "stripes": _stripes,
    "triangles": _triangles,
    "woven": _woven,
    "zigzag": _zigzag,
}
MARKS: dict[str, Callable[[np.random.Generator, tuple[int, int], float], Field]] = {
    "bubbles": _bubbles,
    "camouflage": _camouflage,
    "speckle": _speckle,
    "straw": _straw,
}
TEXTURES = (*PATTERNS, *MARKS)

# Periods in pixels relative to the others, so that all look about equally coarse.
_COARSENESS = {
    "bricks": 0.85, "checks": 0.6, "crackle": 1.1, "grid": 0.85, "honeycomb": 1.05,
    "scales": 1.3, "stripes": 0.8, "triangles": 1.15, "woven": 1.0, "marble": 1.0,
}  # fmt: skip


def draw_texture(
    texture: str,
    rng: np.random.Generator,
    *,
    height: int = 64,
    width: int = 64,
    cell: tuple[float, float] = (7.0, 12.0),
) -> Field:
    """Draws one exemplar of a texture that fills the image.

    Args:
        texture: A name in `TEXTURES`.
        rng: Decides scale, rotation, bending, phase, proportions, and the random marks.
        height: Height in pixels.
        width: Width in pixels.
        cell: Smallest and largest period in pixels (for a texture of average coarseness).

    Returns:
        float32 [height, width] in [0, 1].
    """
    pixels = rng.uniform(*cell) * _COARSENESS.get(texture, 1.0)
    shape = (height * _FINE, width * _FINE)
    if texture in MARKS:
        field = MARKS[texture](rng, shape, pixels * _FINE)
    else:
        turn = rng.uniform(0, 2 * np.pi)
        axis = np.array([np.cos(turn), np.sin(turn)], np.float32) / np.float32(pixels)
        x = (np.arange(shape[1], dtype=np.float32) + np.float32(0.5)) / _FINE
        y = ((np.arange(shape[0], dtype=np.float32) + np.float32(0.5)) / _FINE)[:, None]
        bend = _noise(rng, shape, 4 * pixels * _FINE) * np.float32(0.12)
        phase = rng.uniform(0, 64, 2).astype(np.float32)
        u = axis[0] * x + axis[1] * y + (phase[0] + bend)
        v = axis[0] * y - axis[1] * x + (phase[1] + bend)
        field = PATTERNS[texture](u, v, rng)
    fine = np.asarray(field, np.float32).reshape(height, _FINE, width, _FINE)
    return fine.mean(axis=(1, 3))
