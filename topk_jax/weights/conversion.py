"""From torch's arrays to the variables of our networks, and back.

Joining the path of a module in the variables with "." gives torch's name of the module, so one
rule serves every network:

    params/.../kernel       <module>.weight, (out, in, ...) -> (..., in, out)
    params/.../bias         <module>.bias
    params/.../scale        <module>.weight of a BatchNorm
    batch_stats/.../mean    <module>.running_mean
    batch_stats/.../var     <module>.running_var

`num_batches_tracked` has no counterpart and is left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_TORCH_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "bias"): "bias",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_WITHOUT_COUNTERPART = "num_batches_tracked"


def state_dict_to_variables(
    state_dict: Mapping[str, Any],
    shapes: Mapping[str, Any],
    *,
    whole: Mapping[str, Any] | None = None,
    source: str = "the weights",
) -> dict[str, Any]:
    """Converts arrays under torch's names into variables; all of them fit, or none are given.

    Args:
        state_dict: arrays under torch's names, in torch's layout, floating.
        shapes: tree of anything with `shape`: `networks.variable_shapes(network)`, or variables.
        whole: the same of the whole network, where `shapes` is a part of it: arrays that only the
            whole has a place for are then left out.
        source: what the error calls the weights, for example a file's name.

    Returns:
        Variables with the structure and shapes of `shapes`: float32 NumPy arrays, C order. Put
        them on a device once (`jax.device_put`) where they are used many times.

    Raises:
        ValueError: a name is missing, not used, of another shape or not floating; all of them are
            in the message, with both shapes.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    wanted = [(_torch_name(path), path[-1].key == "kernel", leaf.shape) for path, leaf in leaves]
    elsewhere = jax.tree_util.tree_flatten_with_path(whole or {})[0]
    elsewhere = {_torch_name(path) for path, _ in elsewhere} - {name for name, *_ in wanted}
    state_dict = {name: array for name, array in state_dict.items() if name not in elsewhere}
    _check(
        {name: _torch_shape(shape, kernel) for name, kernel, shape in wanted}, state_dict, source
    )
    arrays = []
    for name, kernel, _ in wanted:
        array = np.asarray(state_dict[name])
        if kernel:
            array = array.transpose(*range(2, array.ndim), 1, 0)
        arrays.append(np.array(array, np.float32, order="C"))
    return jax.tree_util.tree_unflatten(structure, arrays)


def variables_to_state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts variables into arrays under torch's names and in torch's layout.

    Args:
        variables: of a network of this package; its dtypes are kept.

    Returns:
        Arrays in C order, as `state_dict_to_variables` takes them.
    """
    state_dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        array = np.asarray(leaf)
        if path[-1].key == "kernel":
            array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
        state_dict[_torch_name(path)] = np.asarray(array, order="C")
    return state_dict


def count_parameters(shapes: Mapping[str, Any]) -> int:
    """Returns the number of trained values in variables or their shapes, statistics not counted."""
    leaves = jax.tree.leaves(shapes["params"])
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves)


def _torch_name(path: tuple[Any, ...]) -> str:
    collection, *modules, leaf = (str(part.key) for part in path)
    if (collection, leaf) not in _TORCH_NAMES:
        raise ValueError(
            f"variable {'/'.join((collection, *modules, leaf))} has no counterpart in torch; "
            f"expected {', '.join('/'.join(known) for known in _TORCH_NAMES)}"
        )
    return ".".join((*modules, _TORCH_NAMES[collection, leaf]))


def _torch_shape(shape: tuple[int, ...], kernel: bool) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if kernel else tuple(shape)


def _check(
    wanted: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Any], source: str
) -> None:
    """Raises one error with everything that does not fit."""
    given = {name: np.shape(array) for name, array in state_dict.items()}
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in given]
    unused = [
        f"{name} {shape}"
        for name, shape in given.items()
        if name not in wanted and name.rpartition(".")[2] != _WITHOUT_COUNTERPART
    ]
    other = {name for name, shape in wanted.items() if given.get(name, shape) != shape}
    reshaped = [
        f"{name} {given[name]}, expected {wanted[name]}" for name in wanted if name in other
    ]
    # bfloat16 and its like are of kind V to NumPy.
    integers = [
        f"{name} {np.asarray(state_dict[name]).dtype}"
        for name in wanted
        if name in given and np.asarray(state_dict[name]).dtype.kind in "biucOSU"
    ]
    kinds = {"missing": missing, "not used": unused, "of another shape": reshaped,
             "not floating": integers}  # fmt: skip
    parts = [f"{len(names)} {kind} ({', '.join(names)})" for kind, names in kinds.items() if names]
    if parts:
        only_shapes = not (missing or unused or integers)
        advice = _class_count_advice(wanted, given, other) if only_shapes else ""
        raise ValueError(f"{source} do not fit the network: {'; '.join(parts)}{advice}")


def _class_count_advice(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], other: set[str]
) -> str:
    """Says which number of classes the file has, if that is all that differs."""
    modules = {name.rpartition(".")[0] for name in other}
    same_inputs = all(given[name][1:] == wanted[name][1:] and given[name] for name in other)
    if len(modules) != 1 or not same_inputs:
        return ""
    name = next(iter(other))
    return (
        f"; they are for {given[name][0]} classes, the network has {wanted[name][0]}: "
        f"num_classes={given[name][0]} makes one that fits"
    )
