import csv
import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from topk_jax.decisions import IMAGENET16, Trials, read_trials
from topk_jax.metrics import (
    accuracy,
    compare,
    confusion,
    rank_correlation,
    response_histogram,
    shape_bias,
    wilson_interval,
)

# Image and answer: 3 congruent images, 9 conflicts.
TABLE = [
    ("a1-a1", "a"),
    ("b1-b2", "b"),
    ("c1-c1", "a"),
    ("a1-b1", "a"),  # shape
    ("a1-c1", "a"),  # shape
    ("a2-b2", "b"),  # texture
    ("a2-c1", "b"),  # other
    ("b1-a1", "b"),  # shape
    ("b1-c2", "na"),  # other
    ("b2-c2", "c"),  # texture
    ("c1-a1", "na"),  # other
    ("c2-b1", "a"),  # other
]


def table(rows, subject="x"):
    names, answers = zip(*rows, strict=True)
    return Trials.of_network(
        subject, answers, category=[n[0] for n in names], imagename=[f"{n}.png" for n in names]
    )


def conflict_set():
    """Names and shapes of a set like the published one: 16 x 10 exemplars x 8 textures."""
    names, shapes = [], []
    for s, shape in enumerate(IMAGENET16.names):
        for exemplar in range(10):
            for t in range(8):
                texture = IMAGENET16.names[(s + 2 * t + exemplar % 2) % 16]
                names.append(f"{shape}{exemplar + 1}-{texture}1.png")
                shapes.append(shape)
    return names, shapes


def observer(names, shapes, decisions):
    return Trials.of_network("x", decisions, category=shapes, imagename=names)


def test_a_table_worked_by_hand():
    result = shape_bias(table(TABLE))
    assert (result.n_images, result.n_conflict, result.n_excluded) == (12, 9, 3)
    assert (result.n_shape, result.n_texture, result.n_other) == (3, 2, 4)
    assert result.shape_fraction == 3 / 9
    assert result.texture_fraction == 2 / 9
    assert result.decided_fraction == 5 / 9
    assert result.shape_bias == 3 / 5
    assert result.accuracy == 5 / 12
    assert result.congruent_accuracy == 2 / 3
    assert result.response_histogram == {"a": 5, "b": 4, "c": 1, "na": 2}
    assert list(result.response_histogram) == ["a", "b", "c", "na"]
    a, b, c = (result.per_category[name] for name in "abc")
    assert (a.n_conflict, a.n_shape, a.n_texture, a.n_other, a.shape_bias) == (4, 2, 1, 1, 2 / 3)
    assert (b.n_conflict, b.n_shape, b.n_texture, b.n_other, b.shape_bias) == (3, 1, 1, 1, 1 / 2)
    assert (c.n_conflict, c.n_shape, c.n_texture, c.n_other) == (2, 0, 0, 2)
    assert (a.decided_fraction, b.decided_fraction, c.decided_fraction) == (3 / 4, 2 / 3, 0)
    assert math.isnan(c.shape_bias)
    assert result.shape_bias_category_mean == pytest.approx((2 / 3 + 1 / 2) / 2, rel=1e-15)
    assert result.n_categories_decided == 2
    assert result.shape_bias_ci95 == wilson_interval(3, 5)
    assert result.decided_fraction_ci95 == wilson_interval(5, 9)
    assert result.chance_decided == 2 / 3


def test_results_become_json():
    result = shape_bias(table(TABLE))
    again = json.loads(json.dumps(result.as_dict()))
    assert again["n_shape"] == 3
    assert again["shape_bias_ci95"] == list(result.shape_bias_ci95)
    assert again["per_category"]["a"]["n_texture"] == 1
    assert math.isnan(again["per_category"]["c"]["shape_bias"])
    assert again["warnings"] == list(result.warnings)
    issue = (
        "n_images n_conflict n_excluded n_shape n_texture n_other shape_fraction shape_bias "
        "shape_bias_ci95 shape_bias_ci95_bootstrap shape_bias_category_mean decided_fraction "
        "accuracy congruent_accuracy response_histogram per_category warnings"
    )
    assert set(issue.split()) <= set(again)


def test_observers_are_pooled():
    first, second = table(TABLE, "subject-01"), table(TABLE[3:6], "subject-02")
    pooled = shape_bias(Trials.concatenate([first, second]))
    assert (pooled.n_images, pooled.n_shape, pooled.n_texture) == (15, 5, 3)
    assert pooled.shape_bias == 5 / 8


