"""Seeded NumPy weights under torch's names, for outputs that were stored from torchvision's module.

`python tests/reference_weights.py` (with torchvision installed, from the project's root) writes the
stored outputs, `tests/data/torchvision_<name>.npz`.
"""

import pathlib
import sys
import zlib

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
# One network a family and kind of block; the side of the square input image.
CASES = {"alexnet": 65, "vgg11_bn": 40, "resnet18": 49, "resnet50": 49, "squeezenet1_1": 51}
# Networks to be trained: nobody published weights, so that the catalogue has none.
WITHOUT_WEIGHTS = frozenset(
    ("resnet18_li2023", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "cifar_cnn",
     "cnn2")
)  # fmt: skip
NUM_CLASSES = 10
FRACTION = 0.2
# Entries stored of each feature, evenly spaced over the flattened array.
SAMPLES = 12


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that keep the activations' scale; a function of each array's name and shape only."""
    result = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = rng.integers(-127, 128, size=shape, dtype=np.int8).astype(np.float32)
        noise /= 127  # in place: VGG has hundreds of megabytes
        if name.endswith("running_var"):
            result[name] = 1.25 + 0.75 * noise
        elif len(shape) > 1:
            fan_in = int(np.prod(shape[1:]))
            noise *= np.float32((6 / fan_in) ** 0.5)
            result[name] = noise
        elif name.endswith("weight"):
            result[name] = 1 + 0.5 * noise
        else:
            result[name] = 0.2 * noise
    return result


def image(side: int) -> np.ndarray:
    """Two images [2, side, side, 3] in about the range of normalised ones."""
    rng = np.random.default_rng(7)
    return rng.integers(-127, 128, size=(2, side, side, 3)).astype(np.float32) / 64


def sampled(feature: np.ndarray) -> np.ndarray:
    """What is stored of a feature: evenly spaced entries, then mean and mean magnitude."""
    flat = np.asarray(feature, np.float64).ravel()
    index = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return np.concatenate([flat[index], [flat.mean(), np.abs(flat).mean()]])


def main() -> None:
    import torch
    import torch_reference

    DATA.mkdir(exist_ok=True)
    for name, side in CASES.items():
        model = torch_reference.build(name, num_classes=NUM_CLASSES)
        state = model.state_dict()
        kept = {key: tuple(v.shape) for key, v in state.items() if "num_batches" not in key}
        state |= {key: torch.from_numpy(value) for key, value in weights(kept).items()}
        model.load_state_dict(state)
        stored = {}
        for prefix, fraction in (("plain", None), ("topk", FRACTION)):
            found = torch_reference.features(name, model, image(side), fraction)
            stored |= {f"{prefix}/{key}": sampled(value) for key, value in found.items()}
        np.savez_compressed(DATA / f"torchvision_{name}.npz", **stored)
        print(name, len(stored), file=sys.stderr)


if __name__ == "__main__":
    main()
