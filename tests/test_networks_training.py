"""Networks that are trained from scratch: sizes, padded rows, half precision, torch's results."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights
import scipy.signal

from topk_jax.networks import (
    ResNet,
    conv_matrix,
    create_network,
    local_affine,
    parse_stages,
    variable_shapes,
)
from topk_jax.networks.resnet import Block
from topk_jax.networks.sites import resolve_sites
from topk_jax.weights.conversion import (
    count_parameters,
    state_dict_to_variables,
    variables_to_state_dict,
)

# Counted with torch, at the side of the images.
PARAMETERS = {
    "resnet18_li2023": (224, 11_419_722),
    "resnet20": (32, 269_722),
    "resnet32": (32, 464_154),
    "resnet44": (32, 658_586),
    "resnet56": (32, 853_018),
    "resnet110": (32, 1_727_962),
}


def seeded_variables(network, *, image_size=32):
    """The reference weights in the network's own tree."""
    shapes = variable_shapes(network, image_size=image_size)
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    names = {key: value.shape for key, value in variables_to_state_dict(blank).items()}
    return state_dict_to_variables(reference_weights.weights(names), shapes)


def feature_shapes_of(network, variables, side, **options):
    """Shape and dtype of every feature, without computing any."""
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    images = jax.ShapeDtypeStruct((2, side, side, 3), dtype)
    apply = functools.partial(network.apply, **options)
    return jax.eval_shape(apply, variables, images)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    side, expected = PARAMETERS[name]
    shapes = variable_shapes(create_network(name), image_size=side)
    assert count_parameters(shapes) == expected


def test_option_b_has_projections():
    network = create_network("resnet32", shortcut="projection")
    assert count_parameters(variable_shapes(network, image_size=32)) == 466_906


def test_every_network_is_tested():
    assert set(PARAMETERS) | {"cifar_cnn", "cnn2"} == reference_weights.WITHOUT_WEIGHTS


def test_maps_of_the_authors_network():
    network = create_network("resnet18_li2023", topk="2_20")
    assert network.feature_names[:3] == ("conv1", "relu1", "layer1.0")
    shapes = variable_shapes(network)
    _, features = feature_shapes_of(network, shapes, 224, train=False)
    assert set(features) == set(network.feature_names)
    sides = [
        features[name].shape[1]
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4", "avgpool")
    ]
    assert sides == [224, 224, 112, 56, 28, 7]
    assert features["layer2"].shape == (2, 112, 112, 128)


@pytest.mark.parametrize(("name", "features"), [("cifar_cnn", 256 * 2 * 2), ("cnn2", 32 * 8 * 8)])
def test_small_networks_see_whole_maps(name, features):
    """At 32 x 32 nothing is averaged in front of the classifier."""
    network = create_network(name)
    last = f"pool{len(network.convolutions)}"
    _, found = feature_shapes_of(network, variable_shapes(network, image_size=32), 32, train=False)
    assert math.prod(found[last].shape[1:]) == features
    assert found["logits"].shape == (2, 10)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_number_of_stages(stages):
    network = create_network(
        "resnet18", width=16, stem="cifar", num_classes=10, blocks=(1,) * stages
    )
    _, features = feature_shapes_of(
        network, variable_shapes(network, image_size=32), 32, train=False
    )
    assert set(features) == set(network.feature_names)
    assert network.published_sites == tuple(f"layer{i}" for i in range(1, stages + 1))
    side, width = 32 // 2 ** (stages - 1), 16 * 2 ** (stages - 1)
    assert features[f"layer{stages}"].shape == (2, side, side, width)
    assert features["avgpool"].shape == (2, 1, 1, width)


@pytest.mark.parametrize("width", [8, 9])
def test_shortcut_of_option_a(width):
    """With a branch of zeros a block gives its shortcut: every second pixel between zeros."""
    block = Block(width, stride=2, bottleneck=False, shortcut="padding")
    x = np.random.default_rng(0).uniform(size=(2, 6, 6, 4)).astype(np.float32)
    shapes = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), x)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    found = block.apply(zeros, x, train=False)
    expected = np.zeros((2, 3, 3, width), np.float32)
    expected[..., 2:6] = x[:, ::2, ::2]
    np.testing.assert_array_equal(found, expected)
    assert set(shapes["params"]) == {"conv1", "bn1", "conv2", "bn2"}