def test_categories_give_the_order_and_the_level_of_chance():
    result = shape_bias(table(TABLE), categories=("d", "c", "b", "a"))
    assert list(result.per_category) == ["d", "c", "b", "a"]
    assert list(result.response_histogram) == ["d", "c", "b", "a", "na"]
    assert result.per_category["d"].n_conflict == 0
    assert math.isnan(result.per_category["d"].shape_bias)
    assert result.chance_decided == 1 / 2
    assert result.shape_bias == 3 / 5
    with pytest.raises(ValueError, match="category 'c' is in the trials but not among"):
        shape_bias(table(TABLE), categories=("a", "b"))


def test_textures_that_are_no_shape_are_categories_too():
    result = shape_bias(table([("a1-b1", "b"), ("a1-c1", "a")]))
    assert list(result.per_category) == ["a", "b", "c"]
    assert result.shape_bias == 1 / 2


def test_no_decision_is_nan_and_said():
    result = shape_bias(table([(name, "na") for name, _ in TABLE]))
    assert (result.n_shape, result.n_texture, result.n_other) == (0, 0, 9)
    assert result.decided_fraction == 0
    for value in (
        result.shape_bias,
        result.shape_bias_category_mean,
        *result.shape_bias_ci95,
        *result.shape_bias_ci95_bootstrap,
    ):
        assert math.isnan(value)
    assert result.n_categories_decided == 0
    assert result.at_chance
    assert any(line.startswith("no decision") for line in result.warnings)


def test_no_conflict_image_is_nan_and_said():
    result = shape_bias(table(TABLE[:3]))
    assert (result.n_conflict, result.n_excluded) == (0, 3)
    assert math.isnan(result.decided_fraction)
    assert math.isnan(result.shape_bias)
    assert result.congruent_accuracy == 2 / 3
    assert [line[:17] for line in result.warnings] == ["no conflict image"]


def test_no_congruent_image_is_nan():
    assert math.isnan(shape_bias(table(TABLE[3:])).congruent_accuracy)


def test_no_trials_are_an_error():
    empty = table(TABLE).select([])
    for function in (shape_bias, response_histogram, confusion):
        with pytest.raises(ValueError, match="no trials"):
            function(empty)
    assert math.isnan(accuracy(empty))


def test_accuracy_histogram_and_confusion():
    trials = table([*TABLE, ("a3-b1", "zebra")])
    assert accuracy(trials) == 5 / 13
    histogram = response_histogram(trials, categories="abcd")
    assert histogram == {"a": 5, "b": 4, "c": 1, "d": 0, "na": 2, "zebra": 1}
    assert list(histogram) == ["a", "b", "c", "d", "na", "zebra"]
    expected = [[1, 1, 1], [3, 0, 2], [2, 2, 0], [0, 1, 0]]
    assert confusion(trials).tolist() == expected
    with pytest.raises(ValueError, match="category 'c' is in the trials"):
        confusion(trials, categories="ab")


def test_answers_that_are_no_category_are_other_and_named():
    result = shape_bias(table([*TABLE, ("a3-b1", "zebra")]))
    assert result.n_other == 5
    assert any(
        "answers that are no category: 1, such as 'zebra'" in line for line in result.warnings
    )


