import itertools

import jax
import numpy as np
import optax
import pytest
from training_fixtures import SMALL, small_data, small_network, start

from topk_jax import parallel, training
from topk_jax.stimuli import from_arrays


def batches(count, *, epochs, devices):
    images, labels = small_data(count)
    stimuli = from_arrays(images, labels, ("a", "b", "c"), name="small")
    made = training.Batches(
        stimuli, lambda rng, image: image, batch_size=32, epochs=epochs, seed=0, devices=devices
    )
    return training.iterate(made)


def fit(report, *, learning_rate=1e-2, pieces=(0, 56), log_every=14):
    network, optimizer = small_network(dropout=0.1), optax.adam(learning_rate)
    devices = jax.devices()[:2]
    step = training.make_train_step(network, optimizer, preprocessing=SMALL)
    mapped = parallel.map_step(step, devices=devices)
    state = parallel.replicate(start(network, optimizer), devices)
    data = batches(200, epochs=8, devices=2)
    totals = []
    for first, last in itertools.pairwise(pieces):
        state, sums = training.fit(
            mapped, state, data, start=first, stop=last, report=report, log_every=log_every
        )
        totals.append(sums)
    return state, totals


def test_a_small_problem_is_learnt_and_reported():
    records = []
    state, (totals,) = fit(records.append)
    assert [record["step"] for record in records] == [14, 28, 42, 56]
    assert totals["count"] == 8 * 200
    mean = np.average([record["loss"] for record in records])
    assert totals["loss"] / totals["count"] == pytest.approx(mean, rel=0.1)
    assert records[-1]["loss"] < 0.4 * records[0]["loss"]
    assert records[-1]["accuracy"] > 0.9
    images, labels = small_data(100, seed=1)
    x = (images.astype(np.float32) / 255 - 0.5) / 0.25
    variables = jax.device_get(state.variables)
    logits, _ = jax.jit(lambda v, x: small_network().apply(v, x, train=False))(variables, x)
    assert np.mean(np.argmax(logits, axis=-1) == labels) > 0.9


def test_pieces_give_what_the_whole_gives():
    whole, pieces = [], []
    state, (sums,) = fit(whole.append)
    other, parts = fit(pieces.append, pieces=(0, 14, 42, 56))
    for record in (*whole, *pieces):
        del record["images_per_second"]
    assert whole == pieces
    assert sums["correct"] == sum(part["correct"] for part in parts)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_step_whose_loss_is_not_finite_is_named():
    with pytest.raises(RuntimeError, match=r"loss of step 2 is nan: a lower learning rate"):
        fit(lambda record: None, learning_rate=np.inf, pieces=(0, 8), log_every=4)
