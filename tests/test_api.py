"""The interface itself: what is public is documented, annotated, and its defaults have names."""

import dataclasses
import inspect

import flax.linen as nn
import pytest

import topk_jax
from topk_jax import (
    decisions,
    evaluation,
    figures,
    files,
    images,
    metrics,
    networks,
    parallel,
    selection,
    stimuli,
    synthesis,
    telemetry,
    topk,
    weights,
)

MODULES = (
    *(topk_jax, decisions, evaluation, figures, files, images, metrics, networks, parallel),
    *(selection, stimuli, synthesis, telemetry, topk, weights),
)


def public_functions():
    seen = {}
    for module in MODULES:
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("topk_jax")
            if not name.startswith("_") and inspect.isfunction(value) and ours:
                seen[f"{value.__module__}.{value.__qualname__}"] = value
    return seen


FUNCTIONS = public_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    function = FUNCTIONS[name]
    assert inspect.getdoc(function), f"{name} has no docstring"
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty or _is_layer(name)
    parameters = list(signature.parameters.values())
    for position, parameter in enumerate(parameters):
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"
        positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if positional and name not in _POSITIONAL_DEFAULTS:
            assert parameter.default is inspect.Parameter.empty, (
                f"{name}: {parameter.name} has a default and must be keyword-only"
            )
        if parameter.name in ("key", "rng"):
            assert position == 0, f"{name}: {parameter.name} comes first"


def _is_layer(name: str) -> bool:
    return name.startswith("topk_jax.layers")


# Established idioms: `open`'s mode, a session's number, the devices of a replica.
_POSITIONAL_DEFAULTS = {
    "topk_jax.files.atomic_write",
    "topk_jax.trials.trials_filename",
    "topk_jax.parallel.replicate",
}


@pytest.mark.parametrize("name", topk_jax.__all__)
def test_what_is_listed_is_there_and_documented(name):
    value = getattr(topk_jax, name)
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        assert inspect.getdoc(value)


def test_values_are_frozen():
    for module in MODULES:
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and dataclasses.is_dataclass(value)
                and value.__module__.startswith("topk_jax")
                and not issubclass(value, nn.Module)
            ):
                assert value.__dataclass_params__.frozen, value  # pyright: ignore
