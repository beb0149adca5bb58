"""Network x stimuli -> trials, on all devices, images decoded while the devices work.

Data contract: stimuli give uint8 RGB images [h, w, 3]; `predict` gets float32 [n, size, size, 3],
normalised as `preprocessing` says, and returns logits [n, classes].
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from topk_jax import decisions, images, parallel
from topk_jax.decisions import IMAGENET16, Aggregation, CategoryMapping, Trials
from topk_jax.images import IMAGENET_PREPROCESSING, Preprocessing
from topk_jax.stimuli.base import Stimuli

Predict = Callable[..., Any]
"""`predict(variables, images) -> logits`, or `predict(images) -> logits` without variables."""

Progress = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]
"""Wraps the iterator of decoded images, for a progress bar."""


def evaluate(
    predict: Predict,
    stimuli: Stimuli,
    *,
    variables: Any = None,
    mapping: CategoryMapping = IMAGENET16,
    aggregation: Aggregation = "mean",
    preprocessing: Preprocessing = IMAGENET_PREPROCESSING,
    batch_size: int = 64,
    subject: str = "network",
    session: int = 1,
    devices: list[parallel.Device] | None = None,
    progress: Progress = iter,
) -> Trials:
    """What a network answers to each stimulus.

    Args:
        predict: With `variables`: `predict(variables, images) -> logits`, pmapped over the devices.
            Without: `predict(images) -> logits` on NumPy batches, any callable, also not JAX.
        stimuli: Labelled images. Those of `preprocessing.image_size` are used as they are; others
            have their short side resized to it and their centre cut out, with a notice.
        variables: Pytree replicated over the devices.
        mapping: Which classes make up which category.
        aggregation: How the probabilities of a category's classes are combined.
        preprocessing: Input size and normalisation of the network.
        batch_size: Images a call (rounded up to a multiple of the devices).
        subject: Name of the network in the table.
        session: Number of the session in the table.
        devices: All local ones by default.
        progress: Wraps the iterator of images.

    Returns:
        One row an image, in the order of the stimuli.

    Raises:
        ValueError: A category of the stimuli is not one of the mapping; logits of a wrong shape or
            with NaN; an image that cannot be read.
    """
    unknown = sorted(set(stimuli.categories) - set(mapping.names))
    if unknown:
        raise ValueError(
            f"the stimuli have categories that the network does not answer: {', '.join(unknown)}; "
            f"its categories are {', '.join(mapping.names)}"
        )
    answers = [
        decisions.decide(logits, mapping, aggregation=aggregation)
        for logits in predict_logits(
            predict,
            stimuli,
            variables=variables,
            preprocessing=preprocessing,
            batch_size=batch_size,
            devices=devices,
            progress=progress,
        )
    ]
    return Trials.of_network(
        subject,
        np.concatenate(answers),
        category=stimuli.category,
        imagename=stimuli.image_names,
        condition=stimuli.condition,
        session=session,
    )


def predict_logits(
    predict: Predict,
    stimuli: Stimuli,
    *,
    variables: Any = None,
    preprocessing: Preprocessing = IMAGENET_PREPROCESSING,
    batch_size: int = 64,
    devices: list[parallel.Device] | None = None,
    progress: Progress = iter,
) -> Iterator[Float[np.ndarray, "n classes"]]:
    """Logits of the stimuli batch by batch, in order; arguments as `evaluate`.

    Never more than a few batches of images are in memory.

    Raises:
        ValueError: No stimuli, or a batch size below 1.
    """
    if not len(stimuli):
        raise ValueError(f"{stimuli.origin}: no stimuli to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    fit = functools.partial(_fit, preprocessing=preprocessing, origin=stimuli.origin)
    decoded = images.map_parallel(
        lambda index: fit(stimuli.load(index)), range(len(stimuli)), ahead=2 * batch_size
    )
    batches = _batched(progress(decoded), batch_size)
    if variables is None:
        for batch in batches:
            yield np.asarray(predict(images.normalize(batch, preprocessing)), np.float32)
        return

    try:
        hash(predict)
        from_pixels = _from_pixels(predict, preprocessing)
    except TypeError:  # a method of something unhashable: compiled for each call
        from_pixels = _from_pixels.__wrapped__(predict, preprocessing)
    yield from parallel.map_batches(
        from_pixels, variables, batches, batch_size=batch_size, devices=devices
    )


@functools.lru_cache(maxsize=16)
def _from_pixels(predict: Predict, preprocessing: Preprocessing) -> Predict:
    """`predict` of bytes; the same function for the same arguments, so that it is compiled once."""
    table = images.normalization_table(preprocessing)

    def from_pixels(variables: Any, pixels: jax.Array) -> jax.Array:
        # Bytes travel to the device, a quarter of what floats would be.
        normalized = jnp.asarray(table)[pixels.astype(jnp.int32), jnp.arange(3)]
        return predict(variables, normalized)

    return from_pixels


def _fit(
    image: UInt8[np.ndarray, "h w 3"], preprocessing: Preprocessing, origin: str
) -> UInt8[np.ndarray, "size size 3"]:
    """The image at the network's input size."""
    size = preprocessing.image_size
    if image.shape[:2] != (size, size):
        logging.log_first_n(
            logging.WARNING,
            "%s: images of another size than the network's %d x %d (the first: %d x %d) have their "
            "short side resized and their centre cut out",
            1,
            origin,
            size,
            size,
            image.shape[1],
            image.shape[0],
        )
    return images.fit(image, size)


def _batched(
    items: Iterable[UInt8[np.ndarray, "h w 3"]], size: int
) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield np.stack(batch)
