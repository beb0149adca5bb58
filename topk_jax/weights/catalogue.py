"""Which weights exist, where, and what is known about them.

An entry is named by a network and a tag: ("vgg16", "imagenet"). The digests of torchvision's files
are the eight hexadecimal digits of their names, the start of the file's SHA-256.

Accuracies: torchvision's documentation; Geirhos et al. 2019 (arXiv:1811.12231) and its
repository for the networks trained on Stylized-ImageNet ("sin": on it alone; "sin+in": on it and
ImageNet together; "shape": "sin+in", then finetuned on ImageNet, the paper's Shape-ResNet).

"normalised" is the VGG-19 of Gatys et al. 2015, without its classifier: each filter is scaled so
that its mean activation over the ImageNet validation images is 1 (with maximum pooling).
"""

import dataclasses
import difflib

from topk_jax.images import IMAGENET_PREPROCESSING, Preprocessing

BUILTIN_FILE = "builtin.safetensors"
"""Name, within this package, of the weights of the built-in network."""

BUILTIN_SHA256 = "05bc5a4abbbdfff43db010de93a6e8d72a413c24c6c6f619124b12517506b52a"
"""All 64 digits of that file's SHA-256; while it is empty, "builtin" is refused."""

BUILTIN_PARAMETERS = 257424
"""Number of parameters in that file."""

