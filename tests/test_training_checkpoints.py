import jax
import numpy as np
import optax
import pytest
from training_fixtures import small_network, start

from topk_jax.training import Checkpoints


def state(*, width=16, step=0, momentum=0.9, ema=False):
    made = start(small_network(hidden=(width,)), optax.sgd(0.1, momentum=momentum), seed=step)
    ema_tree = jax.tree.map(lambda leaf: leaf + 1, made.variables) if ema else None
    return made._replace(step=np.asarray(step, np.int32), ema=ema_tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_saved_comes_back(tmp_path, ema):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state(ema=ema)) is None
    saved = state(step=7, ema=ema)
    checkpoints.save(7, saved, {"best": {"clean": 0.1 + 0.2}})
    checkpoints.close()
    found, extra = Checkpoints(tmp_path).restore(state(ema=ema))
    assert_same(found, saved)
    assert extra == {"best": {"clean": 0.1 + 0.2}}


def test_latest_and_best_ones_are_kept_apart(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        if step == 2:
            checkpoints.save_best("clean", step, state(step=step), {})
        checkpoints.save(step, state(step=step), {"step": step})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_clean", "latest"]
    again = Checkpoints(tmp_path)
    assert int(again.restore(state())[0].step) == 3
    assert_same(again.restore_best("clean", state())[0], state(step=2))
    assert again.restore_best("stylized", state()) is None
    again.close()
    for folder in tmp_path.iterdir():
        assert len([path for path in folder.iterdir() if path.name.isdigit()]) == 1


def test_a_step_that_is_there_is_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(step=3), {"from": "before"})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(step=3), {"from": "after"})
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(state())[1] == {"from": "before"}


def test_half_a_checkpoint_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(step=3), {})
    checkpoints.close()
    half = tmp_path / "latest" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    again = Checkpoints(tmp_path)
    assert int(again.restore(state())[0].step) == 3
    again.save(5, state(step=5), {})
    again.close()
    assert int(Checkpoints(tmp_path).restore(state())[0].step) == 5


@pytest.mark.parametrize("other", [{"width": 8}, {"momentum": None}, {"ema": True}])
def test_a_checkpoint_of_another_network_or_optimiser_is_refused(tmp_path, other):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(step=1), {})
    checkpoints.close()
    with pytest.raises(ValueError, match="a checkpoint of another network or optimiser"):
        Checkpoints(tmp_path).restore(state(**other))
