"""Training a network on the built-in stimuli and measuring what it learnt.

The config is any object with the fields of `configs/builtin.py`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from absl import logging

from topk_jax import decisions, evaluation, files, metrics, weights
from topk_jax.networks import Network, create_network
from topk_jax.stimuli import builtin
from topk_jax.training import loop
from topk_jax.training.state import create_state, init_variables, make_train_step

WEIGHTS_FILE = "weights.safetensors"
METRICS_FILE = "metrics.jsonl"


def make_optimizer(config: Any, *, steps: int) -> optax.GradientTransformation:
    """AdamW, the learning rate rising linearly and then falling as half a cosine to 0.

    Args:
        config: Has `learning_rate` (peak), `warmup_fraction` (of all steps), `weight_decay` (of
            kernels; biases and scales are left alone).
        steps: Number of updates.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, round(steps * config.warmup_fraction), steps
    )

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)


def measure(network: Network, variables: Any, *, seed: int, per_category: int) -> dict[str, Any]:
    """Accuracies on images that were never trained on, and the shape bias.

    Args:
        network: Has the built-in categories as classes, in their order.
        variables: Of the network.
        seed: Of the stimuli.
        per_category: Images of each category in the three sets other than the conflicts.

    Returns:
        `congruent_accuracy`, `silhouette_accuracy`, `texture_accuracy`; of the conflict images
        `conflict_shape_bias` and `conflict_decided_fraction`.
    """

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        return network.apply(variables, images, train=False)[0]

    def answers(stimuli: Any) -> decisions.Trials:
        return evaluation.evaluate(
            predict,
            stimuli,
            variables=variables,
            mapping=decisions.identity_mapping(builtin.BUILTIN_CATEGORIES),
            preprocessing=weights.default_preprocessing("builtin"),
        )

    single = (builtin.builtin_congruent, builtin.builtin_silhouettes, builtin.builtin_textures)
    result: dict[str, Any] = {}
    for draw in single:
        stimuli = draw(seed=seed, per_category=per_category)
        result[f"{stimuli.name}_accuracy"] = metrics.accuracy(answers(stimuli))
    conflict = metrics.shape_bias(answers(builtin.builtin_cue_conflict(seed=seed)), bootstrap=0)
    result["conflict_shape_bias"] = conflict.shape_bias
    result["conflict_decided_fraction"] = conflict.decided_fraction
    return result


def train_builtin(
    config: Any, workdir: str, *, report: Callable[[str], None] = logging.info
) -> dict[str, Any]:
    """Draws the training images, trains, measures and writes the weights.

    Writes into `workdir` `metrics.jsonl` (a record a line), `weights.safetensors` (torch's names
    and layout, as `load_variables` reads them) and `summary.json` (config and result). A finished
    run of the same config is not repeated.

    Args:
        config: See `configs/builtin.py`; converted with `to_dict`.
        workdir: Folder of the run.
        report: Gets a line of progress now and then.

    Returns:
        The result of `measure` and the `sha256` of the weights.

    Raises:
        ValueError: A setting out of range, or `workdir` belongs to another run.
        RuntimeError: The loss or a parameter is no longer finite.
    """
    for name in ("images", "epochs", "batch_size", "log_every", "test_per_category"):
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}: expected 1 or more")
    with files.run_folder(workdir, config.to_dict()) as folder:
        if folder.previous is not None and "result" in folder.previous:
            report(f"{workdir} holds the finished run of this config")
            return folder.previous["result"]
        network = create_network(config.network, **config.network_options)
        variables = _train(network, config, folder.path, report)
        report("measuring")
        result = measure(
            network, variables, seed=config.test_seed, per_category=config.test_per_category
        )
        path = folder.path / WEIGHTS_FILE
        weights.write_state_dict(path, weights.variables_to_state_dict(variables))
        result["sha256"] = files.sha256(path)
        folder.write_summary({"result": result})
    return result


def _train(
    network: Network, config: Any, folder: pathlib.Path, report: Callable[[str], None]
) -> dict[str, Any]:
    report(f"drawing {config.images} images")
    images, labels = builtin.builtin_training_images(
        config.images, seed=config.seed, shares=tuple(config.shares)
    )
    steps = -(-len(labels) // config.batch_size) * config.epochs
    optimizer = make_optimizer(config, steps=steps)
    init_key, noise_key = jax.random.split(jax.random.key(config.seed))
    variables = init_variables(network, init_key, image_size=images.shape[1])
    step = make_train_step(
        network,
        optimizer,
        preprocessing=weights.default_preprocessing("builtin"),
        microbatch=config.microbatch,
    )
    batches = loop.shuffled_batches(
        images,
        labels,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        devices=jax.local_device_count(),
    )
    with open(folder / METRICS_FILE, "w", encoding="utf-8") as log:

        def record(values: dict[str, Any]) -> None:
            log.write(json.dumps(values) + "\n")
            log.flush()
            report(
                f"step {values['step']}/{steps}: loss {values['loss']:.3f}, "
                f"accuracy {values['accuracy']:.3f}, {values['images_per_second']:.0f} images/s"
            )

        state = create_state(variables, optimizer, noise_key)
        state = loop.fit(step, state, batches, report=record, log_every=config.log_every)
    return state.variables
