"""Work spread over devices by pmap: replicated state, batches cut along a leading device axis.

Data contract: a batch is a pytree of arrays with one leading batch axis, of equal length in every
leaf. What is padded to fill the devices is masked by the caller or cut off again here.
"""

import collections
import concurrent.futures
import functools
import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"

Item = TypeVar("Item")
Result = TypeVar("Result")

Device = Any
"""A `jax.Device`; type checkers take that name for a variable."""


def replicate(tree: Any, devices: list[Device] | None = None) -> Any:
    """Puts one copy of every leaf on each device; for `pmap` arguments with `in_axes=None`."""
    devices = devices or jax.local_devices()
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))


def pad_batch(batch: Any, size: int) -> Any:
    """Repeats the last row of every leaf until the batch has `size` rows.

    Repeated rows, not zeros: they are real inputs, so that nothing can overflow on them.

    Raises:
        ValueError: The batch is empty or longer than `size`.
    """

    def pad(leaf: np.ndarray) -> np.ndarray:
        if not 0 < len(leaf) <= size:
            raise ValueError(f"a batch of {len(leaf)} rows cannot be padded to {size}")
        return np.concatenate([leaf, np.repeat(leaf[-1:], size - len(leaf), axis=0)])

    return jax.tree.map(pad, batch)


def shard(batch: Any, devices: int) -> Any:
    """Cuts the leading axis [n, ...] into [devices, n / devices, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


def batch_per_call(batch_size: int, devices: int) -> int:
    """Smallest multiple of `devices` that is at least `batch_size`."""
    return -(-batch_size // devices) * devices


def check_shared_evenly(batch_size: int, devices: int) -> None:
    """Makes sure that a batch can be shared evenly.

    Raises:
        ValueError: It cannot; the message names a size that can.
    """
    if batch_size % devices:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared evenly by {devices} devices: write a "
            f"multiple of {devices}, for example {batch_per_call(batch_size, devices)}"
        )


@functools.lru_cache(maxsize=16)
def _mapped(function: Callable[[Any, Any], Any], devices: tuple[Device, ...]) -> Any:
    """The same program for the same function: a validation after each epoch compiles once."""
    return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=devices)


def map_step(
    step: Callable[..., Any], *, devices: list[Device] | None = None
) -> Callable[..., Any]:
    """Drives `step(state, batch) -> (state, sums)` over devices; the axis is called `AXIS`.

    Args:
        step: Per-replica function that returns the same state and sums on every device, which
            `psum` or `pmean` over `AXIS` sees to: nothing checks it.
        devices: Devices of this process; by default all devices of all processes, each process
            giving the batches of its own.

    Returns:
        Function of a state from `replicate` and a batch [local devices, n, ...]. Its state is
        replicated and never stacked. The state passed in is given away and must not be used again:
        jax 0.10 ends the process without a word where it is.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,  # pyright: ignore[reportArgumentType]
        donate_argnums=0,
        devices=devices,
    )


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of one run, before anything touches a device.

    Args:
        coordinator_address: `host:port` of process 0. On TPU pods and under Slurm all three are
            found by themselves.
        num_processes: How many there are.
        process_id: Number of this one, from 0.

    Raises:
        ValueError: Some of the three are given, but not all, or they do not fit together.
        RuntimeError: The others were not found.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator_address is None or num_processes is None or process_id is None:
            raise ValueError(
                "coordinator address, number of processes and process id go together: give all "
                "three, or none on a TPU pod or under Slurm"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process {process_id} of {num_processes}: they count from 0")
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def is_first_process() -> bool:
    """Says whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def sum_over_processes(values: Any) -> Any:
    """Sums of a pytree of numbers or NumPy arrays over all processes; the same on each of them."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    def total(leaf: Any) -> np.ndarray:
        # Counts of images fit into float64, but not into JAX's default float32.
        parts = np.atleast_1d(np.asarray(leaf, np.float64)).view(np.int32)
        gathered = np.ascontiguousarray(multihost_utils.process_allgather(parts))
        return gathered.view(np.float64).sum(axis=0).reshape(np.shape(leaf))

    return jax.tree.map(total, values)


def wait_for_processes(name: str) -> None:
    """Returns when every process has come to the place called `name`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def check_same_on_processes(value: Any, what: str) -> None:
    """Makes sure that every process has the same value.

    Raises:
        RuntimeError: They differ, on every process; the message names `what`.
    """
    if jax.process_count() == 1:
        return
    digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:3])
    if sum_over_processes(digest) != digest * jax.process_count():
        raise RuntimeError(f"the processes of this run differ in {what}: start all with the same")


def map_batches(
    function: Callable[[Any, Any], Any],
    state: Any,
    batches: Iterable[Any],
    *,
    batch_size: int,
    devices: list[Device] | None = None,
    ahead: int = 2,
) -> Iterator[Any]:
    """Applies `function(state, batch)` to each batch, spread over all devices.

    One program is compiled: a short batch is padded and its padding cut from the result. Results
    are fetched `ahead` calls after they were started, so that host work (decoding) overlaps.

    Args:
        function: Per-replica function whose results have the batch axis leading in every leaf.
        state: Pytree replicated over the devices (variables of a network).
        batches: Pytrees of NumPy arrays with at most `batch_size` rows.
        batch_size: Rows a call, rounded up to a multiple of the number of devices.
        devices: Devices to use; all local ones by default.
        ahead: Calls in flight.

    Yields:
        NumPy results, one a batch, in order.
    """
    devices = devices or jax.local_devices()
    size = batch_per_call(batch_size, len(devices))
    mapped = _mapped(function, tuple(devices))
    state = replicate(state, devices)
    in_flight: collections.deque[tuple[int, Any]] = collections.deque()

    def fetch() -> Any:
        rows, result = in_flight.popleft()

        def join(leaf: Any) -> np.ndarray:
            array = np.asarray(leaf)
            return array.reshape(-1, *array.shape[2:])[:rows]

        return jax.tree.map(join, result)

    for batch in batches:
        rows = len(jax.tree.leaves(batch)[0])
        in_flight.append((rows, mapped(state, shard(pad_batch(batch, size), len(devices)))))
        if len(in_flight) > ahead:
            yield fetch()
    while in_flight:
        yield fetch()


def map_devices(
    function: Callable[[Item, Device, threading.Event], Result],
    items: Sequence[Item],
    *,
    devices: list[Device] | None = None,
) -> Iterator[Result]:
    """Calls `function(item, device, stop)` for independent problems: one a device at a time.

    Nothing is exchanged between devices. With one device the calls are made one after another by
    the caller itself; with several each device has a thread.

    Args:
        function: What it computes must lie on the device that it is given; it should return soon
            after `stop` is set.
        items: What to work on.
        devices: Devices to use; all local ones by default.

    Yields:
        Results in the order of the items. An exception comes out where its result would have; it,
        like leaving the iterator, stops the calls that have begun and drops the others.
    """
    devices = (devices or jax.local_devices())[: max(1, len(items))]
    stop = threading.Event()
    if len(devices) == 1:
        for item in items:
            yield function(item, devices[0], stop)
        return
    free: queue.SimpleQueue[Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def call(item: Item) -> Result:
        device = free.get()
        try:
            return function(item, device, stop)
        finally:
            free.put(device)

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as executor:
        pending = [executor.submit(call, item) for item in items]
        try:
            for future in pending:
                yield future.result()
        finally:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
