"""Long-tailed subsets, against the published counts."""

import numpy as np
import pytest

from topk_jax.stimuli import from_arrays, long_tailed, long_tailed_counts


@pytest.mark.parametrize(
    ("factor", "counts", "total"),
    [
        (10, {0: 5000, 1: 3871, 2: 2997, 3: 2320, 4: 1796, 5: 1391, 6: 1077, 7: 834, 8: 645,
              9: 500}, 20_431),
        (20, {0: 5000, 9: 250}, 17_023),
        (50, {0: 5000, 9: 100}, 13_996),
        (100, {0: 5000, 1: 2997, 2: 1796, 3: 1077, 4: 645, 5: 387, 6: 232, 7: 139, 8: 83, 9: 50},
         12_406),
        (200, {0: 5000, 9: 25}, 11_203),
    ],
)  # fmt: skip
def test_published_counts_of_cifar10(factor, counts, total):
    found = long_tailed_counts(5000, 10, factor)
    assert {place: found[place] for place in counts} == counts
    assert sum(found) == total


def test_other_counts():
    assert sum(long_tailed_counts(500, 100, 100)) == 10_847  # CIFAR-100
    assert long_tailed_counts(5000, 10, 100, kind="step") == (5000,) * 5 + (50,) * 5
    assert long_tailed_counts(10, 3, 5, kind="step") == (10, 2, 2)
    assert long_tailed_counts(7, 4, 1) == (7,) * 4
    assert long_tailed_counts(7, 1, 3) == (7,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5000, 10, 0.01), "factor=0.01: expected a number of at least 1"),
        ((5000, 10, float("nan")), "factor=nan"),
        ((5000, 10, float("inf")), "factor=inf"),
        ((0, 10, 10), "largest=0, classes=10: expected at least 1"),
        ((30, 10, 100), "factor=100 leaves the smallest class none of 30 images"),
    ],
)
def test_counts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        long_tailed_counts(*arguments)
    with pytest.raises(ValueError, match="kind='linear': expected exponential or step"):
        long_tailed_counts(10, 2, 2, kind="linear")  # pyright: ignore[reportArgumentType]


def a_set(sizes=(20, 20, 20), seed=5):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return from_arrays(pixels, labels, [f"c{i}" for i in range(len(sizes))], name="set"), labels


def drawn(stimuli):
    """Rows of the whole set, read from the pixels."""
    return [int(stimuli.load(index)[0, 0, 0]) for index in range(len(stimuli))]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_draw_is_that_of_the_legacy_generator(seed):
    stimuli, labels = a_set()
    rng = np.random.Generator(np.random.MT19937())
    state = np.random.RandomState(seed).get_state(legacy=False)
    rng.bit_generator.state = state
    expected = []
    for label, count in enumerate((20, 8, 4)):  # 20, 20 / sqrt(5), 20 / 5
        rows = [row for row in range(60) if labels[row] == label]
        for last in range(19, 0, -1):  # Fisher and Yates; bounded numbers by masked rejection
            mask = (1 << last.bit_length()) - 1
            while (number := int(rng.integers(0, 2**32, dtype=np.uint32)) & mask) > last:
                pass
            rows[last], rows[number] = rows[number], rows[last]
        expected += rows[:count]
    found = long_tailed(stimuli, 5, seed=seed)
    assert drawn(found) == expected
    assert found.labels.tolist() == [0] * 20 + [1] * 8 + [2] * 4
    assert found.categories == stimuli.categories
    assert found.name == "set-exponential5"
    assert f"factor=5 seed={seed}: 32 of 60" in found.origin


def test_a_larger_factor_draws_a_part():
    stimuli, _ = a_set()
    assert set(drawn(long_tailed(stimuli, 10))) < set(drawn(long_tailed(stimuli, 4)))
    assert set(drawn(long_tailed(stimuli, 4))) != set(drawn(long_tailed(stimuli, 4, seed=1)))
    step = long_tailed(stimuli, 10, kind="step")
    assert np.bincount(step.labels).tolist() == [20, 2, 2]


def test_unequal_and_empty_classes():
    stimuli, _ = a_set((30, 20, 25))
    assert np.bincount(long_tailed(stimuli, 2).labels).tolist() == [20, 14, 10]
    with pytest.raises(ValueError, match="no images of c1"):
        long_tailed(a_set((3, 0, 3))[0], 2)
