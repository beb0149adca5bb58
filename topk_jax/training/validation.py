"""What a network has learnt: accuracies on several sets, and the shape bias."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from topk_jax import evaluation, metrics, parallel
from topk_jax.decisions import CategoryMapping
from topk_jax.images import Preprocessing
from topk_jax.networks import Network
from topk_jax.stimuli import Stimuli


class Validation:
    """Measures variables of one network; compiled once, however often it is used."""

    def __init__(
        self,
        network: Network,
        sets: Mapping[str, Stimuli],
        *,
        preprocessing: Preprocessing,
        cue_conflict: Stimuli | None = None,
        mapping: CategoryMapping | None = None,
        batch_size: int = 64,
        seed: int = 0,
        strict: bool = False,
    ):
        """Looks at no image yet.

        Args:
            network: Its class numbers are the places of the sets' categories.
            sets: Name -> labelled images.
            preprocessing: Input size and normalisation.
            cue_conflict: Images for the shape bias, if it is wanted.
            mapping: Their categories; needed with them.
            batch_size: Images a call, on all devices of a process.
            seed: Of random controls of Top-K, which draw alike each time.
            strict: Raise where an image cannot be read; otherwise it is left out.
        """
        key = jax.random.key(seed)

        def predict(variables: Any, images: jax.Array) -> jax.Array:
            return network.apply(variables, images, train=False, rngs={"topk": key})[0]

        self._predict, self._sets, self._preprocessing = predict, sets, preprocessing
        self._conflict, self._mapping = cue_conflict, mapping
        self._batch_size, self._strict = batch_size, strict

    def measure(self, variables: Any) -> dict[str, Any]:
        """Measures on the devices of this process; several processes share the sets.

        Returns:
            `accuracy`: name of the set -> part of right answers; `n_images` likewise, those that
            could be read; `per_class`: the accuracies of the classes, in the order of the labels,
            NaN for a class without images. With conflicts also `shape_bias`, `decided_fraction`,
            `n_shape`, `n_texture` and `shape_fraction` (see `metrics.ShapeBias`).

        Raises:
            ValueError: No image of a set can be read, or one cannot and `strict` is set.
        """
        result: dict[str, Any] = {"accuracy": {}, "n_images": {}, "per_class": {}}
        for name, stimuli in self._sets.items():
            right, count = self._count(variables, stimuli)
            if not count.any():
                raise ValueError(f"{stimuli.origin}: none of its images can be read")
            result["accuracy"][name] = float(right.sum() / count.sum())
            result["n_images"][name] = int(count.sum())
            result["per_class"][name] = (right / np.where(count, count, np.nan)).tolist()
        if self._conflict is not None and self._mapping is not None:
            trials = evaluation.evaluate(
                self._predict,
                self._conflict,
                variables=variables,
                mapping=self._mapping,
                preprocessing=self._preprocessing,
                batch_size=self._batch_size,
            )
            bias = metrics.shape_bias(trials, bootstrap=0)
            for name in ("shape_bias", "decided_fraction", "n_shape", "n_texture"):
                result[name] = getattr(bias, name)
            result["shape_fraction"] = bias.shape_fraction
        return result

    def _count(
        self, variables: Any, stimuli: Stimuli
    ) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, " classes"]]:
        """Right answers and readable images of each class, over all processes."""
        mine = range(len(stimuli))[jax.process_index() :: jax.process_count()]
        part = stimuli.select(list(mine))
        labels = part.labels
        readable = np.ones(len(part), bool)
        size = self._preprocessing.image_size

        def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
            try:
                return part.load(index)
            except (OSError, ValueError) as error:
                if self._strict:
                    raise
                logging.log_first_n(logging.WARNING, "left out: %s", 10, error)
                readable[index] = False
                return np.zeros((size, size, 3), np.uint8)

        right = np.zeros(len(part), bool)
        if len(part):
            logits = np.concatenate(
                list(
                    evaluation.predict_logits(
                        self._predict,
                        dataclasses.replace(part, load=load),
                        variables=variables,
                        preprocessing=self._preprocessing,
                        batch_size=self._batch_size,
                    )
                )
            )
            right = (np.argmax(logits, axis=-1) == labels) & readable
        counts = (
            np.bincount(labels[chosen], minlength=len(stimuli.categories))
            for chosen in (right, readable)
        )
        return parallel.sum_over_processes(tuple(count.astype(np.float64) for count in counts))
