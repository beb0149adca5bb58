"""The built-in stimuli: 16 shapes times 16 textures, drawn by formula.

Category i has shape i and texture i: a congruent image of a fish is fish-shaped and covered with
scales. In a cue-conflict image the two disagree, as in the set of Geirhos et al. (ICLR 2019), whose
naming and design are kept: `<shape><i>-<texture><j>.png`, 10 exemplars of each shape, 3 of each
texture, 1,280 images, 5 for each pair of categories, 80 of them congruent.

As after style transfer, figure and ground bear the same texture; the outline shows as a step in
brightness and colour and a break in the pattern. Shape exemplar i fixes outline, place and size;
texture exemplar j fixes the pattern and all colours.

Data contract: images are uint8 [64, 64, 3]. Each is a pure function of the seed, the categories
and the exemplars. Test and training images come from separate streams of random numbers: no test
exemplar is ever trained on, even under the same seed.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8

from topk_jax.stimuli.base import Stimuli
from topk_jax.stimuli.shapes import draw_silhouette
from topk_jax.stimuli.textures import draw_texture

BUILTIN_IMAGE_SIZE = 64

# Category (named after its shape) -> texture.
BUILTIN_TEXTURES: dict[str, str] = {
    "arrow": "stripes",
    "bolt": "zigzag",
    "cross": "grid",
    "crown": "triangles",
    "cup": "crackle",
    "fish": "scales",
    "flower": "honeycomb",
    "heart": "checks",
    "house": "bricks",
    "key": "woven",
    "leaf": "straw",
    "moon": "bubbles",
    "mushroom": "dots",
    "ring": "marble",
    "star": "speckle",
    "tree": "camouflage",
}
BUILTIN_CATEGORIES: tuple[str, ...] = tuple(BUILTIN_TEXTURES)

_SHAPE_EXEMPLARS = 10
_TEXTURE_EXEMPLARS = 3
_PER_PAIR = 5

# Strengths of the two cues, of full brightness: a texture's colours lie this far from their mean on
# either side, and figure and ground this far apart. Each cue is as strong where it stands alone as
# in the images that have both.
_CONTRAST = (0.1, 0.22)
_STEP = (0.2, 0.45)
_MIDDLE = (0.4, 0.6)
# In training the texture may be faint, down to nothing, so that one cue does not hide the other.
_TRAINING_CONTRAST = (0.0, 0.22)

Image = UInt8[np.ndarray, "64 64 3"]
Colors = Float[np.ndarray, "2 3"]


class _Stream(enum.IntEnum):
    """What a random stream is for; part of its seed, so the order must not change."""

    CONFLICT_SHAPE = 0
    CONFLICT_TEXTURE = 1
    CONFLICT_PAIRS = 2
    CONGRUENT = 3
    SILHOUETTE = 4
    TEXTURE = 5
    TRAINING = 6


class Shares(NamedTuple):
    """Relative numbers of training images of each kind."""

    congruent: float = 1.0
    silhouette: float = 0.0
    texture: float = 0.0


def _rng(seed: int, stream: _Stream, *rest: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, *rest])


def _palettes(
    rng: np.random.Generator, contrast: tuple[float, float] = _CONTRAST
) -> tuple[Colors, Colors]:
    """Dark and light colour of the ground and of the figure, in [0, 1]."""
    step = rng.uniform(*_STEP) * rng.choice((-1.0, 1.0))
    middle = rng.uniform(*_MIDDLE)
    tint = rng.uniform(-0.1, 0.1, (2, 1, 3))  # of the region
    hue = rng.uniform(-0.3, 0.3, (2, 2, 3))  # of each colour, relative to the contrast
    amplitude = rng.uniform(*contrast, (2, 1, 1)) * (np.array([[-1.0], [1.0]]) + hue)
    brightness = middle + np.array([-step, step]).reshape(2, 1, 1) / 2
    ground, figure = np.clip(brightness + tint + amplitude, 0, 1).astype(np.float32)
    return ground, figure


def _quantize(image: Float[np.ndarray, "64 64 3"]) -> Image:
    return np.round(image * np.float32(255)).astype(np.uint8)


def _paint(field: Float[np.ndarray, "h w"], colors: Colors) -> Float[np.ndarray, "h w 3"]:
    return colors[0] + field[..., None] * (colors[1] - colors[0])


def _draw_textured(
    shape: str,
    texture: str,
    shape_rng: np.random.Generator,
    texture_rng: np.random.Generator,
    *,
    contrast: tuple[float, float] = _CONTRAST,
) -> Image:
    """Figure and ground with two samples of one texture, in different colours."""
    size = BUILTIN_IMAGE_SIZE
    mask = draw_silhouette(shape, shape_rng, size=size)[..., None]
    ground_colors, figure_colors = _palettes(texture_rng, contrast)
    field = draw_texture(BUILTIN_TEXTURES[texture], texture_rng, height=size, width=2 * size)
    ground = _paint(field[:, :size], ground_colors)
    figure = _paint(field[:, size:], figure_colors)
    return _quantize(ground + mask * (figure - ground))


def _draw_plain(shape: str, rng: np.random.Generator) -> Image:
    """One grey on another grey."""
    mask = draw_silhouette(shape, rng, size=BUILTIN_IMAGE_SIZE)[..., None]
    step = rng.uniform(*_STEP) * rng.choice((-1.0, 1.0))
    middle = rng.uniform(*_MIDDLE)
    grey = np.float32(middle - step / 2) + np.float32(step) * mask
    return _quantize(np.repeat(grey, 3, axis=2))


def _draw_full(texture: str, rng: np.random.Generator) -> Image:
    """A texture that fills the image."""
    colors, _ = _palettes(rng)
    size = BUILTIN_IMAGE_SIZE
    return _quantize(
        _paint(draw_texture(BUILTIN_TEXTURES[texture], rng, height=size, width=size), colors)
    )


def _balanced_pairs(seed: int) -> list[tuple[str, int, str, int]]:
    """Shape, its exemplar, texture, its exemplar: every shape exemplar 8 times, 5 a pair."""
    rng = _rng(seed, _Stream.CONFLICT_PAIRS)
    # Each texture category has 80 images: its exemplars in turn, shuffled.
    turns = np.arange(len(BUILTIN_CATEGORIES) * _PER_PAIR) % _TEXTURE_EXEMPLARS + 1
    supply = {texture: iter(rng.permutation(turns).tolist()) for texture in BUILTIN_CATEGORIES}
    pairs = []
    for shape in BUILTIN_CATEGORIES:
        textures = rng.permutation(BUILTIN_CATEGORIES).tolist()
        for first, second in zip(textures[::2], textures[1::2], strict=True):
            exemplars = (rng.permutation(_SHAPE_EXEMPLARS) + 1).tolist()
            for texture, chosen in (
                (first, exemplars[:_PER_PAIR]),
                (second, exemplars[_PER_PAIR:]),
            ):
                pairs.extend((shape, i, texture, next(supply[texture])) for i in chosen)
    return sorted(pairs, key=lambda pair: f"{pair[0]}{pair[1]}-{pair[2]}{pair[3]}.png")


def _index(category: str) -> int:
    return BUILTIN_CATEGORIES.index(category)


def builtin_cue_conflict(*, seed: int = 0) -> Stimuli:
    """The built-in cue-conflict set: 1,280 images, 5 for each (shape, texture) pair.

    Args:
        seed: Another seed draws other exemplars and pairs them differently.

    Returns:
        Stimuli named "cue-conflict" with `BUILTIN_CATEGORIES`, in the order of their file names
        within each shape category. Images are drawn when they are loaded (1 to 3 ms each).
    """
    pairs = _balanced_pairs(seed)

    def load(index: int) -> Image:
        shape, i, texture, j = pairs[index]
        return _draw_textured(
            shape,
            texture,
            _rng(seed, _Stream.CONFLICT_SHAPE, _index(shape), i),
            _rng(seed, _Stream.CONFLICT_TEXTURE, _index(texture), j),
        )

    return Stimuli(
        name="cue-conflict",
        categories=BUILTIN_CATEGORIES,
        image_names=tuple(f"{shape}{i}-{texture}{j}.png" for shape, i, texture, j in pairs),
        category=tuple(shape for shape, _, _, _ in pairs),
        condition=("NaN",) * len(pairs),
        load=load,
        origin=f"builtin seed={seed}",
    )


def _single_condition(
    kind: _Stream, name: str, template: str, *, seed: int, per_category: int
) -> Stimuli:
    items = [(c, e) for c in BUILTIN_CATEGORIES for e in range(1, per_category + 1)]

    def load(index: int) -> Image:
        category, exemplar = items[index]
        return _draw_kind(kind, category, _rng(seed, kind, _index(category), exemplar))

    return Stimuli(
        name=name,
        categories=BUILTIN_CATEGORIES,
        image_names=tuple(template.format(category=c, exemplar=e) for c, e in items),
        category=tuple(category for category, _ in items),
        condition=("NaN",) * len(items),
        load=load,
        origin=f"builtin seed={seed}",
    )


def _draw_kind(
    kind: _Stream,
    category: str,
    rng: np.random.Generator,
    *,
    contrast: tuple[float, float] = _CONTRAST,
) -> Image:
    if kind == _Stream.CONGRUENT:
        return _draw_textured(category, category, rng, rng, contrast=contrast)
    if kind == _Stream.SILHOUETTE:
        return _draw_plain(category, rng)
    return _draw_full(category, rng)


def builtin_congruent(*, seed: int = 0, per_category: int = 20) -> Stimuli:
    """Images whose shape and texture agree, named "star3-star3.png".

    Args:
        seed: Another seed draws other exemplars.
        per_category: Number of exemplars of each of the 16 categories.
    """
    return _single_condition(
        _Stream.CONGRUENT,
        "congruent",
        "{category}{exemplar}-{category}{exemplar}.png",
        seed=seed,
        per_category=per_category,
    )


def builtin_silhouettes(*, seed: int = 0, per_category: int = 20) -> Stimuli:
    """Shapes without texture or colour, one grey on another, named "star3.png".

    Args:
        seed: Another seed draws other exemplars.
        per_category: Number of exemplars of each of the 16 categories.
    """
    return _single_condition(
        _Stream.SILHOUETTE,
        "silhouette",
        "{category}{exemplar}.png",
        seed=seed,
        per_category=per_category,
    )


def builtin_textures(*, seed: int = 0, per_category: int = 20) -> Stimuli:
    """Textures that fill the image, without a figure, named "star3.png" after their category.

    Args:
        seed: Another seed draws other exemplars.
        per_category: Number of exemplars of each of the 16 categories.
    """
    return _single_condition(
        _Stream.TEXTURE,
        "texture",
        "{category}{exemplar}.png",
        seed=seed,
        per_category=per_category,
    )


def builtin_training_images(
    count: int, *, seed: int = 0, shares: Sequence[float] = Shares()
) -> tuple[UInt8[np.ndarray, "n 64 64 3"], Int32[np.ndarray, " n"]]:
    """Draws a training set, several hundred images a second.

    Args:
        count: Number of images.
        seed: Another seed draws other images. Image k does not depend on `count`.
        shares: Relative numbers of congruent, silhouette and texture images.

    Returns:
        Images uint8 [count, 64, 64, 3] and labels int32 [count], indices into
        `BUILTIN_CATEGORIES`; categories take turns.

    Raises:
        ValueError: If `count` is negative, or the shares are not three numbers of at least 0 with
            a positive sum.
    """
    if count < 0:
        raise ValueError(f"count is {count}: give the number of images, 0 or more")
    weights = np.asarray(shares, np.float64)
    if weights.shape != (3,) or not np.all(weights >= 0) or not 0 < weights.sum() < np.inf:
        raise ValueError(
            f"shares is {tuple(shares)}: give three numbers of at least 0, not all 0, for "
            "congruent, silhouette and texture images"
        )
    kinds = (_Stream.CONGRUENT, _Stream.SILHOUETTE, _Stream.TEXTURE)
    limits = np.cumsum(weights)[:2] / weights.sum()
    images = np.empty((count, BUILTIN_IMAGE_SIZE, BUILTIN_IMAGE_SIZE, 3), np.uint8)
    labels = np.arange(count, dtype=np.int32) % len(BUILTIN_CATEGORIES)
    for k in range(count):
        rng = _rng(seed, _Stream.TRAINING, k)
        kind = kinds[int(np.searchsorted(limits, rng.uniform(), side="right"))]
        images[k] = _draw_kind(
            kind, BUILTIN_CATEGORIES[labels[k]], rng, contrast=_TRAINING_CONTRAST
        )
    return images, labels
