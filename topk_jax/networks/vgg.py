"""VGG (Simonyan and Zisserman, 2015) in torchvision's form, with and without batch normalisation.

`logits, features = network.apply(variables, images, train=False)`; images are NHWC, normalised as
the weights' catalogue entry says, of the parameters' dtype (float32). Features: `conv1_1 (bn1_1)
relu1_1 ... pool1 ... pool5 fc6 relu6 fc7 relu7 logits`; published Top-K sites: after each pool.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from topk_jax import layers
from topk_jax.networks.sites import Features, TopKSites, resolve_sites

# Convolutions of each of the five stages.
STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

# Small networks for CIFAR-10 in the same form (ours; for images of 32 x 32).
SMALL: dict[str, dict[str, Any]] = {
    "cnn2": {
        "convolutions": (1, 1),
        "widths": (16, 32),
        "pooled_size": 8,
        "hidden": (),
        "num_classes": 10,
    },
    "cifar_cnn": {
        "convolutions": (1, 1, 1, 1),
        "widths": (32, 64, 128, 256),
        "batch_norm": True,
        "pooled_size": 2,
        "hidden": (256, 128),
        "num_classes": 10,
        "dropout": 0.0,  # ten epochs of augmented images do not overfit
    },
}


class VGG(nn.Module):
    """VGG with any number of stages; the defaults other than `convolutions` are torchvision's.

    Attributes:
        convolutions: Number of 3x3 convolutions of each stage.
        widths: Channels of each stage.
        batch_norm: Normalise after each convolution.
        pool: "max" as trained, or "average" (Gatys et al. 2015).
        pooled_size: Side of the map that the classifier sees (adaptive average pooling).
        hidden: Width of the hidden classifier layers, named fc6, fc7 and so on.
        num_classes: Width of the logits.
        dropout: Rate behind the hidden layers, in training.
        topk: Top-K sites, see `networks.sites.resolve_sites`.
        axis_name: Device axis that batch statistics are summed over in training.
    """

    convolutions: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    batch_norm: bool = False
    pool: Literal["max", "average"] = "max"
    pooled_size: int = 7
    hidden: Sequence[int] = (4096, 4096)
    num_classes: int = 1000
    dropout: float = 0.5
    topk: TopKSites = None
    axis_name: str | None = None

    @property
    def published_sites(self) -> tuple[str, ...]:
        """Sites that a single fraction stands for: every pool (Li et al. 2023)."""
        return tuple(f"pool{stage}" for stage, _ in enumerate(self.convolutions, start=1))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features in order of computation."""
        names = []
        for stage, count in enumerate(self.convolutions, start=1):
            for i in range(1, count + 1):
                names += [f"conv{stage}_{i}"]
                names += [f"bn{stage}_{i}"] if self.batch_norm else []
                names += [f"relu{stage}_{i}"]
            names += [f"pool{stage}"]
        for layer, _ in enumerate(self.hidden, start=6):
            names += [f"fc{layer}", f"relu{layer}"]
        return (*names, "logits")

    @property
    def output_module(self) -> str:
        """Name of the module that gives the logits."""
        return f"classifier.{3 * len(self.hidden)}"

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"], *, train: bool, mask: Bool[Array, " n"] | None = None
    ) -> tuple[Float[Array, "n classes"], dict[str, Array]]:
        """Logits and every named feature of normalised `images`.

        In training, rows with a False `mask` do not count in the statistics of the batch.
        """
        features = Features(resolve_sites(self.topk, self.published_sites, self.feature_names))
        x = images
        index = 0
        for stage, (count, width) in enumerate(
            zip(self.convolutions, self.widths, strict=True), start=1
        ):
            for i in range(1, count + 1):
                name = f"features.{index}"
                x = layers.conv(width, 3, padding=1, name=name)(x)
                x = features.site(f"conv{stage}_{i}", x)
                index += 1
                if self.batch_norm:
                    norm = layers.BatchNorm(axis_name=self.axis_name, name=f"features.{index}")
                    x = norm(x, use_running_average=not train, mask=mask)
                    x = features.site(f"bn{stage}_{i}", x)
                    index += 1
                x = features.site(f"relu{stage}_{i}", jax.nn.relu(x))
                index += 1
            pool = layers.max_pool if self.pool == "max" else layers.avg_pool
            x = features.site(f"pool{stage}", pool(x, 2, 2))
            index += 1
        x = layers.flatten_channels_first(layers.adaptive_avg_pool(x, self.pooled_size))
        for i, width in enumerate(self.hidden):
            # torchvision's classifier: Linear, ReLU and Dropout a hidden layer.
            x = features.site(f"fc{6 + i}", nn.Dense(width, name=f"classifier.{3 * i}")(x))
            x = features.site(f"relu{6 + i}", jax.nn.relu(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.num_classes, name=self.output_module)(x)
        logits = features.site("logits", x)
        return logits, dict(features)
