import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_jax.decisions import (
    IMAGENET16,
    CategoryMapping,
    category_probabilities,
    decide,
    identity_mapping,
    read_trials,
)

MAPPING = CategoryMapping(("one", "two", "three"), ((4,), (0, 2), (1, 3, 6)))
AGGREGATIONS = {"mean": np.mean, "sum": np.sum, "max": np.max}


def softmax_loop(row):
    """Softmax in float64, by the definition."""
    row = row.astype(np.float64)
    exponentials = [np.exp(value - row.max()) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_decide_agrees_with_a_loop(aggregation, dtype):
    logits = (4 * np.random.default_rng(0).standard_normal((200, 8))).astype(dtype)
    scores = [
        [AGGREGATIONS[aggregation]([p[i] for i in own]) for own in MAPPING.indices]
        for p in map(softmax_loop, logits)
    ]
    expected = [MAPPING.names[int(np.argmax(row))] for row in scores]
    assert len(set(expected)) == 3
    assert decide(logits, MAPPING, aggregation=aggregation).tolist() == expected
    probabilities = category_probabilities(logits, MAPPING, aggregation=aggregation)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, scores, rtol=2e-5)


def test_aggregations_differ_as_worked_by_hand():
    # Probabilities .3 | .2 .2 | .1 .1 .1 of categories one, two, three.
    logits = np.log([[0.2, 0.1, 0.2, 0.1, 0.3, 1e-9, 0.1]])
    assert decide(logits, MAPPING).tolist() == ["one"]
    assert decide(logits, MAPPING, aggregation="sum").tolist() == ["two"]
    logits = np.log([[0.28, 0.09, 0.01, 0.09, 0.26, 1e-9, 0.27]])
    assert decide(logits, MAPPING).tolist() == ["one"]
    assert decide(logits, MAPPING, aggregation="sum").tolist() == ["three"]
    assert decide(logits, MAPPING, aggregation="max").tolist() == ["two"]


def test_decide_does_not_tie_where_all_categories_are_unlikely():
    logits = np.zeros((2, 8), np.float32)
    logits[:, 5] = 500  # in no category: the others' probabilities are 0 in float32
    logits[0, 6] = 1
    logits[1, 0] = 1
    assert decide(logits, MAPPING).tolist() == ["three", "two"]
    assert decide(logits, MAPPING, aggregation="max").tolist() == ["three", "two"]
    assert (category_probabilities(logits, MAPPING) == 0).all()


def test_decide_takes_the_first_of_equal_scores():
    assert decide(np.zeros((1, 1000)), IMAGENET16).tolist() == ["airplane"]
    assert decide(np.zeros((1, 7)), MAPPING, aggregation="max").tolist() == ["one"]
    mapping = CategoryMapping(("z", "a"), ((0,), (1,)))
    assert decide([[1.0, 1.0]], mapping).tolist() == ["z"]


def test_decide_is_unmoved_by_extreme_and_masked_logits():
    logits = np.array([[-3e38, 3e38, 0, 0, -np.inf, 0, 0]], np.float32)
    assert decide(logits, MAPPING, aggregation="max").tolist() == ["three"]
    logits = np.array([[-np.inf, -np.inf, -1e300, -200, -np.inf, 0, -np.inf]])
    assert decide(logits, MAPPING).tolist() == ["three"]


def test_decide_of_no_images_is_empty():
    assert decide(np.zeros((0, 1000)), IMAGENET16).tolist() == []
    assert category_probabilities(np.zeros((0, 1000)), IMAGENET16).shape == (0, 16)


def test_decide_takes_jax_arrays_of_any_float_type():
    import jax.numpy as jnp

    logits = jnp.array([[0, 0, 0, 0, 5, 0, 0], [9, 0, 9, 0, 0, 0, 0]], jnp.bfloat16)
    assert decide(logits, MAPPING).tolist() == ["one", "two"]


@given(
    st.lists(st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5), min_size=1, max_size=5)
)
def test_the_identity_mapping_is_the_argmax(rows):
    names = np.array(["a", "b", "c", "d", "e"])
    logits = np.array(rows, np.float32)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = names[exponentials.argmax(axis=1)].tolist()
    for aggregation in AGGREGATIONS:
        assert decide(
            logits, identity_mapping(names.tolist()), aggregation=aggregation
        ).tolist() == (expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "row 2 has nan for class 3"),
        (np.inf, "row 2 has inf for class 3"),
        (1e300, "row 2"),
    ],
)
def test_rows_without_a_softmax_are_named(value, message):
    logits = np.zeros((4, 8))
    logits[2, 3] = value
    with pytest.raises(ValueError, match=message):
        decide(logits, MAPPING)
    with pytest.raises(ValueError, match=message):
        category_probabilities(logits, MAPPING)


