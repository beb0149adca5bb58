"""The parts of synthesis put together: from a preset and a target picture to an image.

Load the weights of a preset, create a problem for each target, search, and take the picture of the
last state.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, PRNGKeyArray, UInt8

from topk_jax import images
from topk_jax.images import Preprocessing
from topk_jax.networks import FeatureExtractor
from topk_jax.synthesis import lbfgs, objectives, parametrization, postprocessing
from topk_jax.synthesis.objectives import MaskOfImage, Mode, Scaled
from topk_jax.synthesis.parametrization import Parametrization
from topk_jax.synthesis.presets import ObjectiveKind, Preset
from topk_jax.weights import WeightsFile, default_preprocessing, load_features, resolve_weights


class Weights(NamedTuple):
    """The variables that a preset's layers need, and what their images look like.

    Attributes:
        variables: For `networks.FeatureExtractor`.
        preprocessing: How pixels are normalised.
        file: Where they are from.
    """

    variables: dict[str, Any]
    preprocessing: Preprocessing
    file: WeightsFile


@dataclasses.dataclass(frozen=True)
class Problem:
    """An image to be made.

    Attributes:
        objective: Of the image, in the network's units.
        parametrization: Of the image.
        shape: Of the image, [1, h, w, 3].
        deviation: Of the noise that it starts from, in the network's units.
        preprocessing: Between pixels and the network's units.
    """

    objective: Scaled
    parametrization: Parametrization
    shape: tuple[int, ...]
    deviation: float
    preprocessing: Preprocessing

    def published_loss(self, value: float) -> float:
        """The objective's value in the scale of its source."""
        return value * float(self.objective.unit)


def load_weights(preset: Preset, *, weights: str | os.PathLike[str] | None = None) -> Weights:
    """Loads what a preset's layers need.

    Args:
        preset: Gives the network, the layers and the default weights.
        weights: A tag of the catalogue or a file; None is the preset's.

    Raises:
        ValueError: Unknown layers, weights that do not fit; OSError: no file, no download.
    """
    file = resolve_weights(preset.model, weights or preset.weights)
    variables, preprocessing = load_features(preset.network(), preset.layers, file)
    return Weights(variables, preprocessing or default_preprocessing(preset.model), file)


def fit_target(pixels: UInt8[np.ndarray, "h w 3"], preset: Preset) -> UInt8[np.ndarray, "H W 3"]:
    """A target at the preset's size: Lanczos, stretched only where the preset gives both sides."""
    if isinstance(preset.size, int):
        height, width = pixels.shape[:2]
        scale = preset.size / min(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        size = preset.size
    return images.resize(pixels, *size)


def extractor(preset: Preset, weights: Weights) -> jax.tree_util.Partial:
    """The preset's layers as a function of images; one for many problems, so that they share it."""
    network = FeatureExtractor(preset.network(), preset.layers)
    return jax.tree_util.Partial(network, jax.device_put(weights.variables))


def create_problem(
    preset: Preset,
    weights: Weights,
    target: UInt8[np.ndarray, "h w 3"],
    *,
    objective: ObjectiveKind | None = None,
    mode: Mode = "all",
    sparsity: float | None = None,
    mask_image: MaskOfImage = "none",
    features: jax.tree_util.Partial | None = None,
) -> Problem:
    """Puts a problem together.

    Args:
        preset: Settings.
        weights: What `load_weights` gave for the preset.
        target: Picture at the size of the result; see `fit_target`.
        objective: "texture" or "reconstruction"; None is the preset's.
        mode: Which activations count: "all", "top" or "rest".
        sparsity: Part of each feature map that is the top; None is the preset's.
        mask_image: See `objectives.reconstruction_objective`; "none" is all that textures know.
        features: What `extractor` gave, where several problems share it.

    Raises:
        ValueError: A bad setting, or a target of one colour or too small for the network.
    """
    if target.ndim != 3 or target.shape[2] != 3 or target.dtype != np.uint8:
        raise ValueError(
            f"target of {target.dtype} {list(target.shape)}: expected uint8 [height, width, 3]"
        )
    if np.all(target == target[:1, :1]):
        raise ValueError("the target is of one colour: there is nothing to synthesise")
    if features is None:
        features = extractor(preset, weights)
    normalized = np.asarray(images.normalize(target[None], weights.preprocessing))
    space = parametrization.within_range_of(normalized, preset.parametrization)
    settings = {
        "layers": dict.fromkeys(preset.layers, preset.weight),
        "mode": mode,
        "sparsity": preset.sparsity if sparsity is None else sparsity,
        "reduction": preset.reduction,
    }
    kind = objective or preset.objective
    if kind == "texture":
        if mask_image != "none":
            raise ValueError(
                "mask_image is for reconstruction: a texture masks the image by its own Top-K"
            )
        goal = objectives.texture_objective(features, normalized, **settings)
    elif kind == "reconstruction":
        goal = objectives.reconstruction_objective(
            features, normalized, mask_image=mask_image, **settings
        )
    else:
        raise ValueError(f"objective={kind!r}: expected texture or reconstruction")
    # One grey level is one unit of a network that takes levels.
    level = float(np.mean(weights.preprocessing.std)) * 255
    return Problem(goal, space, normalized.shape, preset.deviation / level, weights.preprocessing)


def search(key: PRNGKeyArray, problem: Problem, **limits: Any) -> Iterator[lbfgs.State]:
    """Optimises the image from noise; yields every accepted state.

    Args:
        key: Of the noise.
        problem: What is to be made.
        **limits: What `lbfgs.minimize` takes: `max_evaluations`, `memory_size`, `resume` and so on.

    Raises:
        FloatingPointError: The objective is not finite at the start.
    """
    space = problem.parametrization
    z = parametrization.start(key, space, problem.shape, problem.deviation)
    objective = jax.tree_util.Partial(_of_numbers, space, problem.objective)
    return lbfgs.minimize(objective, z, bounds=space.bounds, **limits)


def _of_numbers(space: Parametrization, objective: Scaled, z: Any) -> Any:
    return objective(space.to_image(z))


def image(problem: Problem, state: lbfgs.State) -> Float32[np.ndarray, "h w 3"]:
    """The image of a state, in the network's units."""
    return np.asarray(problem.parametrization.to_image(state.x))[0]


def picture(problem: Problem, state: lbfgs.State) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a state."""
    return postprocessing.to_pixels(image(problem, state), problem.preprocessing)


def distances(
    preset: Preset,
    features: jax.tree_util.Partial,
    target: UInt8[np.ndarray, "h w 3"],
    problem: Problem,
    state: lbfgs.State,
) -> dict[str, float]:
    """How far an image is from its target, whatever it was asked for.

    Args:
        preset: Gives the layers.
        features: What `extractor` gave.
        target: As in `create_problem`.
        problem: Of the image.
        state: The image.

    Returns:
        `gram_distance`, the norm of the difference between the Gram matrices of all activations,
        over all layers, relative to the target's; `activation_distance`, the same of the
        activations of the last layer.
    """
    normalized = images.normalize(target[None], problem.preprocessing)
    gram = objectives.texture_objective(
        features, normalized, layers=dict.fromkeys(preset.layers, 1)
    )
    last = objectives.reconstruction_objective(features, normalized, layers={preset.layers[-1]: 1})
    x = problem.parametrization.to_image(state.x)
    return {
        "gram_distance": float(_value(gram, x)) ** 0.5,
        "activation_distance": float(_value(last, x)) ** 0.5,
    }


@jax.jit
def _value(objective: Scaled, x: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return objective(x)