@pytest.mark.parametrize("n", [1, 7, 385, 12_000])
@pytest.mark.parametrize("confidence", [0.95, 0.6])
def test_wilson_interval_is_scipys(n, confidence):
    for k in {0, 1, n // 3, n - 1, n}:
        test = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        expected = (test.low, test.high)
        assert wilson_interval(k, n, confidence=confidence) == pytest.approx(expected, abs=1e-12)
    assert wilson_interval(0, n)[0] == 0
    assert wilson_interval(n, n)[1] == 1


@given(st.integers(0, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_fraction(counts):
    k, n = counts
    low, high = wilson_interval(k, n)
    if n == 0:
        assert math.isnan(low)
        assert math.isnan(high)
        return
    assert 0 <= low <= k / n <= high <= 1
    mirrored = wilson_interval(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(-1, 3, 0.9), (4, 3, 0.9), (1, 3, 1), (1, 3, 0)]
)
def test_wilson_interval_checks_its_arguments(k, n, confidence):
    with pytest.raises(ValueError, match=r"expected 0 <= k <= n and a confidence in \(0, 1\)"):
        wilson_interval(k, n, confidence=confidence)


def clustered_trials():
    """Shape exemplars that differ a lot, so that clustering matters."""
    names, shapes = conflict_set()
    rng = np.random.default_rng(3)
    bias = {name.split("-")[0]: rng.random() for name in names}
    decisions = []
    for name, shape in zip(names, shapes, strict=True):
        texture = name.split("-")[1].removesuffix("1.png")
        draw = rng.random()
        decisions.append(
            "na" if draw < 0.3 else shape if rng.random() < bias[name.split("-")[0]] else texture
        )
    return observer(names, shapes, decisions)


def resampled_biases(trials, draws):
    """Shape bias of each resample, trial by trial; `draws` lists exemplars."""
    rows = {}
    columns = (trials.shape_exemplar, trials.category, trials.texture, trials.object_response)
    for exemplar, shape, texture, answer in zip(*(c.tolist() for c in columns), strict=True):
        if shape != texture:
            rows.setdefault(exemplar, []).append((answer == shape, answer == texture))
    biases = []
    for draw in draws:
        drawn = [row for exemplar in draw for row in rows[exemplar]]
        s, x = sum(row[0] for row in drawn), sum(row[1] for row in drawn)
        biases.append(s / (s + x))
    return biases


def test_bootstrap_resamples_shape_exemplars():
    trials = clustered_trials()
    result = shape_bias(trials, bootstrap=400, seed=5)
    exemplars = sorted(set(trials.shape_exemplar.tolist()))
    assert len(exemplars) == 160

    # The same resamples, counted one trial at a time.
    weights = np.random.default_rng(5).multinomial(160, np.full(160, 1 / 160), size=400)
    draws = [np.repeat(exemplars, row).tolist() for row in weights]
    expected = np.percentile(resampled_biases(trials, draws), [2.5, 97.5])
    assert result.shape_bias_ci95_bootstrap == pytest.approx(tuple(expected), abs=1e-12)

    # Resamples of another kind: the ends agree within their own scatter.
    rng = np.random.default_rng(0)
    draws = [[exemplars[i] for i in rng.integers(0, 160, 160)] for _ in range(400)]
    expected = np.percentile(resampled_biases(trials, draws), [2.5, 97.5])
    many = shape_bias(trials, bootstrap=4000).shape_bias_ci95_bootstrap
    assert many == pytest.approx(tuple(expected), abs=0.015)
    assert many[1] - many[0] > 1.3 * (result.shape_bias_ci95[1] - result.shape_bias_ci95[0])


def test_bootstrap_is_repeatable_and_can_be_left_out():
    trials = clustered_trials()
    first = shape_bias(trials, seed=1).shape_bias_ci95_bootstrap
    assert shape_bias(trials, seed=1).shape_bias_ci95_bootstrap == first
    assert shape_bias(trials, seed=2).shape_bias_ci95_bootstrap != first
    assert np.isnan(shape_bias(trials, bootstrap=0).shape_bias_ci95_bootstrap).all()
    one_picture = table([("a1-b1", "a"), ("a1-c1", "c")])
    assert np.isnan(shape_bias(one_picture).shape_bias_ci95_bootstrap).all()


def test_guessing_is_flagged():
    names, shapes = conflict_set()
    flagged = 0
    for seed in range(40):
        guesses = np.random.default_rng(seed).choice(IMAGENET16.names, len(names))
        result = shape_bias(observer(names, shapes, guesses), bootstrap=0)
        flagged += result.at_chance
        assert result.at_chance == any("chance" in line for line in result.warnings)
        assert abs(result.decided_fraction - 0.125) < 0.05
    assert flagged >= 35  # a 95 % interval misses chance in one of twenty, half of them below


def test_one_answer_to_everything_is_flagged_twice():
    names, shapes = conflict_set()
    result = shape_bias(observer(names, shapes, ["knife"] * len(names)))
    assert result.decided_fraction == pytest.approx(0.125, abs=0.01)
    assert [line.split(":")[0] for line in result.warnings] == [
        "at chance",
        "one response dominates",
    ]
    assert "'knife' is 100% of the answers (1280 of 1280)" in result.warnings[1]


def test_avoiding_both_cues_is_flagged():
    names, shapes = conflict_set()
    order = IMAGENET16.names
    decisions = []
    for name, shape in zip(names, shapes, strict=True):
        own = {shape, name.split("-")[1].removesuffix("1.png")}
        decisions.append(next(c for c in order[order.index(shape) :] + order if c not in own))
    decisions[0] = shapes[0]
    decisions[1] = shapes[1]
    result = shape_bias(observer(names, shapes, decisions))
    assert result.n_shape + result.n_texture <= 2
    assert result.at_chance
    assert result.warnings[0].startswith("below chance")


def test_a_network_that_decides_is_not_flagged():
    names, shapes = conflict_set()
    result = shape_bias(observer(names, shapes, shapes))
    assert result.warnings == ()
    assert not result.at_chance
    assert (result.shape_bias, result.decided_fraction, result.accuracy) == (1, 1, 1)
    assert result.shape_bias_ci95_bootstrap == (1, 1)


def test_compare_worked_by_hand():
    first = table(TABLE)
    answers = ["a", "b", "c", "b", "a", "a", "a", "b", "b", "b", "c", "c"]
    second = table([(name, answer) for (name, _), answer in zip(TABLE, answers, strict=True)])
    result = compare(first, second.select(np.arange(12)[::-1]))  # in any order
    # Shape answers: first a1-b1, a1-c1, b1-a1; second all but a1-b1.
    assert (result.n_conflict, result.n_both) == (9, 2)
    assert (result.n_only_first, result.n_only_second) == (1, 6)
    assert result.mcnemar_p == pytest.approx(2 * (1 + 7) / 2**7, rel=1e-15)
    assert result.shape_fraction_difference == (3 - 8) / 9
    assert result.shape_bias_difference == pytest.approx(3 / 5 - 8 / 9, rel=1e-14)
    low, high = result.shape_fraction_difference_ci95
    assert low < result.shape_fraction_difference < high
    swapped = compare(second, first)
    assert swapped.mcnemar_p == result.mcnemar_p
    assert swapped.shape_fraction_difference == -result.shape_fraction_difference


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (3, 3), (94, 190), (700, 640)])
def test_mcnemar_is_scipys_binomial_test(b, c):
    names = [f"a{i + 1}-b1" for i in range(b + c + 4)]
    first = table([(n, "a" if i < b else "b") for i, n in enumerate(names)])
    second = table([(n, "a" if b <= i < b + c else "b") for i, n in enumerate(names)])
    result = compare(first, second, bootstrap=0)
    assert (result.n_only_first, result.n_only_second) == (b, c)
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1
    assert result.mcnemar_p == pytest.approx(expected, rel=1e-9)
    assert np.isnan(result.shape_bias_difference_ci95).all()