TINY = {
    "imagenet stem": ResNet(blocks=(1, 1), bottleneck=False, width=4, num_classes=5),
    "bottleneck": ResNet(
        blocks=(1, 1), bottleneck=True, width=4, num_classes=5, stem="cifar", head_pool=4
    ),
    "padding": ResNet(
        blocks=(1, 1), bottleneck=False, width=4, num_classes=5, stem="cifar", shortcut="padding"
    ),
    "vgg": create_network(
        "cifar_cnn", convolutions=(1, 1), widths=(4, 8), hidden=(8,), num_classes=5, dropout=0.0
    ),
}  # fmt: skip


def windows_of_four(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // 4, 4, w // 4, 4, c).mean(axis=(2, 4))


def test_head_of_windows():
    """Averages of 4 x 4 pixels, flattened channels first as in PyTorch."""
    network = TINY["bottleneck"]
    variables = seeded_variables(network)
    images = reference_weights.image(32)
    logits, features = jax.jit(functools.partial(network.apply, train=False))(variables, images)
    pooled = windows_of_four(np.asarray(features["layer2"], np.float64))
    assert pooled.shape == (2, 4, 4, 32)
    np.testing.assert_allclose(features["avgpool"], pooled, rtol=1e-5, atol=1e-6)
    head = variables["params"]["fc"]
    flat = pooled.transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(logits, flat @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-4)


def summed_loss(network, params, batch_stats, images, targets, mask):
    """Sum over the valid rows of a loss, and the new statistics; `mask` None: all rows."""
    (logits, _), updates = network.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mask=mask,
        mutable=["batch_stats"],
    )
    losses = jnp.sum((logits - targets) ** 2, axis=-1)
    losses = losses if mask is None else jnp.where(mask, losses, 0)
    return jnp.sum(losses), updates["batch_stats"]


@pytest.mark.parametrize("name", ["imagenet stem", "vgg"])
def test_padded_rows_change_nothing(name):
    """33 of 64 rows on eight devices, three of them without any, against 33 rows on one."""
    valid, side = 33, 8
    network = TINY[name]
    variables = seeded_variables(network, image_size=side)
    state = variables["params"], variables["batch_stats"]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, side, side, 3)).astype(np.float32)
    images[valid:] = 100 * images[valid:]
    targets = rng.normal(size=(64, 5)).astype(np.float32)
    mask = np.arange(64) < valid

    alone = functools.partial(summed_loss, network, mask=None)
    expected = jax.jit(jax.grad(alone, has_aux=True))(
        *state, images=images[:valid], targets=targets[:valid]
    )
    spread = functools.partial(summed_loss, network.clone(axis_name="devices"))

    def replica(params, batch_stats, images, targets, mask):
        gradient, stats = jax.grad(spread, has_aux=True)(params, batch_stats, images, targets, mask)
        return jax.lax.psum(gradient, "devices"), stats

    rows = [array.reshape(8, 8, *array.shape[1:]) for array in (images, targets, mask)]
    mapped = jax.pmap(replica, axis_name="devices", in_axes=(None, None, 0, 0, 0))
    found = mapped(*state, *rows)
    for tree, other in zip(expected, found, strict=True):
        # The gradient of a bias in front of a normalisation is rounding alone.
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))
        for (path, leaf), replicas in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True
        ):
            for value in np.asarray(replicas):
                np.testing.assert_allclose(
                    value, leaf, rtol=1e-4, atol=1e-6 * scale, err_msg=jax.tree_util.keystr(path)
                )


@pytest.mark.parametrize(
    ("name", "train"),
    [("imagenet stem", False), ("bottleneck", True), ("padding", True), ("vgg", True)],
)
def test_half_precision(name, train):
    """Parameters and images in bfloat16, statistics in float32; results near those of float32."""
    network = TINY[name]
    variables = seeded_variables(network)
    images = reference_weights.image(32)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])

    @jax.jit
    def apply(variables, images):
        return network.apply(variables, images, train=train, mutable=["batch_stats"])

    (expected, _), stats = apply(variables, images)
    (logits, features), found = apply({**variables, "params": half}, images.astype(jnp.bfloat16))
    assert {value.dtype for value in features.values()} == {jnp.dtype(jnp.bfloat16)}
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(stats), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * np.abs(theirs).max())
    assert relative_error(logits.astype(np.float32), expected) < 0.05


