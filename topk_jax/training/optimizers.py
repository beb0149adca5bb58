"""Optimisers and learning-rate schedules of the papers' recipes, from optax's parts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from topk_jax.training.settings import Optimizer


def make_schedule(settings: Optimizer, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """The learning rate of each step.

    With `per="epoch"` the rate of a step is that of the first step of its epoch, as where a
    scheduler is called once an epoch.

    Args:
        settings: Schedule, rate, warm-up.
        steps_per_epoch: Steps of an epoch.
        epochs: Length of the run.

    Returns:
        Function of the number of updates already made.
    """
    schedule = _by_step(settings, steps_per_epoch, steps_per_epoch * epochs)
    if settings.per == "step":
        return schedule
    return lambda count: schedule(jnp.asarray(count) // steps_per_epoch * steps_per_epoch)


def _by_step(settings: Optimizer, steps_per_epoch: int, steps: int) -> optax.Schedule:
    peak, warmup = settings.learning_rate, round(settings.warmup_epochs * steps_per_epoch)
    if settings.schedule == "cosine":
        if warmup:
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
        return optax.cosine_decay_schedule(peak, steps)
    milestones = settings.milestones if settings.schedule == "step" else ()
    after = optax.piecewise_constant_schedule(
        peak, {round(epoch * steps_per_epoch): settings.factor for epoch in milestones}
    )
    if not warmup:
        return after
    return lambda count: jnp.where(
        jnp.asarray(count) < warmup, peak * jnp.asarray(count) / warmup, after(count)
    )


def make_optimizer(
    settings: Optimizer, *, steps_per_epoch: int, epochs: int
) -> optax.GradientTransformation:
    """The update rule; arguments as `make_schedule`."""
    schedule = make_schedule(settings, steps_per_epoch=steps_per_epoch, epochs=epochs)
    decayed = _kernels if settings.decay == "kernels" else None
    parts = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    if settings.name == "adamw":
        parts += [optax.adamw(schedule, weight_decay=settings.weight_decay, mask=decayed)]
    else:
        if settings.weight_decay:
            parts += [optax.add_decayed_weights(settings.weight_decay, mask=decayed)]
        momentum = settings.momentum or None
        parts += [optax.sgd(schedule, momentum=momentum, nesterov=settings.nesterov)]
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