def test_paired_bootstrap_agrees_with_a_loop():
    first = clustered_trials()
    second = first.select(np.arange(len(first)))
    answers = np.where(np.arange(len(first)) % 5 == 0, first.category, first.object_response)
    second = observer(first.imagename, first.category, answers)
    result = compare(first, second, bootstrap=300)
    s1, s2, x1, x2 = (
        (t.object_response == what)[first.category != first.texture]
        for what in (first.category, first.texture)
        for t in (first, second)
    )
    rng = np.random.default_rng(11)
    differences = []
    for _ in range(600):
        i = rng.integers(0, len(s1), len(s1))
        a, b = s1[i].sum() / (s1 | x1)[i].sum(), s2[i].sum() / (s2 | x2)[i].sum()
        differences.append((a - b, s1[i].mean() - s2[i].mean()))
    bias, fraction = np.percentile(differences, [2.5, 97.5], axis=0).T
    assert result.shape_bias_difference_ci95 == pytest.approx(tuple(bias), abs=0.01)
    assert result.shape_fraction_difference_ci95 == pytest.approx(tuple(fraction), abs=0.01)
    same = compare(first, first)
    assert same.shape_bias_difference_ci95 == (0, 0)
    assert same.mcnemar_p == 1


def test_compare_needs_the_same_images():
    trials = table(TABLE)
    with pytest.raises(ValueError, match=r"1 are in one only, such as 'c2-b1\.png'"):
        compare(trials, trials.select(np.arange(11)))
    twice = Trials.concatenate([trials, trials])
    with pytest.raises(ValueError, match=r"image 'a1-a1\.png' occurs 2 times"):
        compare(twice, twice)
    with pytest.raises(ValueError, match="no conflict image"):
        compare(trials.select(np.arange(3)), trials.select(np.arange(3)))


