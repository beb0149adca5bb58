"""ResNet (He et al. 2016), for ImageNet in torchvision's form and for small images.

`logits, features = network.apply(variables, images, train=False)`; images are NHWC, normalised, of
the parameters' dtype (float32). Features: `conv1 relu1 pool1 layer1.0 ... layer1 ... avgpool
logits`, where `layer1` is its last block and `pool1` is missing with the CIFAR stem; Top-K sites of
a single fraction: after each stage. A bottleneck's stride is in its 3x3 convolution (v1.5).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from topk_jax import layers
from topk_jax.networks.sites import Features, TopKSites, resolve_sites

Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["projection", "padding"]

# Blocks of each stage, and whether they are bottlenecks (He et al., table 1).
STAGES: dict[str, dict[str, Any]] = {
    "resnet18": {"blocks": (2, 2, 2, 2), "bottleneck": False},
    "resnet34": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True},
}

# Networks that Li et al. (2023) trained on ten classes at 224 x 224, after a network for CIFAR-10.
LI2023: dict[str, dict[str, Any]] = {
    "resnet18_li2023": {**STAGES["resnet18"], "stem": "cifar", "head_pool": 4, "num_classes": 10},
}

# 6n + 2 layers for CIFAR-10 (He et al., section 4.2): n blocks in each of three stages.
CIFAR: dict[str, dict[str, Any]] = {
    f"resnet{6 * n + 2}": {
        "blocks": (n, n, n),
        "bottleneck": False,
        "stem": "cifar",
        "width": 16,
        "shortcut": "padding",
        "num_classes": 10,
    }
    for n in (3, 5, 7, 9, 18)
}


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 with four times the width.

    Attributes:
        width: Channels of the inner convolutions.
        stride: Stride of the first (basic) or of the 3x3 convolution (bottleneck).
        bottleneck: Which of the two.
        shortcut: As in `ResNet`.
        axis_name: Device axis of batch statistics.
    """

    width: int
    stride: int
    bottleneck: bool
    shortcut: Shortcut = "projection"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], *, train: bool, mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n h w c"]:
        """The block's output after its last ReLU."""

        def norm(name: str, x: Array) -> Array:
            module = layers.BatchNorm(axis_name=self.axis_name, name=name)
            return module(x, use_running_average=not train, mask=mask)

        out = 4 * self.width if self.bottleneck else self.width
        sizes = (
            ((1, 1), (3, self.stride), (1, 1)) if self.bottleneck else ((3, self.stride), (3, 1))
        )
        y = x
        for i, (size, stride) in enumerate(sizes, start=1):
            width = out if i == len(sizes) else self.width
            y = layers.conv(
                width, size, stride=stride, padding=size // 2, bias=False, name=f"conv{i}"
            )(y)
            y = norm(f"bn{i}", y)
            if i < len(sizes):
                y = jax.nn.relu(y)
        missing = out - x.shape[-1]
        if self.stride != 1 or missing:
            if self.shortcut == "padding":
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
            else:
                x = layers.conv(out, 1, stride=self.stride, bias=False, name="downsample.0")(x)
                x = norm("downsample.1", x)
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet.

    Attributes:
        blocks: Number of blocks of each stage; from the second on a stage halves the map and
            doubles the width.
        bottleneck: Bottleneck blocks (from ResNet-50 on) or basic ones.
        num_classes: Width of the logits.
        stem: "imagenet", a 7x7 convolution of stride 2 and a max-pool, or "cifar", a 3x3
            convolution of stride 1 alone.
        width: Channels of the first stage's inner convolutions, and of the stem.
        shortcut: Where a block changes the shape: "projection" by a 1x1 convolution (option B of
            the paper) or "padding" of every second pixel with channels of zeros, as many on either
            side (option A).
        head_pool: None averages the last map; a number averages it in windows of that side, which
            the last layer then sees flattened as PyTorch does, channels first. The parameters then
            belong to one image size.
        topk: Top-K sites, see `networks.sites.resolve_sites`.
        axis_name: Device axis that batch statistics are summed over in training.
    """

    blocks: Sequence[int]
    bottleneck: bool
    num_classes: int = 1000
    stem: Stem = "imagenet"
    width: int = 64
    shortcut: Shortcut = "projection"
    head_pool: int | None = None
    topk: TopKSites = None
    axis_name: str | None = None

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: An unknown stem or shortcut.
        """
        for name, known in (("stem", Stem), ("shortcut", Shortcut)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(known))}"
                )
        super().__post_init__()

    @property
    def published_sites(self) -> tuple[str, ...]:
        """Sites that a single fraction stands for (supplement of Li et al. 2023)."""
        return tuple(f"layer{stage}" for stage, _ in enumerate(self.blocks, start=1))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features in order of computation."""
        names = ["conv1", "relu1"] + (["pool1"] if self.stem == "imagenet" else [])
        for stage, count in enumerate(self.blocks, start=1):
            names += [f"layer{stage}.{i}" for i in range(count)] + [f"layer{stage}"]
        return (*names, "avgpool", "logits")

    @property
    def output_module(self) -> str:
        """Name of the module that gives the logits."""
        return "fc"

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"], *, train: bool, mask: Bool[Array, " n"] | None = None
    ) -> tuple[Float[Array, "n classes"], dict[str, Array]]:
        """Logits and every named feature of normalised `images`.

        In training, rows with a False `mask` do not count in the statistics of the batch.
        """
        features = Features(resolve_sites(self.topk, self.published_sites, self.feature_names))
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        convolution = layers.conv(
            self.width, size, stride=stride, padding=size // 2, bias=False, name="conv1"
        )
        x = features.site("conv1", convolution(images))
        norm = layers.BatchNorm(axis_name=self.axis_name, name="bn1")
        x = features.site("relu1", jax.nn.relu(norm(x, use_running_average=not train, mask=mask)))
        if self.stem == "imagenet":
            x = features.site("pool1", layers.max_pool(x, 3, 2, padding=1))
        for stage, count in enumerate(self.blocks, start=1):
            for i in range(count):
                block = Block(
                    self.width * 2 ** (stage - 1),
                    stride=2 if stage > 1 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    shortcut=self.shortcut,
                    axis_name=self.axis_name,
                    name=f"layer{stage}.{i}",
                )
                x = features.site(f"layer{stage}.{i}", block(x, train=train, mask=mask))
            x = features.site(f"layer{stage}", x)
        if self.head_pool is None:
            x = layers.adaptive_avg_pool(x, 1)
        else:
            x = layers.avg_pool(x, self.head_pool, self.head_pool)
        x = features.site("avgpool", x)
        head = nn.Dense(self.num_classes, name=self.output_module)
        logits = features.site("logits", head(layers.flatten_channels_first(x)))
        return logits, dict(features)
