"""How Top-K is found: one module per implementation, all equal bit for bit.

Contract of every implementation, for float `x [b, n, c]` in float32, bfloat16 or float16 and an
int32 scalar `1 <= k < n`, traced or not: of the `n` positions of every `(b, c)` the `k` of largest
rank are kept, ties going to the lowest position. What was found is a threshold a row and a cut:
kept are the keys above the threshold, and those equal to it at positions below the cut.

`select` is what `topk_jax.topk` calls; it chooses the implementation and has the derivative.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels import xla
from topk_jax.kernels.keys import RankBy

Implementation = Literal["xla", "pallas_gpu", "pallas_gpu_interpret"]
Keep = Literal["top", "rest"]

_forced: list[Implementation] = []


class Selected(NamedTuple):
    """Result of `select`.

    Attributes:
        y: `x` where kept (or where not kept, for "rest"), else +0; [b, n, c].
        threshold: Key of the k-th entry of every row, or any key with exactly `k` at or above it.
        cut: Keys equal to the threshold are kept at the positions below.
    """

    y: Float[Array, "b n c"]
    threshold: Int[Array, "b c"]
    cut: Int[Array, "b c"]


def choose(shape: tuple[int, ...], dtype: jnp.dtype) -> Implementation:
    """Implementation for `x` of this shape [b, n, c] and dtype.

    The XLA form everywhere, until the Pallas kernel has been measured on a GPU; `force` chooses it.
    A row that does not fit on the chip stays with the XLA form.
    """
    if not _forced or _forced[-1] == "xla":
        return "xla"
    from topk_jax.kernels import pallas_gpu

    return _forced[-1] if pallas_gpu.supports(shape, dtype) else "xla"


@contextlib.contextmanager
def force(implementation: Implementation) -> Iterator[None]:
    """Makes `choose` return this one inside the `with` statement, for tests and benchmarks.

    Functions traced under another choice keep it: trace anew inside.

    Raises:
        ValueError: An unknown name.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation {implementation!r}: expected {', '.join(get_args(Implementation))}"
        )
    _forced.append(implementation)
    try:
        yield
    finally:
        _forced.pop()


def kept(
    x: Float[Array, "b n c"],
    threshold: Int[Array, "b c"],
    cut: Int[Array, "b c"],
    rank_by: RankBy,
) -> Bool[Array, "b n c"]:
    """Mask of the `k` entries that a threshold and a cut stand for."""
    key = keys_lib.keys(x, rank_by)
    position = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :, None]
    tied = (key == threshold[:, None, :]) & (position < cut[:, None, :])
    return (key > threshold[:, None, :]) | tied


# Recomputed in the backward pass, so that the mask is kept but not an array of zeros beside it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _masked(mask: Bool[Array, "b n c"], x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def select(
    x: Float[Array, "b n c"],
    k: Int[Array, ""],
    rank_by: RankBy,
    keep: Keep,
    implementation: Implementation,
) -> Selected:
    """The `k` entries of largest rank of every `(b, c)`, or the others, and zeros.

    The derivative is the mask, in both modes and to any order. The backward pass keeps the mask and
    nothing else.
    """
    if implementation != "xla":
        from topk_jax.kernels import pallas_gpu

        interpret = implementation == "pallas_gpu_interpret"
        return Selected(*pallas_gpu.select(x, k, rank_by, keep, interpret=interpret))
    threshold, cut = xla.search(x, k, rank_by)
    mask = kept(x, threshold, cut, rank_by)
    zero = jnp.zeros((), x.dtype)
    # Not a product: inf * 0 is NaN, and -1 * 0 is -0.
    y = jnp.where(mask, x, zero) if keep == "top" else jnp.where(mask, zero, x)
    return Selected(y, threshold, cut)


@select.defjvp
def _select_jvp(
    rank_by: RankBy, keep: Keep, implementation: Implementation, primals: tuple, tangents: tuple
) -> tuple[Selected, Selected]:
    x, k = primals
    dx, _ = tangents
    selected = select(x, k, rank_by, keep, implementation)
    mask = kept(jax.lax.stop_gradient(x), selected.threshold, selected.cut, rank_by)
    dy = _masked(mask if keep == "top" else ~mask, dx)
    integers = np.zeros(selected.threshold.shape, jax.dtypes.float0)
    return selected, Selected(dy, integers, integers)  # pyright: ignore[reportArgumentType]