# Published data.


@pytest.fixture(scope="module")
def cue_conflict(shared):
    trials = read_trials(shared / "raw-data/cue-conflict")
    tables = {str(s): trials.select(trials.subj == s) for s in np.unique(trials.subj)}
    people = [name for name in tables if name.startswith("subject-")]
    tables["humans"] = Trials.concatenate(tables[name] for name in people)
    return tables


def numbers(result):
    """Our numbers under the names of the reference tables."""
    return {
        "n-shape": result.n_shape,
        "n-texture": result.n_texture,
        "n-conflict": result.n_conflict,
        "n-all": result.n_images,
        "n-trials": result.n_images,
        "shape-bias": result.shape_bias,
        "shape-bias-published-formula": result.shape_bias,
        "shape-bias-category-mean": result.shape_bias_category_mean,
        "fraction-shape-all": result.n_shape / result.n_images,
        "fraction-texture-all": result.n_texture / result.n_images,
        "shape-accuracy-conflict": result.shape_fraction,
        "texture-accuracy-conflict": result.texture_fraction,
        "accuracy-either": result.decided_fraction,
        "accuracy": result.accuracy,
        "na-fraction": result.response_histogram["na"] / result.n_images,
    }


def check_reference(rows, results):
    """Compares to the nine digits given; returns how many numbers were compared."""
    compared = 0
    for row in rows:
        subject, condition, metric = row["subject"], row["condition"], row["metric"]
        if row.get("subject2") or subject not in results:
            continue
        if condition.startswith("shape="):
            own = results[subject].per_category[condition.removeprefix("shape=")]
            ours = {
                "n-shape": own.n_shape,
                "n-texture": own.n_texture,
                "shape-bias": own.shape_bias,
            }[metric]
        else:
            ours = numbers(results[subject]).get(metric)
        if ours is not None:
            assert f"{ours:.9g}" == row["value"], (subject, condition, metric)
            compared += 1
    return compared


