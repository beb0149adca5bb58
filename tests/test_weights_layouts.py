"""VGG-19's other layouts: names, channel order, colours; whole and cut files through the loader."""

import hashlib

import jax
import numpy as np
import pytest
from torch_file_fixtures import state_dict_bytes

from topk_jax import networks
from topk_jax.weights import (
    CAFFE_PREPROCESSING,
    load_features,
    resolve_weights,
    variables_to_state_dict,
    write_state_dict,
)
from topk_jax.weights.layouts import to_torchvision

# (stage, number, place in AdaIN's file, place in torchvision's): counted by hand from both models.
PLACES = [
    *[(1, 1, 2, 0), (1, 2, 5, 2), (2, 1, 9, 5), (2, 2, 12, 7)],
    *[(3, 1, 16, 10), (3, 2, 19, 12), (3, 3, 22, 14), (3, 4, 25, 16)],
    *[(4, 1, 29, 19), (4, 2, 32, 21), (4, 3, 35, 23), (4, 4, 38, 25)],
    *[(5, 1, 42, 28), (5, 2, 45, 30), (5, 3, 48, 32), (5, 4, 51, 34)],
]
MEAN_BGR = np.array([103.939, 116.779, 123.68], np.float32)


def colour():
    weight = np.zeros((3, 3, 1, 1), np.float32)
    for out, channel in enumerate((2, 1, 0)):
        weight[out, channel] = 255
    return {"0.weight": weight, "0.bias": -MEAN_BGR}


def arrays(seed=0):
    """Small arrays of the right ranks, by (stage, number, leaf)."""
    rng = np.random.default_rng(seed)
    return {
        (stage, number, leaf): rng.normal(size=shape).astype(np.float32)
        for stage, number, *_ in PLACES
        for leaf, shape in (("weight", (2, 3, 3, 3)), ("bias", (2,)))
    }


def named(kind, content, last=None):
    places = PLACES[: PLACES.index(last) + 1] if last else PLACES
    names = {
        (stage, number): {"adain": f"{adain}", "caffe": f"conv{stage}_{number}",
                          "torchvision": f"features.{torchvision}"}[kind]
        for stage, number, adain, torchvision in places
    }  # fmt: skip
    return (colour() if kind == "adain" else {}) | {
        f"{names[key[:2]]}.{key[2]}": array for key, array in content.items() if key[:2] in names
    }


@pytest.mark.parametrize("kind", ["adain", "caffe"])
@pytest.mark.parametrize("last", [None, (4, 1, 29, 19), (1, 1, 2, 0)])
def test_both_layouts_become_torchvisions_and_rgb(kind, last):
    content = arrays()
    found, preprocessing = to_torchvision(named(kind, content, last))
    expected = named("torchvision", content, last)
    expected["features.0.weight"] = expected["features.0.weight"][:, [2, 1, 0]]
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert preprocessing == CAFFE_PREPROCESSING


@pytest.mark.parametrize(
    "names",
    [
        ["features.0.weight", "features.0.bias"],
        ["0.weight", "3.weight"],
        ["2.weight", "5.weight"],  # AdaIN's without its colours
        ["conv1_1.weight", "fc6.weight"],
        ["conv1.weight"],
        ["weight"],
        [],
    ],
)
def test_other_layouts_are_left_alone(names):
    state = {name: np.ones((2, 3, 3, 3), np.float32) for name in names}
    found, preprocessing = to_torchvision(state)
    assert preprocessing is None
    assert found == state
    assert found is not state


@pytest.mark.parametrize("change", ["rgb", "unscaled", "mean", "order of means", "bias", "shape"])
def test_other_colours_are_refused(change):
    state = named("adain", arrays())
    if change == "rgb":
        state["0.weight"] = state["0.weight"][::-1]
    elif change == "unscaled":
        state["0.weight"] = state["0.weight"] / 255
    elif change == "mean":
        state["0.bias"] = state["0.bias"] + 1
    elif change == "order of means":
        state["0.bias"] = state["0.bias"][::-1]
    elif change == "bias":
        del state["0.bias"]
    else:
        state["0.weight"] = state["0.weight"][:, :, 0, 0]
    with pytest.raises(ValueError, match=r"some file: 0\.weight and 0\.bias are not the 1x1"):
        to_torchvision(state, source="some file")


def test_colours_and_the_swap_are_the_preprocessing():
    """The file's first two convolutions at one pixel, against ours on the normalised pixel."""
    content = arrays()
    state = named("adain", content)
    rgb = np.array([12.0, 200.0, 77.0])
    bgr = state["0.weight"][:, :, 0, 0] @ (rgb / 255) + state["0.bias"]
    expected = state["2.weight"][:, :, 1, 1] @ bgr
    found, preprocessing = to_torchvision(state)
    normalized = (rgb / 255 - preprocessing.mean) / preprocessing.std
    kernel = found["features.0.weight"][:, :, 1, 1]
    np.testing.assert_allclose(kernel @ normalized, expected, atol=2e-3)


