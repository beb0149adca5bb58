"""Batches over devices: the same numbers on 1 and 8, padding cut off, one program."""

import threading
import time

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


def test_map_devices_gives_results_in_order_each_device_one_item_at_a_time():
    devices = jax.local_devices()[:3]
    lock, busy, most, used = threading.Lock(), set(), [0], set()

    def function(item, device, stop):
        assert not stop.is_set()
        with lock:
            assert device not in busy
            busy.add(device)
            used.add(device)
            most[0] = max(most[0], len(busy))
        time.sleep(0.01 * (3 - item % 3))
        with lock:
            busy.remove(device)
        return item * item

    found = list(parallel.map_devices(function, list(range(12)), devices=devices))
    assert found == [item * item for item in range(12)]
    assert used == set(devices)
    assert most[0] == 3


def test_map_devices_on_one_device_works_in_the_caller_itself():
    main = threading.current_thread()

    def function(item, device, stop):
        assert threading.current_thread() is main
        return item, device

    device = jax.local_devices()[2]
    found = list(parallel.map_devices(function, ["a", "b"], devices=[device]))
    assert found == [("a", device), ("b", device)]
    assert list(parallel.map_devices(function, [])) == []


def test_map_devices_stops_the_others_after_an_exception():
    stopped, begun = threading.Event(), []

    def function(item, device, stop):
        begun.append(item)
        if item == 0:
            time.sleep(0.05)
            raise ValueError("item 0")
        if stop.wait(10):
            stopped.set()

    with pytest.raises(ValueError, match="item 0"):
        list(parallel.map_devices(function, list(range(50)), devices=jax.local_devices()[:2]))
    assert stopped.wait(5)
    assert len(begun) < 10
