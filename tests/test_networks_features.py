"""Which variables a feature needs, and that they are enough: to the bit, and held by no program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import networks
from topk_jax.networks import FeatureExtractor, feature_shapes, variable_shapes

TINY = networks.VGG(
    convolutions=(1, 1), widths=(4, 6), hidden=(8,), num_classes=3, pooled_size=2, batch_norm=True
)


def modules(shapes, collection="params"):
    """Names of the modules that hold variables, as torch writes them."""
    names = set()
    for path, _ in jax.tree_util.tree_flatten_with_path(shapes.get(collection, {}))[0]:
        names.add(".".join(part.key for part in path[:-1]))
    return names


def features_up_to(index):
    """Convolutions of torchvision's VGG-11 up to an index of `features`."""
    return {f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18) if i <= index}


def block(name, *, downsample=False):
    return {f"{name}.{part}" for part in ("conv1", "bn1", "conv2", "bn2")} | (
        {f"{name}.downsample.0", f"{name}.downsample.1"} if downsample else set()
    )


RESNET = networks.ResNet(blocks=(2, 2), bottleneck=False)  # the first half of ResNet-18
STEM = {"conv1", "bn1"}
STAGE1 = block("layer1.0") | block("layer1.1")


@pytest.mark.parametrize(
    ("model", "names", "expected"),
    [
        ("vgg11", ("relu1_1", "pool1"), features_up_to(0)),
        ("vgg11", ("pool4", "relu1_1"), features_up_to(13)),
        ("vgg11", ("relu6",), features_up_to(18) | {"classifier.0"}),
        ("vgg11", ("logits",), features_up_to(18) | {f"classifier.{i}" for i in (0, 3, 6)}),
        ("alexnet", ("conv3",), {"features.0", "features.3", "features.6"}),
        ("alexnet", ("fc7",), {f"features.{i}" for i in (0, 3, 6, 8, 10)}
         | {"classifier.1", "classifier.4"}),
        (RESNET, ("conv1",), {"conv1"}),
        (RESNET, ("pool1",), STEM),
        (RESNET, ("layer1.0",), STEM | block("layer1.0")),
        (RESNET, ("layer1", "layer2.0"), STEM | STAGE1 | block("layer2.0", downsample=True)),
    ],
)  # fmt: skip
def test_exactly_what_the_features_need(model, names, expected):
    network = networks.create_network(model) if isinstance(model, str) else model
    shapes = feature_shapes(network, names)
    assert modules(shapes) == expected
    normed = {name for name in expected if "bn" in name or name.endswith("downsample.1")}
    assert modules(shapes, "batch_stats") == normed
    whole = variable_shapes(network)
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        there = whole
        for part in path:
            there = there[part.key]
        assert (leaf.shape, leaf.dtype) == (there.shape, there.dtype)


def test_all_features_need_all_variables():
    assert feature_shapes(TINY, TINY.feature_names) == variable_shapes(TINY)


def test_top_k_sites_make_no_difference():
    network = TINY.clone(topk={"pool1": 0.1})
    expected = feature_shapes(TINY, ("relu2_1",))
    assert feature_shapes(network, ("relu2_1",)) == expected
    assert "features.4" in expected["params"]


def random_variables(network, **options):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.1, 1, size=leaf.shape).astype(np.float32),
        variable_shapes(network, **options),
    )


def part_of(variables, shapes):
    return {
        collection: {name: variables[collection][name] for name in tree}
        for collection, tree in shapes.items()
    }


def test_part_of_the_variables_gives_the_features_bit_for_bit():
    variables = random_variables(TINY)
    images = np.random.default_rng(1).normal(size=(2, 12, 16, 3)).astype(np.float32)
    names = ("pool1", "bn2_1", "relu1_1")
    part = part_of(variables, feature_shapes(TINY, names))
    assert list(part["params"]) == ["features.0", "features.1", "features.4", "features.5"]
    found = jax.jit(FeatureExtractor(TINY, names))(part, images)
    whole = jax.jit(lambda v, x: TINY.apply(v, x, train=False)[1])(variables, images)
    assert set(found) == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name], whole[name], strict=True)


def test_program_neither_holds_nor_computes_the_layers_that_are_absent():
    network = networks.create_network("vgg11")  # 507 MB of parameters
    names = ("relu1_1", "pool1")
    shapes = feature_shapes(network, names)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    compiled = jax.jit(FeatureExtractor(network, names)).lower(shapes, images).compile()
    memory = compiled.memory_analysis()
    kernels = 4 * (64 * 3 * 9 + 64)
    assert memory.argument_size_in_bytes == kernels + 4 * 3 * 32 * 32
    assert memory.generated_code_size_in_bytes < 1e6
    assert memory.temp_size_in_bytes < 8e6
    text = compiled.as_text()
    for absent in ("4096", "25088", "512"):
        assert f"{absent}," not in text.replace(" ", "")
        assert f",{absent}]" not in text


def test_equal_extractors_share_one_program():
    traced = []

    @jax.jit
    def run(features, images):
        traced.append(1)
        return features(images)

    variables = random_variables(TINY)
    images = jnp.ones((1, 8, 8, 3))
    for _ in range(2):
        network = networks.VGG(
            convolutions=(1, 1), widths=(4, 6), hidden=(8,), num_classes=3, pooled_size=2,
            batch_norm=True,
        )  # fmt: skip
        run(jax.tree_util.Partial(FeatureExtractor(network, ("pool1",)), variables), images)
    assert len(traced) == 1


@pytest.mark.parametrize("make", [FeatureExtractor, feature_shapes])
def test_unknown_features_list_the_nearest(make):
    with pytest.raises(ValueError, match=r"unknown feature 'pool9': .*pool2"):
        make(TINY, ("pool1", "pool9"))
