"""Telemetry against NumPy loops, in one piece, as a stream, and over devices."""

import functools

import jax
import numpy as np
import pytest

from topk_jax import telemetry
from topk_jax.networks import create_network
from topk_jax.topk import TopK
from topk_jax.training.state import init_variables

SHAPE = (8, 4, 5, 6)
FRACTION = 0.25
K = 5


def activations(seed=0) -> np.ndarray:
    """Behind a ReLU, one channel dead, one tied at the cut, one with few entries."""
    x = np.maximum(np.random.default_rng(seed).normal(size=SHAPE), 0).astype(np.float32)
    x[..., 1] = 0
    x[..., 2] = np.round(x[..., 2])
    x[..., 3] *= np.arange(20).reshape(4, 5) < 3
    x[0, :2, :3, 4] = np.nan
    return x


def loop_margins(x):
    """Margins and relative margins of the rows of each channel that have one."""
    found = [[] for _ in range(x.shape[-1])]
    for image in range(len(x)):
        for channel in range(x.shape[-1]):
            row = sorted(np.abs(x[image, :, :, channel].ravel().astype(np.float64)))[::-1]
            row = [np.inf if np.isnan(value) else value for value in row]
            row = sorted(row)[::-1]
            kth, following = row[K - 1], row[K]
            if kth != 0 and np.isfinite(kth) and np.isfinite(following):
                found[channel].append((kth - following, (kth - following) / kth))
    return found


def check(stats, x):
    assert stats.images == len(x)
    np.testing.assert_allclose(stats.density, (x != 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(stats.channel_density, (x != 0).mean(axis=(0, 1, 2)))
    np.testing.assert_array_equal(stats.dead, [False, True, False, False, False, False])
    for channel, margins in enumerate(loop_margins(x)):
        np.testing.assert_allclose(stats.cut_fraction[channel], len(margins) / len(x))
        if not margins:
            assert np.isnan(stats.margin_min[channel])
            assert np.isnan(stats.tied_fraction[channel])
            continue
        absolute, relative = np.array(margins).T
        np.testing.assert_allclose(stats.tied_fraction[channel], (absolute == 0).mean())
        np.testing.assert_allclose(stats.margin_mean[channel], absolute.mean(), rtol=1e-5)
        np.testing.assert_allclose(stats.margin_min[channel], absolute.min(), atol=1e-6)
        np.testing.assert_allclose(stats.relative_margin_mean[channel], relative.mean(), rtol=1e-5)
        np.testing.assert_allclose(stats.relative_margin_min[channel], relative.min(), atol=1e-6)


ALL = np.ones(8, bool)
MEASURE = jax.jit(lambda x, valid=ALL: telemetry.measure(x, fraction=FRACTION, valid=valid))


def test_a_stream_against_a_loop():
    x = np.concatenate([activations(0), activations(1)])
    total = None
    for batch in (x[:8], x[8:]):
        total = telemetry.merge(total, MEASURE(batch))
    check(telemetry.summarize(total), x)
    check(telemetry.summarize(MEASURE(x[:8])), x[:8])
    tied = telemetry.summarize(total).tied_fraction[2]
    assert tied > 0.5


def test_over_devices():
    x = activations(2)
    measured = jax.pmap(functools.partial(telemetry.measure, fraction=FRACTION))(x[:, None])
    check(telemetry.summarize(telemetry.merge(None, measured)), x)
    check(telemetry.summarize(measured), x)


def test_padding_does_not_count():
    x = activations(3)
    padded = np.concatenate([x[:5], np.full((3, *SHAPE[1:]), 7, np.float32)])
    check(telemetry.summarize(MEASURE(padded, np.arange(8) < 5)), x[:5])


def test_rows_over_channels_have_one_entry():
    x = np.abs(activations(4)) + np.arange(6, dtype=np.float32)
    x = np.nan_to_num(x)
    measure = jax.jit(functools.partial(telemetry.measure, fraction=0.5, axes=(-1,)))
    stats = telemetry.summarize(measure(x))
    ordered = -np.sort(-x.reshape(-1, 6))
    margin = ordered[:, 2] - ordered[:, 3]
    np.testing.assert_allclose(stats.margin_mean, [margin.mean()], rtol=1e-5)
    np.testing.assert_array_equal(stats.cut_fraction, [1])
    assert stats.channel_density.shape == (6,)


def test_without_a_cut_there_is_no_margin():
    x = np.ones(SHAPE, np.float32)
    for fraction in (None, 1.0):
        stats = telemetry.summarize(telemetry.measure(x, fraction=fraction))
        assert np.isnan(stats.margin_mean).all()
        assert stats.density == 1
    with pytest.raises(ValueError, match="no images"):
        telemetry.summarize(telemetry.measure(x, valid=np.zeros(8, bool)))
    with pytest.raises(ValueError, match="leave out valid"):
        telemetry.measure(x, fraction=0.5, axes=(0, 1, 2), valid=np.ones(8, bool))
    with pytest.raises(ValueError, match="keep a total for each feature"):
        telemetry.merge(telemetry.measure(x), telemetry.measure(x[..., :2]))


def test_features_and_site_inputs_of_a_network():
    options = {"convolutions": (1, 1), "widths": (6, 8), "hidden": ()}
    sites = {"conv1_1": TopK(0.25)}
    network = create_network("builtin", topk=sites, **options)
    variables = init_variables(network, jax.random.key(0), image_size=16)
    rng = np.random.default_rng(5)
    batches = rng.normal(size=(2, 3, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def forward(variables, images):
        _, features = network.apply(variables, images, train=False)
        inputs = telemetry.site_inputs(network, variables, images, train=False)
        return features, inputs, telemetry.measure_features(features)

    total, seen = None, []
    for images in batches:
        features, inputs, measured = forward(variables, images)
        total = telemetry.merge(total, measured)
        seen.append(features)
        assert set(inputs) == set(sites)
        # Before the site and after it.
        kept = np.asarray(features["conv1_1"]) != 0
        np.testing.assert_array_equal(features["conv1_1"], np.where(kept, inputs["conv1_1"], 0))
        assert np.count_nonzero(inputs["conv1_1"]) > 2 * kept.sum()
    stats = telemetry.summarize(total)
    for name in network.feature_names:
        both = np.concatenate([np.asarray(features[name]) for features in seen])
        np.testing.assert_allclose(stats[name].density, (both != 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(stats["conv1_1"].density, 0.25)
