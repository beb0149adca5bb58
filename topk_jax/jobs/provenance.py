"""What a run says of itself, so that it can be repeated: versions and weights."""

import importlib.metadata
import platform

from topk_jax import files
from topk_jax.weights import WeightsFile

_PACKAGES = ("topk_jax", "jax", "jaxlib", "flax", "optax", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Version of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed (source tree)"
    return found


def refuse_other_weights(folder: files.RunFolder, weights: WeightsFile) -> None:
    """Raises ValueError if the run in `folder` was begun with a file of another digest."""
    earlier = ((folder.previous or {}).get("weights") or {}).get("sha256")
    if earlier not in (None, weights.sha256):
        raise ValueError(
            f"{folder.path}: made with other weights (sha256 {earlier[:8]}..., "
            f"{weights.path} now has {weights.sha256[:8]}...); choose another output folder"
        )