@pytest.mark.parametrize(
    ("name", "topk"), [("alexnet", None), ("squeezenet1_1", None), ("builtin", {"pool1": 0.1})]
)
def test_networks_without_normalisation_keep_half_precision(name, topk):
    network = create_network(name, topk=topk)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        variable_shapes(network, image_size=64),
    )
    rngs = {"dropout": jax.random.key(0)}
    logits, features = feature_shapes_of(network, shapes, 64, train=True, rngs=rngs)
    assert {value.dtype for value in (logits, *features.values())} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("2_20", {"layer2": 20 * 0.01}),
        ("1-2-3_10", {f"layer{i}": 10 * 0.01 for i in (1, 2, 3)}),
        ("1_20,3_10", {"layer1": 20 * 0.01, "layer3": 10 * 0.01}),
        ("4_2.5", {"layer4": 2.5 * 0.01}),
        ("3_100", {"layer3": 1.0}),
    ],
)
def test_stages_as_the_authors_write_them(text, expected):
    assert parse_stages(text) == expected
    network = create_network("resnet18", topk=text)
    assert create_network("resnet18", topk=parse_stages(text)).topk == expected
    # What is computed depends on the sites alone.
    assert network.published_sites == ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize(
    "text", ["2", "_20", "2_", "2-20", "2_0", "2_101", "0_20", "a_20", "2_20_3", "1,2_10", "2_-5"]
)
def test_other_texts_are_errors(text):
    for make in (parse_stages, lambda text: create_network("resnet18", topk=text)):
        with pytest.raises(
            ValueError, match=r"Top-K stages .*expected stages and a percentage"
        ) as e:
            make(text)
        assert "\n" not in str(e.value)


def test_stages_that_are_not_there():
    with pytest.raises(ValueError, match="stage 2 is named twice"):
        parse_stages("2_20,1-2_10")
    with pytest.raises(ValueError, match=r"unknown Top-K site 'layer4': this network has .*layer3"):
        create_network("resnet32", topk="4_20")


def test_text_makes_the_stage_sparse():
    network = create_network("resnet20", topk="2_20,3_10")
    found = resolve_sites(network.topk, network.published_sites, network.feature_names)
    assert {name: site.fraction for name, site in found.items()} == {"layer2": 0.2, "layer3": 0.1}


def test_unknown_options():
    with pytest.raises(ValueError, match="stem='tiny': expected one of imagenet, cifar"):
        create_network("resnet18", stem="tiny")
    with pytest.raises(ValueError, match="shortcut='A': expected one of projection, padding"):
        create_network("resnet18", shortcut="A")
    with pytest.raises(ValueError, match="smaller than a pooling window of 4"):
        variable_shapes(create_network("resnet18_li2023"), image_size=16)


def test_conv_matrix_of_the_worked_example():
    """A 3x3 map and kernel, padding 2, stride 4: every patch meets the map in one pixel."""
    w = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
    matrix = np.asarray(conv_matrix(w[:, :, None, None], (3, 3), stride=4, pad=2))
    expected = np.zeros((4, 9), np.float32)
    expected[0, 0], expected[1, 2], expected[2, 6], expected[3, 8] = 9, 7, 3, 1
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(matrix @ w.ravel(), [9, 21, 21, 9])


@pytest.mark.parametrize(
    ("size", "hw", "stride", "pad"),
    [
        ((3, 3), (5, 7), 1, 1),
        ((3, 2), (7, 6), 2, 0),
        ((1, 1), (4, 4), 3, 0),
        ((5, 5), (4, 6), 2, 3),
    ],
)
def test_conv_matrix_is_the_convolution(size, hw, stride, pad):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(*size, 2, 3)).astype(np.float32)
    x = rng.normal(size=(*hw, 2)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x[None], kernel, (stride, stride), ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]  # fmt: skip
    matrix = conv_matrix(kernel, hw, stride=stride, pad=pad)
    found = np.asarray(matrix) @ x.ravel()
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    by_scipy = sum(
        scipy.signal.correlate2d(np.pad(x[..., c], pad), kernel[:, :, c, 1], mode="valid")
        for c in range(2)
    )[::stride, ::stride]
    np.testing.assert_allclose(
        found.reshape(expected.shape)[..., 1], by_scipy, rtol=1e-4, atol=1e-5
    )


def test_conv_matrix_needs_room():
    with pytest.raises(ValueError, match="map of 2 x 5 with pad=0 is smaller than the kernel of 3"):
        conv_matrix(np.ones((3, 3, 1, 1), np.float32), (2, 5), stride=1, pad=0)


@pytest.mark.parametrize(
    ("x", "slope", "offset", "value"), [(2.0, 6, 3, 15), (-1.0, 1.5, 3, 1.5), (1.0, 6, 3, 9)]
)
def test_local_affine_of_the_worked_example(x, slope, offset, value):
    inner, outer = jnp.array([1.5, 0.5]), jnp.array([[1.0, 2.0], [2.0, 1.0]])
    shift = jnp.array([0.0, 1.0])

    def h(x):
        hidden = jax.nn.relu(outer @ jax.nn.relu(inner * x + shift) + shift)
        return jnp.sum(hidden) - 1.0

    w, b = local_affine(h, x)
    assert (float(w), float(b), float(h(x))) == (slope, offset, value)


