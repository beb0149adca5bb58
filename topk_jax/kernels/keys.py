"""Integer keys whose order is the order of the quantity ranked.

Integers, not floats, are compared: they order subnormals on devices that flush them to zero, give
every NaN one rank above infinity, and give both zeros one rank.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

RankBy = Literal["magnitude", "value"]

_INT_OF_WIDTH = {2: jnp.int16, 4: jnp.int32}


def supported(dtype: jnp.dtype) -> bool:
    """Whether `dtype` is one of float32, bfloat16 and float16."""
    return dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


def bounds(dtype: jnp.dtype, rank_by: RankBy) -> tuple[int, int]:
    """Smallest and largest key of `dtype` (the largest is that of every NaN)."""
    infinity = {jnp.dtype("float32"): 0x7F800000, jnp.dtype("float16"): 0x7C00}.get(
        jnp.dtype(dtype), 0x7F80
    )
    return (0 if rank_by == "magnitude" else -infinity), infinity + 1


def keys(
    x: Float[Array, "*shape"], rank_by: RankBy, *, equal_nans: bool = True
) -> Int[Array, "*shape"]:
    """Ordered int32 keys of `x` by `|x|` or by `x`; elementwise, so that it fuses into readers.

    Without `equal_nans` a NaN may have any key from the largest on, which is enough for comparisons
    `key >= threshold` and an operation less.
    """
    bits = jax.lax.bitcast_convert_type(x, _INT_OF_WIDTH[x.dtype.itemsize]).astype(jnp.int32)
    magnitude_bits = 0x7FFFFFFF if x.dtype.itemsize == 4 else 0x7FFF
    _, largest = bounds(x.dtype, rank_by)
    magnitude = bits & magnitude_bits
    if equal_nans or rank_by == "value":
        magnitude = jnp.minimum(magnitude, largest)
    if rank_by == "magnitude":
        return magnitude
    # Negative numbers in descending order of magnitude; -0 becomes 0, a negative NaN stays largest.
    return jnp.where((bits < 0) & (magnitude < largest), -magnitude, magnitude)
