"""Cue suppression against SciPy, plain loops and published values."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from topk_jax import evaluation, images
from topk_jax.decisions import identity_mapping
from topk_jax.images import Preprocessing
from topk_jax.stimuli import from_arrays, parse_suppression, suppress, suppression


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width, seed=0):
    """Noise with neighbours alike, as in a photograph."""
    values = ndimage.gaussian_filter(noise(height, width, seed).astype(float), (2, 2, 0))
    return np.clip((values - 128) * 4 + 128, 0, 255).astype(np.uint8)


# --- grey ----------------------------------------------------------------------------------------


def test_published_grey_levels():
    colors = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 30), (255, 255, 255)]])
    grey = suppression.grayscale(colors.astype(np.uint8))
    assert grey[0, :, 0].tolist() == [76, 150, 29, 124, 255]
    np.testing.assert_array_equal(grey, grey[..., :1].repeat(3, axis=2))


def test_grey_is_pillows():
    image = noise(60, 70)
    expected = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(suppression.grayscale(image)[..., 2], expected)


# --- blur ----------------------------------------------------------------------------------------


def test_published_kernel():
    kernel = suppression.gaussian_kernel(1)
    np.testing.assert_allclose(kernel[:4], [0.004433, 0.054006, 0.242036, 0.399050], atol=5e-7)
    np.testing.assert_array_equal(kernel, kernel[::-1])
    assert len(kernel) == 7
    assert len(suppression.gaussian_kernel(2.5)) == 17
    assert suppression.gaussian_kernel(4).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 4, 8])
@pytest.mark.parametrize("size", [(40, 31), (5, 64), (1, 7)])
def test_blur_is_scipys(size, sigma):
    image = noise(*size)
    radius = int(np.ceil(3 * sigma))
    expected = ndimage.gaussian_filter(
        image.astype(np.float64), (sigma, sigma, 0), mode="mirror", radius=(radius, radius, 0)
    )
    found = suppression.gaussian_blur(image, sigma)
    assert found.dtype == np.uint8
    # Within rounding: a value may lie next to a half.
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


def test_blur_of_a_point_is_the_kernel():
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = (255, 0, 100)
    kernel = suppression.gaussian_kernel(1)
    expected = np.outer(kernel, kernel)[..., None] * np.array([255.0, 0.0, 100.0])
    found = suppression.gaussian_blur(image, 1)
    np.testing.assert_array_equal(found[1:8, 1:8], np.rint(expected))
    assert not found[0].any()


# --- bilateral -----------------------------------------------------------------------------------


def bilateral_by_loops(image, window, sigma_color, sigma_space):
    """One pass, pixel by pixel, in float64."""
    radius = window // 2
    height, width = image.shape[:2]

    def mirrored(place, count):
        period = max(1, 2 * (count - 1))
        place = abs(place) % period
        return min(place, period - place)

    values = image.astype(np.float64)
    result = np.zeros(image.shape)
    for y, x in itertools.product(range(height), range(width)):
        weighted, total = np.zeros(3), 0.0
        for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
            other = values[mirrored(y + dy, height), mirrored(x + dx, width)]
            color = ((other - values[y, x]) ** 2).sum()
            weight = np.exp(-(dy**2 + dx**2) / (2 * sigma_space**2)) * np.exp(
                -color / (2 * sigma_color**2)
            )
            weighted += weight * other
            total += weight
        result[y, x] = weighted / total
    return result


@pytest.mark.parametrize(
    ("size", "window", "sigma_color", "sigma_space"),
    [((13, 11), 9, 75, 75), ((6, 9), 5, 20, 1.5), ((7, 5), 3, 5, 100), ((4, 3), 1, 75, 75)],
)
def test_bilateral_is_that_of_the_loops(size, window, sigma_color, sigma_space):
    image = smooth(*size)
    options = {"window": window, "sigma_color": sigma_color, "sigma_space": sigma_space}
    expected = bilateral_by_loops(image, window, sigma_color, sigma_space)
    once = suppression.bilateral_filter(image, passes=1, **options)
    assert np.abs(once - expected).max() <= 0.5 + 1e-3
    assert window == 1 or not np.array_equal(once, image)
    twice = suppression.bilateral_filter(image, passes=2, **options)
    np.testing.assert_array_equal(twice, suppression.bilateral_filter(once, passes=1, **options))


def test_bilateral_takes_texture_and_keeps_edges():
    image = np.full((40, 40, 3), 60, np.uint8)
    image[:, 20:] = 240
    texture = np.random.default_rng(0).integers(-12, 13, (40, 40, 1))
    found = suppression.bilateral_filter(np.clip(image + texture, 0, 255).astype(np.uint8))
    left, right = found[:, :20].astype(float), found[:, 20:].astype(float)
    assert max(left.std(), right.std()) < 0.25 * texture.std()
    assert right[:, 0].mean() - left[:, -1].mean() > 160
    blurred = suppression.gaussian_blur(image, 2).astype(float)
    assert blurred[:, 20].mean() - blurred[:, 19].mean() < 60


@pytest.mark.parametrize("color", [0, 77, 255])
def test_a_plain_image_stays_as_it_is(color):
    image = np.full((12, 10, 3), color, np.uint8)
    for word in ("gray", "blur3", "bilateral", "shuffle2"):
        found = parse_suppression(word).apply(image, image_name="x")
        np.testing.assert_array_equal(found, image)


# --- patches -------------------------------------------------------------------------------------


def test_published_shuffle():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    found = suppression.patch_shuffle(image, 2, [2, 0, 3, 1])
    assert found[..., 1].tolist() == [[8, 9, 0, 1], [12, 13, 4, 5], [10, 11, 2, 3], [14, 15, 6, 7]]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32), st.text())
@settings(max_examples=30, deadline=None)
def test_shuffle_keeps_every_tile(grid, tile_height, tile_width, seed, name):
    height, width = grid * tile_height, grid * tile_width
    image = np.arange(height * width * 3).reshape(height, width, 3).astype(np.uint8)
    order = suppression.patch_permutation(grid, seed=seed, image_name=name)
    found = suppression.patch_shuffle(image, grid, order)
    for place, number in enumerate(order.tolist()):
        tiles = []
        for picture, tile in ((found, place), (image, number)):
            top, left = tile // grid * tile_height, tile % grid * tile_width
            tiles.append(picture[top : top + tile_height, left : left + tile_width])
        np.testing.assert_array_equal(*tiles)
    np.testing.assert_array_equal(suppression.patch_shuffle(found, grid, np.argsort(order)), image)


def test_the_order_depends_on_seed_and_name_and_nothing_else():
    draw = suppression.patch_permutation
    first = draw(4, seed=0, image_name="cat/1.jpg")
    assert sorted(first.tolist()) == list(range(16))
    assert draw(4, seed=0, image_name="cat/1.jpg").tolist() == first.tolist()
    assert draw(4, seed=1, image_name="cat/1.jpg").tolist() != first.tolist()
    assert draw(4, seed=0, image_name="cat/2.jpg").tolist() != first.tolist()
    # The same numbers on every machine and with every NumPy: a written set can be made again.
    assert draw(2, seed=0, image_name="cat/1.jpg").tolist() == GOLDEN_ORDER
    counts = np.zeros((4, 4))
    for i in range(2000):
        counts[np.arange(4), draw(2, seed=0, image_name=str(i))] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05  # five standard deviations


GOLDEN_ORDER = [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: suppression.patch_shuffle(x, 5, range(25)),
         r"5 x 5 tiles do not divide 8 x 12 pixels; tiles a side can be 1, 2, 4$"),
        (lambda x: suppression.patch_shuffle(x, 0, []), "0 x 0 tiles"),
        (lambda x: suppression.patch_shuffle(x, 2, [0, 1, 2, 2]), "each number from 0 to 3 once"),
        (lambda x: suppression.patch_shuffle(x, 2, [0, 1, 2]), "each number from 0 to 3 once"),
        (lambda x: suppression.patch_shuffle(x, 2, [0.0, 1, 2, 3]), "a permutation of float64"),
        (lambda x: suppression.gaussian_blur(x, 0), "sigma=0 pixels: expected more than 0"),
        (lambda x: suppression.gaussian_blur(x, float("nan")), "sigma=nan"),
        (lambda x: suppression.bilateral_filter(x, window=4), "window=4: expected an odd"),
        (lambda x: suppression.bilateral_filter(x, sigma_color=0), "sigma_color=0"),
        (lambda x: suppression.bilateral_filter(x, passes=0), "passes=0"),
        (lambda x: suppression.grayscale(x.astype(float)), "an image of float64"),
        (lambda x: suppression.gaussian_blur(x[..., 0], 1), r"expected uint8 \[height, width, 3"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(noise(12, 8))


# --- words and stimuli ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "cue", "strength"),
    [("gray", "gray", 0), ("blur2", "blur", 2), ("blur0.5", "blur", 0.5), ("blur8.0", "blur", 8),
     ("bilateral", "bilateral", 0), ("shuffle14", "shuffle", 14), (" shuffle1 ", "shuffle", 1)],
)  # fmt: skip
def test_words(word, cue, strength):
    found = parse_suppression(word)
    assert (found.cue, found.strength) == (cue, strength)
    assert parse_suppression(found.word) == found


@pytest.mark.parametrize(
    "word", ["", "grey", "blur", "blur-1", "blur0", "blur1e9", "blur2000", "shuffle", "shuffle0",
             "shuffle2.5", "gray2", "bilateral9", "GRAY", "blur²"],
)  # fmt: skip
def test_unknown_words(word):
    with pytest.raises(ValueError, match=r"expected (gray, blur|more than 0|at least 1)"):
        parse_suppression(word)


@pytest.fixture
def pictures():
    pixels = np.stack([smooth(16, 12, seed) for seed in range(6)])
    return from_arrays(pixels, np.arange(6) % 2, ["a", "b"], name="val")


def test_suppressed_stimuli_are_lazy_and_keep_their_columns(pictures):
    loads = []
    counted = dataclasses.replace(
        pictures, load=lambda index: loads.append(index) or pictures.load(index)
    )
    found = suppress(counted, "blur2.0")
    assert not loads
    assert (found.name, found.condition) == ("val-blur2", ("blur2",) * 6)
    assert found.image_names == pictures.image_names
    assert found.category == pictures.category
    assert "blur2" in found.origin
    np.testing.assert_array_equal(found.load(3), suppression.gaussian_blur(pictures.load(3), 2))
    assert loads == [3]
    assert suppress(suppress(pictures, "gray"), "shuffle2").name == "val-gray-shuffle2"


def test_sizes_come_first(pictures):
    fitted = suppress(pictures, "blur1", image_size=8)
    np.testing.assert_array_equal(
        fitted.load(2), suppression.gaussian_blur(images.fit(pictures.load(2), 8), 1)
    )
    preprocessing = Preprocessing(8, 10, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    cropped = suppress(pictures, "gray", preprocessing=preprocessing)
    np.testing.assert_array_equal(
        cropped.load(2), suppression.grayscale(images.preprocess(pictures.load(2), preprocessing))
    )
    with pytest.raises(ValueError, match="3 x 3 tiles do not divide 8 x 8"):
        suppress(pictures, "shuffle3", image_size=8)
    with pytest.raises(ValueError, match="exclude each other"):
        suppress(pictures, "gray", image_size=8, preprocessing=preprocessing)
    with pytest.raises(ValueError, match=r"^a/0: 3 x 3 tiles do not divide 12 x 16"):
        suppress(pictures, "shuffle3").load(0)


def test_shuffles_are_the_same_in_any_order_and_from_threads(pictures):
    found = suppress(pictures, "shuffle4", seed=7)
    alone = [found.load(index) for index in range(6)]
    rows = np.random.default_rng(0).integers(0, 6, 200).tolist()
    for row, image in zip(rows, images.map_parallel(found.load, rows, workers=8), strict=True):
        np.testing.assert_array_equal(image, alone[row])
    part = suppress(pictures.select([5, 2]), "shuffle4", seed=7)
    np.testing.assert_array_equal(part.load(0), alone[5])
    assert not np.array_equal(suppress(pictures, "shuffle4", seed=8).load(0), alone[0])


def test_evaluate_takes_them_as_they_are():
    """A network that tells green from grey is at chance without colour, and untouched by a blur."""
    pixels = np.full((20, 8, 8, 3), 40, np.uint8)
    labels = np.arange(20) % 2
    # Both have the luma 124.
    pixels[labels == 0] = (10, 200, 30)
    pixels[labels == 1] = (124, 124, 124)
    stimuli = from_arrays(pixels, labels, ["green", "other"], name="val")

    def predict(batch):
        return np.stack([batch[..., 1].mean((1, 2)), batch[..., 0].mean((1, 2))], axis=1)

    def accuracy(shown):
        trials = evaluation.evaluate(
            predict,
            shown,
            mapping=identity_mapping(("green", "other")),
            preprocessing=Preprocessing(8, 8, (0.5, 0.6, 0.5), (1.0, 1.0, 1.0)),
        )
        assert set(trials.condition) == set(shown.condition)
        return np.mean(np.array(trials.object_response) == np.array(trials.category))

    assert accuracy(stimuli) == 1
    assert accuracy(suppress(stimuli, "blur2")) == 1
    assert accuracy(suppress(stimuli, "gray")) == 0.5


def test_filters_are_quick_enough_to_be_used_on_the_fly():
    image = smooth(224, 224)

    def fastest(function, *arguments):
        durations = []
        for _ in range(3):
            start = time.thread_time()
            function(image, *arguments)
            durations.append(time.thread_time() - start)
        return min(durations)

    assert fastest(suppression.bilateral_filter) < 1
    assert fastest(suppression.gaussian_blur, 8) < 0.2
