"""Torchvision's modules with an exact Top-K at named sites: the other side of the parity tests.

Nothing of topk_jax is used here. `torch.topk` leaves the choice among equal values open, and behind
a first Top-K equal values are common; a stable sort of |x| decides as the library promises to.
"""

import copy
import re
from collections.abc import Mapping, MutableMapping

import numpy as np
import torch
import torchvision

MARGIN = 4
"""A cut is clear of rounding from this many times the error of float32 on."""

FAMILIES = {
    "alexnet": "alexnet",
    **{f"vgg{n}{bn}": "vgg" for n in (11, 13, 16, 19) for bn in ("", "_bn")},
    **{f"resnet{n}": "resnet" for n in (18, 34, 50, 101, 152)},
    "squeezenet1_0": "squeezenet",
    "squeezenet1_1": "squeezenet",
}


def build(name: str, **options) -> torch.nn.Module:
    """Torchvision's module in evaluation mode, without weights."""
    return getattr(torchvision.models, name)(weights=None, **options).eval()


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Seeded random weights that keep the activations' scale, and random BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def module_of(name: str, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Feature name -> the torch module whose output it is, in order of computation."""
    family = FAMILIES[name]
    if family == "resnet":
        found = {"conv1": model.conv1, "relu1": model.relu, "pool1": model.maxpool}
        for stage in range(1, 5):
            layer = getattr(model, f"layer{stage}")
            found |= {f"layer{stage}.{i}": block for i, block in enumerate(layer)}
            found[f"layer{stage}"] = layer
        return found | {"avgpool": model.avgpool, "logits": model.fc}
    found = {}
    if family == "squeezenet":
        fire = 1
        for module in model.features:
            kind = type(module).__name__
            fire += kind == "Fire"
            key = {"Conv2d": "conv1", "ReLU": "relu1", "MaxPool2d": f"pool{fire}"}
            found[key.get(kind, f"fire{fire}")] = module
        return found | {"conv10": model.classifier[1], "logits": model.classifier}
    if family == "alexnet":
        number = 0
        for module in model.features:
            kind = type(module).__name__
            number += kind == "Conv2d"
            found[{"Conv2d": "conv", "ReLU": "relu", "MaxPool2d": "pool"}[kind] + str(number)] = (
                module
            )
        first = 1
    else:
        stage, number = 1, 0
        for module in model.features:
            kind = type(module).__name__
            number += kind == "Conv2d"
            if kind == "MaxPool2d":
                found[f"pool{stage}"] = module
                stage, number = stage + 1, 0
            else:
                word = {"Conv2d": "conv", "ReLU": "relu", "BatchNorm2d": "bn"}[kind]
                found[f"{word}{stage}_{number}"] = module
        first = 0
    c = model.classifier
    return found | {
        **{"fc6": c[first], "relu6": c[first + 1], "fc7": c[first + 3], "relu7": c[first + 4]},
        "logits": c[6],
    }


def published_sites(name: str, names: list[str]) -> list[str]:
    """Sites of a single fraction, by name."""
    pattern = {
        "alexnet": r"pool[125]|relu[34]",
        "vgg": r"pool\d",
        "resnet": r"layer\d",
        "squeezenet": r"pool\d",
    }[FAMILIES[name]]
    return [feature for feature in names if re.fullmatch(pattern, feature)]


def kept(x: torch.Tensor, fraction: float) -> int:
    """The number of entries that stay in each map."""
    return int(max(1, fraction * x.shape[2] * x.shape[3]))


def ranked(x: torch.Tensor):
    """Values and indices of |x| in each flattened map, the largest first; ties by index."""
    return x.abs().flatten(2).sort(dim=2, descending=True, stable=True)


def stable_topk(x: torch.Tensor, fraction: float) -> torch.Tensor:
    """Keeps the k largest |x| of each map; ties to the lowest index."""
    n, c, h, w = x.shape
    order = ranked(x).indices[..., : kept(x, fraction)]
    mask = torch.zeros(n, c, h * w, dtype=torch.bool).scatter_(2, order, True).view_as(x)
    return torch.where(mask, x, torch.zeros_like(x))


def features(
    name: str,
    model: torch.nn.Module,
    images: np.ndarray,
    fraction: float | None,
    *,
    continue_with: Mapping[str, np.ndarray] | None = None,
    before_topk: MutableMapping[str, torch.Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Every named feature of NHWC `images`, as NHWC (or [n, c]) arrays, in order.

    All is computed in the dtype of the module's parameters. With `continue_with` the layer behind
    each Top-K site sees what is given here under the site's name, not the site's own result: so a
    near-tie that rounding turns does not spread. `before_topk` is filled with what each site sees.
    """
    dtype = next(model.parameters()).dtype
    named = module_of(name, model)
    sites = published_sites(name, list(named)) if fraction is not None else []
    found: dict[str, np.ndarray] = {}

    def hook(feature: str):
        def record(_, __, output):
            if feature in sites:
                if before_topk is not None:
                    before_topk[feature] = output.detach().clone()
                output = stable_topk(output, fraction)
            # A copy: torchvision's ReLUs work in place.
            array = output.detach().clone().numpy()
            found[feature] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
            if feature in sites and continue_with is not None:
                given = np.asarray(continue_with[feature]).transpose(0, 3, 1, 2)
                return torch.from_numpy(given.copy())
            return output

        return record

    handles = []
    for feature, module in named.items():
        # A ReLU module may run several times in a ResNet; only its first call is `relu1`.
        handles.append(module.register_forward_hook(_once(hook(feature), found, feature)))
    try:
        with torch.inference_mode():
            logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype))
    finally:
        for handle in handles:
            handle.remove()
    found["logits"] = logits.numpy()
    return found


def well_posed(name: str, model: torch.nn.Module, images: np.ndarray, fraction: float) -> bool:
    """Whether another way to round float32 may be expected to keep the same entries at every site.

    The float32 module must choose as the same module in float64 does, and in every map the smallest
    entry kept must lead the largest one dropped by `MARGIN` times the error of float32 in that map.
    Ties that are exact in both dtypes are clear: zeros, and one value that overlapping windows of
    a pool show twice.
    """
    single: dict[str, torch.Tensor] = {}
    double: dict[str, torch.Tensor] = {}
    features(name, model, images, fraction, before_topk=single)
    features(name, copy.deepcopy(model).double(), images, fraction, before_topk=double)
    return all(_clear_of_rounding(single[site], double[site], fraction) for site in single)


def _clear_of_rounding(single: torch.Tensor, double: torch.Tensor, fraction: float) -> bool:
    k = kept(single, fraction)
    chosen = [stable_topk(x, fraction) != 0 for x in (single, double)]
    if not torch.equal(*chosen):
        return False
    gaps = [
        values[..., k - 1] - values[..., k]
        for values in (ranked(x).values for x in (single, double))
    ]
    error = (single - double).abs().amax(dim=(2, 3))
    ties = (gaps[0] == 0) & (gaps[1] == 0)
    return bool((ties | (gaps[1] >= MARGIN * error)).all())


def _once(hook, found, feature):
    def call(module, inputs, output):
        return output if feature in found else hook(module, inputs, output)

    return call
