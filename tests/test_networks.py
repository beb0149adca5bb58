"""Networks against torchvision: stored outputs everywhere, its modules where it is installed."""

import importlib.util

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights

from topk_jax import kernels
from topk_jax.networks import create_network, list_networks, variable_shapes
from topk_jax.topk import TopK, _topk
from topk_jax.weights import catalogue
from topk_jax.weights.conversion import (
    count_parameters,
    state_dict_to_variables,
    variables_to_state_dict,
)

# Parameters as torchvision documents them.
PARAMETERS = {
    "alexnet": 61_100_840,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
}


def relative_error(found, expected) -> float:
    """Largest difference relative to the largest magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def seeded_variables(network, *, image_size: int = 224):
    """The reference weights in the network's own tree."""
    shapes = variable_shapes(network, image_size=image_size)
    blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    names = {key: value.shape for key, value in variables_to_state_dict(blank).items()}
    return state_dict_to_variables(reference_weights.weights(names), shapes)


def run(network, variables, images):
    """Logits and features, as one program."""
    return jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, images)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    """Of the network, and as its entry in the catalogue says."""
    shapes = variable_shapes(create_network(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]
    assert count_parameters(shapes) == PARAMETERS[name]
    assert catalogue.find_entry(name, "imagenet").parameters == PARAMETERS[name]


def test_every_network_is_tested():
    others = {"builtin"} | reference_weights.WITHOUT_WEIGHTS
    assert set(list_networks()) == set(PARAMETERS) | others


def select_by_counting(x, k, rank_by, keep, implementation):
    """`kernels.select` as far as these networks use it, compiled in a tenth of the time."""
    assert (rank_by, keep, implementation) == ("magnitude", "top", "xla")
    magnitude, position = jnp.abs(x), jnp.arange(x.shape[1])
    one, other = magnitude[:, :, None], magnitude[:, None]
    earlier = (position[None] < position[:, None])[None, :, :, None]
    rank = jnp.sum((other > one) | ((other == one) & earlier), axis=2, dtype=jnp.int32)
    return kernels.Selected(jnp.where(rank < k, x, 0.0), threshold=k, cut=k)


# The library's own search in two networks, and in the others if asked for.
SEARCHES = [
    *[pytest.param(name, True, id=name) for name in ("resnet18", "squeezenet1_1")],
    *[
        pytest.param(name, own, id=f"{name}-{'own search' if own else 'counting'}", marks=marks)
        for own, marks in ((False, ()), (True, pytest.mark.slow))
        for name in ("alexnet", "vgg11_bn", "resnet50")
    ],
]


def test_every_stored_output_is_compared():
    assert {case.values[0] for case in SEARCHES} == set(reference_weights.CASES)


@pytest.mark.parametrize(("name", "own_search"), SEARCHES)
def test_stored_outputs_of_torchvision(monkeypatch, name, own_search):
    if not own_search:
        monkeypatch.setattr(kernels, "select", select_by_counting)
        # Without its jit, which would keep the programs for other tests.
        monkeypatch.setattr("topk_jax.topk._topk", _topk.__wrapped__)
    stored = np.load(reference_weights.DATA / f"torchvision_{name}.npz")
    images = reference_weights.image(reference_weights.CASES[name])
    networks = {
        prefix: create_network(name, topk=fraction, num_classes=reference_weights.NUM_CLASSES)
        for prefix, fraction in (("plain", None), ("topk", reference_weights.FRACTION))
    }

    @jax.jit
    def features_of_both(variables, images):
        # In one program, so that what comes before the first site is compiled once.
        return {
            prefix: network.apply(variables, images, train=False)[1]
            for prefix, network in networks.items()
        }

    features = features_of_both(seeded_variables(networks["plain"]), images)
    found = {
        f"{prefix}/{key}": value for prefix, maps in features.items() for key, value in maps.items()
    }
    assert set(found) == set(stored.files)
    for key, expected in stored.items():
        error = relative_error(reference_weights.sampled(found[key]), expected)
        assert error < 1e-4, f"{key}: {error:.2g}"


SEEDS = 20
"""Draws of weights and image among which one must be well posed."""


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("side", [224, 193])
@pytest.mark.parametrize("name", PARAMETERS)
def test_torchvision_module(name, side):
    """Logits and all features, plain and with Top-K at the published sites.

    Rounding that turns one near-tie at a site changes all that follows, in any implementation. So
    Top-K networks are compared twice. For every seed the layers behind a site see the same in both,
    and entries that were turned must lie at the cut. The first seed for which torchvision's
    own float32 and float64 keep the same entries, by a margin, is compared as it runs.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install 'topk_jax[parity]'")
    import torch_reference

    plain, sparse = create_network(name), create_network(name, topk=0.1)
    shapes = variable_shapes(plain)
    forward = {
        network: jax.jit(lambda v, x, network=network: network.apply(v, x, train=False))
        for network in (plain, sparse)
    }
    for seed in range(SEEDS):
        model = torch_reference.randomize(torch_reference.build(name), seed)
        images = np.random.default_rng(seed).normal(size=(1, side, side, 3)).astype(np.float32)
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        variables = state_dict_to_variables(state, shapes)
        _, features = forward[sparse](variables, images)
        expected = torch_reference.features(name, model, images, 0.1, continue_with=features)
        for key in sparse.published_sites:
            assert_equal_but_for_near_ties(np.asarray(features[key]), expected.pop(key))
        others = {key: value for key, value in features.items() if key in expected}
        assert_features_agree(others, expected, f"with Top-K, seed {seed}")
        if torch_reference.well_posed(name, model, images, 0.1):
            break
    else:
        pytest.fail(f"{name} at {side} is not well posed with any of {SEEDS} seeds")
    print(f"{name} at {side}: well posed with seed {seed}")
    for network, fraction in ((plain, None), (sparse, 0.1)):
        logits, features = forward[network](variables, images)
        expected = torch_reference.features(name, model, images, fraction)
        assert list(expected) == list(network.feature_names)
        assert_features_agree(
            features | {"logits": logits}, expected, f"Top-K {fraction}, seed {seed}"
        )


def assert_features_agree(found, expected, case):
    """Every feature within 1e-4 of its largest entry."""
    assert set(found) == set(expected)
    errors = {key: relative_error(found[key], value) for key, value in expected.items()}
    assert max(errors.values()) < 1e-4, (case, {key: e for key, e in errors.items() if e >= 1e-4})


def assert_equal_but_for_near_ties(found, expected):
    """Maps after Top-K: where they kept different entries, these are as large as the smallest kept.

    Rounding differs between the two libraries by about 1e-6; among the 12,544 entries of a map some
    lie as close as that to the cut. There are few of them.
    """
    assert found.shape == expected.shape
    turned = (found != 0) != (expected != 0)
    assert turned.mean() < 1e-4
    scale = np.abs(expected).max()
    assert np.abs(np.where(turned, 0, found - expected)).max() < 1e-4 * scale
    smallest = np.where(expected != 0, np.abs(expected), np.inf).min(axis=(1, 2), keepdims=True)
    at_cut = np.abs(np.maximum(np.abs(found), np.abs(expected)) - smallest)
    assert np.where(turned, at_cut, 0).max() < 1e-4 * scale


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_torchvision_module_in_training(name):
    """Batch statistics, their running averages and the gradient of a loss."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install 'topk_jax[parity]'")
    import torch
    import torch_reference

    model = torch_reference.randomize(torch_reference.build(name, num_classes=10), seed=3).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images = np.random.default_rng(4).normal(size=(4, 65, 65, 3)).astype(np.float32)
    options = {"dropout": 0.0} if name.startswith("squeeze") else {}
    network = create_network(name, num_classes=10, **options)
    state = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    variables = state_dict_to_variables(state, variable_shapes(network))

    def loss(params):
        rest = {key: value for key, value in variables.items() if key != "params"}
        (logits, _), updates = network.apply(
            {"params": params, **rest}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(logits**2), (logits, updates)

    gradient, (logits, updates) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    torch_logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    (torch_logits**2).mean().backward()
    assert relative_error(logits, torch_logits.detach().numpy()) < 1e-4
    found = variables_to_state_dict({"params": gradient, **updates})
    after = {key: value.numpy() for key, value in model.state_dict().items()}
    for key, parameter in model.named_parameters():
        assert relative_error(found[key], parameter.grad.numpy()) < 2e-3, key
    for key, value in after.items():
        if "running" in key:
            assert relative_error(found[key], value) < 1e-4, key


def small(**options):
    return create_network("vgg11", num_classes=4, hidden=(8, 8), widths=(4, 4, 8, 8, 8), **options)


@pytest.fixture(scope="module")
def sparse():
    """A network with Top-K at two sites, its variables and images, logits and features."""
    network = small(topk={"pool1": 0.1, "relu2_1": TopK(0.25, keep="rest")})
    images = reference_weights.image(32)
    variables = seeded_variables(network, image_size=32)
    return network, variables, images, run(network, variables, images)


def test_asking_for_features_never_changes_logits(sparse):
    network, variables, images, with_features = sparse
    alone = jax.jit(lambda v, x: network.apply(v, x, train=False)[0])
    np.testing.assert_array_equal(with_features[0], alone(variables, images))


def test_features_are_what_the_next_layer_sees(sparse):
    """Each site's feature has k nonzero entries a map; what follows differs from the plain."""
    _, variables, images, (_, features) = sparse
    _, plain = run(small(), variables, images)
    assert np.count_nonzero(features["pool1"], axis=(1, 2)).max() <= int(0.1 * 16 * 16)
    kept = np.asarray(features["pool1"]) != 0
    np.testing.assert_array_equal(
        np.asarray(features["pool1"])[kept], np.asarray(plain["pool1"])[kept]
    )
    np.testing.assert_array_equal(features["relu1_1"], plain["relu1_1"])
    assert np.any(np.asarray(features["conv2_1"]) != np.asarray(plain["conv2_1"]))
    assert np.count_nonzero(features["relu2_1"], axis=(1, 2)).max() <= 16 * 16 - 64


def test_average_pooling_is_an_option_of_vgg():
    network, images = small(pool="average"), reference_weights.image(32)
    variables = seeded_variables(network, image_size=32)
    _, features = run(network, variables, images)
    relu = np.asarray(features["relu1_1"])
    expected = relu.reshape(2, 16, 2, 16, 2, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(features["pool1"], expected, rtol=1e-5, atol=1e-6)


def test_errors_name_what_would_be_right():
    with pytest.raises(ValueError, match=r"unknown network 'vgg61': did you mean .*vgg16"):
        create_network("vgg61")
    with pytest.raises(ValueError, match=r"unknown Top-K site 'pool6': .*pool5"):
        create_network("vgg16", topk={"pool6": 0.1})
    for fraction in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="fraction must be in"):
            create_network("vgg16", topk=fraction)
    with pytest.raises(ValueError, match="smaller than a pooling window"):
        variable_shapes(create_network("alexnet"), image_size=20)


def test_a_network_works_in_nnx():
    options = {"convolutions": (1,), "widths": (4,), "hidden": ()}  # initialised op by op
    network = create_network("builtin", topk={"pool1": 0.5}, **options)
    images = reference_weights.image(8)
    module = flax.nnx.bridge.ToNNX(network, rngs=flax.nnx.Rngs(0))
    module.lazy_init(images, train=False)
    params = flax.nnx.to_pure_dict(flax.nnx.state(module, flax.nnx.Param))
    logits, features = module(images, train=False)
    expected, expected_features = run(network, {"params": params}, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert tuple(features) == network.feature_names
    assert set(features) == set(expected_features)
