"""From a name or a file of weights to the variables of a network.

`resolve_weights` finds (or downloads) the file and tells its digest, `load_variables` reads and
converts it. A torch file is unpickled once: its arrays are then kept as safetensors in the cache
folder, under the digest of the file that they came from. Neither ever gives random weights.
"""

import dataclasses
import difflib
import importlib.resources
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from topk_jax import download, files, networks
from topk_jax.images import Preprocessing
from topk_jax.weights import catalogue
from topk_jax.weights.catalogue import WeightsEntry
from topk_jax.weights.conversion import (
    count_parameters,
    state_dict_to_variables,
    variables_to_state_dict,
)
from topk_jax.weights.layouts import to_torchvision
from topk_jax.weights.torch_files import StateDict, read_state_dict

_CACHE_FORMAT = 1
"""Raised when `read_state_dict` gives other arrays for the same file."""


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file of weights that is there, and how it was asked for.

    Attributes:
        path: the file.
        sha256: its digest, 64 hexadecimal digits.
        origin: the address, "builtin", or the path as it was given.
        entry: the catalogue's entry; None for a file of one's own.
    """

    path: pathlib.Path
    sha256: str
    origin: str
    entry: WeightsEntry | None


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert_file` has written.

    Attributes:
        source: the file that was read.
        path: the safetensors file.
        sha256: its digest, 64 hexadecimal digits.
        tensors: number of tensors in it.
        parameters: number of trained values in it.
    """

    source: WeightsFile
    path: pathlib.Path
    sha256: str
    tensors: int
    parameters: int


def resolve_weights(
    model: str, weights: str | os.PathLike[str], *, progress: bool = True
) -> WeightsFile:
    """Finds a file of weights, downloading it where that is needed.

    A named file is looked for in the cache folder, then in torch hub's ($TORCH_HOME), and then
    fetched; its digest is checked wherever it comes from.

    Args:
        model: the network, for example "vgg16".
        weights: a tag of the catalogue ("imagenet", "sin", "builtin") or the path of a file. A file
            that is called as a tag is written with its folder: "./imagenet".
        progress: show the progress of a download.

    Raises:
        ValueError: the catalogue has no such weights, or the built-in ones are damaged.
        OSError: there is no such file, or it could not be downloaded; one line that says which file
            to put where.
    """
    tags = sorted({tag for _, tag in catalogue.CATALOGUE})
    if isinstance(weights, str) and weights in tags:
        entry = catalogue.find_entry(model, weights)
        return _packaged(entry) if not entry.url else _downloaded(entry, progress)
    path = files.local_path(weights)
    if isinstance(weights, str) and not path.exists() and path.name == weights and not path.suffix:
        near = difflib.get_close_matches(weights, tags, n=3) or tags
        raise ValueError(
            f"unknown weights {weights!r}: no such file, and no name of the catalogue; "
            f"did you mean {', '.join(near)}?"
        )
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path}: not a file; expected a .pth or .safetensors file")
    return WeightsFile(path, files.sha256(path), os.fspath(weights), None)


def _packaged(entry: WeightsEntry) -> WeightsFile:
    resource = importlib.resources.files("topk_jax.weights") / entry.filename
    path = pathlib.Path(str(resource))
    if len(entry.sha256) != 64 or not path.is_file():
        raise ValueError(f"the weights of the {entry.model} network are not part of this package")
    digest = files.sha256(path)
    if digest != entry.sha256:
        raise ValueError(
            f"{path}: sha256 {digest}, expected {entry.sha256}; the installation is damaged"
        )
    return WeightsFile(path, digest, entry.tag, entry)


def _downloaded(entry: WeightsEntry, progress: bool) -> WeightsFile:
    name = f"weights/{entry.filename}"
    own = download.cache_dir() / name
    for path in (own, _torch_hub() / entry.filename):
        if not path.is_file():
            continue
        try:
            digest = files.sha256(path)
        except OSError as error:
            logging.warning("%s: %s; not used", path, error.strerror)
            continue
        if digest.startswith(entry.sha256):
            return WeightsFile(path, digest, entry.url, entry)
        if path != own:  # `fetch` replaces our own
            logging.warning("%s: sha256 %s..., expected %s; not used", path, digest[:8],
                            entry.sha256)  # fmt: skip
    path = download.fetch(
        entry.url,
        filename=name,
        sha256_prefix=entry.sha256,
        progress=progress,
        hint="or give the path of a file you have as the weights",
    )
    return WeightsFile(path, files.sha256(path), entry.url, entry)


