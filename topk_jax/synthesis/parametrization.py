"""How an image is written in the numbers that are optimised.

Data contract: images are float32 [1, h, w, c] in the network's normalised units; low and high are
scalars or arrays that broadcast to them. `start` draws noise, `to_image` and `to_numbers` are
inverse to one another within the range.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Kind = Literal["sigmoid", "bounds", "none"]

_EDGE = 1e-6  # the logit of what is nearer to an end of the range would be infinite in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parametrization:
    """One of three ways to keep an image within a range, or not to.

    Attributes:
        kind: "sigmoid" is low + (high - low) * sigmoid(z) (Li et al. 2023, code); "bounds" is z
            itself, kept within the range by the optimiser (Gatys et al. 2015); "none" is z itself.
        low: Least value of the image.
        high: Greatest value.
    """

    kind: Kind = dataclasses.field(metadata={"static": True})
    low: Any
    high: Any

    @property
    def bounds(self) -> tuple[Any, Any] | None:
        """What the optimiser must keep the numbers within; None for nothing."""
        return (self.low, self.high) if self.kind == "bounds" else None

    def to_image(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The image of the numbers."""
        if self.kind != "sigmoid":
            return z
        return self.low + (self.high - self.low) * jax.nn.sigmoid(z)

    def to_numbers(self, image: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The numbers of an image, which is clipped to the range first (unless kind is "none")."""
        if self.kind == "none":
            return image
        if self.kind == "bounds":
            return jnp.clip(image, self.low, self.high)
        y = (image - self.low) / (self.high - self.low)
        y = jnp.clip(y, _EDGE, 1 - _EDGE)
        return jnp.log(y) - jnp.log1p(-y)


def within_range_of(target: Float[Any, "1 h w c"], kind: Kind) -> Parametrization:
    """Parametrisation with the least and the greatest value of a target, over all its channels.

    Raises:
        ValueError: All values of the target are the same, so that there is no range.
    """
    low, high = float(target.min()), float(target.max())
    if not low < high:
        raise ValueError(
            "all pixels of the target have the same value: there is nothing to synthesise"
        )
    return Parametrization(kind, jnp.float32(low), jnp.float32(high))


def start(
    key: PRNGKeyArray, parametrization: Parametrization, shape: tuple[int, ...], deviation: float
) -> Float[Array, "*shape"]:
    """Numbers of an image of normal noise about zero, clipped to the range.

    Args:
        key: Random key.
        parametrization: Of the image.
        shape: Of the image.
        deviation: Standard deviation of the noise, in the network's normalised units.
    """
    return parametrization.to_numbers(deviation * jax.random.normal(key, shape))
