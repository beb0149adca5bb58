"""From a preset and a target to a picture: the built-in network and a tiny one, small pictures."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

from topk_jax import images, networks
from topk_jax.images import IMAGENET_PREPROCESSING
from topk_jax.synthesis import problem as problems
from topk_jax.synthesis.presets import find_preset
from topk_jax.weights import CAFFE_PREPROCESSING, default_preprocessing

PRESET = dataclasses.replace(find_preset("builtin"), layers=("relu1_1", "pool1"), size=32)


@functools.cache
def weights():
    return problems.load_weights(PRESET)


@functools.cache
def features():
    return problems.extractor(PRESET, weights())


def target(height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def problem(pixels=None, preset=PRESET, **options):
    pixels = target() if pixels is None else pixels
    return problems.create_problem(preset, weights(), pixels, features=features(), **options)


def test_weights_are_those_that_the_layers_need():
    found = weights()
    assert list(found.variables["params"]) == ["features.0"]
    assert found.preprocessing == default_preprocessing("builtin")
    assert found.file.origin == "builtin"


@pytest.mark.parametrize(
    ("size", "shape"),
    [(8, (8, 13)), ((8, 8), (8, 8)), ((9, 4), (9, 4)), (20, (20, 33))],
)
def test_target_is_fitted_by_lanczos(size, shape):
    pixels = target(20, 33)
    found = problems.fit_target(pixels, dataclasses.replace(PRESET, size=size))
    assert found.shape == (*shape, 3)
    expected = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, np.asarray(expected))
    turned = problems.fit_target(pixels.swapaxes(0, 1), dataclasses.replace(PRESET, size=8))
    assert turned.shape == (13, 8, 3)


def test_a_long_target_keeps_a_pixel_of_its_short_side():
    assert problems.fit_target(target(2, 100), dataclasses.replace(PRESET, size=1)).shape[0] == 1


def test_search_lowers_the_loss_and_its_picture_is_in_the_range_of_the_target():
    pixels = (target() // 4 + 90).astype(np.uint8)
    one = problem(pixels)
    states = list(problems.search(jax.random.key(0), one, max_evaluations=40, memory_size=10))
    assert states[-1].evaluations == 40
    assert states[-1].value < 0.1 * states[0].value
    for state in (states[0], states[-1]):
        picture = problems.picture(one, state)
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
        assert picture.min() >= pixels.min()
        assert picture.max() <= pixels.max()
    # The loss of the image in the published scale, in NumPy from the network's features.
    image = problems.image(one, states[-1])
    run = jax.jit(networks.FeatureExtractor(PRESET.network(), PRESET.layers))
    variables = weights().variables
    loss = 0.0
    for name in PRESET.layers:
        grams = []
        for x in (image, images.normalize(pixels, weights().preprocessing)):
            a = np.asarray(run(variables, x[None])[name], np.float64)[0]
            a = a.reshape(-1, a.shape[-1])
            grams.append(a.T @ a / a.size)
        loss += 0.25e9 * np.sum((grams[0] - grams[1]) ** 2)
    np.testing.assert_allclose(one.published_loss(states[-1].value), loss, rtol=2e-2)


def test_start_is_noise_of_one_grey_level_about_the_networks_zero():
    one = problem()
    (state,) = list(problems.search(jax.random.key(1), one, max_evaluations=1, memory_size=10))
    levels = problems.picture(one, state).astype(float)
    zero = 255 * np.array(weights().preprocessing.mean)
    np.testing.assert_allclose(levels.mean((0, 1)), zero, atol=0.5)
    assert 0.8 < (levels - levels.mean((0, 1))).std() < 1.3
    (again,) = list(problems.search(jax.random.key(1), one, max_evaluations=1, memory_size=10))
    np.testing.assert_array_equal(again.x, state.x)
    (other,) = list(problems.search(jax.random.key(2), one, max_evaluations=1, memory_size=10))
    assert np.abs(other.x - state.x).max() > 0


@pytest.mark.parametrize(
    ("preprocessing", "deviation"),
    [(CAFFE_PREPROCESSING, 1.0), (IMAGENET_PREPROCESSING, 1 / (255 * 0.226))],
)
def test_deviation_is_in_the_networks_units(preprocessing, deviation):
    changed = weights()._replace(preprocessing=preprocessing)
    found = problems.create_problem(PRESET, changed, target(), features=features())
    np.testing.assert_allclose(found.deviation, deviation, rtol=1e-6)
    assert found.shape == (1, 32, 32, 3)
    lows = [(0 / 255 - m) / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    assert target().min() == 0
    np.testing.assert_allclose(found.parametrization.low, min(lows), rtol=1e-5)


def test_bounds_are_kept_by_the_search():
    preset = dataclasses.replace(PRESET, parametrization="bounds")
    shared = jax.tree_util.Partial(lambda images: {"relu1_1": images, "pool1": images})
    one = problems.create_problem(preset, weights(), target(4, 4), features=shared)
    low, high = one.parametrization.bounds
    assert high > low
    states = list(problems.search(jax.random.key(0), one, max_evaluations=15, memory_size=10))
    for state in states:
        assert np.all((state.x >= low) & (state.x <= high))
    assert states[-1].value < states[0].value


def test_objective_of_the_search_is_the_problems():
    shared = jax.tree_util.Partial(lambda images: {"relu1_1": images, "pool1": images})
    one = problems.create_problem(
        PRESET, weights(), target(4, 4), features=shared, objective="reconstruction"
    )
    assert one.objective(images.normalize(target(4, 4)[None], weights().preprocessing)) < 1e-10
    (state,) = list(problems.search(jax.random.key(0), one, max_evaluations=1, memory_size=10))
    np.testing.assert_allclose(
        state.value, one.objective(one.parametrization.to_image(state.x)), rtol=1e-5
    )


def test_resume_goes_on_where_it_stopped():
    one = problem()
    limits = {"max_evaluations": 20, "memory_size": 10}
    kept = []
    for state in problems.search(jax.random.key(0), one, **limits):
        kept.append(state._replace(memory=jax.tree.map(np.array, state.memory)))
    again = list(problems.search(jax.random.key(9), one, resume=kept[5], **limits))
    assert again[-1].value == kept[-1].value
    np.testing.assert_array_equal(again[-1].x, kept[-1].x)


def test_one_program_for_the_searches_of_all_targets():
    traced = []

    def counted(images):
        traced.append(images.shape)
        return {"relu1_1": images, "pool1": images * 2}

    shared = jax.tree_util.Partial(counted)
    for seed in range(3):
        one = problems.create_problem(PRESET, weights(), target(seed=seed), features=shared)
        list(problems.search(jax.random.key(seed), one, max_evaluations=3, memory_size=10))
    assert len(traced) == 2  # the targets' features, and the losses


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (target().astype(np.float32), {}, r"float32 \[32, 32, 3\]: expected uint8"),
        (target()[..., 0], {}, r"uint8 \[32, 32\]: expected"),
        (target()[..., :2], {}, r"\[32, 32, 2\]"),
        (np.full((32, 32, 3), 128, np.uint8), {}, "nothing to synthesise"),
        (target(), {"objective": "gram"}, "objective='gram': expected texture or reconstruction"),
        (target(), {"mask_image": "target"}, "mask_image is for reconstruction"),
        (target(), {"mode": "bottom"}, "mode='bottom'"),
        (target(), {"mode": "top", "sparsity": 0.0}, "sparsity=0.0"),
        (target(1, 9), {}, "too small for this network"),
        (target(16, 64), {}, "too small for this network"),
    ],
)
def test_bad_problems(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        problem(pixels, **options)


def test_unknown_layers_are_an_error_when_weights_are_loaded():
    with pytest.raises(ValueError, match="unknown feature 'relu9_1'"):
        problems.load_weights(dataclasses.replace(PRESET, layers=("relu9_1",)))
