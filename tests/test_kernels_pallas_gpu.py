"""The GPU kernel in interpret mode against the XLA form and a stable sort; lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import kernels
from topk_jax.kernels import pallas_gpu
from topk_jax.topk import kept_count, topk_activation

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def draw(kind: str, shape, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.0, -1.0])
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "coarse": np.round(2 * normal) / 2,
        "constant": np.full(shape, -3.0),
        "special": rng.choice(special, size=shape),
    }[kind].astype(np.float32)


def stable_mask(x: np.ndarray, k: int, rank=np.abs) -> np.ndarray:
    """The k of largest rank over the middle axis of [b, n, c]; NaN first, ties to the lowest."""
    ranks = np.where(np.isnan(x), np.inf, rank(x))
    nan_last = ~np.isnan(x)
    mask = np.zeros(x.shape, bool)
    for b, c in np.ndindex(x.shape[0], x.shape[2]):
        order = np.lexsort((np.arange(x.shape[1]), -ranks[b, :, c], nan_last[b, :, c]))
        mask[b, order[:k], c] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 37, 3), (3, 50, 1)])
def test_equals_a_stable_sort(shape, dtype):
    for kind in ("normal", "relu", "coarse", "constant", "special"):
        x = jnp.asarray(draw(kind, shape)).astype(dtype)
        bits = np.asarray(x).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)
        for k in (1, 5, shape[1] - 1):
            expected = stable_mask(np.asarray(x.astype(jnp.float32)), k)
            y, threshold, cut = pallas_gpu.select(
                x, jnp.int32(k), "magnitude", "top", interpret=True
            )
            np.testing.assert_array_equal(
                kernels.kept(x, threshold, cut, "magnitude"), expected, err_msg=f"{kind} {k}"
            )
            np.testing.assert_array_equal(np.asarray(y).view(bits.dtype), expected * bits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_rest_by_value(dtype):
    x = jnp.asarray(draw("coarse", (2, 37, 3))).astype(dtype)
    plain = np.asarray(x.astype(jnp.float32))
    mask = stable_mask(plain, kept_count(0.3, (37,)), rank=np.positive)
    with kernels.force("pallas_gpu_interpret"):
        found = topk_activation(x, 0.3, axes=(1,), rank_by="value", keep="rest")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), np.where(mask, 0, plain))


def test_gradient_is_the_mask():
    x = jnp.asarray(draw("normal", (2, 37, 3)))
    mask = stable_mask(np.asarray(x), kept_count(0.2, (37,)))
    with kernels.force("pallas_gpu_interpret"):
        gradient = jax.grad(lambda x: jnp.sum(topk_activation(x, 0.2, axes=(1,))))(x)
    np.testing.assert_array_equal(gradient, mask)
    assert np.asarray(gradient).sum() == kept_count(0.2, (37,)) * 6


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3025, 64), (4, 49, 2048), (8, 784, 1), (2, 5000, 1)])
def test_lowers_for_cuda(shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    k = jax.ShapeDtypeStruct((), jnp.int32)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = pallas_gpu.select.trace(x, k, "magnitude", "top", interpret=False)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_rows_that_do_not_fit_are_left_to_the_xla_form():
    assert pallas_gpu.supports((1, 6400, 64), jnp.float32)
    assert not pallas_gpu.supports((1, 224 * 224, 64), jnp.float32)
    with pytest.raises(ValueError, match="do not fit"):
        pallas_gpu.select(jnp.ones((1, 224 * 224, 64)), jnp.int32(3), "magnitude")


def test_unknown_implementation():
    with pytest.raises(ValueError, match="pallas_gpu"), kernels.force("cuda"):  # pyright: ignore
        pass
