"""The convolution of every network, computed in the way that is fastest for its backend and shape.

Data contract: NHWC maps, HWIO kernels, equal floating dtypes; symmetric zero padding, as PyTorch
has it. `jit`, `vmap`, `pmap`, `jvp`, `vjp` and derivatives of any order work in every form. On
finite maps the forms differ by rounding only; an infinity or NaN spreads further in "winograd",
over the rows of its tile.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Method = Literal["auto", "xla", "dot", "winograd"]

# F(4, 3): four outputs of a filter of three taps from six inputs, with the interpolation points
# 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2016, section 4.3).
_INPUTS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUTS = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
_TILE = len(_OUTPUTS)

_WIDE = 256
"""Channels on both sides from which "winograd" wins on a CPU. With 128 (28 x 28, batch 32) it is
level, with 192 on the narrower side (13 x 13) too."""

_WIDE_ALONE = 128
"""The same for a single image, as texture synthesis has it."""

_BY_PRODUCTS = 512
"""Channels on both sides from which its columns are matrix products rather than convolutions: those
are faster forwards, but the input gradient of a 1-D convolution takes three times as long here."""

_SLICE = 2**17
"""Numbers of a map that XLA:CPU takes the gradient of a kernel of at a time."""

_SLICE_ROWS = (4, 16)
"""Least and largest number of images of such a slice: few make for many operations to compile."""


def conv2d(
    x: Float[Array, "n h w in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int = 1,
    padding: int = 0,
    method: Method = "auto",
) -> Float[Array, "n oh ow out"]:
    """Cross-correlation of maps with a kernel, as PyTorch's `conv2d`.

    Args:
        x: Maps.
        kernel: Of the same dtype.
        stride: Step along both axes, at least 1.
        padding: Zeros on each of the four sides.
        method: "xla" is XLA's convolution. "dot", for 1x1 kernels with stride 1 and no padding,
            is a matrix product, which XLA:CPU computes faster. "winograd", for 3x3 kernels with
            stride 1 and padding 1, is F(4, 3) along the rows (Lavin and Gray 2016), nested with
            1-D convolutions or matrix products over the columns: half of the multiplications, and
            a relative error of some 1e-6 in float32. "auto" is the fastest of those that fit: on a
            CPU "dot", and "winograd" in float32 with at least 256 channels on both sides (128 for
            a single image); otherwise "xla".

    Raises:
        ValueError: An unknown method, or one that is not for this kernel, stride or padding.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: expected one of {', '.join(get_args(Method))}")
    fits = _fitting(kernel.shape[:2], stride, padding)
    if method not in ("auto", "xla", fits):
        raise ValueError(
            f"method={method!r} does not compute a {kernel.shape[0]}x{kernel.shape[1]} kernel with "
            f"stride {stride} and padding {padding}: write method='auto'"
        )
    if method == "auto":
        method = _fastest(fits, x, kernel)
    if method == "dot":
        return x @ kernel[0, 0]
    if method == "winograd":
        return _winograd(x, kernel)
    return _xla(x, kernel, stride, padding)


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **kwargs: Any
) -> Array:
    """`conv2d` with the signature that `flax.linen.Conv` calls.

    Raises:
        ValueError: Dilation, groups, or strides or paddings that differ between the sides.
    """
    dilations = (kwargs.get("lhs_dilation") or ()), (kwargs.get("rhs_dilation") or ())
    plain = all(factor == 1 for factors in dilations for factor in factors)
    sides = {side for axis in padding for side in axis}
    groups = kwargs.get("feature_group_count", 1)
    if not plain or groups != 1 or len(set(window_strides)) != 1 or len(sides) != 1:
        raise ValueError(
            f"convolution with strides {tuple(window_strides)}, padding {padding}, dilation "
            f"{dilations} and {groups} groups: expected equal strides, equal padding, no dilation "
            "and one group; use jax.lax.conv_general_dilated for others"
        )
    return conv2d(lhs, rhs, stride=window_strides[0], padding=sides.pop())


