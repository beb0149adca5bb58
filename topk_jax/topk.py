"""Top-K activation: keep the strongest responses of every feature map, set the others to zero.

Data contract: float arrays (float32, bfloat16, float16) of any rank; by default NHWC, ranked over
the two spatial axes, separately for every channel of every image. `fraction` is always what is
kept. Source: Li, Wen, Li, Lee, "Emergence of Shape Bias in Convolutional Neural Networks through
Activation Sparsity", NeurIPS 2023, section 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels import xla
from topk_jax.kernels.keys import RankBy

Keep = Literal["top", "rest"]

SPATIAL = (-3, -2)


def kept_count(fraction: float, sizes: Sequence[int]) -> int:
    """Number of entries kept of a row of n1 * n2 positions: `int(max(1, fraction * n1 * n2))`.

    The product runs in float64 from left to right over the axes in ascending order, as the authors'
    code does; another order can differ by one (fraction .29 of 10x10 is 29, not 28).

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction must be in (0, 1], the part of each feature map that is kept; got {fraction}"
        )
    product = float(fraction)
    for size in sizes:
        product *= size
    return int(max(1, product))


def topk_mask(
    x: Float[Array, "*shape"],
    fraction: float,
    *,
    axes: Sequence[int] = SPATIAL,
    rank_by: RankBy = "magnitude",
    keep: Keep = "top",
) -> Bool[Array, "*shape"]:
    """Mask of the `k` largest entries over `axes`, separately for every other index.

    Exactly `kept_count(fraction, sizes)` entries are True (`keep="top"`), or exactly the others
    (`keep="rest"`). Ties go to the lowest flat index over the axes; every NaN ranks above infinity;
    +0 and -0 rank alike.

    Args:
        x: Activations, float32, bfloat16 or float16.
        fraction: Part kept, in (0, 1]; a Python number, since it fixes `k`.
        axes: Axes ranked jointly; (-3, -2) are the spatial axes of NHWC.
        rank_by: "magnitude" ranks by `|x|` (the paper), "value" by `x`.
        keep: "top", or "rest" for the complement.

    Returns:
        Boolean mask of the shape of `x`.

    Raises:
        ValueError: A fraction outside (0, 1], a wrong axis, or an unknown `rank_by` or `keep`.
        TypeError: `x` has another dtype.
    """
    axes = _check(x, axes, rank_by, keep)
    k = kept_count(fraction, [x.shape[axis] for axis in axes])
    if x.size == 0 or k == math.prod(x.shape[axis] for axis in axes):
        top = jnp.ones(x.shape, jnp.bool_)
    else:
        top = _top_mask(jax.lax.stop_gradient(x), jnp.int32(k), axes, rank_by)
    return top if keep == "top" else ~top


def topk_activation(
    x: Float[Array, "*shape"],
    fraction: float,
    *,
    axes: Sequence[int] = SPATIAL,
    rank_by: RankBy = "magnitude",
    keep: Keep = "top",
) -> Float[Array, "*shape"]:
    """`x` where `topk_mask` is True, else +0. Kept entries keep their value and sign.

    The gradient is the mask. Each entry of `x` appears, bit for bit, in exactly one of the results
    for `keep="top"` and `keep="rest"`; `fraction=1` with `keep="top"` is the identity. Arguments
    and errors are those of `topk_mask`.
    """
    mask = topk_mask(x, fraction, axes=axes, rank_by=rank_by, keep=keep)
    # Not a product: inf * 0 is NaN, and -1 * 0 is -0.
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


class TopK(nn.Module):
    """`topk_activation` as a Linen module, to be put into a network or named as a site's setting.

    Attributes:
        fraction: Part of each feature map that is kept, in (0, 1].
        axes: Axes ranked jointly.
        rank_by: "magnitude" or "value".
        keep: "top" or "rest".
    """

    fraction: float
    axes: Sequence[int] = SPATIAL
    rank_by: RankBy = "magnitude"
    keep: Keep = "top"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation to `x` of any shape that has `axes`."""
        return topk_activation(
            x, self.fraction, axes=self.axes, rank_by=self.rank_by, keep=self.keep
        )


def _check(x: Array, axes: Sequence[int], rank_by: str, keep: str) -> tuple[int, ...]:
    """The axes as ascending non-negative numbers; errors of the other arguments."""
    if not keys_lib.supported(x.dtype):
        raise TypeError(
            f"Top-K takes float32, bfloat16 or float16, got {x.dtype}; convert with x.astype"
        )
    if rank_by not in ("magnitude", "value"):
        raise ValueError(f'rank_by must be "magnitude" or "value", got {rank_by!r}')
    if keep not in ("top", "rest"):
        raise ValueError(f'keep must be "top" or "rest", got {keep!r}')
    if not axes or any(not -x.ndim <= axis < x.ndim for axis in axes):
        raise ValueError(f"axes {tuple(axes)} do not fit an array of shape {x.shape}")
    positive = sorted(axis % x.ndim for axis in axes)
    if len(set(positive)) != len(positive):
        raise ValueError(f"axes {tuple(axes)} name one axis of an array of shape {x.shape} twice")
    return tuple(positive)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _top_mask(
    x: Float[Array, "*shape"], k: Int[Array, ""], axes: tuple[int, ...], rank_by: RankBy
) -> Bool[Array, "*shape"]:
    """The mask of the top `k`; `k` is traced, so that one program serves every fraction.

    The ranked axes become the middle of [b, n, c]. Where they lie side by side this is a reshape:
    what precedes them is `b`, what follows is `c`.
    """
    first, last = axes[0], axes[-1]
    if last - first != len(axes) - 1:
        others = tuple(axis for axis in range(x.ndim) if axis not in axes)
        order = others + axes
        moved_axes = tuple(range(len(others), x.ndim))
        mask = _top_mask(jnp.transpose(x, order), k, moved_axes, rank_by)
        return jnp.transpose(mask, [order.index(axis) for axis in range(x.ndim)])
    b, n, c = (
        math.prod(s) for s in (x.shape[:first], x.shape[first : last + 1], x.shape[last + 1 :])
    )
    return xla.mask(x.reshape(b, n, c), k, rank_by).reshape(x.shape)
