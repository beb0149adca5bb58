"""The three ways to write an image in numbers: inverse, bounded, stable at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from topk_jax.synthesis.parametrization import Parametrization, start, within_range_of

LOW, HIGH = -103.939, 151.061


def space(kind):
    return Parametrization(kind, jnp.float32(LOW), jnp.float32(HIGH))


def test_range_is_that_of_the_target_over_all_channels():
    target = np.zeros((1, 4, 5, 3), np.float32)
    target[0, 1, 2, 0], target[0, 3, 4, 2] = -2.5, 7.25
    found = within_range_of(target, "sigmoid")
    assert (found.low, found.high) == (-2.5, 7.25)
    assert found.low.dtype == found.high.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["sigmoid", "bounds", "none"])
@pytest.mark.parametrize("target", [np.full((1, 2, 2, 3), 3.0), np.full((1, 2, 2, 3), np.nan)])
def test_a_target_without_a_range_is_an_error(kind, target):
    with pytest.raises(ValueError, match="nothing to synthesise"):
        within_range_of(target, kind)


def test_sigmoid_is_that_of_scipy():
    z = np.linspace(-30, 30, 241)
    expected = LOW + (HIGH - LOW) * scipy.special.expit(z)
    np.testing.assert_allclose(space("sigmoid").to_image(z.astype(np.float32)), expected, atol=1e-4)
    inside = np.linspace(LOW + 0.01, HIGH - 0.01, 100)
    expected = scipy.special.logit((inside - LOW) / (HIGH - LOW))
    np.testing.assert_allclose(
        space("sigmoid").to_numbers(inside.astype(np.float32)), expected, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["sigmoid", "bounds", "none"])
def test_round_trip(kind):
    image = np.random.default_rng(0).uniform(LOW, HIGH, (1, 4, 6, 3)).astype(np.float32)
    image[0, 0, 0] = [LOW, HIGH, 0]
    numbers = space(kind).to_numbers(image)
    # A grey level is 1: the ends lose a millionth of the range.
    np.testing.assert_allclose(space(kind).to_image(numbers), image, atol=1e-3)
    inner = numbers[:, 1:]
    np.testing.assert_allclose(
        space(kind).to_numbers(space(kind).to_image(inner)), inner, rtol=1e-2
    )


@pytest.mark.parametrize("kind", ["sigmoid", "bounds"])
def test_images_outside_the_range_are_clipped(kind):
    image = np.array([-1e9, LOW - 1, HIGH + 1, 1e9, -np.inf, np.inf], np.float32)
    numbers = space(kind).to_numbers(image)
    assert np.all(np.isfinite(numbers))
    np.testing.assert_allclose(
        space(kind).to_image(numbers), [LOW, LOW, HIGH, HIGH, LOW, HIGH], atol=1e-3
    )


def test_none_keeps_everything():
    image = np.array([-1e9, 0, 1e9], np.float32)
    np.testing.assert_array_equal(space("none").to_numbers(image), image)
    np.testing.assert_array_equal(space("none").to_image(image), image)


def test_both_tails_have_finite_gradients_within_the_range():
    z = jnp.asarray([-1e4, -100, -20, -1, 0, 1, 20, 100, 1e4], jnp.float32)
    image, gradient = jax.vmap(jax.value_and_grad(space("sigmoid").to_image))(z)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient) >= 0)
    assert np.all((np.asarray(image) >= LOW - 1e-4) & (np.asarray(image) <= HIGH + 1e-4))
    expected = (HIGH - LOW) * scipy.special.expit(z) * scipy.special.expit(-np.asarray(z))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_ends_of_the_range_can_be_left_again():
    numbers = space("sigmoid").to_numbers(np.array([LOW, HIGH], np.float32))
    gradient = jax.vmap(jax.grad(space("sigmoid").to_image))(numbers)
    assert np.all(np.asarray(gradient) > 1e-5)


def test_only_bounds_have_bounds():
    assert space("sigmoid").bounds is None
    assert space("none").bounds is None
    np.testing.assert_allclose(space("bounds").bounds, (LOW, HIGH))


def test_a_range_for_each_channel():
    low, high = (np.array(v, np.float32).reshape(1, 1, 1, 3) for v in ([0, -1, 5], [1, 1, 9]))
    for kind in ("sigmoid", "bounds"):
        found = Parametrization(kind, low, high)
        image = np.array([[[[0.25, 0.5, 6]]]], np.float32)
        np.testing.assert_allclose(found.to_image(found.to_numbers(image)), image, rtol=1e-5)


def test_start_is_noise_about_zero_clipped_to_the_range():
    key = jax.random.key(3)
    expected = 2.5 * np.asarray(jax.random.normal(key, (1, 4, 6, 3)))
    for kind in ("sigmoid", "bounds", "none"):
        wide, narrow = space(kind), Parametrization(kind, jnp.float32(-1), jnp.float32(2))
        np.testing.assert_allclose(
            wide.to_image(start(key, wide, (1, 4, 6, 3), 2.5)), expected, atol=1e-3
        )
        clipped = expected if kind == "none" else np.clip(expected, -1, 2)
        np.testing.assert_allclose(
            narrow.to_image(start(key, narrow, (1, 4, 6, 3), 2.5)), clipped, atol=1e-4
        )


def test_ranges_are_arguments_of_compiled_programs():
    traced = []

    @jax.jit
    def image(parametrization, z):
        traced.append(z.shape)
        return parametrization.to_image(z)

    for low in (0.0, 1.0):
        found = image(Parametrization("sigmoid", jnp.float32(low), jnp.float32(3)), jnp.zeros(2))
        np.testing.assert_allclose(found, (low + 3) / 2)
    assert len(traced) == 1
