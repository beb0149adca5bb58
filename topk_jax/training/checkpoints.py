"""Checkpoints of a run (orbax): the latest one, and the best one of each validation set.

A checkpoint is one folder, complete or absent: the state, and beside it what else a run needs to go
on. Leaves are NumPy arrays, so that a run may go on with another number of devices or processes.
"""

import errno
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topk_jax.training.state import TrainState

_LATEST = "latest"
_BEST = "best_"


class Checkpoints:
    """The checkpoints of one run, in folders `latest` and `best_<name>`.

    Used by all processes of a run at the same places; the folder must be the same for all.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens nothing yet.

        Args:
            folder: Made when something is saved.
        """
        self._folder = pathlib.Path(folder).resolve()
        self._managers: dict[str, Any] = {}

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Saves the latest state; returns before it is on the disk.

        Args:
            step: Number of steps made.
            state: May be given away as soon as this returns.
            extra: JSON's types.

        Raises:
            OSError: This checkpoint, or the one before, could not be written.
        """
        self._save(_LATEST, step, _plain(state), extra)

    def save_best(self, name: str, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Saves the state as the best one for the validation set `name`; as `save`."""
        self._save(_BEST + name, step, _plain(state), extra)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest state, or None where nothing was saved.

        Args:
            like: A state of the same structure and shapes.

        Returns:
            The state, of NumPy arrays but for the key, and what was saved beside it.

        Raises:
            ValueError: The checkpoint is of another structure or of other shapes.
        """
        return self._restore(_LATEST, like)

    def restore_best(self, name: str, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The best state for the validation set `name`; as `restore`."""
        return self._restore(_BEST + name, like)

    def close(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            OSError: The last checkpoint could not be written.
        """
        try:
            self._wait()
        finally:
            for manager in self._managers.values():
                manager.close()
            self._managers.clear()

    def _wait(self) -> None:
        for name, manager in self._managers.items():
            try:
                manager.wait_until_finished()
            except (ValueError, RuntimeError) as error:  # whatever the disk said, in their words
                raise OSError(f"{self._folder / name}: not written: {error}") from error

    def _manager(self, name: str) -> Any:
        import orbax.checkpoint as ocp

        if name not in self._managers:
            self._managers[name] = ocp.CheckpointManager(
                self._folder / name,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1, cleanup_tmp_directories=True, enable_background_delete=False
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "extra": ocp.JsonCheckpointHandler(),
                },
            )
        return self._managers[name]

    def _save(self, name: str, step: int, tree: Any, extra: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        manager = self._manager(name)
        # One at a time: the barriers of two savings of several processes have the same name.
        self._wait()
        _check_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        if step in manager.all_steps():
            return  # a run that was ended between two checkpoints comes to the same step again
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree),  # pyright: ignore[reportCallIssue]
            extra=ocp.args.JsonSave(extra),  # pyright: ignore[reportCallIssue]
        )
        if not manager.save(step, args=items, force=True):
            raise OSError(f"{self._folder / name}: the checkpoint of step {step} was not written")

    def _restore(self, name: str, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        import orbax.checkpoint as ocp

        if not (self._folder / name).is_dir():
            return None
        manager = self._manager(name)
        step = manager.latest_step()
        if step is None:
            return None
        template = _plain(like)
        metadata = manager.item_metadata(step)["state"]
        _check_fits(template, metadata, self._folder / name)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(template),  # pyright: ignore[reportCallIssue]
            extra=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
        )
        found = manager.restore(step, args=items)
        tree = found["state"]
        key = jax.random.wrap_key_data(jnp.asarray(tree["key"]), impl=jax.random.key_impl(like.key))
        return TrainState(**(tree | {"key": key})), found["extra"]


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as NumPy arrays by name, its key as bits."""
    tree = state._replace(key=jax.random.key_data(state.key))._asdict()
    return jax.tree.map(np.asarray, jax.device_get(tree))


def _check_space(folder: pathlib.Path, size: int) -> None:
    """Raises OSError where the disk is too full; halfway, orbax would print hundreds of lines."""
    free, needed = shutil.disk_usage(folder).free, 2 * size + 2**20
    if free < needed:
        words = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.1f} MB, a checkpoint needs"
        raise OSError(errno.ENOSPC, f"{words} up to {needed / 1e6:.1f} MB", str(folder))


def _check_fits(template: Any, metadata: Any, path: pathlib.Path) -> None:
    """Raises ValueError where a stored array has another shape or dtype: orbax casts silently."""

    def described(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(where, simple=True, separator="/"): (
                tuple(leaf.shape),
                str(np.dtype(leaf.dtype)),
            )
            for where, leaf in leaves
        }

    wanted, stored = described(template), described(metadata)
    for name in wanted | stored:
        if wanted.get(name) != stored.get(name):
            raise ValueError(
                f"{path}: its {name} is {stored.get(name, 'missing')}, this run's "
                f"{wanted.get(name, 'missing')}: a checkpoint of another network or optimiser"
            )
