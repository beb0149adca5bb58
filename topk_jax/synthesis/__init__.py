"""Images made to share statistics with a target: texture synthesis and reconstruction with Top-K.

Data contract: pictures are uint8 [h, w, 3]; images float32 [1, h, w, 3], normalised for the
network. An objective is a function of an image; a search is an iterator of states.
"""

from topk_jax.synthesis.lbfgs import minimize
from topk_jax.synthesis.objectives import (
    gram_matrix,
    reconstruction_objective,
    texture_objective,
)
from topk_jax.synthesis.postprocessing import match_histograms
from topk_jax.synthesis.presets import PRESETS, Preset, find_preset
from topk_jax.synthesis.problem import (
    Problem,
    Weights,
    create_problem,
    distances,
    extractor,
    fit_target,
    load_weights,
    picture,
    search,
)
from topk_jax.synthesis.renormalization import renormalize

__all__ = [
    "PRESETS",
    "Preset",
    "Problem",
    "Weights",
    "create_problem",
    "distances",
    "extractor",
    "find_preset",
    "fit_target",
    "gram_matrix",
    "load_weights",
    "match_histograms",
    "minimize",
    "picture",
    "reconstruction_objective",
    "renormalize",
    "search",
    "texture_objective",
]
