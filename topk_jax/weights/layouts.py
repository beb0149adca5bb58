"""Files of VGG-19 that name its layers otherwise than torchvision does.

Two are in use, both converted from Caffe, both without the classifier:

    0.weight, 2.weight, 5.weight ... 51.weight   the encoder of AdaIN (Huang and Belongie 2017): a
        1x1 convolution from RGB in [0, 1] to BGR levels less their mean, then the network with a
        module of padding before each convolution
    conv1_1.weight ... conv5_4.weight            the network alone, BGR levels less their mean

Either becomes torchvision's names and RGB: the 1x1 convolution is what `CAFFE_PREPROCESSING` does,
up to the order of the channels, which conv1_1 takes over.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topk_jax.images import Preprocessing
from topk_jax.weights.catalogue import CAFFE_PREPROCESSING

_STAGES = (2, 2, 4, 4, 4)
_CAFFE = tuple(f"conv{s}_{i}" for s, n in enumerate(_STAGES, 1) for i in range(1, n + 1))
_ADAIN = ("2", "5", "9", "12", "16", "19", "22", "25", "29", "32", "35", "38", "42", "45", "48",
          "51")  # fmt: skip
_TORCHVISION = tuple(f"features.{i}" for i in
                     (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34))  # fmt: skip
_COLOUR = "0"


def to_torchvision(
    state_dict: Mapping[str, Any], *, source: str = "the weights"
) -> tuple[dict[str, Any], Preprocessing | None]:
    """Renames the arrays of a file in one of the two layouts; leaves all others as they are.

    Args:
        state_dict: arrays under the names of the file, in torch's layout.
        source: what the error calls the weights, for example a file's name.

    Returns:
        Arrays under torchvision's names, and the preprocessing that the layout implies; None where
        the file is in neither layout.

    Raises:
        ValueError: the 1x1 convolution of the AdaIN layout is another than described.
    """
    modules = {name.rpartition(".")[0] for name in state_dict}
    if modules and modules <= set(_CAFFE):
        names = _CAFFE
    elif modules <= {_COLOUR, *_ADAIN} and _COLOUR in modules:
        names = _ADAIN
        _check_colours(state_dict, source)
    else:
        return dict(state_dict), None
    renamed = dict(zip(names, _TORCHVISION, strict=True))
    result = {}
    for name, array in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if module == names[0] and leaf == "weight":
            array = np.asarray(array)[:, ::-1]
        if module != _COLOUR:
            result[f"{renamed[module]}.{leaf}"] = array
    return result, CAFFE_PREPROCESSING


def _check_colours(state_dict: Mapping[str, Any], source: str) -> None:
    swap = 255 * np.eye(3)[::-1, :, None, None]
    offset = -255 * np.array(CAFFE_PREPROCESSING.mean)[::-1]
    weight, bias = (np.asarray(state_dict.get(f"{_COLOUR}.{leaf}")) for leaf in ("weight", "bias"))
    same = weight.shape == swap.shape and bias.shape == offset.shape
    if not same or not np.allclose(weight, swap) or not np.allclose(bias, offset, atol=0.01):
        raise ValueError(
            f"{source}: 0.weight and 0.bias are not the 1x1 convolution from RGB in [0, 1] to BGR "
            "levels less their mean that this layout begins with"
        )
