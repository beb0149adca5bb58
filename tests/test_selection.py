"""Variants and controls of Top-K against NumPy loops and golden values, alone and in networks."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from topk_jax import selection
from topk_jax.networks import create_network, variable_shapes
from topk_jax.selection import calibrate_thresholds
from topk_jax.topk import TopK, bottom_nonzero_mask, random_mask
from topk_jax.training.state import init_variables

A = np.array([[3, -5, 1], [0, 2, -4], [0.5, -0.25, 6]], np.float32)
# Each shape is one more program to compile.
SHAPE = (8, 4, 5, 6)
FRACTION = 0.25
K = 5
AXES = {
    "space": (-3, -2),
    "channels": (-1,),
    "space and channels": (-3, -2, -1),
    "batch and space": (0, -3, -2),
    "batch, space and channels": (0, -3, -2, -1),
}


def normal(seed=0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relu(seed=0, shape=SHAPE) -> np.ndarray:
    return np.maximum(normal(seed, shape), 0)


def rows_of(x, axes):
    """Index tuples of every row and the row's entries in flat order of the axes."""
    axes = sorted(axis % x.ndim for axis in axes)
    others = [axis for axis in range(x.ndim) if axis not in axes]
    for place in itertools.product(*(range(x.shape[axis]) for axis in others)):
        index = []
        for inner in itertools.product(*(range(x.shape[axis]) for axis in axes)):
            full = dict(zip(others, place, strict=True)) | dict(zip(axes, inner, strict=True))
            index.append(tuple(full[axis] for axis in range(x.ndim)))
        yield index, [float(x[i]) for i in index]


def loop_mask(x, fraction, axes, rank=abs, chosen=lambda value: True):
    """Of the entries that are `chosen`, the k of largest rank; the first of equal ones."""
    mask = np.zeros(x.shape, bool)
    for index, row in rows_of(x, axes):
        k = int(max(1, fraction * len(row)))
        places = [i for i, value in enumerate(row) if chosen(value)]
        for i in sorted(places, key=lambda i: (-rank(row[i]), i))[:k]:
            mask[index[i]] = True
    return mask


def apply(module, x, *, key=None, variables=None):
    rngs = None if key is None else {"topk": key}
    return np.asarray(module.apply(variables or {}, x, rngs=rngs))


def on_plane(values, fraction, **fields):
    return apply(TopK(fraction, axes=(0, 1), **fields), np.asarray(values, np.float32))


def test_golden_values():
    blended = [[2.1, -5, 0.7], [0, 1.4, -2.8], [0.35, -0.175, 6]]
    np.testing.assert_allclose(on_plane(A, 0.25, blend=0.3), blended, rtol=1e-6)
    mean = np.diag(np.full(3, 11 / 3, np.float32))
    np.testing.assert_allclose(on_plane(A, 0.4, replace="mean", rank_by="value"), mean, rtol=1e-6)
    two = [[0, 4.5, 0], [0, 0, 4.5], [0, 0, 0]]
    np.testing.assert_array_equal(on_plane(-A, 0.25, replace="mean", rank_by="value"), two)
    # Sums of magnitudes: 21.75 in all, 11 of the two kept.
    energy = np.where(np.abs(A) >= 5, A * (21.75 / 11), 0)
    np.testing.assert_allclose(on_plane(A, 0.25, rescale=True), energy, rtol=1e-6)


@pytest.mark.parametrize("name", AXES)
def test_axes_against_a_loop(name):
    x, weights = normal(1), normal(2)
    mask = loop_mask(x, FRACTION, AXES[name])
    keep = "top"
    if name == "batch and space":
        keep, mask = "rest", ~mask
    module = TopK(FRACTION, axes=AXES[name], keep=keep)

    def weighted(x):
        y = module.apply({}, x)
        return jnp.sum(y * weights), y

    gradient, y = jax.jit(jax.grad(weighted, has_aux=True))(x)
    np.testing.assert_array_equal(y, np.where(mask, x, 0))
    np.testing.assert_array_equal(gradient, np.where(mask, weights, 0))


