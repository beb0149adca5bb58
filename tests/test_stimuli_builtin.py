import collections
import re

import numpy as np
import pytest

from topk_jax.stimuli import builtin, shapes, textures
from topk_jax.trials import parse_cue_conflict_name

SETS = (
    builtin.builtin_cue_conflict,
    builtin.builtin_congruent,
    builtin.builtin_silhouettes,
    builtin.builtin_textures,
)


def grey(image):
    return image.astype(np.float64).mean(axis=-1)


def test_sixteen_categories_pair_every_shape_with_its_own_texture():
    assert len(builtin.BUILTIN_CATEGORIES) == 16
    assert all(re.fullmatch("[a-z]+", name) for name in builtin.BUILTIN_CATEGORIES)
    assert sorted(builtin.BUILTIN_CATEGORIES) == sorted(shapes.SHAPES)
    assert sorted(builtin.BUILTIN_TEXTURES.values()) == sorted(textures.TEXTURES)


def test_conflict_set_has_the_design_of_the_real_one():
    stimuli = builtin.builtin_cue_conflict()
    names = [parse_cue_conflict_name(name) for name in stimuli.image_names]
    assert stimuli.name == "cue-conflict"
    assert stimuli.origin == "builtin seed=0"
    assert len(stimuli) == len(set(stimuli.image_names)) == 1280
    assert stimuli.category == tuple(name[0] for name in names)
    assert set(stimuli.condition) == {"NaN"}

    pairs = collections.Counter((shape, texture) for shape, _, texture, _ in names)
    assert len(pairs) == 256
    assert set(pairs.values()) == {5}
    exemplars = collections.Counter((shape, int(i)) for shape, i, _, _ in names)
    assert set(exemplars) == {(c, i) for c in builtin.BUILTIN_CATEGORIES for i in range(1, 11)}
    assert set(exemplars.values()) == {8}
    sources = collections.Counter((texture, int(j)) for _, _, texture, j in names)
    assert set(sources) == {(c, j) for c in builtin.BUILTIN_CATEGORIES for j in (1, 2, 3)}
    assert set(sources.values()) == {26, 27}
    # Within a pair no outline comes twice.
    assert len({(s, i, t) for s, i, t, _ in names}) == 1280


def test_exemplars_fix_what_their_names_say():
    stimuli = builtin.builtin_cue_conflict()
    by_texture, by_shape = collections.defaultdict(list), collections.defaultdict(list)
    for index, name in enumerate(stimuli.image_names):
        shape, i, texture, j = parse_cue_conflict_name(name)
        by_texture[texture, j].append(index)
        by_shape[shape, i].append(index)
    for first, second, *_ in list(by_texture.values())[::6]:
        # The ground, where neither figure is, is the same to the last bit.
        same = np.all(stimuli.load(first) == stimuli.load(second), axis=-1)
        assert 0.1 < same.mean() < 1
    for first, second, *_ in list(by_shape.values())[::20]:
        same = np.all(stimuli.load(first) == stimuli.load(second), axis=-1)
        assert same.mean() < 0.05


@pytest.mark.parametrize("draw", SETS)
def test_images_depend_on_the_seed_alone(draw):
    first, again, other = draw(), draw(seed=0), draw(seed=1)
    assert first.categories == builtin.BUILTIN_CATEGORIES
    assert first.image_names == again.image_names
    for index in range(0, len(first), len(first) // 7):
        image = first.load(index)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, again.load(index))
        assert np.any(image != other.load(index))


@pytest.mark.parametrize("draw", SETS[1:])
def test_single_conditions_are_balanced_and_grow_without_change(draw):
    few, many = draw(per_category=2), draw(per_category=5)
    assert collections.Counter(few.category) == dict.fromkeys(builtin.BUILTIN_CATEGORIES, 2)
    at = {name: index for index, name in enumerate(many.image_names)}
    for index, name in list(enumerate(few.image_names))[::5]:
        np.testing.assert_array_equal(few.load(index), many.load(at[name]))


