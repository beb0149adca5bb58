"""The rule from torch's names and layouts to ours, on hand-made trees and on the networks."""

import jax
import ml_dtypes
import numpy as np
import pytest
import reference_weights

from topk_jax import networks
from topk_jax.weights.conversion import (
    count_parameters,
    state_dict_to_variables,
    variables_to_state_dict,
)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


SHAPES = {
    "params": {
        "features.0": {"kernel": shape(3, 5, 2, 4), "bias": shape(4)},
        "layer1.0": {"bn1": {"scale": shape(4), "bias": shape(4)}},
        "fc": {"kernel": shape(6, 7), "bias": shape(7)},
    },
    "batch_stats": {"layer1.0": {"bn1": {"mean": shape(4), "var": shape(4)}}},
}
TORCH_SHAPES = {
    "features.0.weight": (4, 2, 3, 5),
    "features.0.bias": (4,),
    "layer1.0.bn1.weight": (4,),
    "layer1.0.bn1.bias": (4,),
    "layer1.0.bn1.running_mean": (4,),
    "layer1.0.bn1.running_var": (4,),
    "layer1.0.bn1.num_batches_tracked": (),
    "fc.weight": (7, 6),
    "fc.bias": (7,),
}


def torch_like(dtype=np.float32):
    rng = np.random.default_rng(0)
    arrays = {
        name: np.asarray(rng.normal(size=s)).astype(dtype) for name, s in TORCH_SHAPES.items()
    }
    return arrays | {"layer1.0.bn1.num_batches_tracked": np.array(9)}


def test_rule():
    state = torch_like()
    variables = state_dict_to_variables(state, SHAPES)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, SHAPES)
    kernel = variables["params"]["features.0"]["kernel"]
    for o, i, h, w in np.ndindex(4, 2, 3, 5):
        assert kernel[h, w, i, o] == state["features.0.weight"][o, i, h, w]
    dense = variables["params"]["fc"]["kernel"]
    for o, i in np.ndindex(7, 6):
        assert dense[i, o] == state["fc.weight"][o, i]
    norm = variables["params"]["layer1.0"]["bn1"] | variables["batch_stats"]["layer1.0"]["bn1"]
    for ours, theirs in [("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"),
                         ("var", "running_var")]:  # fmt: skip
        np.testing.assert_array_equal(norm[ours], state[f"layer1.0.bn1.{theirs}"], strict=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_always_float32_in_memory_of_its_own(dtype):
    state = torch_like(dtype)
    variables = state_dict_to_variables(state, SHAPES)
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == np.float32
        assert leaf.flags["C_CONTIGUOUS"]
    bias = variables["params"]["fc"]["bias"]
    np.testing.assert_array_equal(bias, state["fc.bias"].astype(np.float32), strict=True)
    bias[:] = 0
    assert np.any(state["fc.bias"] != 0)


def test_there_and_back():
    state = torch_like()
    back = variables_to_state_dict(state_dict_to_variables(state, SHAPES))
    assert set(back) == set(state) - {"layer1.0.bn1.num_batches_tracked"}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], strict=True)
        assert array.flags["C_CONTIGUOUS"]


def test_parameters_are_counted_without_statistics():
    assert count_parameters(SHAPES) == 3 * 5 * 2 * 4 + 4 + 8 + 6 * 7 + 7


def test_everything_wrong_is_said_at_once():
    state = torch_like()
    del state["layer1.0.bn1.running_var"], state["features.0.bias"]
    state |= {
        "fc.weight": np.zeros((7, 5), np.float32),
        "fc.bias": np.arange(7),
        "aux.weight": np.zeros((2, 3), np.float32),
        "aux.num_batches_tracked": np.array(3),
    }
    with pytest.raises(ValueError, match="my file do not fit") as raised:
        state_dict_to_variables(state, SHAPES, source="my file")
    message = str(raised.value)
    assert "2 missing (" in message
    assert "features.0.bias (4,)" in message
    assert "layer1.0.bn1.running_var (4,)" in message
    assert "1 not used (aux.weight (2, 3))" in message
    assert "1 of another shape (fc.weight (7, 5), expected (7, 6))" in message
    assert "1 not floating (fc.bias int64)" in message
    assert "\n" not in message
    assert "classes" not in message


def test_another_number_of_classes_is_said():
    state = torch_like() | {"fc.weight": np.zeros((3, 6), np.float32), "fc.bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"3 classes, the network has 7: num_classes=3"):
        state_dict_to_variables(state, SHAPES)


def test_other_differences_are_not_taken_for_classes():
    for name, sizes in [
        ("fc.weight", (7, 9)),
        ("fc.weight", ()),
        ("features.0.weight", (4, 2, 1, 1)),
    ]:
        state = torch_like() | {name: np.zeros(sizes, np.float32)}
        with pytest.raises(ValueError, match="1 of another shape") as raised:
            state_dict_to_variables(state, SHAPES)
        assert "classes" not in str(raised.value)


def test_a_scalar_does_not_stand_for_an_array():
    state = torch_like() | {"fc.bias": np.float32(1)}
    with pytest.raises(ValueError, match=r"fc\.bias \(\), expected \(7,\)"):
        state_dict_to_variables(state, SHAPES)


def test_unknown_variables_are_an_error():
    with pytest.raises(ValueError, match=r"params/norm/alpha has no counterpart"):
        state_dict_to_variables({}, {"params": {"norm": {"alpha": shape(3)}}})


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_networks_there_and_back(name):
    shapes = networks.variable_shapes(networks.create_network(name))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    state = variables_to_state_dict(variables)
    assert len(state) == {"resnet18": 102, "squeezenet1_1": 52}[name]
    again = state_dict_to_variables(state, shapes)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", sorted(set(networks.list_networks()) - {"builtin"} - reference_weights.WITHOUT_WEIGHTS)
)
def test_names_and_shapes_are_torchvisions(name):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    shapes = networks.variable_shapes(networks.create_network(name))
    # Views of one number: nothing of the size of the network is allocated.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    ours = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(zeros)[0]:
        tree = leaf
        for part in reversed(path):
            tree = {part.key: tree}
        ours |= {key: array.shape for key, array in variables_to_state_dict(tree).items()}
    expected = {key: tuple(value.shape) for key, value in theirs.items()}
    assert ours == {k: s for k, s in expected.items() if not k.endswith("num_batches_tracked")}