# --- through the loader --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOPK_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def vgg():
    """A tiny VGG, with arrays under torch's names."""
    network = networks.VGG(
        convolutions=(1, 1), widths=(4, 6), hidden=(8,), num_classes=3, pooled_size=2
    )
    rng = np.random.default_rng(0)
    shapes = networks.variable_shapes(network)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return network, variables_to_state_dict(variables)


def file_of(tmp_path, state, suffix="safetensors"):
    path = tmp_path / f"own.{suffix}"
    if suffix == "pth":
        path.write_bytes(state_dict_bytes(state))
    else:
        write_state_dict(path, state)
    return resolve_weights("vgg19", path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("part", ["whole", "cut"])
def test_what_features_need_from_a_whole_or_a_cut_file(tmp_path, vgg, part, suffix):
    network, state = vgg
    given = state if part == "whole" else {k: a for k, a in state.items() if "features.0" in k}
    variables, preprocessing = load_features(
        network, ("relu1_1", "pool1"), file_of(tmp_path, given, suffix)
    )
    assert preprocessing is None
    (module,) = variables["params"].values()
    assert list(variables) == ["params"]
    np.testing.assert_array_equal(
        module["kernel"], state["features.0.weight"].transpose(2, 3, 1, 0), strict=True
    )
    np.testing.assert_array_equal(module["bias"], state["features.0.bias"], strict=True)


def test_a_missing_key_that_is_needed_is_an_error(tmp_path, vgg):
    network, state = vgg
    cut = {k: a for k, a in state.items() if "features.0" in k}
    with pytest.raises(ValueError, match=r"own\.safetensors.*2 missing.*features\.3\.weight"):
        load_features(network, ("relu1_1", "pool2"), file_of(tmp_path, cut))


def test_a_key_that_no_layer_has_is_an_error(tmp_path, vgg):
    network, state = vgg
    more = state | {"features.6.weight": np.ones((2, 6, 3, 3), np.float32)}
    with pytest.raises(ValueError, match=r"1 not used \(features\.6\.weight \(2, 6, 3, 3\)\)"):
        load_features(network, ("relu1_1",), file_of(tmp_path, more))


def test_a_needed_array_of_another_shape_is_an_error(tmp_path, vgg):
    network, state = vgg
    other = state | {"features.0.bias": np.ones(5, np.float32)}
    with pytest.raises(ValueError, match=r"features\.0\.bias \(5,\), expected \(4,\)"):
        load_features(network, ("relu1_1",), file_of(tmp_path, other))


def test_an_unknown_feature_is_an_error(tmp_path, vgg):
    network, state = vgg
    with pytest.raises(ValueError, match=r"unknown feature 'relu9_1'"):
        load_features(network, ("relu9_1",), file_of(tmp_path, state))


def test_vgg19_in_another_layout(tmp_path):
    network = networks.create_network("vgg19")
    rng = np.random.default_rng(0)
    content = {
        (1, 1, "weight"): rng.normal(size=(64, 3, 3, 3)).astype(np.float32),
        (1, 1, "bias"): rng.normal(size=64).astype(np.float32),
        (1, 2, "weight"): rng.normal(size=(64, 64, 3, 3)).astype(np.float32),
        (1, 2, "bias"): rng.normal(size=64).astype(np.float32),
    }
    file = file_of(tmp_path, named("adain", content))
    variables, preprocessing = load_features(network, ("relu1_1", "relu1_2"), file)
    assert preprocessing == CAFFE_PREPROCESSING
    params = variables["params"]
    assert sorted(params) == ["features.0", "features.2"]
    first, second = (content[1, i, "weight"].transpose(2, 3, 1, 0) for i in (1, 2))
    np.testing.assert_array_equal(params["features.0"]["kernel"], first[:, :, ::-1])
    np.testing.assert_array_equal(params["features.2"]["kernel"], second)
    np.testing.assert_array_equal(params["features.2"]["bias"], content[1, 2, "bias"])


@pytest.mark.real
def test_the_real_file_in_its_own_layout(shared):
    path = shared / "weights" / "vgg19_normalised.pth"
    file = resolve_weights("vgg19", path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    network = networks.create_network("vgg19", pool="average")
    variables, preprocessing = load_features(network, ("pool4",), file)
    assert preprocessing == CAFFE_PREPROCESSING
    assert len(variables["params"]) == 12
    with pytest.raises(ValueError, match="missing"):
        load_features(network, ("relu5_4",), file)
