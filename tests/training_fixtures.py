"""A network, images and a state so small that a test can train them."""

import jax
import numpy as np

from topk_jax import training
from topk_jax.images import Preprocessing
from topk_jax.networks.vgg import VGG

SMALL = Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def small_network(**options):
    fields = {
        "widths": (8, 16), "pooled_size": 1, "hidden": (16,), "num_classes": 3, "dropout": 0.0
    }  # fmt: skip
    return VGG((1, 1), **(fields | options))


def small_data(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 120, (count, 8, 8, 3))
    images[np.arange(count), :, :, labels] += 100
    return images.astype(np.uint8), labels


def start(network, optimizer, seed=0):
    key = jax.random.key(seed)
    variables = training.init_variables(network, key, image_size=8)
    return training.create_state(variables, optimizer, key)
