"""Train state and the step of one replica.

Data contract: a batch is a dict of `image` uint8 [n, h, w, 3], `label` int32 [n] and `mask` bool
[n]; rows with a False mask are padding and count for nothing. The step works with sums over rows,
added over the device axis before they are divided by the number of valid rows, so that any number
of devices and any uneven batch give the same update.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from topk_jax import images as images_lib
from topk_jax import parallel
from topk_jax.images import Preprocessing
from topk_jax.networks import Network, variable_shapes
from topk_jax.training import losses as losses_lib

Batch = dict[str, Any]
Sums = dict[str, Array]
LossFunction = Callable[[Float[Array, "n classes"], Int32[Array, " n"]], Float[Array, " n"]]


class TrainState(NamedTuple):
    """All that a step changes, and the key that its noise is derived from.

    Attributes:
        step: Number of updates made, int32 scalar.
        params: Parameters.
        batch_stats: Running statistics, empty for networks without batch normalisation.
        opt_state: The optimiser's state.
        key: Typed random key; constant.
        ema: Moving average of the variables, None if there is none.
    """

    step: Int32[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    key: Array
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `network.apply` takes."""
        return _variables(self.params, self.batch_stats)


def _variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def init_variables(network: Network, key: Array, *, image_size: int = 224) -> dict[str, Any]:
    """Random variables: kernels as He et al. (2015), normal with variance 2 / fan-in.

    Drawn from the shapes alone, which saves compiling the network.

    Args:
        network: Any of `topk_jax.networks`.
        key: Typed random key.
        image_size: Side of the input images.

    Returns:
        float32 NumPy arrays.
    """
    shapes = variable_shapes(network, image_size=image_size)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    sizes = [int(np.prod(leaf.shape)) if path[-1].key == "kernel" else 0 for path, leaf in leaves]
    # One draw for all: each new shape would be one more program to compile.
    normal = np.asarray(jax.random.normal(key, (sum(sizes),)))
    variables = []
    for (path, leaf), drawn in zip(leaves, np.split(normal, np.cumsum(sizes)[:-1]), strict=True):
        if path[-1].key == "kernel":
            scale = np.sqrt(2 / np.prod(leaf.shape[:-1])).astype(np.float32)
            variables.append(scale * drawn.reshape(leaf.shape))
        else:
            fill = 1 if path[-1].key in ("scale", "var") else 0
            variables.append(np.full(leaf.shape, fill, np.float32))
    return jax.tree_util.tree_unflatten(structure, variables)


def create_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    ema: bool = False,
) -> TrainState:
    """State before the first step.

    Args:
        variables: `{"params": ...}`, with `"batch_stats"` where the network has any.
        optimizer: Its state is made for the parameters.
        key: Typed random key of the noise in training (dropout, random controls of Top-K).
        ema: Keep a moving average of the variables.
    """
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=jax.jit(optimizer.init)(params),
        key=key,
        ema=jax.tree.map(jnp.array, variables) if ema else None,
    )


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    preprocessing: Preprocessing,
    loss: LossFunction = losses_lib.softmax_cross_entropy,
    microbatch: int | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    ema_decay: float = 0.0,
    axis_name: str = parallel.AXIS,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Builds the step of one replica, to be driven by `parallel.map_step`.

    Args:
        network: Called with `train=True`; with batch normalisation, its `axis_name` must be the
            same.
        optimizer: Gets the gradient of the mean loss.
        preprocessing: How pixels are normalised.
        loss: `loss(logits, labels) -> [n]`, one value a row.
        microbatch: Rows that gradients are taken of at a time; None takes all of a device's. Less
            memory, and on CPUs faster: XLA's gradient of a convolution's kernel takes less time an
            image for few images. Not for networks with batch normalisation.
        precision: With "bfloat16" images and a copy of the parameters are rounded to 16 bits;
            parameters, batch statistics, logits and the loss stay in 32.
        ema_decay: Weight of the old in the state's moving average, if it has one.
        axis_name: Name of the device axis.

    Returns:
        `step(state, batch) -> (state, sums)`; sums over the valid rows of all devices: `loss`,
        `correct`, `count`, each a float32 scalar.
    """
    dtype = jnp.dtype(precision)

    def loss_sum(
        params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], tuple[Sums, Any]]:
        pixels = images_lib.normalize(batch["image"], preprocessing)
        if dtype != jnp.float32:
            params, pixels = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, pixels))
        rngs = {"dropout": key, "topk": jax.random.fold_in(key, 1)}
        valid = {"mask": batch["mask"]} if batch_stats else {}
        (logits, _), updated = network.apply(
            _variables(params, batch_stats),
            pixels,
            train=True,
            rngs=rngs,
            mutable=["batch_stats"],
            **valid,
        )
        mask = batch["mask"].astype(jnp.float32)
        losses = loss(logits.astype(jnp.float32), batch["label"])
        correct = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        total = jnp.sum(losses * mask)
        sums = {"loss": total, "correct": jnp.sum(correct * mask), "count": jnp.sum(mask)}
        return total, (sums, updated.get("batch_stats", {}))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        rows = len(batch["label"])
        size = microbatch or rows
        if state.batch_stats and size < rows:
            raise ValueError(
                "a network with batch normalisation needs the statistics of the whole batch: "
                f"leave out microbatch={microbatch}"
            )
        key = jax.random.fold_in(state.key, state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        total, batch_stats = None, state.batch_stats
        # Not a scan: convolution gradients are several times slower inside XLA's loops on CPUs.
        for start in range(0, rows, size):
            part = {name: leaf[start : start + size] for name, leaf in batch.items()}
            gradient, (sums, batch_stats) = jax.grad(loss_sum, has_aux=True)(
                state.params, batch_stats, part, jax.random.fold_in(key, start)
            )
            term = (gradient, sums)
            total = term if total is None else jax.tree.map(jnp.add, total, term)
        gradient, sums = jax.lax.psum(total, axis_name)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums["count"], 1), gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules promote
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(
                lambda old, new: ema_decay * old + (1 - ema_decay) * new,
                ema,
                _variables(params, batch_stats),
            )
        return TrainState(state.step + 1, params, batch_stats, opt_state, state.key, ema), sums

    return step
