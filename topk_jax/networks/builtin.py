"""The small network whose weights come with the package, for the built-in stimuli (64x64).

A VGG of five stages with one convolution each; its features are named as VGG's: `conv1_1 relu1_1
pool1 ... pool5 fc6 relu6 logits`. Top-K sites: after each pool. Its 16 classes are the built-in
categories in their order. Trained by `scripts/train.py --config=configs/builtin.py`.
"""

from typing import Any

from topk_jax.networks.sites import TopKSites
from topk_jax.networks.vgg import VGG


def builtin_network(*, topk: TopKSites = None, **options: Any) -> VGG:
    """The built-in network.

    Args:
        topk: Top-K sites, as in `create_network`.
        **options: Other fields of `VGG` than the built-in network has.
    """
    fields: dict[str, Any] = {
        "convolutions": (1, 1, 1, 1, 1),
        "widths": (16, 32, 64, 96, 128),
        "pooled_size": 2,
        "hidden": (128,),
        "num_classes": 16,
        "dropout": 0.2,
    }
    return VGG(topk=topk, **(fields | options))
