"""Convolutional networks with Top-K sites, parameters named as torchvision names them.

Data contract: `logits, features = network.apply(variables, images, train=False)` with float32 NHWC
images normalised as the weights' catalogue entry says. `features` maps public names to what the
next layer sees; `network.feature_names` gives their order of computation. Joining the path of a
module in the variables with "." gives torchvision's name of it. Parameters and images in bfloat16
give bfloat16 features and logits; running statistics stay float32. Networks with batch
normalisation take a `mask` of the rows that count in training.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any

from topk_jax.networks import resnet, vgg
from topk_jax.networks.alexnet import AlexNet
from topk_jax.networks.analysis import conv_matrix, local_affine
from topk_jax.networks.builtin import builtin_network
from topk_jax.networks.features import FeatureExtractor, feature_shapes, variable_shapes
from topk_jax.networks.resnet import ResNet
from topk_jax.networks.sites import TopKSites, parse_stages, resolve_sites
from topk_jax.networks.squeezenet import SqueezeNet
from topk_jax.networks.vgg import VGG

Network = AlexNet | ResNet | SqueezeNet | VGG

_NETWORKS: dict[str, Callable[..., Network]] = {
    "builtin": builtin_network,
    "alexnet": AlexNet,
    **{name: functools.partial(VGG, convolutions=stages) for name, stages in vgg.STAGES.items()},
    **{
        f"{name}_bn": functools.partial(VGG, convolutions=stages, batch_norm=True)
        for name, stages in vgg.STAGES.items()
    },
    **{name: functools.partial(VGG, **fields) for name, fields in vgg.SMALL.items()},
    **{
        name: functools.partial(ResNet, **fields)
        for name, fields in (resnet.STAGES | resnet.CIFAR | resnet.LI2023).items()
    },
    "squeezenet1_0": functools.partial(SqueezeNet, "1_0"),
    "squeezenet1_1": functools.partial(SqueezeNet, "1_1"),
}


def list_networks() -> tuple[str, ...]:
    """Names that `create_network` knows."""
    return tuple(_NETWORKS)


def create_network(name: str, *, topk: TopKSites = None, **options: Any) -> Network:
    """Network by name.

    Torchvision's have its names. "builtin" is the small one whose weights come along. Without
    weights: "resnet18_li2023" (ten classes at 224 x 224, as Li et al. 2023 trained it), "resnet20"
    to "resnet110" (He et al. 2016, for CIFAR-10), "cifar_cnn" and "cnn2" (small, for CIFAR-10).

    Args:
        name: One of `list_networks()`.
        topk: None, a kept fraction in (0, 1] for the published sites, a mapping from feature name
            to a fraction or a `TopK`, or stages and percentages as in "2_20" (`parse_stages`).
        **options: Further fields of the network's class, such as `num_classes` or, for VGG, `pool`.

    Raises:
        ValueError: Unknown name (the nearest are listed), site or value of an option, or a fraction
            outside (0, 1].
        TypeError: An option that the network's class does not have.
    """
    if name not in _NETWORKS:
        near = difflib.get_close_matches(name, _NETWORKS, n=3, cutoff=0.4) or list_networks()
        raise ValueError(f"unknown network {name!r}: did you mean {', '.join(near)}?")
    network = _NETWORKS[name](topk=topk, **options)
    resolve_sites(network.topk, network.published_sites, network.feature_names)
    return network


__all__ = [
    "VGG",
    "AlexNet",
    "FeatureExtractor",
    "Network",
    "ResNet",
    "SqueezeNet",
    "conv_matrix",
    "create_network",
    "feature_shapes",
    "list_networks",
    "local_affine",
    "parse_stages",
    "variable_shapes",
]