def _torch_hub() -> pathlib.Path:
    """Where torch keeps its downloads."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return pathlib.Path(home).expanduser() / "hub" / "checkpoints"


def load_variables(
    name_or_network: str | networks.Network,
    weights: str | os.PathLike[str] | WeightsFile | Mapping[str, Any],
    *,
    cache: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Loads trained weights as the variables of a network.

    Args:
        name_or_network: a name that `networks.create_network` knows, or the network itself. Top-K
            sites and other options without weights make no difference.
        weights: "imagenet", "builtin" or another tag of the catalogue; the path of a `.pth` or
            `.safetensors` file; what `resolve_weights` gave; or a mapping of arrays under torch's
            names (a `state_dict` with NumPy arrays).
        cache: keep the arrays of a torch file as safetensors in the cache folder, and use them.
        progress: show the progress of a download.

    Returns:
        {"params": ..., "batch_stats": ...} (the latter where there is BatchNorm) of float32 NumPy
        arrays; `jax.device_put` them once where they are used many times.

    Raises:
        ValueError: the weights are unknown, damaged, or do not fit the network: every name that is
            missing, not used or of another shape is in the message.
        OSError: the file is not there or could not be downloaded.
    """
    network = name_or_network
    if isinstance(network, str):
        network = networks.create_network(network)
    shapes = networks.variable_shapes(network)
    if isinstance(weights, Mapping):
        return state_dict_to_variables(weights, shapes)
    if not isinstance(weights, WeightsFile):
        model = name_or_network if isinstance(name_or_network, str) else _model(shapes, weights)
        weights = resolve_weights(model, weights, progress=progress)
    state_dict = _read_cached(weights) if cache else read_state_dict(weights.path)
    return state_dict_to_variables(state_dict, shapes, source=f"the weights of {weights.path}")


def load_features(
    network: networks.Network,
    names: Sequence[str],
    weights: WeightsFile,
    *,
    cache: bool = True,
) -> tuple[dict[str, Any], Preprocessing | None]:
    """Loads what some features of a network depend on, from a whole file or one that is cut off.

    Files of VGG-19 in the layouts of `weights.layouts` are understood too.

    Args:
        network: the network.
        names: features, as in `network.feature_names`.
        weights: what `resolve_weights` gave.
        cache: as in `load_variables`.

    Returns:
        Those variables alone, for `networks.FeatureExtractor`, as `load_variables` gives them; and
        the preprocessing of the images as the catalogue states or the file's layout implies it;
        None where neither does (`default_preprocessing` then).

    Raises:
        ValueError: an unknown feature, or a file that does not fit; see `load_variables`.
        OSError: the file cannot be read.
    """
    whole = networks.variable_shapes(network)
    source = f"the weights of {weights.path}"
    state_dict = _read_cached(weights) if cache else read_state_dict(weights.path)
    state_dict, implied = to_torchvision(state_dict, source=source)
    shapes = networks.feature_shapes(network, names)
    variables = state_dict_to_variables(state_dict, shapes, whole=whole, source=source)
    stated = weights.entry.preprocessing if weights.entry else None
    return variables, stated or implied


def _model(shapes: Mapping[str, Any], weights: str | os.PathLike[str]) -> str:
    """Returns the catalogue's name of a network: no two networks have as many parameters."""
    parameters = count_parameters(shapes)
    tagged = {entry.parameters: model for (model, tag), entry in catalogue.CATALOGUE.items()
              if tag == weights}  # fmt: skip
    if not tagged:
        return "network"  # a file, where the name does not matter
    if parameters not in tagged:
        raise ValueError(
            f"no {weights!r} weights are known for this network of {parameters} parameters; they "
            f"are for {', '.join(sorted(tagged.values()))}, with the number of classes they were "
            "trained for"
        )
    return tagged[parameters]


def _read_cached(weights: WeightsFile) -> StateDict:
    """Reads a file by way of the cache folder; trouble there never stops the run."""
    if weights.path.suffix == ".safetensors":
        return read_state_dict(weights.path)
    kept = download.cache_dir() / "converted" / f"{weights.sha256}-{_CACHE_FORMAT}.safetensors"
    if kept.is_file():
        try:
            return read_state_dict(kept)
        except (OSError, ValueError) as error:
            logging.warning("%s; it is made anew", error)
    state_dict = read_state_dict(weights.path)
    try:
        write_state_dict(kept, state_dict)
    except OSError as error:
        logging.warning("%s: converted weights are not kept: %s", kept, error.strerror or error)
    return state_dict


def write_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as safetensors, atomically.

    Args:
        path: the file.
        state_dict: arrays under torch's names.
        metadata: text that goes along; with at most one entry equal arrays give equal bytes.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    import safetensors.numpy

    # safetensors takes the bytes as they lie in memory, whatever the strides.
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    data = safetensors.numpy.save(arrays, metadata=dict(metadata) if metadata else None)
    with files.atomic_write(path) as file:
        file.write(data)


def convert_file(
    model: str,
    weights: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Converts a file of weights into a safetensors file with torch's names, checked and complete.

    Args:
        model: the network that the weights are for; every tensor must fit it.
        weights: the path of a file, or a tag of the catalogue.
        output: the file to write, ending in .safetensors.
        num_classes: width of the network's logits; by default what the network has.
        overwrite: replace an `output` that is there.

    Raises:
        FileExistsError: `output` is there and `overwrite` is off.
        ValueError: another ending, or whatever `load_variables` finds wrong.
        OSError: a file cannot be read or written.
    """
    target = files.local_path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: expected a name that ends in .safetensors")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: is there already; --overwrite replaces it")
    options = {} if num_classes is None else {"num_classes": num_classes}
    network = networks.create_network(model, **options)
    source = resolve_weights(model, weights)
    variables = load_variables(network, source, cache=False)
    state_dict = variables_to_state_dict(variables)
    write_state_dict(target, state_dict, metadata={"source": f"{model}, sha256 {source.sha256}"})
    return Conversion(
        source, target, files.sha256(target), len(state_dict), count_parameters(variables)
    )
