"""Batches of a training run as a function of their number, so that a run goes on anywhere.

Data contract: a batch is what one process gives to its devices: `image` uint8 [devices, n, h, w,
3], `label` int32 and `mask` bool [devices, n]; False rows are padding or could not be read.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from topk_jax import parallel
from topk_jax.stimuli import Stimuli

Augment = Callable[[np.random.Generator, UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "s s 3"]]


class Batches:
    """Every image once an epoch, each epoch in an order of its own.

    `batches[step]` depends on the arguments and `step` alone: the order is that of
    `np.random.default_rng([seed, epoch]).permutation`, and an image is augmented with
    `np.random.default_rng([seed, epoch, index])`. It may be called from several threads.

    The last batch of an epoch is filled with copies whose mask is False. With several processes,
    process p gets rows p, p + processes, ... of the batch.

    Attributes:
        skipped: Numbers of the images that could not be read so far.
    """

    def __init__(
        self,
        stimuli: Stimuli,
        augment: Augment,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        devices: int = 1,
        process: tuple[int, int] = (0, 1),
        strict: bool = False,
    ):
        """Takes the images without looking at any.

        Args:
            stimuli: Images and their categories; a label is the place of a category.
            augment: `augment(rng, image)` gives images of one size.
            batch_size: Rows a step, over all devices of all processes.
            epochs: Passes over the images.
            seed: Of order and augmentation.
            devices: Devices of this process.
            process: Number of this process and of all.
            strict: Raise where an image cannot be read.

        Raises:
            ValueError: No images, or a batch that the devices cannot share evenly.
        """
        if not len(stimuli):
            raise ValueError(f"{stimuli.origin}: no images to train on")
        parallel.check_shared_evenly(batch_size, devices * process[1])
        self._stimuli, self._augment = stimuli, augment
        self.labels = stimuli.labels.astype(np.int32)
        self._batch_size, self._epochs, self._seed = batch_size, epochs, seed
        self._devices, self._process, self._strict = devices, process, strict
        self.steps_per_epoch = -(-len(stimuli) // batch_size)
        self.skipped: set[int] = set()
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of steps of all epochs."""
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Batch number `step`, from 0."""
        epoch, place = divmod(int(step), self.steps_per_epoch)
        start = place * self._batch_size
        number, processes = self._process
        chosen = self._order(epoch)[start : start + self._batch_size][number::processes]
        size = self._batch_size // processes
        if not len(chosen):  # a short last batch: this process has padding alone
            chosen, valid = self._order(epoch)[:1], np.zeros(1, bool)
        else:
            valid = np.ones(len(chosen), bool)
        images = []
        for row, index in enumerate(chosen):
            image = self._read(epoch, int(index))
            valid[row] &= image is not None
            images.append(image)
        # What could not be read is black, and counts for nothing.
        shape = next((image.shape for image in images if image is not None), None)
        if shape is None:
            shape = self._any_shape()
        images = [np.zeros(shape, np.uint8) if image is None else image for image in images]
        batch = {"image": np.stack(images), "label": self.labels[chosen]}
        batch = parallel.pad_batch(batch, size)
        batch["mask"] = np.zeros(size, bool)
        batch["mask"][: len(valid)] = valid
        return parallel.shard(batch, self._devices)

    def _order(self, epoch: int) -> Int[np.ndarray, " n"]:
        with self._lock:
            if epoch not in self._orders:
                for old in [number for number in self._orders if number < epoch - 1]:
                    del self._orders[old]
                rng = np.random.default_rng([self._seed, epoch])
                self._orders[epoch] = rng.permutation(len(self._stimuli))
            return self._orders[epoch]

    def _read(self, epoch: int, index: int) -> UInt8[np.ndarray, "s s 3"] | None:
        try:
            rng = np.random.default_rng([self._seed, epoch, index])
            return self._augment(rng, self._stimuli.load(index))
        except (OSError, ValueError) as error:
            if self._strict:
                raise
            with self._lock:
                known = index in self.skipped
                self.skipped.add(index)
            if not known:
                logging.warning("left out: %s", error)
            return None

    def _any_shape(self) -> tuple[int, ...]:
        """Shape of an augmented image, from the first that can be read."""
        for index in range(len(self._stimuli)):
            image = self._read(0, index)
            if image is not None:
                return image.shape
        count = len(self._stimuli)
        raise ValueError(f"{self._stimuli.origin}: none of its {count} images can be read")


def iterate(
    batches: Batches, *, start: int = 0, threads: int = 4, ahead: int = 4
) -> Iterator[dict[str, Any]]:
    """Batches from number `start` on, made in threads ahead of their use (by grain).

    Args:
        batches: What to go through.
        start: Number of the first.
        threads: Threads; 0 makes each batch when it is asked for.
        ahead: Batches that may wait.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
    source: Any = batches  # it has what grain asks of a source, but not its type
    return iter(grain.MapDataset.source(source)[start:].to_iter_dataset(options))
