"""Objectives against golden values, a NumPy loop, finite differences, and raw VGG-19 arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import images, networks
from topk_jax.synthesis.objectives import (
    gram_matrix,
    masked,
    reconstruction_objective,
    texture_objective,
)
from topk_jax.weights import CAFFE_PREPROCESSING, load_features, read_state_dict, resolve_weights

# One image of two channels (spec 1.8), as [1, 2, 2, 2].
F = np.array([[[1, 2], [3, 4]], [[0, -1], [1, 2]]], np.float32).transpose(1, 2, 0)[None]
QUARTER = {"f": 0.25e9}
REAL_LAYERS = ("relu1_1", "pool1", "pool2", "pool3", "pool4")


def identity(image):
    return {"f": image}


def curved(kernel, x):
    """Two smooth features of two sizes; `kernel` is [channels, 5]."""
    first = jnp.tanh(jnp.einsum("nhwc,cd->nhwd", x, kernel, precision="highest"))
    n, h, w, d = first.shape
    second = jnp.mean(first.reshape(n, h // 2, 2, w // 2, 2, d), axis=(2, 4)) ** 2 + 0.1
    return {"first": first, "second": second}


def curved_in_numpy(kernel, x):
    first = np.tanh(np.asarray(x, np.float64) @ np.asarray(kernel, np.float64))
    n, h, w, d = first.shape
    return {
        "first": first,
        "second": first.reshape(n, h // 2, 2, w // 2, 2, d).mean((2, 4)) ** 2 + 0.1,
    }


def gram_of(x):
    """By a loop over pairs of channels; x is [h, w, c]."""
    h, w, c = x.shape
    gram = np.empty((c, c))
    for i in range(c):
        for j in range(c):
            gram[i, j] = sum(x[p, q, i] * x[p, q, j] for p in range(h) for q in range(w))
    return gram / (c * h * w)


def mask_of(x, mode, sparsity):
    """1 where an activation counts; x is [h, w, c] without ties."""
    h, w, c = x.shape
    if mode == "all":
        return np.ones(x.shape)
    k = int(max(1, sparsity * h * w))
    top = np.zeros((h * w, c))
    for channel in range(c):
        order = np.argsort(-np.abs(x[:, :, channel].ravel()), kind="stable")
        top[order[:k], channel] = 1
    top = top.reshape(x.shape)
    return top if mode == "top" else 1 - top


def draw(shape=(1, 4, 6, 3), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNEL = draw((3, 5), 9)
FEATURES = jax.tree_util.Partial(curved, jnp.asarray(KERNEL))
LAYERS = {"first": 2.0, "second": 30.0}


def loss_in_numpy(kind, image, target, *, layers, mode, sparsity, reduction, mask_image="none"):
    total = 0.0
    there, wanted = (curved_in_numpy(KERNEL, x) for x in (image, target))
    for name, weight in layers.items():
        x, t = there[name][0], wanted[name][0]
        mask = mask_of(t, mode, sparsity)
        if kind == "texture":
            difference = gram_of(x * mask_of(x, mode, sparsity)) - gram_of(t * mask)
        else:
            difference = (x * mask if mask_image == "target" else x) - t * mask
        reduce = np.sum if reduction == "sum" else np.mean
        total += weight * reduce(difference**2)
    return total


def value(objective, image):
    return objective(image) * objective.unit


@jax.jit
def value_and_gradient(objective, image):
    return jax.value_and_grad(value, argnums=1)(objective, image)


# --- golden values -------------------------------------------------------------------------------


def test_gram_matrix_of_the_specification():
    np.testing.assert_allclose(gram_matrix(F), [[[3.75, 1.125], [1.125, 0.75]]])
    top = masked(jnp.asarray(F), "top", 0.5)
    np.testing.assert_array_equal(top[0, :, :, 0], [[0, 0], [3, 4]])
    np.testing.assert_array_equal(top[0, :, :, 1], [[0, -1], [0, 2]])
    np.testing.assert_allclose(gram_matrix(top), [[[3.125, 1], [1, 0.625]]])
    rest = masked(jnp.asarray(F), "rest", 0.5)
    np.testing.assert_allclose(gram_matrix(rest), [[[0.625, 0], [0, 0.125]]])


@pytest.mark.parametrize(
    ("mode", "loss", "unit"),
    [
        ("all", 38_601_562_500, 0.25e9 * (3.75**2 + 2 * 1.125**2 + 0.75**2)),
        ("top", 27_351_562_500, 0.25e9 * (3.125**2 + 2 * 1**2 + 0.625**2)),
        ("rest", 0.25e9 * 9 * (0.625**2 + 0.125**2), 0.25e9 * (0.625**2 + 0.125**2)),
    ],
)
def test_texture_losses_of_the_specification(mode, loss, unit):
    objective = texture_objective(identity, F, layers=QUARTER, mode=mode, sparsity=0.5)
    np.testing.assert_allclose(objective.unit, unit, rtol=1e-6)
    np.testing.assert_allclose(value(objective, 2 * F), loss, rtol=1e-6)
    assert value(objective, F) == 0


@pytest.mark.parametrize(
    ("mask_image", "loss", "changed_loss"), [("none", 1.5e9, 0.75e9), ("target", 0, 0.25e9)]
)
def test_reconstruction_losses_of_the_specification(mask_image, loss, changed_loss):
    objective = reconstruction_objective(
        identity, F, layers=QUARTER, mode="top", sparsity=0.5, mask_image=mask_image
    )
    np.testing.assert_allclose(objective.unit, 0.25e9 * (9 + 16 + 1 + 4), rtol=1e-6)
    np.testing.assert_allclose(value(objective, F), loss, rtol=1e-6)
    # From 3 to 4 where the mask is, from 2 to 0 where it is not.
    changed = F.copy()
    changed[0, 1, 0, 0], changed[0, 0, 1, 0] = 4, 0
    np.testing.assert_allclose(value(objective, changed), changed_loss, rtol=1e-6)
    with pytest.raises(ValueError, match=r"an image of the target's size"):
        objective(jnp.zeros((1, 3, 2, 2)))


# --- Gram matrices -------------------------------------------------------------------------------


def test_gram_matrix_is_a_loop_over_channels_of_each_image():
    x = draw((2, 3, 5, 4))
    np.testing.assert_allclose(gram_matrix(x), [gram_of(x[0]), gram_of(x[1])], rtol=2e-6, atol=1e-8)


def test_gram_matrix_does_not_know_positions_and_is_of_degree_two():
    x = draw((1, 6, 7, 4))
    order = np.random.default_rng(1).permutation(42)
    shuffled = x.reshape(1, 42, 4)[:, order].reshape(1, 7, 6, 4)
    np.testing.assert_allclose(gram_matrix(shuffled), gram_matrix(x), rtol=1e-5, atol=1e-7)
    for factor in (2.0**-40, 2.0**12, 2.0**50):
        np.testing.assert_array_equal(gram_matrix(factor * x), factor**2 * gram_matrix(x))


def test_tiled_texture_has_the_same_gram_matrix():
    x = draw((1, 4, 4, 3))
    np.testing.assert_allclose(
        gram_matrix(np.tile(x, (1, 3, 2, 1))), gram_matrix(x), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parity
def test_gram_loss_as_torch():
    torch = pytest.importorskip("torch")
    x, t = (torch.from_numpy(draw(seed=s).transpose(0, 3, 1, 2).copy()) for s in (0, 1))
    x.requires_grad_()

    def gram(a):
        rows = a.reshape(a.shape[1], -1)
        k = int(max(1, 0.2 * rows.shape[1]))
        mask = torch.zeros_like(rows).scatter_(1, rows.abs().topk(k, dim=1).indices, 1)
        return (rows * mask) @ (rows * mask).T / rows.numel()

    expected = 1e9 * 0.25 * ((gram(x) - gram(t)) ** 2).sum()
    expected.backward()
    objective = texture_objective(identity, draw(seed=1), layers=QUARTER, mode="top", sparsity=0.2)
    found, gradient = value_and_gradient(objective, draw(seed=0))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    torch_gradient = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(
        gradient, torch_gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max()
    )


# --- losses --------------------------------------------------------------------------------------

# A masked case has its own programs with searches of Top-K, seconds to compile: hence no product.
CASES = [
    ("texture", "all", "sum", "none"),
    ("texture", "top", "mean", "none"),
    ("reconstruction", "all", "sum", "target"),
    ("reconstruction", "all", "mean", "none"),
    ("reconstruction", "rest", "mean", "target"),
]


@pytest.mark.parametrize(("kind", "mode", "reduction", "mask_image"), CASES)
def test_losses_and_gradients_in_numpy(kind, mode, reduction, mask_image):
    settings = {"mode": mode, "sparsity": 0.3, "reduction": reduction}
    settings["layers"] = LAYERS if mode == "all" else {"first": 2.0}
    if kind == "texture":
        make, expected = texture_objective, functools.partial(loss_in_numpy, kind, **settings)
    else:
        settings["mask_image"] = mask_image
        make, expected = reconstruction_objective, functools.partial(
            loss_in_numpy, kind, **settings
        )  # fmt: skip
    image, target = draw(seed=6), draw(seed=7)
    objective = make(FEATURES, target, **settings)
    found, gradient = value_and_gradient(objective, image)
    np.testing.assert_allclose(found, expected(image, target), rtol=1e-5)
    rng = np.random.default_rng(8)
    for _ in range(4):
        # So small a step (in float64) that no activation changes its rank.
        step = 1e-6 * rng.normal(size=image.shape)
        slope = (expected(image + step, target) - expected(image - step, target)) / 2
        scale = np.linalg.norm(gradient) * np.linalg.norm(step)
        np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=1e-4, atol=1e-5 * scale)
    # At the target nothing is left to be done but where zeros are wanted of what is not masked.
    left, _ = value_and_gradient(objective, target)
    tolerance = 1e-10 * float(objective.unit)
    np.testing.assert_allclose(left, expected(target, target), rtol=1e-5, atol=tolerance)
    assert (left > tolerance) == (
        kind == "reconstruction" and mode != "all" and mask_image == "none"
    )


def test_a_texture_may_be_of_another_size_than_its_target():
    image, target = draw((1, 6, 4, 3), 2), draw((1, 4, 8, 3), 3)
    objective = texture_objective(FEATURES, target, layers=LAYERS)
    settings = {"mode": "all", "sparsity": 1, "reduction": "sum", "layers": LAYERS}
    found, _ = value_and_gradient(objective, image)
    np.testing.assert_allclose(
        found, loss_in_numpy("texture", image, target, **settings), rtol=1e-5
    )


def test_scaled_loss_does_not_depend_on_the_scale_of_the_weights():
    found = []
    for scale in (1e-12, 1.0, 1e15):
        objective = texture_objective(identity, F, layers={"f": scale})
        found.append(float(objective(2 * F)))
        expected = scale * np.sum((gram_of(2 * F[0]) - gram_of(F[0])) ** 2)
        np.testing.assert_allclose(float(objective.unit) * found[-1], expected, rtol=1e-5)
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "scale"), [(texture_objective, 1e6), (reconstruction_objective, 1e9)]
)
def test_large_activations_give_the_same_scaled_loss(make, scale):
    # Sums of squares of 1e18 with weights of 1e9: products of gradients would overflow unscaled.
    expected = make(identity, F, layers=QUARTER)(2 * F)
    objective = make(identity, np.float32(scale) * F, layers=QUARTER)
    found, gradient = value_and_gradient(objective, np.float32(2 * scale) * F)
    np.testing.assert_allclose(found / objective.unit, expected, rtol=1e-5)
    relative = np.asarray(gradient) / float(objective.unit) * scale
    assert np.all(np.isfinite(relative))
    assert 0.1 < np.abs(relative).max() < 100


# --- what is compiled ----------------------------------------------------------------------------


def test_targets_and_weights_are_arguments():
    traced = []

    def features(weights, x):
        traced.append(x.shape)
        return {"f": x * weights}

    @jax.jit
    def loss(objective, x):
        return objective(x)

    found = []
    for seed, weight in ((0, 1.0), (1, 1.0), (1, 2.0)):
        bound = jax.tree_util.Partial(features, jnp.float32(weight))
        objective = texture_objective(bound, draw(seed=seed), layers={"f": 1.0})
        found.append(float(loss(objective, draw(seed=3)) * objective.unit))
    assert len(set(found)) == 3
    # Once for the targets, once for the losses.
    assert len(traced) == 2


def test_leaves_are_weights_targets_and_unit():
    objective = reconstruction_objective(FEATURES, draw(), layers=LAYERS)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(objective))
    assert shapes == [(), (), (1, 2, 3, 5), (1, 4, 6, 5), (3, 5)]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [texture_objective, reconstruction_objective])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {"g": 1.0}}, "no feature 'g': there are f"),
        ({"layers": {}}, "positive weights"),
        ({"layers": {"f": 0.0}}, "positive weights"),
        ({"layers": {"f": -1.0}}, "positive weights"),
        ({"layers": {"f": np.nan}}, "positive weights"),
        ({"mode": "bottom"}, "mode='bottom': expected all or top or rest"),
        ({"reduction": "max"}, "reduction='max': expected sum or mean"),
        ({"mode": "top", "sparsity": 0.0}, "sparsity=0.0"),
        ({"mode": "top", "sparsity": 1.1}, "sparsity=1.1"),
        ({"mode": "top", "sparsity": -0.5}, "sparsity=-0.5"),
        ({"sparsity": np.nan}, "sparsity=nan"),
        ({"mode": "rest", "sparsity": 1.0}, "leaves nothing"),
        ({"target": 0 * F}, "all features of the target are zero"),
        ({"target": np.where(F == 4, np.nan, F)}, "not finite"),
        ({"target": np.where(F == 4, np.nan, F), "mode": "rest", "sparsity": 0.5}, "not finite"),
        ({"target": np.where(F == 4, np.inf, F)}, "not finite"),
        ({"target": F[0]}, r"\(2, 2, 2\): expected one image"),
        ({"target": np.concatenate([F, F])}, r"\(2, 2, 2, 2\): expected one image"),
    ],
)
def test_bad_settings(make, changes, message):
    settings = {"target": F, "layers": QUARTER} | changes
    with pytest.raises(ValueError, match=message):
        make(identity, settings.pop("target"), **settings)


def test_bad_mask_of_the_image():
    with pytest.raises(ValueError, match="mask_image='image': expected none or target"):
        reconstruction_objective(identity, F, layers=QUARTER, mask_image="image")  # pyright: ignore


# --- real weights --------------------------------------------------------------------------------


@functools.cache
def real_vgg19(shared, pool):
    network = networks.create_network("vgg19", pool=pool)
    file = resolve_weights("vgg19", shared / "weights" / "vgg19_normalised.pth")
    variables, preprocessing = load_features(network, REAL_LAYERS, file, cache=False)
    extract = networks.FeatureExtractor(network, (*REAL_LAYERS, "relu4_1"))
    return jax.tree_util.Partial(extract, jax.device_put(variables)), preprocessing


def convolved(x, weight, bias):
    """3x3 convolution by nine matrix products; x is [c, h, w], padded with zeros."""
    _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    result = np.repeat(np.repeat(bias[:, None, None], h, 1), w, 2).astype(np.float64)
    for i in range(3):
        for j in range(3):
            result += np.tensordot(weight[:, :, i, j], padded[:, i : i + h, j : j + w], 1)
    return result


def raw_vgg19(state, pixels):
    """Features in NumPy, float64, from the arrays and the names of AdaIN's file."""
    arrays = {name: np.asarray(array, np.float64) for name, array in state.items()}
    rgb = pixels.transpose(2, 0, 1) / 255
    x = np.tensordot(arrays["0.weight"][:, :, 0, 0], rgb, 1) + arrays["0.bias"][:, None, None]
    found = {}
    for stage, indices in enumerate(((2, 5), (9, 12), (16, 19, 22, 25), (29, 32, 35, 38)), 1):
        for i, index in enumerate(indices, 1):
            x = np.maximum(convolved(x, arrays[f"{index}.weight"], arrays[f"{index}.bias"]), 0)
            found[f"relu{stage}_{i}"] = x
        x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
        found[f"pool{stage}"] = x
    return found