def _fitting(size: Sequence[int], stride: int, padding: int) -> Method:
    """The form other than XLA's that computes this convolution, or "xla" if there is none."""
    if stride == 1 and (*size, padding) == (1, 1, 0):
        return "dot"
    if stride == 1 and (*size, padding) == (3, 3, 1):
        return "winograd"
    return "xla"


def _fastest(fits: Method, x: Array, kernel: Array) -> Method:
    if jax.default_backend() != "cpu":
        return "xla"
    least = _WIDE_ALONE if x.shape[0] == 1 else _WIDE
    wide = min(kernel.shape[2:]) >= least and x.dtype == jnp.float32
    return "xla" if fits == "winograd" and not wide else fits


def _plain(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


_xla = jax.custom_jvp(_plain, nondiff_argnums=(2, 3))


def _xla_jvp(stride: int, padding: int, primals: Any, tangents: Any) -> tuple[Array, Any]:
    """The derivative, with the part of the kernel a few images at a time on a CPU.

    Transposed, that part is the gradient of the kernel: a sum over slices, which XLA:CPU computes
    faster than the whole, most so where maps are large and channels few.
    """
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = _plain(x, kernel, stride, padding)
    parts = []
    if not isinstance(x_dot, SymbolicZero):
        parts += [_plain(x_dot, kernel, stride, padding)]
    if not isinstance(kernel_dot, SymbolicZero):
        rows = _slice_rows(x.shape)
        slices = [x[start : start + rows] for start in range(0, len(x), rows)] or [x]
        slices = [_plain(part, kernel_dot, stride, padding) for part in slices]
        parts += [slices[0] if len(slices) == 1 else jnp.concatenate(slices)]
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


_xla.defjvp(_xla_jvp, symbolic_zeros=True)


def _slice_rows(shape: Sequence[int]) -> int:
    """Images that the gradient of a kernel is taken of at a time, a power of two."""
    n, h, w, c = shape
    if jax.default_backend() != "cpu":
        return max(n, 1)
    fitting = max(1, _SLICE // max(h * w * c, 1))
    return min(max(2 ** (fitting.bit_length() - 1), _SLICE_ROWS[0]), _SLICE_ROWS[1])


def _winograd(x: Array, kernel: Array) -> Array:
    """3x3, padding 1: six lines of combined rows, combined again into four rows of a tile."""
    n, h, w, c = x.shape
    tiles = -(-h // _TILE)
    below = _TILE * (tiles + 1) - h - 1
    rows = jnp.pad(x, ((0, 0), (1, below), (0, 0), (0, 0)))
    rows = rows.reshape(n, tiles + 1, _TILE, w, c)
    # The six rows that a tile needs: its own four and the first two of the tile below.
    six = [rows[:, :tiles, i] for i in range(_TILE)] + [rows[:, 1:, i] for i in range(2)]
    columns = _products if min(kernel.shape[2:]) >= _BY_PRODUCTS else _convolutions
    lines = [
        columns(_combine(of_inputs, six), _combine(of_taps, list(kernel)))
        for of_inputs, of_taps in zip(_INPUTS, _TAPS, strict=True)
    ]
    out = jnp.stack([_combine(of_products, lines) for of_products in _OUTPUTS], axis=2)
    return out.reshape(n, _TILE * tiles, w, -1)[:, :h]


def _products(line: Array, taps: Array) -> Array:
    """Cross-correlation along the columns, as three shifted matrix products."""
    width = line.shape[2]
    line = jnp.pad(line, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return functools.reduce(jnp.add, [line[:, :, j : j + width] @ taps[j] for j in range(3)])


def _convolutions(line: Array, taps: Array) -> Array:
    """The same as a convolution with a kernel of one row."""
    return jax.lax.conv_general_dilated(
        line, taps[None], (1, 1), ((0, 0), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _combine(weights: Sequence[float], arrays: Sequence[Array]) -> Array:
    """Sum of the weighted arrays, without the terms that are zero."""
    terms = [
        array if weight == 1 else weight * array
        for weight, array in zip(weights, arrays, strict=True)
        if weight
    ]
    return functools.reduce(jnp.add, terms)
