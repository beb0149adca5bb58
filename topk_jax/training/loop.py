"""Steps of a run, a stretch at a time, with records of what they cost and gave."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from topk_jax.training.state import Batch, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
Report = Callable[[dict[str, Any]], None]

_IN_FLIGHT = 2  # calls that wait for the devices; each holds its batch


def fit(
    step: Step,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    start: int,
    stop: int,
    report: Report,
    log_every: int = 100,
) -> tuple[TrainState, dict[str, float]]:
    """Makes the steps from `start` up to `stop`.

    Args:
        step: From `parallel.map_step`.
        state: After `start` steps, replicated; it is given away and must not be used afterwards.
        batches: Gives the batches from `start` on.
        start: Steps already made.
        stop: Steps made afterwards.
        report: Gets, whenever `log_every` divides the number of steps made and at the end, a
            record of `step`, `loss` and `accuracy` (means over the images since the last record,
            in training mode) and `images_per_second` (compilation included in the first).
        log_every: Steps between records.

    Returns:
        The last state, replicated, and the sums `loss`, `correct` and `count` over all images.

    Raises:
        RuntimeError: A loss is not finite; the message names the step. It is noticed at the next
            record.
    """
    totals: dict[str, float] = dict.fromkeys(("loss", "correct", "count"), 0.0)
    pending: list[dict[str, Any]] = []
    begun = time.monotonic()

    def record(made: int) -> None:
        nonlocal begun
        fetched = jax.device_get(pending)
        sums = {name: float(sum(each[name] for each in fetched)) for name in totals}
        for number, each in enumerate(fetched, start=made - len(fetched) + 1):
            if not np.isfinite(each["loss"]):
                raise RuntimeError(
                    f"the loss of step {number} is {float(each['loss'])}: a lower learning rate or "
                    "a limit, config.optimizer.clip_norm, may help"
                )
        now = time.monotonic()
        for name, value in sums.items():
            totals[name] += value
        count = max(sums["count"], 1)
        report(
            {
                "step": made,
                "loss": sums["loss"] / count,
                "accuracy": sums["correct"] / count,
                "images_per_second": sums["count"] / max(now - begun, 1e-9),
            }
        )
        pending.clear()
        begun = now

    for made in range(start + 1, stop + 1):
        state, sums = step(state, next(batches))
        pending.append(sums)
        if len(pending) > _IN_FLIGHT:
            jax.block_until_ready(pending[-1 - _IN_FLIGHT])
        if made % log_every == 0 or made == stop:
            record(made)
    return state, totals