def test_rows_of_minus_infinity_are_named():
    logits = np.zeros((3, 8))
    logits[1] = -np.inf
    with pytest.raises(ValueError, match="row 1 is -inf for every class"):
        category_probabilities(logits, MAPPING)
    logits[1, 5] = 0  # in no category
    with pytest.raises(ValueError, match="row 1 is -inf for every class of the mapping"):
        decide(logits, MAPPING)
    assert (category_probabilities(logits, MAPPING)[1] == 0).all()


@pytest.mark.parametrize(
    ("logits", "mapping", "message"),
    [
        (np.zeros((2, 6)), MAPPING, "6 classes, the mapping expects at least 7"),
        (np.zeros((2, 1001)), IMAGENET16, "1001 classes, the mapping expects 1000"),
        (np.zeros((2, 17)), identity_mapping("abcd"), "17 classes, the mapping expects 4"),
        (np.zeros(1000), IMAGENET16, r"expected numbers \[n, classes\]"),
        (np.zeros((2, 1000), complex), IMAGENET16, "complex128"),
        (np.full((2, 1000), "x"), IMAGENET16, "<U1"),
    ],
)
def test_logits_that_do_not_fit(logits, mapping, message):
    with pytest.raises(ValueError, match=message):
        decide(logits, mapping)


def test_an_unknown_aggregation():
    with pytest.raises(ValueError, match='"mean", "sum" or "max", got \'median\''):
        decide(np.zeros((1, 8)), MAPPING, aggregation="median")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("names", "indices", "message"),
    [
        ((), (), "at least one"),
        (("a", "b"), ((0,),), "2 names and 1 lists"),
        (("a", "a"), ((0,), (1,)), "'a': expected a new name"),
        (("a", ""), ((0,), (1,)), "'': expected a new name"),
        (("na",), ((0,),), "'na': expected a new name"),
        (("a", "b"), ((0,), ()), "'b' has no classes"),
        (("a",), ((-1,),), "class -1, expected a number from 0 and below 5"),
        (("a",), ((5,),), "class 5, expected a number from 0 and below 5"),
        (("a", "b"), ((0, 1), (2, 1)), "class 1 is in both 'a' and 'b'"),
        (("a",), ((3, 3),), "class 3 is in both 'a' and 'a'"),
    ],
)
def test_mappings_are_checked(names, indices, message):
    with pytest.raises(ValueError, match=message):
        CategoryMapping(names, indices, 5)


def test_imagenet16():
    assert len(IMAGENET16.names) == 16
    assert list(IMAGENET16.names) == sorted(IMAGENET16.names)
    sizes = dict(zip(IMAGENET16.names, map(len, IMAGENET16.indices), strict=True))
    assert sum(sizes.values()) == 207
    assert (sizes["dog"], sizes["bird"], sizes["truck"], sizes["airplane"]) == (109, 49, 8, 1)
    logits = np.zeros((16, 1000))
    logits[np.arange(16), [own[-1] for own in IMAGENET16.indices]] = 10
    assert decide(logits, IMAGENET16).tolist() == list(IMAGENET16.names)


@pytest.mark.real
def test_imagenet16_is_the_benchmarks(shared):
    expected = json.loads((shared / "spec/categories16.json").read_text())
    assert dict(zip(IMAGENET16.names, map(list, IMAGENET16.indices), strict=True)) == expected
    assert list(IMAGENET16.names) == list(expected)


@pytest.mark.real
def test_decisions_on_real_logits(shared):
    """Logits of torchvision's SqueezeNet 1.1 give the decisions stored beside them."""
    with open(shared / "reference/squeezenet1_1_decisions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(shared / "reference/squeezenet1_1_logits.npz") as arrays:
        images, logits = arrays["images"].tolist(), dict(arrays)
    for fraction in ("1", "0.5", "0.2", "0.1", "0.05"):
        stored = {row["image"]: row["decision"] for row in rows if row["fraction"] == fraction}
        decisions = decide(logits[f"f{fraction}"], IMAGENET16)
        assert decisions.tolist() == [stored[image] for image in images]


@pytest.mark.real
def test_decisions_of_2018_are_those_of_the_maximum(shared):
    published = read_trials(shared / "reference/geirhos2018_squeezenet1_1.csv")
    response = dict(
        zip(published.image_key.tolist(), published.object_response.tolist(), strict=True)
    )
    with np.load(shared / "reference/squeezenet1_1_logits.npz") as arrays:
        decisions = decide(arrays["f1"], IMAGENET16, aggregation="max")
        assert decisions.tolist() == [response[image] for image in arrays["images"].tolist()]
