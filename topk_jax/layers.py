"""What several networks need and Flax lacks or does otherwise than PyTorch.

Data contract: NHWC, float32 (or bfloat16); functions are pure and keep the dtype. Sizes, paddings
and ties follow PyTorch, since the networks are compared with it number by number.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from topk_jax import convolution


def conv(
    features: int, size: int, *, stride: int = 1, padding: int = 0, bias: bool = True, name: str
):
    """Convolution with PyTorch's symmetric padding, which "SAME" is not where the stride is > 1.

    Computed by `convolution.conv2d`, in the form that suits backend and shape.
    """
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=bias,
        conv_general_dilated=convolution.conv_general_dilated,
        name=name,
    )


def max_pool(
    x: Float[Array, "n h w c"], size: int, stride: int, *, padding: int = 0, ceil: bool = False
) -> Float[Array, "n oh ow c"]:
    """PyTorch's `max_pool2d`; with `ceil`, windows that start inside the input or its left padding.

    Written as maxima of strided slices: on a CPU this is twice as fast as `reduce_window`, and its
    gradient five to ten times. Of equal entries the first in row-major order gets the gradient,
    as in PyTorch, which is why columns are reduced before rows.

    Raises:
        ValueError: The input is smaller than one window.
    """
    pads = [_pool_padding(n, size, stride, padding, ceil) for n in x.shape[1:3]]
    for axis, (left, right) in ((2, pads[1]), (1, pads[0])):
        if (left, right) != (0, 0):
            config = [(0, 0, 0)] * 4
            config[axis] = (left, right, 0)
            x = jax.lax.pad(x, np.asarray(-np.inf, x.dtype), config)
        last = x.shape[axis] - size
        slices = [jax.lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(size)]
        x = functools.reduce(_first_maximum, slices)
    return x


def _first_maximum(a: Array, b: Array) -> Array:
    """Elementwise maximum whose gradient goes to `a` where both are equal; NaN stays NaN."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def avg_pool(x: Float[Array, "n h w c"], size: int, stride: int) -> Float[Array, "n oh ow c"]:
    """PyTorch's `avg_pool2d` without padding, summed in float32 at least.

    Raises:
        ValueError: The input is smaller than one window.
    """
    pads = [_pool_padding(n, size, stride, 0, False) for n in x.shape[1:3]]
    wide = x.astype(_at_least_float32(x.dtype))
    zero = np.zeros((), wide.dtype)
    total = nn.pool(wide, zero, jax.lax.add, (size, size), (stride, stride), pads)
    return (total / size**2).astype(x.dtype)


def _at_least_float32(dtype: Any) -> Any:
    """Dtype in which to sum: float32, or the dtype itself if it is wider."""
    return np.promote_types(dtype, np.float32)


def _pool_padding(n: int, size: int, stride: int, padding: int, ceil: bool) -> tuple[int, int]:
    """Left and right padding of one axis that give PyTorch's number of windows."""
    room = n + 2 * padding - size
    if room < 0:
        raise ValueError(
            f"a map of {n} pixels a side is smaller than a pooling window of {size}: "
            "the input image is too small for this network"
        )
    windows = (-(-room // stride) if ceil else room // stride) + 1
    if ceil and (windows - 1) * stride >= n + padding:
        windows -= 1
    # Negative when the last pixels belong to no window: PyTorch leaves them out, as does lax.
    return padding, (windows - 1) * stride + size - n - padding


def adaptive_avg_pool(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n size size c"]:
    """PyTorch's `adaptive_avg_pool2d`: bin i averages floor(i n / o) up to ceil((i + 1) n / o)."""
    if x.shape[1:3] == (size, size):
        return x
    if size == 1:
        return jnp.mean(x, axis=(1, 2), keepdims=True)
    rows, columns = (jnp.asarray(_bins(n, size), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("nhwc,ih,jw->nijc", x, rows, columns, precision="highest")


def _bins(n: int, size: int) -> list[list[float]]:
    """Matrix [size, n] that averages `n` positions into `size` bins."""
    matrix = []
    for i in range(size):
        start, stop = i * n // size, -(-(i + 1) * n // size)
        matrix.append([1 / (stop - start) if start <= j < stop else 0.0 for j in range(n)])
    return matrix


def flatten_channels_first(x: Float[Array, "n h w c"]) -> Float[Array, "n chw"]:
    """Flattens as PyTorch does NCHW maps, so that a Linear's weights need no permutation."""
    return jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's statistics, right for uneven batches over devices.

    Flax's averages the devices' means with equal weight, which is wrong (and NaN on a device
    without a valid row) when the last batch is padded; here the sums are added over devices first.
    The running variance is the unbiased one, as in PyTorch. Whatever the dtype of the input and of
    the parameters, statistics and arithmetic are float32 (float64 for such an input), and the
    running statistics keep their own dtype.

    Attributes:
        momentum: Weight of the old running statistics (0.9 is PyTorch's momentum 0.1).
        epsilon: Added to the variance.
        axis_name: Name of the mapped device axis that statistics are summed over, if any.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n h w c"],
        *,
        use_running_average: bool,
        mask: Bool[Array, " n"] | None = None,
    ) -> Float[Array, "n h w c"]:
        """Normalises over all axes but the last; rows with `mask` False do not count."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        zeros, ones = (lambda: jnp.zeros((channels,))), (lambda: jnp.ones((channels,)))
        running_mean = self.variable("batch_stats", "mean", zeros)
        running_var = self.variable("batch_stats", "var", ones)
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var, count = self._statistics(x, mask)
            if not self.is_initializing():
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    new = (1 - self.momentum) * new
                    running.value = self.momentum * running.value + new.astype(running.value.dtype)
        dtype = _at_least_float32(x.dtype)
        scale, bias, mean, var = (value.astype(dtype) for value in (scale, bias, mean, var))
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        offset = bias - mean * factor
        broadcast = (1,) * (x.ndim - 1) + (channels,)
        y = x.astype(dtype) * factor.reshape(broadcast) + offset.reshape(broadcast)
        return y.astype(x.dtype)

    def _statistics(self, x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        """Mean, biased variance and number of entries a channel, over all valid rows everywhere."""
        axes: Sequence[int] = tuple(range(x.ndim - 1))
        x = x.astype(_at_least_float32(x.dtype))
        if mask is None:
            weight = jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), x.dtype)
        else:
            weight = mask.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
        per_row = 1
        for size in x.shape[1:-1]:
            per_row *= size

        def total(value: Array) -> Array:
            if self.axis_name is None or self.is_initializing():
                return value
            return jax.lax.psum(value, self.axis_name)

        count = total(jnp.sum(weight) * per_row)
        mean = total(jnp.sum(x * weight, axis=axes)) / jnp.maximum(count, 1)
        deviation = (x - mean.reshape((1,) * (x.ndim - 1) + (-1,))) * weight
        var = total(jnp.sum(deviation * deviation, axis=axes)) / jnp.maximum(count, 1)
        return mean, var, count