def test_random_keeps_exactly_k_uniformly_and_independently():
    x = np.zeros(SHAPE, np.float32)
    masks = np.stack([random_mask(jax.random.key(i), x, FRACTION) for i in range(60)])
    assert (masks.sum(axis=(2, 3)) == K).all()
    # Each position is kept in a quarter of the rows of all draws, within five standard deviations.
    spread = np.sqrt(FRACTION * (1 - FRACTION))
    frequency = masks.mean(axis=(0, 1, 4))
    assert np.abs(frequency - FRACTION).max() < 5 * spread / np.sqrt(60 * 8 * 6)
    # Neighbouring channels, images and keys agree as often as independent draws do.
    for axis in (4, 1, 0):
        first = np.moveaxis(masks, axis, 0)
        overlap = (first[:-1] & first[1:]).sum() / first[:-1].sum()
        assert abs(overlap - FRACTION) < 0.02


def test_a_key_fixes_the_positions():
    x, layer = normal(4), TopK(FRACTION, select="random")
    first = apply(layer, x, key=jax.random.key(1))
    np.testing.assert_array_equal(first, apply(layer, x, key=jax.random.key(1)))
    assert (first != apply(layer, x, key=jax.random.key(2))).any()
    kept = first != 0
    assert (kept.sum(axis=(1, 2)) == K).all()
    np.testing.assert_array_equal(first[kept], x[kept])
    rest = apply(TopK(FRACTION, select="random", keep="rest"), x, key=jax.random.key(1))
    np.testing.assert_array_equal(rest, np.where(kept, 0, x))


def test_random_among_the_nonzero():
    x = relu(6)
    x[0, :, :, 0] = 0
    x[1, :, :, 1] = 0
    x[1, 2, 3, 1], x[1, 0, 0, 1] = np.nan, 1e-40
    count = (x != 0).sum(axis=(1, 2))
    masks = np.stack(
        [np.asarray(random_mask(jax.random.key(i), x, FRACTION, nonzero=True)) for i in range(60)]
    )
    assert not masks[:, x == 0].any()
    np.testing.assert_array_equal(masks.sum(axis=(2, 3)), [np.minimum(count, K)] * 60)
    frequency = masks.mean(axis=0)
    expected = np.where(x != 0, np.minimum(1, K / np.maximum(count, 1))[:, None, None, :], 0)
    assert np.abs(frequency - expected).max() < 5 * np.sqrt(0.25 / 60)
    kept = apply(TopK(FRACTION, select="random_nonzero"), x, key=jax.random.key(0))
    assert ((kept != 0).sum(axis=(1, 2)) == np.minimum(count, K)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bottom_of_the_nonzero_against_a_loop(dtype):
    rng = np.random.default_rng(7)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, -6e-8, 1.0, -1.0, 2.0]
    x = np.where(rng.random(SHAPE) < 0.5, rng.choice(special, size=SHAPE), np.round(normal(8), 1))
    x[0, :, :, 0] = 0
    x = jnp.asarray(x, jnp.float32).astype(dtype)
    plain = np.asarray(x.astype(jnp.float32))

    def rank(value):
        return -1e39 if np.isnan(value) else -min(abs(value), 5e38)

    expected = loop_mask(plain, FRACTION, (-3, -2), rank, lambda value: value != 0)
    np.testing.assert_array_equal(bottom_nonzero_mask(x, FRACTION), expected)
    np.testing.assert_array_equal(bottom_nonzero_mask(x, FRACTION, keep="rest"), ~expected)
    y = TopK(FRACTION, select="bottom_nonzero").apply({}, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(jnp.float32), np.where(expected, plain, 0))


@pytest.mark.parametrize("name", ["space", "channels", "batch and space"])
@pytest.mark.parametrize("keep", ["top", "rest"])
def test_replace_rescale_and_blend_against_a_loop(name, keep):
    x, axes = relu(9), AXES[name]
    x[2] = 0  # no energy, nothing to put in the place of zeros
    top = loop_mask(x, FRACTION, axes)
    mask = top if keep == "top" else ~top
    mean, scaled, binary = (np.zeros(SHAPE) for _ in range(3))
    for index, row in rows_of(x, axes):
        kept = [value for i, value in zip(index, row, strict=True) if mask[i]]
        lost = sum(map(abs, row)) / sum(map(abs, kept)) if sum(map(abs, kept)) else 1
        for i, value in zip(index, row, strict=True):
            if mask[i]:
                mean[i], scaled[i] = sum(kept) / len(kept), lost * value
    # One number an image, or one for all where the batch is ranked jointly.
    for images in [slice(0, 8)] if 0 in axes else [slice(i, i + 1) for i in range(8)]:
        places = mask[images] & (x[images] != 0)
        if places.any():
            number = x[images][places].mean(dtype=np.float64)
            binary[images] = np.where(places, number, 0)
    for fields, expected in (
        ({"replace": "mean"}, mean),
        ({"replace": "binary"}, binary),
        ({"rescale": True}, scaled),
        ({"rescale": True, "blend": 0.25}, 0.25 * scaled + 0.75 * x),
    ):
        y = np.asarray(selection.keep_masked(x, mask, axes=axes, **fields))
        np.testing.assert_allclose(y, expected, rtol=2e-6, err_msg=str(fields))
        if name == "space":
            module = TopK(FRACTION, axes=axes, keep=keep, **fields)
            np.testing.assert_array_equal(apply(module, x), y)