@pytest.mark.real
def test_shape_bias_of_the_published_tables(shared, cue_conflict):
    with open(shared / "reference/model_vs_human.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "cue-conflict"]
    results = {name: shape_bias(trials, bootstrap=0) for name, trials in cue_conflict.items()}
    assert check_reference(rows, results) > 15 * (16 * 3 + 10)
    assert f"{results['humans'].shape_bias:.9g}" == "0.95868798"
    people = [result.shape_bias for name, result in results.items() if name[:8] == "subject-"]
    reference = {row["metric"]: row["value"] for row in rows if row["subject"] == "humans"}
    assert f"{np.mean(people):.9g}" == reference["shape-bias-subject-mean"]
    assert f"{np.std(people, ddof=1):.9g}" == reference["shape-bias-subject-sd"]


@pytest.mark.real
def test_shape_bias_of_2018(shared):
    with open(shared / "reference/geirhos2018.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == "cue-conflict"]
    names = {"alexnet": "alexnet-caffe", "googlenet": "googlenet-caffe", "vgg": "vgg-caffe"}
    results = {}
    for folder in sorted((shared / "raw-data-2018").iterdir()):
        trials = read_trials(folder)
        for subject in np.unique(trials.subj).tolist():
            name = names.get(subject, subject)
            results[name] = shape_bias(trials.select(trials.subj == subject), bootstrap=0)
    assert len(results) == 5
    assert check_reference(rows, results) >= 5 * (16 + 7)


# Spec of the method, table of published results: S, X, decided, pooled, interval, mean over
# categories, accuracy, congruent right.
PUBLISHED = {
    "AlexNet_normal": (181, 575, 0.6300, 0.2394, 0.210, 0.271, 0.2248, 0.1891, 61),
    "AlexNet_topK_50": (252, 327, 0.4825, 0.4352, 0.395, 0.476, 0.3787, 0.2391, 54),
    "AlexNet_topK_40": (291, 250, 0.4508, 0.5379, 0.496, 0.579, 0.4463, 0.2664, 50),
    "AlexNet_topK_30": (302, 175, 0.3975, 0.6331, 0.589, 0.675, 0.5093, 0.2711, 45),
    "AlexNet_topK_20": (333, 136, 0.3908, 0.7100, 0.667, 0.749, 0.5870, 0.2961, 46),
    "AlexNet_topK_10": (277, 108, 0.3208, 0.7195, 0.673, 0.762, 0.5847, 0.2398, 30),
    "AlexNet_topK_5": (186, 109, 0.2458, 0.6305, 0.574, 0.684, 0.4976, 0.1609, 20),
    "VGG_normal": (77, 892, 0.8075, 0.0795, 0.064, 0.098, 0.0766, 0.1156, 71),
    "VGG_topK_10": (303, 243, 0.4550, 0.5549, 0.513, 0.596, 0.4569, 0.2727, 46),
    "vit_large_patch16_224": (508, 436, 0.7867, 0.5381, 0.506, 0.570, 0.5137, 0.4570, 77),
    "clip": (488, 363, 0.7092, 0.5734, 0.540, 0.606, 0.5447, 0.4406, 76),
}


@pytest.mark.real
@pytest.mark.parametrize("subject", PUBLISHED)
def test_published_networks(cue_conflict, subject):
    result = shape_bias(cue_conflict[subject], bootstrap=500)
    s, x, decided, pooled, low, high, mean, right, congruent = PUBLISHED[subject]
    assert (result.n_shape, result.n_texture, result.n_excluded) == (s, x, 80)
    assert result.congruent_accuracy == congruent / 80
    assert result.decided_fraction == pytest.approx(decided, abs=5.1e-5)
    assert result.shape_bias == pytest.approx(pooled, abs=5.1e-5)
    assert result.shape_bias_ci95 == pytest.approx((low, high), abs=5.1e-4)
    assert result.shape_bias_category_mean == pytest.approx(mean, abs=5.1e-5)
    assert result.accuracy == pytest.approx(right, abs=5.1e-5)
    low, high = result.shape_bias_ci95_bootstrap
    assert low < result.shape_bias < high
    assert not result.at_chance
    assert not any("chance" in line for line in result.warnings)
    dominated = subject in ("AlexNet_topK_20", "AlexNet_topK_10", "AlexNet_topK_5")
    assert any("dominates" in line for line in result.warnings) == dominated


@pytest.mark.real
@pytest.mark.parametrize("subject", ["AlexNet_normal", "VGG_topK_10", "humans"])
def test_a_shuffled_network_is_flagged(cue_conflict, subject):
    """Its own answers, each given to another image: nothing is left but their frequencies."""
    trials = cue_conflict[subject].select(np.arange(1280))
    assert not shape_bias(trials, bootstrap=0).at_chance
    flagged = 0
    for seed in range(20):
        answers = np.random.default_rng(seed).permutation(trials.object_response)
        result = shape_bias(observer(trials.imagename, trials.category, answers), bootstrap=0)
        flagged += result.at_chance and "chance" in result.warnings[0]
    assert flagged >= 17


@pytest.mark.real
def test_accuracy_of_all_datasets(shared):
    with open(shared / "reference/model_vs_human.csv", newline="") as file:
        reference = {
            (row["dataset"], row["subject"]): row["value"]
            for row in csv.DictReader(file)
            if (row["condition"], row["metric"]) == ("all", "accuracy")
        }
    datasets = sorted((shared / "raw-data").iterdir())
    assert len(datasets) == 17
    compared = 0
    for path in datasets:
        trials = read_trials(path)
        for subject in np.unique(trials.subj).tolist():
            value = reference.get((path.name, subject))
            if value is not None:
                own = trials.select(trials.subj == subject)
                assert f"{accuracy(own):.9g}" == value
                compared += 1
    assert compared > 80


@pytest.mark.real
def test_top_k_against_the_plain_network(cue_conflict):
    result = compare(cue_conflict["AlexNet_topK_10"], cue_conflict["AlexNet_normal"])
    assert result.n_both + result.n_only_first == 277
    assert result.n_both + result.n_only_second == 181
    assert result.shape_fraction_difference_ci95[0] > 0
    expected = scipy.stats.binomtest(
        result.n_only_first, result.n_only_first + result.n_only_second
    ).pvalue
    assert result.mcnemar_p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 8, 12), rng.normal(size=12)
    expected = scipy.stats.spearmanr(a, b).statistic
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_of_what_has_no_ranks():
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, math.nan], [1, 2]))
    assert rank_correlation([3, 2, 1], [10, 20, 30]) == pytest.approx(-1)
    with pytest.raises(ValueError, match="same length"):
        rank_correlation([1, 2], [1, 2, 3])
