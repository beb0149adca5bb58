"""Settings of the presets as their sources give them (spec 3 and 8.2), and presets by network."""

import dataclasses

import pytest

from topk_jax import networks
from topk_jax.synthesis.presets import PRESETS, find_preset
from topk_jax.weights import CATALOGUE


def test_the_papers_settings():
    preset = find_preset("li2023")
    assert (preset.model, preset.weights, preset.pool) == ("vgg19", "normalised", "average")
    assert preset.layers == ("relu1_1", "pool1", "pool2", "pool3", "pool4")
    assert (preset.objective, preset.reduction, preset.weight) == ("texture", "sum", 1e9 / 4)
    assert (preset.parametrization, preset.deviation, preset.sparsity) == ("sigmoid", 1, 0.05)
    assert preset.size == (256, 256)


def test_reconstruction_differs_in_goal_and_budget_alone():
    changed = dataclasses.replace(
        find_preset("li2023_reconstruction"), objective="texture", max_evaluations=500, source=""
    )
    assert changed == dataclasses.replace(find_preset("li2023"), source="")
    assert find_preset("li2023_reconstruction").objective == "reconstruction"
    assert find_preset("li2023_reconstruction").max_evaluations == 20 * 5 // 4


def test_the_reproductions_settings():
    preset = find_preset("ye2024")
    # Indices 1, 4, 9, 18 and 27 of VGG-16.
    assert (preset.model, preset.weights, preset.pool) == ("vgg16", "imagenet", "max")
    assert preset.layers == ("relu1_1", "pool1", "pool2", "relu4_1", "relu5_2")
    assert (preset.weight, preset.reduction) == (1e9, "mean")
    assert (preset.parametrization, preset.max_evaluations) == ("none", 2000)


def test_gatys_compares_conv1_1_and_keeps_to_the_range():
    preset = find_preset("gatys2015")
    assert preset.layers == ("conv1_1", "pool1", "pool2", "pool3", "pool4")
    assert (preset.pool, preset.parametrization) == ("average", "bounds")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_network_and_the_catalogue(name):
    preset = PRESETS[name]
    network = preset.network()
    assert set(preset.layers) <= set(network.feature_names)
    order = [network.feature_names.index(layer) for layer in preset.layers]
    assert order == sorted(order)
    assert (preset.model, preset.weights) in CATALOGUE
    assert network.pool == preset.pool  # pyright: ignore
    assert network.topk is None
    assert preset.source


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19", "vgg16_bn", "vgg19_bn"])
def test_a_preset_for_every_vgg(name):
    preset = find_preset(name)
    assert (preset.model, preset.weights, preset.pool) == (name, "imagenet", "average")
    assert preset.layers == ("relu1_1", "pool1", "pool2", "pool3", "pool4")
    assert preset.network().pool == "average"  # pyright: ignore
    assert set(preset.layers) <= set(preset.network().feature_names)


def test_a_preset_for_alexnet_with_its_own_pools():
    preset = find_preset("alexnet")
    assert preset.layers == ("relu1", "pool1", "pool2", "pool5")
    assert preset.pool == "max"
    assert preset.network() == networks.create_network("alexnet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("li2032", "expected li2023"),
        ("vgg61", "vgg16"),
        ("resnet50", "or the name of a VGG or AlexNet"),
        ("squeezenet1_1", "or the name of a VGG or AlexNet"),
        ("", "builtin, li2023"),
    ],
)
def test_unknown_presets_list_the_nearest(name, message):
    with pytest.raises(ValueError, match=f"unknown preset {name!r}.*{message}"):
        find_preset(name)


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_preset("li2023").size = 8  # pyright: ignore