def test_rescaling_is_safe():
    x = normal(10)
    x[0, 1, 1, 1] = np.inf
    x[0, 1, 1, 2] = np.nan
    x[0, :, :, 3] = 0
    x[0, 0, :2, 3] = 1e30, 1e-30
    plain = apply(TopK(FRACTION), x)
    scaled = apply(TopK(FRACTION, rescale=True), x)
    # Rows that cannot be scaled are as they were, and have a gradient.
    np.testing.assert_array_equal(scaled[0, :, :, 1:3], plain[0, :, :, 1:3])
    weakest = np.zeros(SHAPE, bool)
    weakest[0, 0, 1, 3] = True

    def total(x):
        return jnp.sum(selection.keep_masked(x, weakest, axes=(1, 2), rescale=True))

    value, gradient = jax.jit(jax.value_and_grad(total))(np.nan_to_num(x, posinf=1.0))
    assert value == np.float32(1e-30)
    np.testing.assert_array_equal(gradient, weakest)


def test_sums_of_16_bit_numbers_do_not_overflow():
    x = np.full(SHAPE, 60000, np.float16)
    np.testing.assert_array_equal(on_batch := apply(TopK(1.0, replace="mean"), x), x)
    assert on_batch.dtype == np.float16
    np.testing.assert_array_equal(apply(TopK(1.0, rescale=True), x), x)


CALIBRATED = {"topk": {"threshold": np.full(SHAPE[-1], 0.8, np.float32)}}
# Each variant once, and no more searches to compile than that takes.
VARIANTS = {
    "random, blend": {"select": "random", "blend": 0.3},
    "random_nonzero, rest, binary": {
        "select": "random_nonzero",
        "keep": "rest",
        "replace": "binary",
    },
    "bottom_nonzero, mean": {"select": "bottom_nonzero", "replace": "mean"},
    "rescale": {"rescale": True},
    "threshold": {"select": "threshold"},
}


def total(name, x, weights, key):
    """A number whose gradient is that of the variant, and the variant's result."""
    y = TopK(FRACTION, **VARIANTS[name]).apply(CALIBRATED, x, rngs={"topk": key})
    return jnp.sum(y * weights), y


@pytest.fixture(scope="module")
def mapped():
    """Results and gradients of all variants: pmap of vmap of grad over images, one program."""
    keys = jax.random.split(jax.random.key(3), SHAPE[0])

    def gradients(x, weights, key):
        return {
            name: jax.grad(functools.partial(total, name), has_aux=True)(
                x[None], weights[None], key
            )
            for name in VARIANTS
        }

    arguments = (normal(11), normal(12), keys)
    leading = jax.tree.map(lambda leaf: leaf[:, None], arguments)
    results = jax.pmap(jax.vmap(gradients))(*leading)
    return arguments, jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0, 0], results)


@pytest.fixture(scope="module")
def directly(mapped):
    """The same by grad alone: of all images at once, and of two where they have their own keys."""
    (x, weights, keys), _ = mapped

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(random, x, weights, key):
        return {
            name: jax.grad(functools.partial(total, name), has_aux=True)(x, weights, key)
            for name in VARIANTS
            if ("random" in name) == random
        }

    alone = [gradients(True, x[i : i + 1], weights[i : i + 1], keys[i]) for i in (0, 5)]
    return gradients(False, x, weights, keys[0]) | jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *alone
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_transformations(name, mapped, directly):
    dx, y = mapped[1][name]
    expected_dx, expected = directly[name]
    if "random" in name:
        # Each image has a key of its own, so its positions do not depend on the batch.
        dx, y = dx[[0, 5]], y[[0, 5]]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_selection_are_the_mask(mapped):
    (x, weights, _), results = mapped
    dx, y = results["threshold"]
    np.testing.assert_array_equal(dx, np.where(y != 0, weights, 0))
    dx, y = results["random, blend"]
    kept = np.isclose(y, x, rtol=1e-5)
    assert (kept.sum(axis=(1, 2)) == K).all()
    np.testing.assert_allclose(dx, np.where(kept, 1, 0.7) * weights, rtol=1e-5)
    dx, y = results["bottom_nonzero, mean"]
    kept = y != 0
    mean = np.where(kept, weights, 0).sum(axis=(1, 2), keepdims=True) / K
    np.testing.assert_allclose(dx, np.where(kept, mean, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{"replace": "mean"}, {"replace": "binary"}, {"rescale": True}])
