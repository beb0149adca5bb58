"""Grey levels and histograms against golden values and a loop over pixels."""

import bisect

import numpy as np
import pytest

from topk_jax import images
from topk_jax.images import IMAGENET_PREPROCESSING, Preprocessing
from topk_jax.synthesis.postprocessing import match_histograms, to_pixels
from topk_jax.weights import CAFFE_PREPROCESSING, default_preprocessing

BUILTIN = default_preprocessing("builtin")
SOURCE = np.array([[0, 1], [2, 2]], np.uint8)[..., None]
EDGES = [level - 0.5 for level in range(257)]
TARGET = np.array([[10, 20], [30, 250]], np.uint8)[..., None]


def matched_by_a_loop(image, target, bins):
    """Each pixel by itself, with Python's numbers."""
    result = np.empty(image.shape, np.uint8)
    for channel in range(image.shape[2]):
        source = sorted(image[..., channel].ravel().tolist())
        wanted = target[..., channel].ravel().tolist()
        low, high = min(wanted), max(wanted)
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = [low + (high - low) * i / bins for i in range(bins + 1)] if bins else EDGES
        number = len(edges) - 1
        counts = [0] * number
        for level in wanted:
            counts[min(number - 1, bisect.bisect_right(edges, level) - 1)] += 1
        cumulative = [sum(counts[:i]) / len(wanted) for i in range(number + 1)]
        for place in np.ndindex(image.shape[:2]):
            level = int(image[(*place, channel)])
            first = bisect.bisect_left(source, level)
            last = bisect.bisect_right(source, level)
            # Mean of the ranks first + 1 ... last, or the middle of the pixels.
            rank = (first + (1 if bins else 0) + last) / 2 / len(source)
            upper = bisect.bisect_right(cumulative, rank)
            if upper > number:
                value = edges[-1]
            else:
                below, above = cumulative[upper - 1], cumulative[upper]
                part = (rank - below) / (above - below)
                value = edges[upper - 1] + part * (edges[upper] - edges[upper - 1])
            result[(*place, channel)] = int(value) if bins else round(value)
    return result


@pytest.mark.parametrize(
    ("bins", "expected"), [(4, [[30, 50], [220, 220]]), (100, [[19, 29], [248, 248]])]
)
def test_golden_values_are_cut_down(bins, expected):
    # 19.6, 29.2 and 248.8 with 100 bins.
    found = match_histograms(SOURCE, TARGET, bins=bins)
    np.testing.assert_array_equal(found[..., 0], expected)
    assert found.dtype == np.uint8


def test_ranks_are_shared_by_equal_pixels():
    # Ranks .75 .375 .375 1 against a target whose cumulative histogram is a straight line.
    line = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    image = np.array([[3, 1], [1, 7]], np.uint8)[..., None]
    found = match_histograms(image, line, bins=256)[..., 0]
    np.testing.assert_array_equal(found, [[191, 95], [95, 255]])
    # Middles .625 .25 .25 .875 of the pixels, of 256 levels from -0.5 on.
    found = match_histograms(image, line)[..., 0]
    np.testing.assert_array_equal(found, [[160, 64], [64, 224]])


@pytest.mark.parametrize("bins", [None, 1, 7, 100, 256])
@pytest.mark.parametrize("seed", range(4))
def test_vectorised_is_the_loop(seed, bins):
    rng = np.random.default_rng(seed)
    high = (256, 5, 40, 256)[seed]
    image = rng.integers(0, high, (9, 7, 3)).astype(np.uint8)
    target = rng.normal(120, 30, (6, 11, 3)).clip(0, 255).astype(np.uint8)
    found = match_histograms(image, target, bins=bins).astype(int)
    expected = matched_by_a_loop(image, target, bins).astype(int)
    # Levels that are whole but for float64 rounding may be cut down either way.
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found != expected) < 0.02


