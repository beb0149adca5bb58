"""SqueezeNet 1.0 and 1.1 (Iandola et al. 2016) in torchvision's form.

`logits, features = network.apply(variables, images, train=False)`; images are float32 NHWC,
normalised. Features: `conv1 relu1 pool1 fire2 fire3 ... conv10 logits`, pools named after
the block before them. Top-K sites of a single fraction: after each max-pool (ours: Li et al. did
not publish this network).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from topk_jax import layers
from topk_jax.networks.sites import Features, TopKSites, resolve_sites

# Squeeze widths of fire2 to fire9; each of the two expand layers is four times as wide.
_SQUEEZE = {2: 16, 3: 16, 4: 32, 5: 32, 6: 48, 7: 48, 8: 64, 9: 64}
_POOLED = {"1_0": (1, 4, 8), "1_1": (1, 3, 5)}
# Kernel and channels of conv1.
_STEM = {"1_0": (7, 96), "1_1": (3, 64)}


class Fire(nn.Module):
    """Squeeze to few channels by 1x1, expand by 1x1 and 3x3 side by side.

    Attributes:
        squeeze: Channels after squeezing; eight times as many come out.
    """

    squeeze: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w out"]:
        """The block's output after its ReLUs."""
        x = jax.nn.relu(layers.conv(self.squeeze, 1, name="squeeze")(x))
        narrow = layers.conv(4 * self.squeeze, 1, name="expand1x1")(x)
        wide = layers.conv(4 * self.squeeze, 3, padding=1, name="expand3x3")(x)
        return jax.nn.relu(jnp.concatenate([narrow, wide], axis=-1))


class SqueezeNet(nn.Module):
    """SqueezeNet.

    Attributes:
        version: "1_0" or "1_1".
        num_classes: Width of the logits.
        dropout: Rate in front of the last convolution, in training.
        topk: Top-K sites, see `networks.sites.resolve_sites`.
    """

    version: Literal["1_0", "1_1"]
    num_classes: int = 1000
    dropout: float = 0.5
    topk: TopKSites = None

    @property
    def published_sites(self) -> tuple[str, ...]:
        """Sites that a single fraction stands for: after each max-pool."""
        return tuple(f"pool{i}" for i in _POOLED[self.version])

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features in order of computation."""
        names = ["conv1", "relu1", "pool1"]
        for i in _SQUEEZE:
            names += [f"fire{i}"] + ([f"pool{i}"] if i in _POOLED[self.version] else [])
        return (*names, "conv10", "logits")

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"], *, train: bool
    ) -> tuple[Float[Array, "n classes"], dict[str, Array]]:
        """Logits and every named feature of normalised `images`."""
        features = Features(resolve_sites(self.topk, self.published_sites, self.feature_names))
        size, width = _STEM[self.version]
        x = features.site("conv1", layers.conv(width, size, stride=2, name="features.0")(images))
        x = features.site("relu1", jax.nn.relu(x))
        x = features.site("pool1", layers.max_pool(x, 3, 2, ceil=True))
        index = 3
        for i, squeeze in _SQUEEZE.items():
            x = features.site(f"fire{i}", Fire(squeeze, name=f"features.{index}")(x))
            index += 1
            if i in _POOLED[self.version]:
                x = features.site(f"pool{i}", layers.max_pool(x, 3, 2, ceil=True))
                index += 1
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = features.site("conv10", layers.conv(self.num_classes, 1, name="classifier.1")(x))
        logits = layers.flatten_channels_first(layers.adaptive_avg_pool(jax.nn.relu(x), 1))
        return features.site("logits", logits), dict(features)
