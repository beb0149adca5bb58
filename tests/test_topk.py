"""Top-K against the golden values, a NumPy loop, and (where it is installed) PyTorch."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_jax import kernels
from topk_jax.kernels import xla
from topk_jax.topk import TopK, _topk, kept_count, topk_activation, topk_mask

A = np.array([[3, -5, 1], [0, 2, -4], [0.5, -0.25, 6]], np.float32)
B = np.array(
    [[[[1, 2], [3, 4]], [[-8, 7], [0, 0.5]]], [[[0, 0], [0, -1]], [[5, 5], [4, 6]]]], np.float32
)
BOTH = (0, 1)


def plane(values) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("fraction", "options", "expected"),
    [
        (1, {}, A),
        (0.5, {}, plane([[3, -5, 0], [0, 0, -4], [0, 0, 6]])),
        (0.4, {}, plane([[0, -5, 0], [0, 0, -4], [0, 0, 6]])),
        (1 / 3, {}, plane([[0, -5, 0], [0, 0, -4], [0, 0, 6]])),
        (0.3, {}, plane([[0, -5, 0], [0, 0, 0], [0, 0, 6]])),
        (0.25, {}, plane([[0, -5, 0], [0, 0, 0], [0, 0, 6]])),
        (0.12, {}, plane([[0, 0, 0], [0, 0, 0], [0, 0, 6]])),
        (0.05, {}, plane([[0, 0, 0], [0, 0, 0], [0, 0, 6]])),
        (0.4, {"keep": "rest"}, plane([[3, 0, 1], [0, 2, 0], [0.5, -0.25, 0]])),
        (1, {"keep": "rest"}, np.zeros_like(A)),
        (0.4, {"rank_by": "value"}, plane([[3, 0, 0], [0, 2, 0], [0, 0, 6]])),
    ],
)
def test_golden_values(fraction, options, expected):
    np.testing.assert_array_equal(topk_activation(A, fraction, axes=BOTH, **options), expected)


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [
        ([[2, -2], [2, 1]], 0.5, [[2, -2], [0, 0]]),
        ([[2, -2], [2, 1]], 0.75, [[2, -2], [2, 0]]),
        ([[0, 0], [0, 1]], 0.5, [[0, 0], [0, 1]]),
    ],
)
def test_ties_go_to_the_lowest_index(values, fraction, expected):
    np.testing.assert_array_equal(topk_activation(plane(values), fraction, axes=BOTH), expected)


def test_tied_mask_has_exactly_k():
    mask = topk_mask(plane([[0, 0], [0, 1]]), 0.5, axes=BOTH)
    np.testing.assert_array_equal(mask, [[True, False], [False, True]])


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.25, [[[[0, 0], [0, 4]], [[-8, 0], [0, 0]]], [[[0, 0], [0, -1]], [[0, 0], [0, 6]]]]),
        (0.5, [[[[0, 0], [3, 4]], [[-8, 7], [0, 0]]], [[[0, 0], [0, -1]], [[5, 0], [0, 6]]]]),
    ],
)
def test_each_channel_of_each_image_by_itself(fraction, expected):
    nhwc = B.transpose(0, 2, 3, 1)
    result = np.asarray(topk_activation(nhwc, fraction))
    np.testing.assert_array_equal(result.transpose(0, 3, 1, 2), expected)
    np.testing.assert_array_equal(topk_activation(B, fraction, axes=(-2, -1)), expected)


def test_gradient_is_the_mask():
    gradient = jax.grad(lambda x: topk_activation(x, 0.4, axes=BOTH).sum())(jnp.asarray(A))
    np.testing.assert_array_equal(gradient, [[0, 1, 0], [0, 0, 1], [0, 0, 1]])


def test_kept_zeros_have_a_gradient():
    x = jnp.zeros((2, 2))
    gradient = jax.grad(lambda x: topk_activation(x, 0.5, axes=BOTH).sum())(x)
    np.testing.assert_array_equal(gradient, [[1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("side", "fraction", "k"),
    [
        *[(112, 0.05, 627), (56, 0.05, 156), (28, 0.05, 39), (14, 0.05, 9), (7, 0.05, 2)],
        *[(7, 0.1, 4), (7, 0.2, 9), (7, 0.3, 14), (7, 0.4, 19), (7, 0.5, 24), (27, 0.05, 36)],
        *[(27, 0.1, 72), (13, 0.05, 8), (13, 0.1, 16), (6, 0.05, 1), (6, 0.1, 3), (6, 0.2, 7)],
        *[(56, 0.2, 627), (112, 0.2, 2508), (32, 0.05, 51), (32, 0.15, 153)],
        *[(10, 0.29, 29), (10, 0.58, 58), (10, 0.57, 56), (2, 0.01, 1)],
    ],
)
def test_k_is_the_truncated_product_from_left_to_right(side, fraction, k):
    assert kept_count(fraction, (side, side)) == k


# Shapes drawn freely would compile for every example.
CASES = [
    ((2, 5, 7, 3), jnp.float32, "magnitude"),
    ((1, 33, 31, 9), jnp.float32, "value"),
    ((3, 4, 4, 16), jnp.bfloat16, "magnitude"),
    ((1, 13, 17, 2), jnp.bfloat16, "value"),
    ((2, 6, 6, 8), jnp.float16, "magnitude"),
]
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.0, -1.0], np.float32)


def stable_topk_mask(x: np.ndarray, k: int, rank_by: str) -> np.ndarray:
    """NumPy loop over (image, channel): stable descending order, NaNs first."""
    mask = np.zeros(x.shape, bool)
    for image, channel in itertools.product(range(x.shape[0]), range(x.shape[-1])):
        row = x[image, :, :, channel].astype(np.float64).ravel()
        rank = np.abs(row) if rank_by == "magnitude" else row
        nan = np.isnan(rank)
        order = np.lexsort((np.where(nan, 0, -rank), ~nan))  # the last key counts first
        flat = np.zeros(row.size, bool)
        flat[order[:k]] = True
        mask[image, :, :, channel] = flat.reshape(x.shape[1:3])
    return mask


def draw(rng: np.random.Generator, kind: str, shape) -> np.ndarray:
    normal = rng.normal(size=shape)
    spread = np.exp2(rng.uniform(-126, 127, size=shape)) * np.sign(normal)
    clusters = np.where(normal > 0.5, 1e30, 1e-30) * (1 + 1e-6 * rng.integers(0, 9, size=shape))
    values = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "coarse": np.round(2 * normal) / 2,
        "constant": np.full(shape, rng.choice(SPECIAL)),
        "special": rng.choice(SPECIAL, size=shape),
        "spread": spread,
        "clusters": clusters,
        "one-hot": np.where(rng.random(shape) < 0.02, normal, 0),
    }
    return values[kind].astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def mask_top_and_rest(x, k, rank_by):
    """What `topk_mask` and `topk_activation` call, in one program, which compiles faster."""
    return tuple(
        _topk(x, k, (1, 2), rank_by, keep, result, "xla")
        for keep, result in (("top", "mask"), ("top", "activation"), ("rest", "activation"))
    )


@pytest.mark.parametrize(("shape", "dtype", "rank_by"), CASES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(
        ["normal", "relu", "coarse", "constant", "special", "spread", "clusters", "one-hot"]
    ),
    fraction=st.one_of(st.sampled_from([1e-4, 0.05, 0.1, 0.5, 0.999]), st.floats(1e-3, 0.999)),
)
def test_mask_equals_a_loop_over_stable_sorts(shape, dtype, rank_by, seed, kind, fraction):
    with np.errstate(over="ignore"):
        x = draw(np.random.default_rng(seed), kind, shape).astype(dtype)
    k = kept_count(fraction, shape[1:3])
    expected = stable_topk_mask(x.astype(np.float32), k, rank_by)
    mask, top, rest = map(np.asarray, mask_top_and_rest(x, np.int32(k), rank_by))
    np.testing.assert_array_equal(mask, expected)
    bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
    # Bit for bit in exactly one of the two, and +0 in the other.
    for found, kept in ((top, mask), (rest, ~mask)):
        np.testing.assert_array_equal(found.view(bits), np.where(kept, x.view(bits), 0))


@pytest.mark.parametrize("shape", [(1, 263, 251, 2), (1, 224, 224, 8)])
def test_long_rows(shape):
    rng = np.random.default_rng(1)
    for kind, dtype in itertools.product(("normal", "coarse"), (jnp.float32, jnp.bfloat16)):
        x = jnp.asarray(draw(rng, kind, shape)).astype(dtype)
        k = kept_count(0.1, shape[1:3])
        expected = stable_topk_mask(np.asarray(x.astype(jnp.float32)), k, "magnitude")
        np.testing.assert_array_equal(topk_mask(x, 0.1), expected)


def test_every_nan_ranks_alike_whatever_its_bits():
    bits = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0x3F800000, 0x7F800000], np.uint32)
    x = jnp.asarray(bits.view(np.float32))
    for rank_by in ("magnitude", "value"):
        mask = functools.partial(topk_mask, x, axes=(0,), rank_by=rank_by)
        np.testing.assert_array_equal(mask(0.4), [True, True, False, False, False])
        np.testing.assert_array_equal(mask(0.8), [True, True, True, False, True])


@pytest.mark.parametrize(
    ("axes", "shape"),
    [((1,), (3, 8, 5)), ((0, 2), (4, 3, 5)), ((0, 1, 2), (3, 4, 5)), ((-1,), (7,))],
)
def test_any_axes(axes, shape):
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    mask = np.asarray(topk_mask(x, 0.4, axes=axes))
    positive = tuple(axis % len(shape) for axis in axes)
    others = tuple(axis for axis in range(len(shape)) if axis not in positive)
    rows = np.abs(x).transpose(others + positive).reshape(*[shape[i] for i in others], -1)
    k = kept_count(0.4, [shape[i] for i in positive])
    threshold = -np.sort(-rows, axis=-1)[..., k - 1 : k]
    found = mask.transpose(others + positive).reshape(rows.shape)
    np.testing.assert_array_equal(found, rows >= threshold)


def test_fraction_one_is_the_identity_bit_for_bit():
    x = jnp.asarray(SPECIAL)
    bits = np.asarray(topk_activation(x, 1.0, axes=(0,))).view(np.uint32)
    np.testing.assert_array_equal(bits, SPECIAL.view(np.uint32))


def test_transformations():
    x = np.random.default_rng(3).normal(size=(8, 6, 6, 2)).astype(np.float32)
    expected = np.where(stable_topk_mask(x, kept_count(0.2, (6, 6)), "magnitude"), x, 0)
    x = jnp.asarray(x)

    def layer(x):
        return topk_activation(x, 0.2)

    def total(x):
        return jnp.sum(layer(x) ** 3)

    def tangent(x):
        return jax.jvp(layer, (x,), (jnp.ones_like(x),))[1]

    @jax.jit
    def transformed(x):
        # In one program, so that what is searched alike is compiled once.
        return {
            "jit": layer(x),
            "vmap": jax.vmap(layer)(x),
            "gradient": jax.grad(total)(x),
            "rematerialised": jax.grad(jax.checkpoint(total))(x),
            "second": jax.grad(lambda x: jnp.sum(jax.grad(total)(x)))(x),
            "tangent": tangent(x),
            "mask": topk_mask(x, 0.2),
        }

    found = transformed(x)
    chex.assert_trees_all_equal(found["jit"], expected)
    chex.assert_trees_all_equal(found["vmap"], expected)
    chex.assert_trees_all_equal(jax.pmap(layer)(x[:, None])[:, 0], expected)
    np.testing.assert_allclose(found["gradient"], 3 * np.square(expected), rtol=1e-6)
    chex.assert_trees_all_equal(found["rematerialised"], found["gradient"])
    np.testing.assert_allclose(found["second"], 6 * np.asarray(expected), rtol=1e-6)
    np.testing.assert_array_equal(found["tangent"], found["mask"])
    np.testing.assert_array_equal(found["mask"], np.asarray(expected) != 0)


def test_one_program_serves_every_fraction_of_a_shape():
    topk_activation(A, 0.5, axes=BOTH)
    with NoCompilation():
        topk_activation(A, 0.3, axes=BOTH)


class NoCompilation:
    """Fails when a program is compiled inside the `with` statement."""

    def __enter__(self):
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        self._count += event.endswith("backend_compile_duration")

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)
        assert self._count == 0


@pytest.mark.parametrize("rank_by", ["magnitude", "value"])
def test_passes_of_the_search_are_bounded(monkeypatch, rank_by):
    passes = []
    while_loop = jax.lax.while_loop

    def counted(condition, body, carry):
        carry, count = while_loop(
            lambda state: condition(state[0]),
            lambda state: (body(state[0]), state[1] + 1),
            (carry, jnp.int32(0)),
        )
        passes.append(count)
        return carry

    @jax.jit
    def search(x, k):
        threshold, cut = xla.search(x, k, rank_by)
        (count,) = passes
        return kernels.kept(x, threshold, cut, rank_by), count

    monkeypatch.setattr(jax.lax, "while_loop", counted)
    rng = np.random.default_rng(6)
    kinds = ("normal", "relu", "coarse", "special", "spread", "clusters", "one-hot")
    rows = np.concatenate([draw(rng, kind, (1, 60, 8)) for kind in kinds])
    # A pair one unit in the last place apart, at the cut.
    rows[0, :2] = np.array([[1.5], [np.nextafter(np.float32(1.5), np.float32(2))]])
    counts = []
    for k in (1, 3, 30, 50, 59):
        mask, count = search(rows, np.int32(k))
        expected = stable_topk_mask(rows[:, :, None], k, rank_by)[:, :, 0]
        np.testing.assert_array_equal(mask, expected)
        counts.append(int(count))
    assert 0 < max(counts) <= 40


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_keeps_one_mask(dtype):
    x = jax.ShapeDtypeStruct((2, 9, 9, 16), dtype)
    residuals = jax.eval_shape(lambda x: jax.vjp(lambda x: topk_activation(x, 0.1), x)[1], x)
    kept = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(residuals) if leaf.size > 1]
    assert sum(np.prod(shape) * dtype.itemsize for shape, dtype in kept) <= 2 * 9 * 9 * 16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_tpu_without_gather_scatter_or_sort(dtype):
    x = jax.ShapeDtypeStruct((2, 28, 28, 64), dtype)
    traced = jax.jit(lambda x: topk_activation(x, 0.1)).trace(x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in text
    for operation in ("gather", "scatter", "sort", "top_k"):
        assert f"stablehlo.{operation}" not in text
        assert f"chlo.{operation}" not in text


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_positions_may_be_permuted_and_a_second_time_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    x = rng.permutation(np.arange(1, 9 * 9 * 8 + 1)).reshape(1, 9, 9, 8).astype(np.float32)
    once = np.asarray(topk_activation(x, 0.2))
    np.testing.assert_array_equal(topk_activation(once, 0.2), once)
    order = rng.permutation(81)
    shuffled = x.reshape(1, 81, 8)[:, order].reshape(x.shape)
    np.testing.assert_array_equal(
        topk_activation(shuffled, 0.2), once.reshape(1, 81, 8)[:, order].reshape(x.shape)
    )


def test_module_is_the_function():
    for options in ({"keep": "rest"}, {"rank_by": "value"}):
        module = TopK(0.4, axes=BOTH, **options)
        chex.assert_trees_all_equal(
            module.apply({}, A), topk_activation(A, 0.4, axes=BOTH, **options)
        )


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        topk_activation(A, fraction, axes=BOTH)


def test_bad_arguments():
    with pytest.raises(TypeError, match="int32"):
        topk_activation(jnp.ones((2, 2), jnp.int32), 0.5, axes=BOTH)
    with pytest.raises(ValueError, match="do not fit"):
        topk_activation(A, 0.5)
    with pytest.raises(ValueError, match="twice"):
        topk_activation(A, 0.5, axes=(0, -2))
    with pytest.raises(ValueError, match="rank_by"):
        topk_activation(A, 0.5, axes=BOTH, rank_by="abs")  # pyright: ignore
    with pytest.raises(ValueError, match="keep"):
        topk_activation(A, 0.5, axes=BOTH, keep="bottom")  # pyright: ignore


@pytest.mark.parity
def test_equals_torch_topk_without_ties():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(5).normal(size=(3, 4, 9, 11)).astype(np.float32)
    for fraction in (0.05, 0.1, 0.5):
        rows = torch.from_numpy(x).reshape(3, 4, -1)
        k = kept_count(fraction, (9, 11))
        index = rows.abs().topk(k, dim=2).indices
        expected = (rows * torch.zeros_like(rows).scatter_(2, index, 1)).reshape(x.shape)
        found = topk_activation(x.transpose(0, 2, 3, 1), fraction)
        np.testing.assert_array_equal(np.asarray(found).transpose(0, 3, 1, 2), expected.numpy())
