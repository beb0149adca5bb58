"""Settings of published synthesis, and of any VGG or AlexNet.

Source of each preset at its place; what it does otherwise than the source is marked there.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Literal

from topk_jax.networks import AlexNet, Network, create_network, list_networks
from topk_jax.synthesis.objectives import Reduction
from topk_jax.synthesis.parametrization import Kind

ObjectiveKind = Literal["texture", "reconstruction"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """What one synthesis is made of, apart from the images and the mask.

    Attributes:
        model: Network, as `create_network` names it.
        weights: Tag of the catalogue that is the default.
        pool: Pooling of the network, "max" or "average".
        layers: Features compared.
        objective: The default objective.
        weight: Of each layer.
        reduction: Sum or mean over the entries of a layer's statistic.
        sparsity: The default fraction that is the top.
        parametrization: See `parametrization.Parametrization`.
        deviation: Of the noise that the image starts from, in grey levels.
        size: (height, width) of the image in pixels, whatever the target's; an int is the short
            side, the aspect kept.
        max_evaluations: The default budget.
        source: Where this is from.
    """

    model: str
    weights: str
    pool: Literal["max", "average"]
    layers: tuple[str, ...]
    objective: ObjectiveKind = "texture"
    weight: float = 0.25e9
    reduction: Reduction = "sum"
    sparsity: float = 0.05
    parametrization: Kind = "sigmoid"
    deviation: float = 1.0
    size: int | tuple[int, int] = 256
    max_evaluations: int = 500
    source: str = ""

    def network(self) -> Network:
        """The network, without Top-K."""
        if self.model == "alexnet":  # its overlapping pools are part of what was trained
            return create_network(self.model)
        return create_network(self.model, pool=self.pool)


_GATYS_LAYERS = ("relu1_1", "pool1", "pool2", "pool3", "pool4")

_LI2023 = Preset(
    model="vgg19",
    weights="normalised",
    pool="average",
    layers=_GATYS_LAYERS,
    size=(256, 256),
    # The authors allow 2,000 iterations; the picture hardly changes after 500 evaluations.
    max_evaluations=500,
    source="Li et al. 2023, section 4, and the authors' code",
)

PRESETS: Mapping[str, Preset] = {
    "builtin": Preset(
        model="builtin",
        weights="builtin",
        pool="average",
        layers=("relu1_1", "pool1", "pool2", "pool3"),
        size=64,
        max_evaluations=300,
        source="the method of Li et al. 2023 on the built-in network",
    ),
    "li2023": _LI2023,
    # One step of at most 20 iterations and 25 evaluations. The authors' first trial step of 10 is
    # not taken over: our first step does not depend on the scale of the loss.
    "li2023_reconstruction": dataclasses.replace(
        _LI2023,
        objective="reconstruction",
        max_evaluations=25,
        source="Li et al. 2023, supplement 1, and the authors' code",
    ),
    # conv1_1 is compared before its ReLU; the range is that of the target over all channels.
    "gatys2015": Preset(
        model="vgg19",
        weights="normalised",
        pool="average",
        layers=("conv1_1", "pool1", "pool2", "pool3", "pool4"),
        parametrization="bounds",
        deviation=1.0,
        size=256,
        max_evaluations=2000,
        source="Gatys, Ecker, Bethge 2015, sections 2 to 4",
    ),
    # Their layer list is of VGG-19, applied to VGG-16, which makes it relu4_1 and relu5_2; they
    # give the network images in [0, 1] without normalisation (here they are normalised), start from
    # uniform noise over that range (here from grey) and use L-BFGS without a line search.
    "ye2024": Preset(
        model="vgg16",
        weights="imagenet",
        pool="max",
        layers=("relu1_1", "pool1", "pool2", "relu4_1", "relu5_2"),
        weight=1e9,
        reduction="mean",
        parametrization="none",
        size=(256, 256),
        max_evaluations=2000,
        source="the reproduction of Ye et al., their code",
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by its name, or one for any VGG or AlexNet by the network's.

    Raises:
        ValueError: Neither a preset nor such a network; the nearest names are listed.
    """
    if name in PRESETS:
        return PRESETS[name]
    known = [n for n in list_networks() if n.startswith(("vgg", "alexnet"))]
    if name in known:
        network = create_network(name)
        pools = tuple(n for n in network.feature_names if n.startswith("pool"))[:4]
        first = "relu1" if isinstance(network, AlexNet) else "relu1_1"
        return Preset(
            model=name,
            weights="imagenet",
            pool="max" if isinstance(network, AlexNet) else "average",
            layers=(first, *pools),
            source="the method of Li et al. 2023 on torchvision's network",
        )
    near = difflib.get_close_matches(name, [*PRESETS, *known], n=3, cutoff=0.4)
    raise ValueError(
        f"unknown preset {name!r}: expected {', '.join(near or PRESETS)}, or the name of a VGG or "
        "AlexNet"
    )