@pytest.mark.parametrize("spread", [0, 3, 20, 100])
def test_an_image_matched_to_itself_stays_as_it_is(spread):
    image = np.random.default_rng(1).normal(128, spread, (32, 33, 3)).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(match_histograms(image, image), image)
    np.testing.assert_array_equal(match_histograms(np.tile(image, (2, 1, 1)), image)[:32], image)


def test_matched_levels_have_the_distribution_of_the_target():
    rng = np.random.default_rng(5)
    image = rng.permutation(256).astype(np.uint8).reshape(16, 16, 1)  # no two pixels are equal
    target = rng.normal(90, 40, (16, 16, 1)).clip(0, 255).astype(np.uint8)
    found = np.sort(match_histograms(image, target).ravel().astype(int))
    np.testing.assert_allclose(found, np.sort(target.ravel()), atol=1)


def test_order_of_pixels_is_kept_and_places_do_not_matter():
    rng = np.random.default_rng(2)
    image, target = (rng.integers(0, 256, (12, 12, 1)).astype(np.uint8) for _ in range(2))
    found = match_histograms(image, target)
    order = np.argsort(image.ravel(), kind="stable")
    assert np.all(np.diff(found.ravel()[order].astype(int)) >= 0)
    shuffled = rng.permutation(target.ravel()).reshape(target.shape)
    np.testing.assert_array_equal(match_histograms(image, shuffled), found)
    turned = match_histograms(image[::-1], target)
    np.testing.assert_array_equal(turned, found[::-1])


def test_channels_are_matched_each_by_itself():
    rng = np.random.default_rng(3)
    image, target = (rng.integers(0, 256, (8, 9, 3)).astype(np.uint8) for _ in range(2))
    found = match_histograms(image, target)
    for channel in range(3):
        one = match_histograms(image[..., channel, None], target[..., channel, None])
        np.testing.assert_array_equal(found[..., channel], one[..., 0])


@pytest.mark.parametrize("level", [0, 10, 255])
@pytest.mark.parametrize("bins", [None, 100, 256])
def test_a_target_of_one_level_gives_that_level(level, bins):
    image = np.random.default_rng(4).integers(0, 256, (8, 9, 1)).astype(np.uint8)
    found = match_histograms(image, np.full((3, 3, 1), level, np.uint8), bins=bins)
    np.testing.assert_array_equal(found, level)


@pytest.mark.parametrize(
    ("image", "target", "message"),
    [
        (SOURCE[..., 0], TARGET, r"\(2, 2\) and \(2, 2, 1\)"),
        (SOURCE, np.repeat(TARGET, 3, 2), r"as many channels"),
        (SOURCE.astype(np.float32), TARGET, "expected uint8"),
        (SOURCE, TARGET.astype(np.int32), "expected uint8"),
        (SOURCE[:0], TARGET, "at least one pixel"),
        (SOURCE, TARGET[:0], "at least one pixel"),
    ],
)
def test_bad_images(image, target, message):
    with pytest.raises(ValueError, match=message):
        match_histograms(image, target)


def test_bad_bins():
    with pytest.raises(ValueError, match="bins=0"):
        match_histograms(SOURCE, TARGET, bins=0)


@pytest.mark.parametrize("preprocessing", [IMAGENET_PREPROCESSING, CAFFE_PREPROCESSING, BUILTIN])
def test_pixels_are_what_was_normalised(preprocessing):
    levels = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)
    found = to_pixels(images.normalize(levels, preprocessing), preprocessing)
    np.testing.assert_array_equal(found, levels)
    assert found.dtype == np.uint8


def test_pixels_are_rounded_and_clipped():
    preprocessing = Preprocessing(4, 4, (0.0, 0.5, 1.0), (1.0, 1.0, 1 / 255))
    levels = np.array([[[-3, 12.4, 300], [12.6, 254.6, -0.6]]])
    image = (levels / 255 - preprocessing.mean) / preprocessing.std
    found = to_pixels(image.astype(np.float32), preprocessing)
    np.testing.assert_array_equal(found, [[[0, 12, 255], [13, 255, 0]]])
