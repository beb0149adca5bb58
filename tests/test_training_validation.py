import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import SMALL, small_data, small_network

from topk_jax import evaluation, training
from topk_jax.stimuli import Stimuli, from_arrays


def classes(count=30, seed=0, broken=()):
    pixels, labels = small_data(count, seed=seed)
    stimuli = from_arrays(pixels, labels, ("a", "b", "c"), name="small")

    def load(index):
        if index in broken:
            raise ValueError(f"image {index} is damaged")
        return stimuli.load(index)

    return Stimuli(
        "small", stimuli.categories, stimuli.image_names, stimuli.category, stimuli.condition,
        load, "memory",
    ), pixels, labels  # fmt: skip


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture(scope="module")
def variables(network):
    return training.init_variables(network, jax.random.key(3), image_size=8)


def right(network, variables, pixels, labels):
    x = jnp.asarray((pixels.astype(np.float32) / 255 - 0.5) / 0.25)
    return np.argmax(network.apply(variables, x, train=False)[0], axis=-1) == labels


def test_accuracies_of_each_set_and_class(network, variables):
    first, pixels, labels = classes()
    second, *others = classes(count=11, seed=1)
    validation = training.Validation(
        network, {"first": first, "second": second}, preprocessing=SMALL, batch_size=8
    )
    found = validation.measure(variables)
    correct = right(network, variables, pixels, labels)
    assert found["accuracy"]["first"] == np.mean(correct)
    assert found["accuracy"]["second"] == pytest.approx(np.mean(right(network, variables, *others)))
    assert found["n_images"] == {"first": 30, "second": 11}
    expected = [np.mean(correct[labels == label]) for label in range(3)]
    np.testing.assert_allclose(found["per_class"]["first"], expected)
    assert "shape_bias" not in found


def test_damaged_images_are_left_out_or_end_it(network, variables):
    stimuli, pixels, labels = classes(broken=(4, 9))
    found = training.Validation(network, {"x": stimuli}, preprocessing=SMALL).measure(variables)
    readable = np.delete(np.arange(30), (4, 9))
    expected = np.mean(right(network, variables, pixels[readable], labels[readable]))
    assert found["n_images"] == {"x": 28}
    assert found["accuracy"]["x"] == pytest.approx(expected)
    strict = training.Validation(network, {"x": stimuli}, preprocessing=SMALL, strict=True)
    with pytest.raises(ValueError, match="image 4 is damaged"):
        strict.measure(variables)
    nothing, *_ = classes(count=3, broken=(0, 1, 2))
    with pytest.raises(ValueError, match="none of its images can be read"):
        training.Validation(network, {"x": nothing}, preprocessing=SMALL).measure(variables)


def test_a_second_measurement_compiles_nothing(network, variables):
    stimuli, *_ = classes()
    traces = []

    class Traced:
        def apply(self, *args, **kwargs):
            traces.append(1)
            return network.apply(*args, **kwargs)

    validation = training.Validation(Traced(), {"x": stimuli, "y": stimuli}, preprocessing=SMALL)
    first = validation.measure(variables)
    count = len(traces)
    assert count > 0
    assert validation.measure(variables) == first
    assert len(traces) == count


def test_methods_of_what_cannot_be_hashed_are_evaluated_too(network, variables):
    stimuli, pixels, labels = classes()

    class Unhashable:
        __hash__ = None

        def predict(self, variables, x):
            return network.apply(variables, x, train=False)[0]

    logits = np.concatenate(
        list(
            evaluation.predict_logits(
                Unhashable().predict, stimuli, variables=variables, preprocessing=SMALL
            )
        )
    )
    np.testing.assert_array_equal(
        np.argmax(logits, axis=-1) == labels, right(network, variables, pixels, labels)
    )
