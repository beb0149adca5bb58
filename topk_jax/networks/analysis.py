"""Two views of a network as linear algebra: a convolution's matrix, a network's local affine map.

Data contract: arrays of any floating dtype, NHWC and HWIO without the batch axis; pure functions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def conv_matrix(
    kernel: Float[Array, "kh kw in out"], in_hw: tuple[int, int], *, stride: int, pad: int
) -> Float[Array, "oh_ow_out h_w_in"]:
    """The matrix A of a convolution: `A @ x.ravel()` is the flattened result for one map x.

    Args:
        kernel: Of the convolution (of the cross-correlation, as networks have it), HWIO.
        in_hw: Height and width of the map.
        stride: Step along both axes, at least 1.
        pad: Zeros on each of the four sides.

    Returns:
        Dense matrix: rows run over height, width and channel of the result [oh, ow, out], columns
        over those of the map [h, w, in]. It is linear in, and differentiable by, the kernel.

    Raises:
        ValueError: The padded map is smaller than the kernel.
    """
    taps = []
    for size, length in zip(kernel.shape[:2], in_hw, strict=True):
        room = length + 2 * pad - size
        if room < 0:
            raise ValueError(
                f"a map of {in_hw[0]} x {in_hw[1]} with pad={pad} is smaller than the kernel of "
                f"{kernel.shape[0]} x {kernel.shape[1]}"
            )
        # Position that a tap of an output sees; those in the padding match no position.
        seen = np.arange(room // stride + 1)[:, None] * stride + np.arange(size) - pad
        taps.append(jnp.asarray(seen[..., None] == np.arange(length), kernel.dtype))
    matrix = jnp.einsum("iar,jbc,abmo->ijorcm", *taps, kernel, precision="highest")
    rows = matrix.shape[0] * matrix.shape[1] * matrix.shape[2]
    return matrix.reshape(rows, -1)


def local_affine(
    function: Callable[[Float[Array, "*inputs"]], Float[Array, "*outputs"]],
    x: Float[Array, "*inputs"],
) -> tuple[Float[Array, "*outputs inputs"], Float[Array, "*outputs"]]:
    """The affine map that a piecewise affine function is around a point: f(y) = W y + b.

    A network of convolutions, ReLUs, max-pools and Top-K (in evaluation mode) is such a function.

    Args:
        function: Of one array, differentiable at `x`.
        x: The point.

    Returns:
        W, the Jacobian, of the result's shape followed by that of `x`, and b = f(x) - W x of the
        result's shape.
    """
    x = jnp.asarray(x)
    slope = jax.jacobian(function)(x)
    return slope, function(x) - jnp.tensordot(slope, x, x.ndim)
