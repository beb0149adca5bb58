"""Shape bias of convolutional networks with Top-K activation sparsity, in JAX and Flax.

    network = topk_jax.create_network("vgg16", topk=0.1)
    variables = topk_jax.load_variables("vgg16", "imagenet")
    logits, features = network.apply(variables, images, train=False)

A name that is not listed here or in a room's own `__init__` is not promised to stay.
"""

from topk_jax import metrics, stimuli, telemetry
from topk_jax.decisions import (
    IMAGENET16,
    CategoryMapping,
    Trials,
    decide,
    identity_mapping,
    read_trials,
    write_trials,
)
from topk_jax.evaluation import evaluate, predict_logits
from topk_jax.images import IMAGENET_PREPROCESSING, Preprocessing, normalize, read_image
from topk_jax.metrics import ShapeBias, shape_bias
from topk_jax.networks import create_network, list_networks, variable_shapes
from topk_jax.selection import calibrate_thresholds
from topk_jax.stimuli import Stimuli, read_cue_conflict
from topk_jax.topk import TopK, bottom_nonzero_mask, random_mask, topk_activation, topk_mask
from topk_jax.weights import default_preprocessing, load_variables, read_state_dict

__all__ = [
    "IMAGENET16",
    "IMAGENET_PREPROCESSING",
    "CategoryMapping",
    "Preprocessing",
    "ShapeBias",
    "Stimuli",
    "TopK",
    "Trials",
    "bottom_nonzero_mask",
    "calibrate_thresholds",
    "create_network",
    "decide",
    "default_preprocessing",
    "evaluate",
    "identity_mapping",
    "list_networks",
    "load_variables",
    "metrics",
    "normalize",
    "predict_logits",
    "random_mask",
    "read_cue_conflict",
    "read_image",
    "read_state_dict",
    "read_trials",
    "shape_bias",
    "stimuli",
    "telemetry",
    "topk_activation",
    "topk_mask",
    "variable_shapes",
    "write_trials",
]