def test_gradients_flow_through_means_and_sums(fields):
    x, weights, mask = normal(17), normal(18), normal(19) > 0.5

    def total(x):
        return jnp.sum(selection.keep_masked(x, mask, axes=(1, 2), **fields) * weights)

    check_grads(jax.jit(total), (x,), 1, ["fwd", "rev"], rtol=2e-2, atol=0.1, eps=1e-3)


def test_threshold_keeps_what_reaches_it():
    x = normal(13)
    threshold = np.linspace(0, 1.5, SHAPE[-1]).astype(np.float32)
    variables = {"topk": {"threshold": threshold}}
    expected = np.abs(x) >= threshold
    module = TopK(FRACTION, select="threshold")
    np.testing.assert_array_equal(apply(module, x, variables=variables), np.where(expected, x, 0))
    rest = TopK(FRACTION, select="threshold", keep="rest")
    np.testing.assert_array_equal(apply(rest, x, variables=variables), np.where(expected, 0, x))
    value = TopK(FRACTION, select="threshold", rank_by="value")
    np.testing.assert_array_equal(
        apply(value, x, variables=variables), np.where(x >= threshold, x, 0)
    )
    with pytest.raises(ValueError, match=r"thresholds of shape \(2,\).*expected \(6,\)"):
        apply(module, x, variables={"topk": {"threshold": threshold[:2]}})


@pytest.mark.parametrize("axes", [AXES["space"], AXES["channels"], AXES["space and channels"]])
def test_calibration_is_the_exact_quantile(axes):
    x, module = normal(14), TopK(FRACTION, select="threshold", axes=axes)
    variables = calibrate_thresholds(module, {"params": {}}, [x[:3], x[3:6], x[6:]])
    assert set(variables) == {"params", "topk"}
    pooled = tuple(sorted({0, *(axis % 4 for axis in axes)}))
    last = np.moveaxis(np.abs(x), pooled, range(-len(pooled), 0))
    values = np.sort(last.reshape(*last.shape[: -len(pooled)], -1))
    k = int(FRACTION * values.shape[-1])
    np.testing.assert_array_equal(variables["topk"]["threshold"], values[..., -k])
    kept = np.asarray(module.apply(variables, x)) != 0
    assert (kept.sum(axis=pooled) == k).all()


