"""Losses: the published forms in plain NumPy, tabled values, finite differences, torch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax.training import losses

LOGITS = np.array([[2, 0, -1], [0.5, 0.5, 0], [-1, 3, 0]], np.float32)
LABELS = np.array([0, 2, 1], np.int32)
COUNTS = (100, 10, 1)
FACTOR_100 = (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50)
FORMS = ("outside", "inside", "sigmoid")
GAMMAS = (0.0, 0.5, 1.0, 2.0)

# Means over the three examples, by beta and form, for each gamma.
TABLE = {
    (0.0, "outside"): (0.564583, 0.453643, 0.383158, 0.287609),
    (0.0, "inside"): (0.564583, 0.453643, 0.383158, 0.287609),
    (0.0, "sigmoid"): (1.609878, 1.128907, 0.812767, 0.440638),
    (0.9, "outside"): (1.184744, 1.026242, 0.895101, 0.685159),
    (0.9, "inside"): (1.184744, 1.149191, 1.128359, 1.093238),
    (0.9, "sigmoid"): (2.326709, 1.753924, 1.332483, 0.780182),
    (0.9999, "outside"): (1.320895, 1.152608, 1.008410, 0.773344),
    (0.9999, "inside"): (1.320895, 1.301482, 1.287995, 1.262844),
    (0.9999, "sigmoid"): (2.484687, 1.892173, 1.447655, 0.855523),
}


def focal_by_definition(logits, labels, weights, gamma, form):
    """With probabilities, in float64, example by example."""
    result = []
    for z, y in zip(np.asarray(logits, np.float64), labels, strict=True):
        w = float(weights[y])
        if form == "sigmoid":
            terms = []
            for c, value in enumerate(z):
                p = 1 / (1 + math.exp(-value))
                p = p if c == y else 1 - p
                terms.append((1 - p) ** gamma * -math.log(p))
            result.append(w * sum(terms))
            continue
        entropy = -math.log(math.exp(z[y]) / sum(math.exp(value) for value in z))
        if form == "inside":
            result.append(w * entropy * (1 - math.exp(-w * entropy)) ** gamma)
        else:
            result.append(w * entropy * (1 - math.exp(-entropy)) ** gamma)
    return np.array(result)


@pytest.mark.parametrize(("beta", "form"), TABLE)
def test_tabled_values(beta, form):
    weights = losses.class_balanced_weights(COUNTS, beta)
    for gamma, expected in zip(GAMMAS, TABLE[beta, form], strict=True):
        found = losses.focal(LOGITS, LABELS, weights=weights, gamma=gamma, form=form)
        assert found.shape == (3,)
        assert found.dtype == jnp.float32
        assert float(np.mean(found)) == pytest.approx(expected, abs=1e-6)


def test_tabled_cross_entropy():
    found = losses.softmax_cross_entropy(LOGITS, LABELS)
    np.testing.assert_allclose(found, [0.16984602, 1.45802009, 0.06588390], rtol=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [1] * 10),
        (0.9999, [0.050611, 0.076900, 0.121134, 0.195037, 0.318805, 0.524590, 0.868349, 1.442627,
                  2.409223, 3.992724]),
        (0.25, [1] * 10),
        (0.5, [1] * 10),
        (0.75, [1] * 10),
    ],
)  # fmt: skip
def test_tabled_weights(beta, expected):
    found = losses.class_balanced_weights(FACTOR_100, beta)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.sum() == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "first", "last"), [(0.999, 0.181187, 3.688319), (0.99, 0.783832, 1.984417)]
)
def test_ends_of_tabled_weights(beta, first, last):
    found = losses.class_balanced_weights(FACTOR_100, beta)
    np.testing.assert_allclose(found[[0, -1]], [first, last], atol=1e-6)


def test_weights_of_three_classes():
    expected = [0.239329, 0.367442, 2.393229]
    np.testing.assert_allclose(losses.class_balanced_weights(COUNTS, 0.9), expected, atol=1e-6)
    expected = [0.027159, 0.270369, 2.702472]
    np.testing.assert_allclose(losses.class_balanced_weights(COUNTS, 0.9999), expected, atol=1e-6)


def test_weights_tend_to_inverse_frequency():
    inverse = 1 / np.array(FACTOR_100)
    expected = 10 * inverse / inverse.sum()
    np.testing.assert_allclose(losses.class_balanced_weights(FACTOR_100, 1), expected, rtol=1e-12)
    # 1 - beta^n by itself would have no digit left here.
    close = losses.class_balanced_weights(FACTOR_100, 1 - 2**-50)
    np.testing.assert_allclose(close, expected, rtol=1e-9)


def test_without_focus_and_balance_it_is_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(64, 10)).astype(np.float32)
    labels = rng.integers(10, size=64, dtype=np.int32)
    expected = losses.softmax_cross_entropy(logits, labels)
    for form in ("outside", "inside"):
        found = losses.focal(logits, labels, weights=np.ones(10), gamma=0.0, form=form)
        # The plain one is optax's, the other a function of the margin: they round differently.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_definitions(form, gamma):
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=(32, 6)).astype(np.float32)
    labels = rng.integers(6, size=32, dtype=np.int32)
    weights = rng.uniform(0.1, 3, size=6)
    found = losses.focal(logits, labels, weights=weights, gamma=gamma, form=form)
    expected = focal_by_definition(logits, labels, weights, gamma, form)
    np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_smoothed_labels(smoothing):
    rng = np.random.default_rng(2)
    logits = rng.normal(scale=3, size=(16, 5))
    labels = rng.integers(5, size=16, dtype=np.int32)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    weights = np.linspace(0.5, 2, 5)
    single = logits.astype(np.float32)
    found = losses.softmax_cross_entropy(single, labels, label_smoothing=smoothing)
    np.testing.assert_allclose(found, -(target * log_p).sum(axis=1), rtol=1e-5, atol=1e-6)
    weighted = losses.class_balanced_cross_entropy(
        single, labels, weights=weights, label_smoothing=smoothing
    )
    np.testing.assert_allclose(weighted, weights[labels] * np.asarray(found), rtol=1e-6)


def test_digits_are_kept_where_p_rounds_to_one():
    """In float32 p is 1 from a margin of 17 on."""
    logits = np.array([[20, 0, 0], [40, 0, 0]], np.float32)
    labels = np.zeros(2, np.int32)
    entropy = np.array([math.log1p(2 * math.exp(-20)), math.log1p(2 * math.exp(-40))])
    found = losses.focal(logits, labels, weights=np.ones(3), gamma=0.0)
    np.testing.assert_allclose(found, entropy, rtol=1e-5)
    found = losses.focal(logits, labels, weights=np.ones(3), gamma=0.5)
    np.testing.assert_allclose(found, entropy * np.sqrt(-np.expm1(-entropy)), rtol=1e-5)


def extreme_logits():
    """Certain and right, certain and wrong, undecided; every label."""
    rows = [[0, 0, 0], [17, 0, 0], [50, 0, 0], [500, 0, -500], [1e4, 0, 0], [88, 88, 0]]
    logits = np.repeat(np.array(rows, np.float32), 3, axis=0)
    return logits, np.tile(np.arange(3, dtype=np.int32), len(rows))


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_are_finite_everywhere(form):
    logits, labels = extreme_logits()
    weights = np.array([0.01, 1, 4])

    @jax.jit
    def derivatives(z):
        results = {}
        for gamma in GAMMAS:
            loss = functools.partial(losses.focal, weights=weights, gamma=gamma, form=form)
            gradient = jax.grad(lambda z, loss=loss: jnp.sum(loss(z, labels)))
            results[gamma] = (loss(z, labels), *jax.jvp(gradient, (z,), (1 + z,)))
        return results

    for gamma, values in derivatives(logits).items():
        for value in values:
            assert np.all(np.isfinite(value)), gamma


def central_differences(function, z, step=1e-6):
    """Derivative of a function of a matrix by each of its entries, along new first axes."""
    rows = []
    for index in np.ndindex(z.shape):
        shift = np.zeros(z.shape)
        shift[index] = step
        rows.append((function(z + shift) - function(z - shift)) / (2 * step))
    return np.reshape(rows, (*z.shape, *np.shape(rows[0])))


@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form):
    """The first against differences of the definition, the second against those of the first."""
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(4, 3))
    labels = np.array([0, 1, 2, 1], np.int32)
    weights = np.array([0.3, 1, 1.7])

    def total(z):
        loss = losses.focal(z, labels, weights=weights, gamma=0.5, form=form)
        assert loss.dtype == jnp.float64
        return jnp.sum(loss)

    def definition(z):
        return focal_by_definition(z, labels, weights, 0.5, form).sum()

    with jax.enable_x64(True):
        derivatives = jax.jit(lambda z: (jax.grad(total)(z), jax.hessian(total)(z)))
        first, second = derivatives(logits)
        np.testing.assert_allclose(first, central_differences(definition, logits), atol=1e-8)
        expected = central_differences(lambda z: np.asarray(derivatives(z)[0]), logits)
        np.testing.assert_allclose(second, expected, atol=1e-8)


def test_half_precision_logits_have_losses_in_float32():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    for name in ("cross_entropy", "class_balanced", "class_balanced_focal"):
        counts = None if name == "cross_entropy" else COUNTS
        loss = losses.make_loss(name, class_counts=counts)
        found = loss(half, LABELS)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, loss(LOGITS, LABELS))  # exact in bfloat16 as well


def test_losses_by_name():
    focal = losses.make_loss("class_balanced_focal", class_counts=COUNTS, beta=0.9, gamma=0.5)
    assert float(np.mean(focal(LOGITS, LABELS))) == pytest.approx(1.026242, abs=1e-6)
    inside = losses.make_loss(
        "class_balanced_focal", class_counts=COUNTS, beta=0.9, gamma=0.5, form="inside"
    )
    assert float(np.mean(jax.jit(inside)(LOGITS, LABELS))) == pytest.approx(1.149191, abs=1e-6)
    balanced = losses.make_loss("class_balanced", class_counts=COUNTS, beta=0.9999)
    assert float(np.mean(balanced(LOGITS, LABELS))) == pytest.approx(1.320895, abs=1e-6)
    plain = losses.make_loss("cross_entropy", label_smoothing=0.2)
    expected = losses.softmax_cross_entropy(LOGITS, LABELS, label_smoothing=0.2)
    np.testing.assert_array_equal(plain(LOGITS, LABELS), expected)


def test_errors_name_what_would_be_right():
    with pytest.raises(ValueError, match=r"unknown loss 'focal': expected .*class_balanced_focal"):
        losses.make_loss("focal")
    with pytest.raises(ValueError, match="needs class_counts"):
        losses.make_loss("class_balanced", beta=0.9)
    with pytest.raises(ValueError, match=r"beta=0\.9 says nothing to cross_entropy"):
        losses.make_loss("cross_entropy", beta=0.9)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 says nothing to .*_focal"):
        losses.make_loss("class_balanced_focal", class_counts=COUNTS, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5: expected .*\[0, 1\)"):
        losses.make_loss("cross_entropy", label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"images of each class \[3, 0\]: expected at least 1"):
        losses.class_balanced_weights([3, 0], 0.9)
    with pytest.raises(ValueError, match=r"beta is 1.1: expected a number in \[0, 1\]"):
        losses.class_balanced_weights([3, 1], 1.1)
    with pytest.raises(ValueError, match="form='inner': expected one of outside, inside, sigmoid"):
        losses.make_loss("class_balanced_focal", class_counts=COUNTS, form="inner")
    with pytest.raises(ValueError, match="gamma is -1: expected"):
        losses.make_loss("class_balanced_focal", class_counts=COUNTS, gamma=-1)


def test_sigmoid_prior():
    """Every class begins with the probability of one in ten; nothing else changes."""
    head = {"kernel": np.zeros((4, 10), np.float32), "bias": np.zeros(10, np.float32)}
    params = {"conv1": {"kernel": np.ones(3, np.float32)}, "fc": head}
    found = losses.with_sigmoid_prior(params, "fc")
    np.testing.assert_allclose(1 / (1 + np.exp(-found["fc"]["bias"])), 0.1, rtol=1e-6)
    assert found["fc"]["bias"].dtype == np.float32
    assert found["fc"]["kernel"] is head["kernel"]
    assert found["conv1"] is params["conv1"]
    np.testing.assert_array_equal(head["bias"], 0)


@pytest.mark.parity
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_of_torch(gamma):
    """Torch's own cross-entropies, from which the published code builds its focal losses."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    rng = np.random.default_rng(4)
    logits = rng.normal(scale=3, size=(32, 10)).astype(np.float32)
    labels = rng.integers(10, size=32, dtype=np.int32)
    weights = losses.class_balanced_weights(FACTOR_100, 0.9999).astype(np.float32)
    own, targets = torch.from_numpy(weights), torch.from_numpy(labels).long()

    def outside(z):
        entropy = functional.cross_entropy(z, targets, reduction="none")
        return own[targets] * entropy * (1 - torch.exp(-entropy)) ** gamma

    def inside(z):
        entropy = functional.cross_entropy(z, targets, weight=own, reduction="none")
        return entropy * (1 - torch.exp(-entropy)) ** gamma

    def sigmoid(z):
        one_hot = functional.one_hot(targets, 10).float()
        entropy = functional.binary_cross_entropy_with_logits(z, one_hot, reduction="none")
        focus = torch.exp(-gamma * one_hot * z - gamma * functional.softplus(-z))
        return own[targets] * (focus * entropy).sum(dim=1)

    def smoothed(z):
        return functional.cross_entropy(z, targets, reduction="none", label_smoothing=gamma / 4)

    cases = {form: functools.partial(losses.focal, weights=weights, gamma=gamma, form=form)
             for form in FORMS}  # fmt: skip
    cases["smoothed"] = functools.partial(losses.softmax_cross_entropy, label_smoothing=gamma / 4)
    for theirs in (outside, inside, sigmoid, smoothed):
        z = torch.from_numpy(logits).double().requires_grad_()
        own = own.double()
        expected = theirs(z)
        expected.sum().backward()
        ours = cases[theirs.__name__]
        np.testing.assert_allclose(
            ours(logits, labels), expected.detach().numpy(), rtol=1e-4, atol=1e-6
        )
        gradient = jax.grad(lambda z, ours=ours: jnp.sum(ours(z, labels)))(logits)
        np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=1e-4, atol=1e-6)