def photo(shared, name):
    return images.resize(images.read_image(shared / "images" / "photos" / name), 64, 64)


def call(function, x):
    return function(x)


@pytest.mark.real
def test_real_vgg19_features_and_gram_loss_in_numpy(shared):
    features, preprocessing = real_vgg19(shared, "average")
    assert preprocessing == CAFFE_PREPROCESSING
    state = read_state_dict(shared / "weights" / "vgg19_normalised.pth")
    pixels = [photo(shared, name) for name in ("fish_2699.jpg", "jeep_11825.jpg")]
    normalized = [jnp.asarray(images.normalize(p[None], preprocessing)) for p in pixels]
    expected = [raw_vgg19(state, p) for p in pixels]
    found = jax.jit(call)(features, normalized[0])
    for name in REAL_LAYERS:
        wanted = expected[0][name].transpose(1, 2, 0)
        np.testing.assert_allclose(found[name][0], wanted, atol=1e-4 * wanted.max(), err_msg=name)
    layers = dict.fromkeys(REAL_LAYERS, 0.25e9)
    for mode, sparsity in (("all", 0.05), ("top", 0.05)):
        loss = 0.0
        for name in REAL_LAYERS:
            grams = []
            for one in expected:
                x = one[name].transpose(1, 2, 0)
                rows = (x * mask_of(x, mode, sparsity)).reshape(-1, x.shape[2])
                grams.append(rows.T @ rows / rows.size)
            loss += 0.25e9 * np.sum((grams[0] - grams[1]) ** 2)
        objective = texture_objective(
            features, normalized[1], layers=layers, mode=mode, sparsity=sparsity
        )
        there = jax.jit(call)(objective, normalized[0]) * objective.unit
        np.testing.assert_allclose(there, loss, rtol=1e-3, err_msg=mode)


@pytest.mark.real
def test_real_vgg19_has_mean_activations_near_one_with_the_pooling_it_was_scaled_with(shared):
    # 0.92 to 0.99 with maximum pooling (ten photographs); with average pooling 0.99 falls to 0.35.
    means = {}
    for pool in ("max", "average"):
        features, preprocessing = real_vgg19(shared, pool)
        folders = sorted((shared / "images" / "imagenet_val").iterdir())
        paths = [images.list_images(folder)[0] for folder in folders]
        batch = np.stack([images.read_image(path) for path in paths])
        found = jax.jit(call)(features, images.normalize(batch, preprocessing))
        means[pool] = [np.asarray(found[name]).mean() for name in ("relu1_1", "relu4_1")]
    assert all(0.85 < mean < 1.15 for mean in means["max"]), means
    assert 0.3 < means["average"][1] < 0.6, means
