"""A network seen from its features: their variables, and a function that gives some of them."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float


def variable_shapes(network: Any, *, image_size: int = 224) -> dict[str, Any]:
    """Shapes and dtypes of the network's variables, without computing or allocating them."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    init = functools.partial(network.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)


def feature_shapes(network: Any, names: Sequence[str], *, image_size: int = 224) -> dict[str, Any]:
    """Shapes and dtypes of the variables that some features depend on, and of no others.

    Args:
        network: Any network of this package.
        names: Features, as in `network.feature_names`.
        image_size: Side of the input images.

    Raises:
        ValueError: An unknown feature; the nearest names are listed.
    """
    extract = FeatureExtractor(network, tuple(names))
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        variable_shapes(network, image_size=image_size)
    )
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda flat, x: extract(jax.tree.unflatten(structure, flat), x))(
        [leaf for _, leaf in leaves], images
    )
    needed = {v for v in traced.jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    for equation in reversed(traced.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if isinstance(v, jax.extend.core.Var))
    kept = {
        tuple(part.key for part in path): leaf
        for (path, leaf), variable in zip(leaves, traced.jaxpr.invars, strict=False)
        if variable in needed
    }
    return flax.traverse_util.unflatten_dict(kept)


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A network, in evaluation mode, as a function that gives some of its features.

    Attributes:
        network: Any network of this package.
        names: Features, as in `network.feature_names`.

    Raises:
        ValueError: An unknown feature; the nearest names are listed.
    """

    network: Any
    names: tuple[str, ...]

    def __post_init__(self):
        known = self.network.feature_names
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
                raise ValueError(
                    f"unknown feature {name!r}: this network has e.g. {', '.join(near)}"
                )

    def __call__(
        self, variables: Mapping[str, Any], images: Float[Array, "n h w 3"]
    ) -> dict[str, Array]:
        """The features of normalised images, by name.

        `variables` may be those of `feature_shapes` alone. The others are zeros here, of layers
        that nobody reads: no compiled program computes or holds them.
        """
        shapes = variable_shapes(self.network, image_size=max(images.shape[1:3]))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        filled = flax.traverse_util.flatten_dict(zeros)
        filled |= flax.traverse_util.flatten_dict(dict(variables))
        whole = flax.traverse_util.unflatten_dict(filled)
        features = self.network.apply(whole, images, train=False)[1]
        return {name: features[name] for name in self.names}
