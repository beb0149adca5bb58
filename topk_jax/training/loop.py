"""Training on images that fit into memory, data-parallel over all devices.

Data contract: images uint8 [n, h, w, 3] and int32 labels [n]; see `training.state` for batches.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from topk_jax import parallel
from topk_jax.training.state import Batch, Sums, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Sums]]
Report = Callable[[dict[str, Any]], None]


def shuffled_batches(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: Int32[np.ndarray, " n"],
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    devices: int = 1,
) -> Iterator[Batch]:
    """Batches [devices, rows, ...] of several epochs, each in an order of its own.

    Every image comes once an epoch; the last batch of an epoch may be short. What is missing to
    `batch_size`, or to a multiple of `devices`, is filled with copies whose mask is False.
    """
    size = parallel.batch_per_call(batch_size, devices)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(labels))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {"image": images[chosen], "label": labels[chosen]}
            batch = parallel.pad_batch(batch, size)
            batch["mask"] = np.arange(size) < len(chosen)
            yield parallel.shard(batch, devices)


def fit(
    step: Step,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    report: Report,
    log_every: int = 100,
    devices: list[parallel.Device] | None = None,
) -> TrainState:
    """Runs `step` over all batches.

    Args:
        step: Step of one replica, from `make_train_step`.
        state: Start; its buffers are given away, so it must not be used afterwards.
        batches: With a leading axis of all devices.
        report: Gets, every `log_every` steps and at the end, a record of `step`, `loss` and
            `accuracy` (means over the images since the last record, in training mode) and
            `images_per_second` (compilation included in the first).
        log_every: Steps between records.
        devices: All local ones by default.

    Returns:
        The last state, replicated over the devices.

    Raises:
        RuntimeError: The loss is not finite (noticed at the next record), or the parameters at
            the end are not.
    """
    devices = devices or jax.local_devices()
    mapped = jax.pmap(
        step,
        axis_name=parallel.AXIS,
        in_axes=(None, 0),
        out_axes=None,  # pyright: ignore[reportArgumentType]
        donate_argnums=0,
        devices=devices,
    )
    state = parallel.replicate(state, devices)
    pending: list[Sums] = []
    start = time.monotonic()

    def record() -> None:
        nonlocal start
        fetched = jax.device_get(pending)
        loss, correct, count = (
            float(sum(sums[name] for sums in fetched)) for name in ("loss", "correct", "count")
        )
        now = time.monotonic()
        report(
            {
                "step": int(state.step),
                "loss": loss / count,
                "accuracy": correct / count,
                "images_per_second": count / max(now - start, 1e-9),
            }
        )
        if not np.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} by step {int(state.step)}: a lower learning rate may help"
            )
        pending.clear()
        start = now

    for batch in batches:
        state, sums = mapped(state, batch)
        pending.append(sums)
        if len(pending) == log_every:
            record()
    if pending:
        record()
    for leaf in jax.tree.leaves(jax.device_get(state.variables)):
        if not np.all(np.isfinite(leaf)):
            raise RuntimeError(
                f"parameters are not finite after step {int(state.step)}: a lower learning rate "
                "may help"
            )
    return state