def test_calibration_of_sparse_and_tied_channels():
    x = np.zeros(SHAPE, np.float32)
    x[..., 1] = 2  # ties: all of them are kept
    x[:, 0, 0, 2] = 1  # fewer than a quarter: none is cut
    x[:, :2, :2, 3] = normal(15, (8, 2, 2))
    module = TopK(0.1, select="threshold")
    variables = calibrate_thresholds(module, {}, [x])
    np.testing.assert_array_equal(variables["topk"]["threshold"][:3], [0, 2, 0])
    density = (apply(module, x, variables=variables) != 0).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(density, [0, 1, 0.05, 0.1, 0, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="pass a list"):
        calibrate_thresholds(module, {}, iter([x]))
    with pytest.raises(ValueError, match="no images"):
        calibrate_thresholds(module, {}, [])
    with pytest.raises(ValueError, match="no site to calibrate"):
        calibrate_thresholds(TopK(0.1), {}, [x])
    with pytest.raises(ValueError, match=r"no thresholds: variables = calibrate_thresholds"):
        module.apply({}, x)


def network_and_variables(topk):
    options = {"convolutions": (1, 1), "widths": (6, 8), "hidden": ()}
    network = create_network("builtin", topk=topk, **options)
    return network, init_variables(network, jax.random.key(0), image_size=16)


IMAGES = normal(16, (8, 16, 16, 3))


def test_calibration_of_a_network_goes_from_site_to_site():
    """The second site's density is right only with the first site's thresholds in force."""
    layer = TopK(0.1, select="threshold")
    network, variables = network_and_variables({"conv2_1": layer, "conv1_1": layer})
    assert set(variables) == {"params"}
    calibrated = calibrate_thresholds(network, variables, [IMAGES[:5], IMAGES[5:]], train=False)
    shapes = jax.tree.map(np.shape, calibrated["topk"])
    assert shapes == {
        "topk.conv1_1": {"threshold": (6,)},
        "topk.conv2_1": {"threshold": (8,)},
    }
    chex.assert_trees_all_equal(calibrated["params"], variables["params"])
    _, features = jax.jit(lambda v, x: network.apply(v, x, train=False))(calibrated, IMAGES)
    for site, side in (("conv1_1", 16), ("conv2_1", 8)):
        count = (np.asarray(features[site]) != 0).sum(axis=(0, 1, 2))
        # Another batch size rounds differently; a single entry may cross the threshold.
        np.testing.assert_allclose(count, int(0.1 * 8 * side**2), atol=1)
    with pytest.raises(ValueError, match=r"at topk.conv1_1 has no thresholds"):
        network.apply(variables, IMAGES, train=False)


def test_random_sites_of_a_network():
    layer = TopK(0.25, select="random")
    network, variables = network_and_variables({"conv1_1": layer, "relu1_1": layer})

    @jax.jit
    def apply(key):
        return network.apply(variables, IMAGES, train=False, rngs={"topk": key})[1]

    # Any kind of key does; this one compiles faster.
    features, other = (apply(jax.random.key(i, impl="rbg")) for i in (0, 1))
    first = np.asarray(features["conv1_1"]) != 0
    assert (first.sum(axis=(1, 2)) == 64).all()
    assert (first != (np.asarray(other["conv1_1"]) != 0)).any()
    # Half of the kept entries are positive; a quarter of these also lie at the second site's
    # positions if those are drawn anew, and all of them if they are not.
    second = np.asarray(features["relu1_1"]) != 0
    assert 0.08 < second.sum() / first.sum() < 0.17
    with pytest.raises(ValueError, match=r'topk.conv1_1 draws positions: pass rngs=\{"topk": '):
        network.apply(variables, IMAGES, train=False)


@pytest.mark.parametrize("name", ["builtin", "alexnet", "vgg11_bn", "resnet18", "squeezenet1_1"])
def test_sites_change_no_variable_of_any_network(name):
    plain = create_network(name)
    site = plain.published_sites[0]
    shapes = variable_shapes(plain)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    for select in ("random", "threshold"):
        network = create_network(name, topk={site: TopK(0.1, select=select)})
        chex.assert_trees_all_equal_shapes(variable_shapes(network), shapes)

        def apply(variables, image, key, network=network):
            return network.apply(variables, image, train=False, rngs={"topk": key})

        if select == "random":
            logits, _ = jax.eval_shape(apply, shapes, image, jax.random.key(0))
            assert logits.shape == (1, network.num_classes)


def test_fields_are_hashable_and_checked_at_once():
    assert hash(TopK(0.1, axes=[-3, -2], select="random")) == hash(TopK(0.1, select="random"))
    for fields, message in (
        ({"select": "bottom"}, "expected top, random, random_nonzero, bottom_nonzero, threshold"),
        ({"select": "random", "rank_by": "value"}, "leave it out"),
        ({"select": "bottom_nonzero", "rank_by": "value"}, "leave it out"),
        ({"replace": "median"}, 'expected None, "mean" or "binary"'),
        ({"replace": "binary", "rescale": True}, 'replace="mean"'),
        ({"blend": 1.5}, r"blend must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TopK(0.1, **fields)
    with pytest.raises(ValueError, match="fraction must be in"):
        create_network("builtin", topk={"pool1": TopK(0, select="random")})
    with pytest.raises(TypeError, match="int32"):
        bottom_nonzero_mask(jnp.ones(SHAPE, jnp.int32), 0.5)


def test_ranks_order_as_the_numbers_do():
    x = jnp.asarray([3, -1, 0, jnp.nan, -0.0, jnp.inf, 1e-40, 1], jnp.float32)
    order = np.argsort(-np.asarray(selection.bottom_nonzero_ranks(x)), kind="stable")
    np.testing.assert_array_equal(order[-2:], [2, 4])
    np.testing.assert_array_equal(order[:6], [6, 1, 7, 0, 5, 3])
