"""Weights of a VGG scaled so that every filter's mean activation is 1 (Gatys et al. 2015)."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float32

from topk_jax.networks import VGG, FeatureExtractor


def renormalize(
    network: VGG, variables: Any, batches: Iterable[Float32[Any, "n h w 3"]]
) -> dict[str, Any]:
    """Scales each filter by its mean activation over images and positions; what it sees, back.

    Activations are those after the ReLU. ReLU and pooling commute with positive factors, so each
    feature of the result is that of the network divided by its mean, and the logits are the same.
    Filters that never respond are left as they are, with a notice.

    Args:
        network: A VGG without batch normalisation, with the pooling that is to be used.
        variables: Its variables, whole or those of `networks.feature_shapes`: the convolutions up
            to any one, from the first on.
        batches: Normalised images; all of one size.

    Returns:
        float32 NumPy variables of the same structure.

    Raises:
        ValueError: Batch normalisation, no images, or activations that are not finite.
    """
    if network.batch_norm:
        raise ValueError("renormalize: expected a VGG without batch normalisation")
    layers = [
        (f"features.{index}", f"relu{stage}_{i}")
        for index, stage, i in _convolutions(network)
        if f"features.{index}" in variables["params"]
    ]
    extract = FeatureExtractor(network, tuple(name for _, name in layers))

    @jax.jit
    def sums(variables: Any, images: Array) -> list[Array]:
        found = extract(variables, images)
        return [jnp.mean(found[name], axis=(0, 1, 2)) * images.shape[0] for name in extract.names]

    variables = jax.device_put(variables)
    total, count = None, 0
    for images in batches:
        found = [np.asarray(mean, np.float64) for mean in sums(variables, jnp.asarray(images))]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        count += len(images)
    if total is None:
        raise ValueError("renormalize: no images")
    params = dict(jax.tree.map(np.asarray, variables["params"]))
    before = np.ones(3)
    for (module, name), mean in zip(layers, total, strict=True):
        mean = mean / count
        if not np.all(np.isfinite(mean)):
            raise ValueError(f"renormalize: activations of {name} are not finite")
        silent = int(np.sum(mean <= 0))
        if silent:
            logging.info("%s: %d of %d filters never respond: left as they are", name, silent,
                         len(mean))  # fmt: skip
        mean = np.where(mean > 0, mean, 1.0)
        kernel = params[module]["kernel"] * before[:, None] / mean
        bias = params[module]["bias"] / mean
        params[module] = {"kernel": _float32(kernel), "bias": _float32(bias)}
        before = mean
    first = params.get("classifier.0")
    if first is not None:
        # Flattened as PyTorch does: each channel's positions in a row.
        factors = np.repeat(before, network.pooled_size**2)[:, None]
        params["classifier.0"] = dict(first) | {"kernel": _float32(first["kernel"] * factors)}
    return dict(variables) | {"params": params}


_float32 = functools.partial(np.asarray, dtype=np.float32)


def _convolutions(network: VGG) -> Iterable[tuple[int, int, int]]:
    """Index in torchvision's `features`, stage, and number within the stage, of each."""
    index = 0
    for stage, count in enumerate(network.convolutions, start=1):
        for i in range(1, count + 1):
            yield index, stage, i
            index += 2
        index += 1
