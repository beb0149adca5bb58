"""Augmentation: laws of the drawn boxes, Pillow's pixels, and torchvision where it is installed."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from topk_jax import images
from topk_jax.training import augmentation
from topk_jax.training.augmentation import Augmentation

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32))
def test_boxes_are_within_the_image(height, width, seed):
    box = augmentation.random_box(np.random.default_rng(seed), height, width)
    assert all(isinstance(value, int) for value in box)
    assert 0 <= box.top < box.top + box.height <= height
    assert 0 <= box.left < box.left + box.width <= width


@given(st.integers(20, 600), st.floats(0.8, 1.25), st.integers(0, 2**32))
def test_area_and_ratio_are_within_limits(height, shape, seed):
    """Up to the rounding of both sides; the fallback is as likely as ten failures at random."""
    width = round(height * shape)
    box = augmentation.random_box(np.random.default_rng(seed), height, width)
    whole = height * width
    assert (box.width - 0.5) * (box.height - 0.5) <= SCALE[1] * whole
    assert (box.width + 0.5) * (box.height + 0.5) >= SCALE[0] * whole
    assert (box.width + 0.5) / (box.height - 0.5) >= RATIO[0]
    assert (box.width - 0.5) / (box.height + 0.5) <= RATIO[1]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 1000, (0, 493, 10, 13)),  # 4/3 of the height, in the middle
        (1000, 9, (494, 0, 12, 9)),
        (7, 9, (0, 0, 7, 9)),  # an allowed ratio: the whole image
    ],
)
def test_what_no_box_fits_is_cut_in_the_middle(height, width, expected):

    class TooLarge:
        """Draws an area of twice the image."""

        def uniform(self, low, high):
            return 2 * high

    assert augmentation.random_box(TooLarge(), height, width) == expected


def test_law_of_the_boxes():
    """Where every draw fits, area, logarithm of the ratio and place are uniform."""
    rng = np.random.default_rng(0)
    side, scale = 1000, (0.08, 0.5)
    boxes = [augmentation.random_box(rng, side, side, scale=scale) for _ in range(3000)]
    top, left, height, width = np.array(boxes).T
    log_ratio = np.log(np.array(RATIO))
    for values, (low, high) in (
        (height * width / side**2, scale),
        (np.log(width / height), log_ratio),
        (top / (side - height), (0, 1)),
        (left / (side - width), (0, 1)),
    ):
        law = scipy.stats.uniform(low, high - low)
        assert scipy.stats.kstest(values, law.cdf).pvalue > 1e-3


def test_a_generator_in_the_same_state_gives_the_same_image():
    image = noise(50, 70)
    first, again, other = (
        augmentation.random_resized_crop(np.random.default_rng(seed), image, 32)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("box", [(3, 5, 20, 31), (0, 0, 40, 60), (39, 59, 1, 1), (7, 0, 8, 60)])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_resized_crop_is_a_crop_and_then_a_resize(box, size):
    image = noise(40, 60)
    top, left, height, width = box
    expected = Image.fromarray(image).crop((left, top, left + width, top + height))
    expected = expected.resize((size, size), Image.Resampling.BILINEAR)
    found = images.resized_crop(image, *box, size)
    np.testing.assert_array_equal(found, np.asarray(expected))
    # The pixels around the box are not seen.
    other = 255 - image
    other[top : top + height, left : left + width] = image[top : top + height, left : left + width]
    np.testing.assert_array_equal(images.resized_crop(other, *box, size), found)


def test_resized_crop_is_within_the_image():
    image = noise(40, 60)
    np.testing.assert_array_equal(
        images.resized_crop(image[:, :40], 0, 0, 40, 40, 40), image[:, :40]
    )
    for box in ((-1, 0, 5, 5), (0, 56, 5, 5), (0, 0, 0, 5), (36, 0, 5, 5)):
        with pytest.raises(ValueError, match="expected one within the image of 40 x 60"):
            images.resized_crop(image, *box, 8)
    with pytest.raises(ValueError, match="size 0: expected"):
        images.resized_crop(image, 0, 0, 5, 5, 0)


def test_random_crop():
    """All 25 places, as often as one another; zeros outside the image."""
    image = noise(8, 8) | 1
    padded = np.zeros((12, 12, 3), np.uint8)
    padded[2:10, 2:10] = image
    rng = np.random.default_rng(0)
    places = {padded[i : i + 8, j : j + 8].tobytes(): (i, j) for i in range(5) for j in range(5)}
    counts = np.zeros((5, 5), int)
    for _ in range(2000):
        counts[places[augmentation.random_crop(rng, image, 8, 2).tobytes()]] += 1
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3
    with pytest.raises(ValueError, match="8 x 8 with a frame of 2 is smaller than the crop of 13"):
        augmentation.random_crop(rng, image, 13, 2)


def test_random_flip():
    image = noise(3, 4)
    rng = np.random.default_rng(0)
    mirrored = 0
    for _ in range(400):
        found = augmentation.random_flip(rng, image)
        flipped = found[0, 0].tolist() != image[0, 0].tolist()
        mirrored += flipped
        np.testing.assert_array_equal(found, image[:, [3, 2, 1, 0]] if flipped else image)
    assert scipy.stats.binomtest(mirrored, 400).pvalue > 1e-3


@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
def test_every_augmentation_gives_the_size(crop):
    augment = Augmentation(crop=crop, flip=True, size=24)
    for shape in ((24, 24), (30, 50)):
        image = noise(*shape)
        before = image.copy()
        found = augment(np.random.default_rng(0), image)
        assert (found.shape, found.dtype) == ((24, 24, 3), np.uint8)
        np.testing.assert_array_equal(image, before)


def test_augmentation_uses_its_settings():
    image = noise(40, 40)
    rngs = [np.random.default_rng(5) for _ in range(6)]
    none = Augmentation(crop="none", flip=False, size=24)
    np.testing.assert_array_equal(none(rngs[0], image), images.fit(image, 24))
    narrow = Augmentation(
        crop="random_resized", flip=False, size=24, scale=(0.2, 0.3), ratio=(0.5, 0.6)
    )
    expected = augmentation.random_resized_crop(
        rngs[1], image, 24, scale=(0.2, 0.3), ratio=(0.5, 0.6)
    )
    np.testing.assert_array_equal(narrow(rngs[2], image), expected)
    padded = Augmentation(crop="padded", flip=True, size=40, padding=7)
    expected = augmentation.random_flip(rngs[3], augmentation.random_crop(rngs[3], image, 40, 7))
    np.testing.assert_array_equal(padded(rngs[4], image), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "center"}, "crop='center': expected one of random_resized, padded, none"),
        ({"size": 0}, "size=0, padding=4: expected pixels"),
        ({"padding": -1}, "size=24, padding=-1: expected pixels"),
        ({"scale": (0.5, 0.1)}, "scale=.*: expected 0 < least <= largest"),
        ({"ratio": (0.0, 1.0)}, "ratio=.*: expected 0 < least <= largest"),
    ],
)
def test_errors_name_what_would_be_right(options, message):
    good = Augmentation(crop="padded", flip=False, size=24)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **options)


@pytest.mark.parity
def test_pixels_of_torchvision():
    pytest.importorskip("torch")
    functional = pytest.importorskip("torchvision.transforms.functional")
    rng = np.random.default_rng(1)
    for seed in range(60):
        image = noise(*rng.integers(8, 300, size=2), seed)
        box = augmentation.random_box(rng, *image.shape[:2])
        size = int(rng.integers(1, 230))
        expected = functional.resized_crop(Image.fromarray(image), *box, [size, size])
        np.testing.assert_array_equal(images.resized_crop(image, *box, size), np.asarray(expected))
        padding = int(rng.integers(0, 9))
        padded = functional.pad(Image.fromarray(image), padding)
        side = min(padded.size)
        found = augmentation.random_crop(np.random.default_rng(0), image, side, padding)
        assert any(
            np.array_equal(found, np.asarray(functional.crop(padded, i, j, side, side)))
            for i in range(padded.height - side + 1)
            for j in range(padded.width - side + 1)
        )


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(300, 400), (400, 120), (60, 500)])
def test_law_of_torchvision(shape):
    """Also where many draws do not fit, and with the fallback."""
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    image = torch.zeros(3, *shape)
    torch.manual_seed(0)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, list(SCALE), list(RATIO)) for _ in range(3000)])
    rng = np.random.default_rng(0)
    ours = np.array([augmentation.random_box(rng, *shape) for _ in range(3000)])
    for found, expected in zip(ours.T, theirs.T, strict=True):
        assert scipy.stats.ks_2samp(found, expected).pvalue > 1e-3
    area, expected = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    assert scipy.stats.ks_2samp(area, expected).pvalue > 1e-3