def test_local_affine_of_a_network():
    """The same map gives the logits of an image nearby, in which no unit has turned."""
    network = create_network("cnn2", convolutions=(1,), widths=(2,), pooled_size=2, num_classes=3)
    variables = seeded_variables(network, image_size=4)
    image = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)

    def logits(image):
        return network.apply(variables, image[None], train=False)[0][0]

    slope, offset = jax.jit(functools.partial(local_affine, logits))(image)
    assert slope.shape == (3, 4, 4, 3)
    nearby = image + np.float32(1e-4) * np.random.default_rng(1).normal(size=image.shape).astype(
        np.float32
    )
    for x in (image, nearby):
        found = np.tensordot(np.asarray(slope), x, 3) + offset
        np.testing.assert_allclose(found, logits(x), rtol=1e-4, atol=1e-5)


def torch_network(width, blocks, *, padding, window):
    """The authors' ResNet-18 (projections, windows) or one of He et al. for CIFAR, in torch."""
    import torch
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, inside, out, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(out)
            self.stride, self.missing = stride, out - inside
            if self.missing and not padding:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.missing and padding:
                x = x[:, :, :: self.stride, :: self.stride]
                zeros = torch.zeros(len(x), self.missing // 2, *x.shape[2:])
                x = torch.cat([zeros, x, zeros], dim=1)
            elif self.missing:
                x = self.downsample(x)
            return torch.relu(x + y)

    class Network(nn.Module):
        def __init__(self, cells):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            inside = width
            for stage, count in enumerate(blocks):
                out = width * 2**stage
                layer = []
                for i in range(count):
                    layer.append(Residual(inside, out, 2 if stage and not i else 1))
                    inside = out
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            self.fc = nn.Linear(inside * cells, 10)

        def forward(self, x, sites, seen):
            """Logits; `seen` gets the stages' outputs, of which `sites` make what follows."""
            x = torch.relu(self.bn1(self.conv1(x)))
            for stage in range(1, len(blocks) + 1):
                name = f"layer{stage}"
                x = getattr(self, name)(x)
                seen[name] = x
                x = sites.get(name, lambda x: x)(x)
            x = nn.functional.avg_pool2d(x, window or x.shape[-1])
            return self.fc(x.flatten(1))

    return Network


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("resnet18_li2023", 64, {"width": 64, "blocks": (2,) * 4, "padding": False, "window": 4}),
        ("resnet32", 32, {"width": 16, "blocks": (5,) * 3, "padding": True, "window": None}),
    ],
)
def test_torch_module(name, side, options):
    """Logits and every stage's output, plain and behind Top-K at 20 % of every stage."""
    torch = pytest.importorskip("torch")
    network = create_network(name)
    cells = (side // 2 ** (len(network.blocks) - 1) // 4) ** 2 if options["window"] else 1
    model = torch_network(**options)(cells).eval()
    if name == "resnet32":
        assert sum(p.numel() for p in model.parameters()) == 464_154
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    variables = state_dict_to_variables(state, variable_shapes(network, image_size=side))
    images = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for fraction in (None, 0.2):
        sparse = network.clone(topk=fraction)
        logits, features = jax.jit(functools.partial(sparse.apply, train=False))(variables, images)
        sites, kept = {}, {}

        def site(x, name, features=features, kept=kept):
            n, c, h, w = x.shape
            order = x.abs().flatten(2).sort(dim=2, descending=True, stable=True).indices
            mask = torch.zeros(n, c, h * w, dtype=torch.bool)
            mask.scatter_(2, order[..., : int(max(1, 0.2 * h * w))], True)
            kept[name] = torch.where(mask.view_as(x), x, torch.zeros_like(x))
            # Our own result goes on, so that a near-tie that rounding turns does not spread.
            return torch.from_numpy(np.asarray(features[name]).transpose(0, 3, 1, 2).copy())

        if fraction:
            sites = {key: functools.partial(site, name=key) for key in network.published_sites}
        seen = {}
        with torch.inference_mode():
            expected = model(inputs, sites, seen).numpy()
        assert relative_error(logits, expected) < 1e-4
        for key in network.published_sites:
            theirs = (kept if fraction else seen)[key].numpy().transpose(0, 2, 3, 1)
            ours = np.asarray(features[key])
            turned = (ours != 0) != (theirs != 0)
            if fraction:
                assert turned.mean() < 1e-3, key
                ours, theirs = np.where(turned, 0, ours), np.where(turned, 0, theirs)
            assert relative_error(ours, theirs) < 1e-4, key


def relative_error(found, expected):
    """Largest difference relative to the largest magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
