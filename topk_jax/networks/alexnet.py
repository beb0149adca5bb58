"""AlexNet in torchvision's form (Krizhevsky 2014, "One weird trick").

`logits, features = network.apply(variables, images, train=False)`; images are float32 NHWC,
normalised. Features: `conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5
fc6 relu6 fc7 relu7 logits`.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from topk_jax import layers
from topk_jax.networks.sites import Features, TopKSites, resolve_sites

# Index in torchvision's `features`, name, channels, kernel, stride, padding, pooled afterwards.
_CONVOLUTIONS = (
    (0, "1", 64, 11, 4, 2, True),
    (3, "2", 192, 5, 1, 2, True),
    (6, "3", 384, 3, 1, 1, False),
    (8, "4", 256, 3, 1, 1, False),
    (10, "5", 256, 3, 1, 1, True),
)


class AlexNet(nn.Module):
    """AlexNet.

    Attributes:
        num_classes: Width of the logits.
        dropout: Rate in front of the two hidden classifier layers, in training.
        topk: Top-K sites, see `networks.sites.resolve_sites`.
    """

    num_classes: int = 1000
    dropout: float = 0.5
    topk: TopKSites = None

    @property
    def published_sites(self) -> tuple[str, ...]:
        """Sites that a single fraction stands for (Li et al. 2023)."""
        return ("pool1", "pool2", "relu3", "relu4", "pool5")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features in order of computation."""
        names = []
        for _, name, *_, pooled in _CONVOLUTIONS:
            names += [f"conv{name}", f"relu{name}"] + ([f"pool{name}"] if pooled else [])
        return (*names, "fc6", "relu6", "fc7", "relu7", "logits")

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w 3"], *, train: bool
    ) -> tuple[Float[Array, "n classes"], dict[str, Array]]:
        """Logits and every named feature of normalised `images`."""
        features = Features(resolve_sites(self.topk, self.published_sites, self.feature_names))
        x = images
        for index, name, width, size, stride, padding, pooled in _CONVOLUTIONS:
            convolution = layers.conv(
                width, size, stride=stride, padding=padding, name=f"features.{index}"
            )
            x = features.site(f"conv{name}", convolution(x))
            x = features.site(f"relu{name}", jax.nn.relu(x))
            if pooled:
                x = features.site(f"pool{name}", layers.max_pool(x, 3, 2))
        x = layers.flatten_channels_first(layers.adaptive_avg_pool(x, 6))
        for layer, index in ((6, 1), (7, 4)):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = features.site(f"fc{layer}", nn.Dense(4096, name=f"classifier.{index}")(x))
            x = features.site(f"relu{layer}", jax.nn.relu(x))
        logits = features.site("logits", nn.Dense(self.num_classes, name="classifier.6")(x))
        return logits, dict(features)
