"""ResNet (He et al. 2016) in torchvision's form (v1.5: the stride of a bottleneck is in its 3x3).

`logits, features = network.apply(variables, images, train=False)`; images are float32 NHWC,
normalised. Features: `conv1 relu1 pool1 layer1.0 ... layer1 ... layer4 avgpool logits`, where
`layer1` is its last block; published Top-K sites: after each of the four stages.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from topk_jax import layers
from topk_jax.networks.sites import Features, TopKSites, resolve_sites

# Blocks of each of the four stages, and whether they are bottlenecks.
STAGES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 with four times the width.

    Attributes:
        width: Channels of the inner convolutions.
        stride: Stride of the first (basic) or of the 3x3 convolution (bottleneck).
        bottleneck: Which of the two.
        axis_name: Device axis of batch statistics.
    """

    width: int
    stride: int
    bottleneck: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w c"]:
        """The block's output after its last ReLU."""

        def norm(name: str, x: Array) -> Array:
            module = layers.BatchNorm(axis_name=self.axis_name, name=name)
            return module(x, use_running_average=not train)

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
        if self.stride != 1 or x.shape[-1] != out:
            x = layers.conv(out, 1, stride=self.stride, bias=False, name="downsample.0")(x)
            x = norm("downsample.1", x)
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet.

    Attributes:
        blocks: Number of blocks of each of the four stages.
        bottleneck: Bottleneck blocks (from ResNet-50 on) or basic ones.
        num_classes: Width of the logits.
        topk: Top-K sites, see `networks.sites.resolve_sites`.
        axis_name: Device axis that batch statistics are summed over in training.
    """

    blocks: Sequence[int]
    bottleneck: bool
    num_classes: int = 1000
    topk: TopKSites = None
    axis_name: str | None = None

    @property
    def published_sites(self) -> tuple[str, ...]:
        """Sites that a single fraction stands for (supplement of Li et al. 2023)."""
        return ("layer1", "layer2", "layer3", "layer4")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features in order of computation."""
        names = ["conv1", "relu1", "pool1"]
        for stage, count in enumerate(self.blocks, start=1):
            names += [f"layer{stage}.{i}" for i in range(count)] + [f"layer{stage}"]
        return (*names, "avgpool", "logits")

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"], *, train: bool
    ) -> tuple[Float[Array, "n classes"], dict[str, Array]]:
        """Logits and every named feature of normalised `images`."""
        features = Features(resolve_sites(self.topk, self.published_sites, self.feature_names))
        x = layers.conv(64, 7, stride=2, padding=3, bias=False, name="conv1")(images)
        x = features.site("conv1", x)
        norm = layers.BatchNorm(axis_name=self.axis_name, name="bn1")
        x = features.site("relu1", jax.nn.relu(norm(x, use_running_average=not train)))
        x = features.site("pool1", layers.max_pool(x, 3, 2, padding=1))
        for stage, count in enumerate(self.blocks, start=1):
            for i in range(count):
                block = Block(
                    64 * 2 ** (stage - 1),
                    stride=2 if stage > 1 and i == 0 else 1,
                    bottleneck=self.bottleneck,
                    axis_name=self.axis_name,
                    name=f"layer{stage}.{i}",
                )
                x = features.site(f"layer{stage}.{i}", block(x, train=train))
            x = features.site(f"layer{stage}", x)
        x = features.site("avgpool", layers.adaptive_avg_pool(x, 1))
        logits = nn.Dense(self.num_classes, name="fc")(layers.flatten_channels_first(x))
        return features.site("logits", logits), dict(features)
