"""Batches over devices: the same numbers on 1 and 8, padding cut off, one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import parallel


def double_sum(state, batch):
    return {"y": 2 * batch["x"] * state, "total": jnp.sum(batch["x"], axis=1)}


def batches(sizes):
    start = 0
    for size in sizes:
        yield {"x": np.arange(start, start + 3 * size, dtype=np.float32).reshape(size, 3)}
        start += 3 * size


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("sizes", [[8, 8], [8, 5], [1], [8, 8, 8, 8, 3]])
def test_results_do_not_depend_on_devices_or_padding(devices, sizes):
    found = list(
        parallel.map_batches(
            double_sum,
            np.float32(5),
            batches(sizes),
            batch_size=8,
            devices=jax.local_devices()[:devices],
        )
    )
    for batch, result in zip(batches(sizes), found, strict=True):
        np.testing.assert_array_equal(result["y"], 10 * batch["x"])
        np.testing.assert_array_equal(result["total"], batch["x"].sum(axis=1))


def test_one_program_for_full_and_short_batches():
    traces = 0

    def function(state, batch):
        nonlocal traces
        traces += 1
        return double_sum(state, batch)

    list(parallel.map_batches(function, np.float32(1), batches([8, 8, 3]), batch_size=8))
    assert traces == 1


def test_few_batches_are_taken_ahead():
    taken = 0

    def count():
        nonlocal taken
        for batch in batches([4] * 10):
            taken += 1
            yield batch

    results = parallel.map_batches(double_sum, np.float32(1), count(), batch_size=4, ahead=2)
    next(results)
    assert taken == 3


def test_replicate_puts_a_copy_on_every_device():
    leaf = parallel.replicate({"w": np.ones(3, np.float32)})["w"]
    assert leaf.is_fully_replicated
    assert len(leaf.addressable_shards) == jax.local_device_count()


def test_pad_batch():
    padded = parallel.pad_batch({"x": np.array([[1], [2]])}, 4)
    np.testing.assert_array_equal(padded["x"], [[1], [2], [2], [2]])
    with pytest.raises(ValueError, match="cannot be padded"):
        parallel.pad_batch({"x": np.zeros((5, 1))}, 4)