def test_silhouettes_are_two_greys_with_soft_edges():
    stimuli = builtin.builtin_silhouettes(per_category=2)
    for index in range(len(stimuli)):
        image = stimuli.load(index)
        assert np.all(image == image[..., :1])
        counts = np.sort(np.bincount(image[..., 0].ravel(), minlength=256))[::-1]
        assert counts[:2].sum() > 0.75 * 64 * 64, stimuli.image_names[index]
        low, high = np.flatnonzero(np.isin(np.bincount(image[..., 0].ravel()), counts[:2]))[[0, -1]]
        assert high - low > 40
        assert image.min() == low
        assert image.max() == high
        assert len(set(image[0, :, 0])) == 1  # the figure stays off the rim


def test_textures_have_no_figure():
    # Every quarter is about as bright as the others, and over exemplars none stands out.
    stimuli = builtin.builtin_textures(per_category=12)
    for category in range(16):
        fields = np.stack([grey(stimuli.load(12 * category + k)) for k in range(12)])
        spread = fields.std(axis=(1, 2))
        assert np.all(spread > 8)
        quarters = fields.reshape(12, 2, 32, 2, 32).mean(axis=(2, 4)).reshape(12, 4)
        uneven = (quarters - quarters.mean(axis=1, keepdims=True)) / spread[:, None]
        assert np.abs(uneven).max() < 0.5, builtin.BUILTIN_CATEGORIES[category]
        assert np.abs(uneven.mean(axis=0)).max() < 0.2


@pytest.mark.parametrize("name", textures.TEXTURES)
def test_two_halves_of_a_texture_are_two_samples_of_it(name):
    field = textures.draw_texture(name, np.random.default_rng(3), height=64, width=128)
    assert field.shape == (64, 128)
    assert field.dtype == np.float32
    assert field.min() >= 0
    assert field.max() <= 1
    left, right = field[:, :64], field[:, 64:]
    assert abs(left.mean() - right.mean()) < 0.15
    assert 0.6 < left.std() / right.std() < 1.6
    assert np.mean(left == right) < 0.9


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_silhouettes_cover_a_fair_part_and_stay_inside(shape):
    areas = []
    for seed in range(12):
        mask = shapes.draw_silhouette(shape, np.random.default_rng(seed))
        assert mask.dtype == np.float32
        assert mask.max() == 1
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert 34 <= max(np.ptp(rows), np.ptp(columns)) <= 60
        areas.append(mask.mean())
    assert 0.03 < np.mean(areas) < 0.5
    assert np.std(areas) > 0.005


def test_training_images_are_prefix_stable_and_no_test_images():
    images, labels = builtin.builtin_training_images(48, seed=0)
    fewer, _ = builtin.builtin_training_images(20, seed=0)
    np.testing.assert_array_equal(images[:20], fewer)
    assert images.shape == (48, 64, 64, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), np.full(16, 3))
    tests = builtin.builtin_congruent(seed=0, per_category=3)
    shown = {tests.load(index).tobytes() for index in range(len(tests))}
    assert not shown & {image.tobytes() for image in images}


def test_training_shares_give_the_kinds_asked_for():
    greys, _ = builtin.builtin_training_images(40, seed=1, shares=(0, 1, 0))
    assert np.all(greys == greys[..., :1])
    mixed, _ = builtin.builtin_training_images(400, seed=1, shares=(2, 1, 1))
    share = np.mean([np.all(image == image[..., :1]) for image in mixed])
    assert 0.17 < share < 0.33
    full, labels = builtin.builtin_training_images(32, seed=1, shares=(0, 0, 1))
    spread = full.mean(axis=-1).std(axis=(1, 2))
    assert np.all(spread > 8)
    assert len(labels) == 32


@pytest.mark.parametrize("shares", [(1, 0), (1, -1, 1), (0, 0, 0), (1, np.nan, 0)])
def test_bad_shares_are_refused(shares):
    with pytest.raises(ValueError, match="three numbers"):
        builtin.builtin_training_images(1, shares=shares)


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match="count is -1"):
        builtin.builtin_training_images(-1)