BUILTIN_PREPROCESSING = Preprocessing(64, 64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
"""What the built-in network was trained with."""

CAFFE_PREPROCESSING = Preprocessing(
    224, 256, (0.48501961, 0.45795686, 0.40760392), (1 / 255, 1 / 255, 1 / 255)
)
"""What the networks converted from Caffe expect: the levels of 0 to 255 less the mean of ImageNet
(123.68, 116.779 and 103.939 for red, green and blue), not divided by a deviation."""

_TERMS = "trained on ImageNet, whose terms allow non-commercial research and education"
_TORCHVISION_LICENCE = f"torchvision, BSD-3-Clause; {_TERMS}"
_SIN_LICENCE = f"rgeirhos/texture-vs-shape, no licence for the weights is stated; {_TERMS}"
_NORMALISED_URL = (
    "https://github.com/naoto0804/pytorch-AdaIN/releases/download/v0.0.0/vgg_normalised.pth"
)
_NORMALISED_LICENCE = "Gatys et al. 2015, non-commercial use only; file of naoto0804/pytorch-AdaIN"
_BUILTIN_LICENCE = "Apache-2.0, as this package"


@dataclasses.dataclass(frozen=True)
class WeightsEntry:
    """One file of weights.

    Attributes:
        model: the network, as `networks.create_network` names it.
        tag: what the weights were trained on, as `--weights` names them.
        url: http address; "" for a file of this package.
        filename: the file's name.
        sha256: the first hexadecimal digits, or all, of the file's SHA-256.
        parameters: number of trained values, running statistics not counted.
        top1: published accuracy on the ImageNet validation set, per cent; None where there is none.
        top5: the same within five guesses.
        preprocessing: how the images of that accuracy were prepared.
        licence: whose the weights are, and on what terms.
    """

    model: str
    tag: str
    url: str
    filename: str
    sha256: str
    parameters: int
    top1: float | None
    top5: float | None
    preprocessing: Preprocessing
    licence: str


# model, file, parameters, top-1, top-5. The ResNets are torchvision's V1: results up to 2023
# predate V2.
_TORCHVISION = (
    ("alexnet", "alexnet-owt-7be5be79.pth", 61_100_840, 56.522, 79.066),
    ("vgg11", "vgg11-8a719046.pth", 132_863_336, 69.020, 88.628),
    ("vgg11_bn", "vgg11_bn-6002323d.pth", 132_868_840, 70.370, 89.810),
    ("vgg13", "vgg13-19584684.pth", 133_047_848, 69.928, 89.246),
    ("vgg13_bn", "vgg13_bn-abd245e5.pth", 133_053_736, 71.586, 90.374),
    ("vgg16", "vgg16-397923af.pth", 138_357_544, 71.592, 90.382),
    ("vgg16_bn", "vgg16_bn-6c64b313.pth", 138_365_992, 73.360, 91.516),
    ("vgg19", "vgg19-dcbb9e9d.pth", 143_667_240, 72.376, 90.876),
    ("vgg19_bn", "vgg19_bn-c79401a0.pth", 143_678_248, 74.218, 91.842),
    ("resnet18", "resnet18-f37072fd.pth", 11_689_512, 69.758, 89.078),
    ("resnet34", "resnet34-b627a593.pth", 21_797_672, 73.314, 91.420),
    ("resnet50", "resnet50-0676ba61.pth", 25_557_032, 76.130, 92.862),
    ("resnet101", "resnet101-63fe2227.pth", 44_549_160, 77.374, 93.546),
    ("resnet152", "resnet152-394f9c45.pth", 60_192_808, 78.312, 94.046),
    ("squeezenet1_0", "squeezenet1_0-b66bff10.pth", 1_248_424, 58.092, 80.420),
    ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", 1_235_496, 58.178, 80.624),
)

_SIN_URL = "https://bitbucket.org/robert_geirhos/texture-vs-shape-pretrained-models/raw/"
_SIN_COMMITS = (
    "6f41d2e86fc60566f78de64ecff35cc61eb6436f",
    "60b770e128fffcbd8562a3ab3546c1a735432d03",
    "0008049cd10f74a944c6d5e90d4639927f8620ae",
)
_SHAPE_RESNET = (
    "resnet50_finetune_60_epochs_lr_decay_after_30_start_resnet50_train_45_epochs_combined_IN_SF"
    "-ca06340c.pth.tar"
)
# model, tag, commit, file, top-1, top-5 on ImageNet.
_SIN = (
    ("resnet50", "sin", 0, "resnet50_train_60_epochs-c8e5653e.pth.tar", 60.18, 82.62),
    ("resnet50", "sin+in", 1, "resnet50_train_45_epochs_combined_IN_SF-2a0d100e.pth.tar",
     74.59, 92.14),
    ("resnet50", "shape", 1, _SHAPE_RESNET, 76.72, 93.28),
    ("vgg16", "sin", 2, "vgg16_train_60_epochs_lr0.01-6c6fcc9f.pth.tar", 52.26, 76.39),
    ("alexnet", "sin", 2, "alexnet_train_60_epochs_lr0.001-b4aa5238.pth.tar", None, None),
)  # fmt: skip


def _entries() -> dict[tuple[str, str], WeightsEntry]:
    digest = {name: name.partition(".pth")[0].rpartition("-")[2] for _, name, *_ in _TORCHVISION}
    entries = [
        WeightsEntry(model, "imagenet", f"https://download.pytorch.org/models/{name}", name,
                     digest[name], parameters, top1, top5, IMAGENET_PREPROCESSING,
                     _TORCHVISION_LICENCE)
        for model, name, parameters, top1, top5 in _TORCHVISION
    ]  # fmt: skip
    parameters = {entry.model: entry.parameters for entry in entries}
    entries += [
        WeightsEntry(model, tag, f"{_SIN_URL}{_SIN_COMMITS[commit]}/{name}", name,
                     name.removesuffix(".pth.tar").rpartition("-")[2], parameters[model],
                     top1, top5, IMAGENET_PREPROCESSING, _SIN_LICENCE)
        for model, tag, commit, name, top1, top5 in _SIN
    ]  # fmt: skip
    entries.append(
        WeightsEntry("vgg19", "normalised", _NORMALISED_URL, "vgg_normalised.pth", "804ca283",
                     20_024_384, None, None, CAFFE_PREPROCESSING, _NORMALISED_LICENCE)
    )  # fmt: skip
    entries.append(
        WeightsEntry("builtin", "builtin", "", BUILTIN_FILE, BUILTIN_SHA256, BUILTIN_PARAMETERS,
                     None, None, BUILTIN_PREPROCESSING, _BUILTIN_LICENCE)
    )  # fmt: skip
    return {(entry.model, entry.tag): entry for entry in entries}


CATALOGUE: dict[tuple[str, str], WeightsEntry] = _entries()
"""Every known file, by (model, tag)."""


def list_tags(model: str) -> tuple[str, ...]:
    """Tags of the weights that the catalogue has for a network; empty if it has none."""
    return tuple(tag for name, tag in CATALOGUE if name == model)


def find_entry(model: str, tag: str) -> WeightsEntry:
    """Returns the catalogue's entry.

    Args:
        model: the network, for example "vgg16".
        tag: what it was trained on: "imagenet", "sin", "builtin" ...

    Raises:
        ValueError: there is none; the message lists the nearest.
    """
    entry = CATALOGUE.get((model, tag))
    if entry is not None:
        return entry
    tags = list_tags(model)
    if tags:
        raise ValueError(
            f"unknown weights {tag!r} for {model}: expected {' or '.join(map(repr, tags))}, "
            "or the path of a file"
        )
    names = sorted({name for name, _ in CATALOGUE})
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.4) or names
    raise ValueError(
        f"no weights are known for {model!r}: did you mean {', '.join(near)}? "
        "Weights of other networks are given as the path of a file"
    )


def default_preprocessing(model: str) -> Preprocessing:
    """Returns how images are prepared for a network, whatever weights it has.

    Args:
        model: the network, for example "vgg16".
    """
    return BUILTIN_PREPROCESSING if model == "builtin" else IMAGENET_PREPROCESSING


def format_catalogue() -> str:
    """Returns the catalogue as a table, one line an entry under a line of titles."""
    titles = ("model", "weights", "top-1", "top-5", "parameters", "sha256", "file")
    rows: list[tuple[str, ...]] = [titles]
    for entry in CATALOGUE.values():
        accuracies = (
            "-" if value is None else f"{value:.3f}" for value in (entry.top1, entry.top5)
        )
        rows.append((entry.model, entry.tag, *accuracies, f"{entry.parameters:,}",
                     entry.sha256[:8] or "-", entry.filename))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    right = {2, 3, 4}
    lines = (
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)
