"""Mean activations of 1 and the same logits, computed without the function under test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import networks
from topk_jax.synthesis.renormalization import renormalize

RELUS = ("relu1_1", "relu2_1", "relu2_2")
NETWORK = networks.VGG(
    convolutions=(1, 2), widths=(4, 6), hidden=(8,), num_classes=3, pooled_size=2, pool="average"
)


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    shapes = networks.variable_shapes(NETWORK, image_size=8)
    found = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    for module in found["params"].values():
        module["kernel"] *= 0.1
        module["bias"] += 2  # every filter responds somewhere
    return found


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(n, 8, 8, 3)).astype(np.float32) for n in (3, 3, 2)]
    images[2] *= 5  # so that a mean of means of batches would be another
    return images


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda variables, images: NETWORK.apply(variables, images, train=False))


@pytest.fixture(scope="module")
def renormalized(variables, batches):
    return renormalize(NETWORK, variables, batches)


def means(run, variables, batches):
    """Of each filter over all images and positions."""
    features = run(variables, np.concatenate(batches))[1]
    return {name: np.asarray(features[name], np.float64).mean((0, 1, 2)) for name in RELUS}


def test_mean_activations_become_one(run, variables, batches, renormalized):
    before, after = (means(run, v, batches) for v in (variables, renormalized))
    for name in RELUS:
        assert np.abs(before[name] - 1).max() > 0.3
        np.testing.assert_allclose(after[name], 1, rtol=1e-5)


def test_logits_are_the_same_and_features_in_proportion(run, variables, batches, renormalized):
    before = means(run, variables, batches)
    images = np.random.default_rng(2).normal(size=(8, 8, 8, 3)).astype(np.float32)
    (old, old_features), (new, new_features) = (run(v, images) for v in (variables, renormalized))
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4 * np.abs(old).max())
    for name in RELUS:
        expected = np.asarray(old_features[name]) / before[name]
        np.testing.assert_allclose(new_features[name], expected, rtol=1e-3, atol=1e-4)


def test_result_is_float32_in_numpy_and_the_argument_is_as_it_was(variables, batches):
    copy = jax.tree.map(np.array, variables)
    result = renormalize(NETWORK, variables, batches[:1])
    assert jax.tree.structure(result) == jax.tree.structure(variables)
    for leaf in jax.tree.leaves(result):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, variables, copy)


def test_a_second_time_changes_nothing(batches, renormalized):
    again = renormalize(NETWORK, renormalized, batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again, renormalized
    )


def test_silent_filters_are_left_as_they_are(run, variables, batches, caplog):
    caplog.set_level("INFO", logger="absl")
    silent = jax.tree.map(np.array, variables)
    silent["params"]["features.0"]["bias"][1] = -1e6
    found = renormalize(NETWORK, silent, batches)
    old, new = (v["params"]["features.0"] for v in (silent, found))
    np.testing.assert_array_equal(new["kernel"][..., 1], old["kernel"][..., 1])
    assert new["bias"][1] == old["bias"][1]
    after = means(run, found, batches)
    np.testing.assert_array_equal(after["relu1_1"][1], 0)
    np.testing.assert_allclose(np.delete(after["relu1_1"], 1), 1, rtol=1e-5)
    np.testing.assert_allclose(after["relu2_1"], 1, rtol=1e-5)
    assert "relu1_1: 1 of 4 filters never respond" in caplog.text
    images = np.concatenate(batches)
    expected = run(silent, images)[0]
    np.testing.assert_allclose(run(found, images)[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("last", ["relu1_1", "relu2_1"])
def test_variables_that_are_cut_off(variables, batches, renormalized, last):
    shapes = networks.feature_shapes(NETWORK, (last,), image_size=8)
    part = {"params": {name: variables["params"][name] for name in shapes["params"]}}
    found = renormalize(NETWORK, part, batches)
    assert list(found["params"]) == list(part["params"])
    for module, leaves in found["params"].items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(leaf, renormalized["params"][module][name], rtol=1e-5)


def test_what_cannot_be_renormalised(variables, batches):
    with pytest.raises(ValueError, match="without batch normalisation"):
        renormalize(networks.create_network("vgg11_bn"), variables, batches)
    with pytest.raises(ValueError, match="no images"):
        renormalize(NETWORK, variables, [])
    spoilt = [jnp.where(batches[0] > 2, jnp.nan, batches[0])]
    with pytest.raises(ValueError, match="activations of relu1_1 are not finite"):
        renormalize(NETWORK, variables, spoilt)
