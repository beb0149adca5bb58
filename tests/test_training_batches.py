import itertools

import numpy as np
import pytest

from topk_jax.stimuli import Stimuli
from topk_jax.training import Batches, iterate


def numbered(count, *, broken=()):
    """Stimuli whose pixels say which one it is; labels are the number modulo 3."""

    def load(index):
        if index in broken:
            raise ValueError(f"image {index} is damaged")
        return np.full((2, 2, 3), index, np.uint8)

    return Stimuli(
        "numbered", ("a", "b", "c"), tuple(map(str, range(count))),
        tuple("abc"[i % 3] for i in range(count)), ("NaN",) * count, load, "memory",
    )  # fmt: skip


def unchanged(rng, image):
    return image


def rows(batch):
    """Numbers of the valid images of a batch."""
    return batch["image"][..., 0, 0, 0][batch["mask"]].tolist()


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own():
    batches = Batches(numbered(50), unchanged, batch_size=16, epochs=2, seed=5, devices=8)
    assert len(batches) == 8
    assert batches.steps_per_epoch == 4
    epochs = []
    for epoch in range(2):
        made = [batches[4 * epoch + i] for i in range(4)]
        assert [batch["mask"].sum() for batch in made] == [16, 16, 16, 2]
        assert {batch["image"].shape for batch in made} == {(8, 2, 2, 2, 3)}
        for batch in made:
            np.testing.assert_array_equal(batch["image"][..., 0, 0, 0] % 3, batch["label"])
        epochs.append([row for batch in made for row in rows(batch)])
        expected = np.random.default_rng([5, epoch]).permutation(50)
        assert epochs[-1] == expected.tolist()
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(processes):
    def parts(process, of, devices):
        return Batches(
            numbered(21), unchanged, batch_size=8, epochs=1, seed=0, devices=devices,
            process=(process, of),
        )  # fmt: skip

    whole = parts(0, 1, 4)
    shared = [parts(process, processes, 4 // processes) for process in range(processes)]
    for step in range(len(whole)):
        together = [row for part in shared for row in rows(part[step])]
        assert sorted(together) == sorted(rows(whole[step]))
        assert {part[step]["label"].size for part in shared} == {8 // processes}


def test_a_batch_depends_on_its_number_alone():
    def noisy(rng, image):
        return image + rng.integers(0, 100, image.shape).astype(np.uint8)

    options = {"batch_size": 4, "epochs": 3, "seed": 1}
    one = Batches(numbered(10), noisy, **options)
    in_order = [one[step] for step in range(len(one))]
    for threads in (0, 3):
        other = Batches(numbered(10), noisy, **options)
        started = list(iterate(other, start=5, threads=threads))
        assert len(started) == len(one) - 5
        for expected, found in zip(in_order[5:], started, strict=True):
            np.testing.assert_array_equal(expected["image"], found["image"])
            np.testing.assert_array_equal(expected["mask"], found["mask"])
    # the same image in two epochs is augmented anew
    first, second = (
        {int(label): None for label in in_order[step]["image"][0, :, 0, 0, 0]} for step in (0, 3)
    )
    assert first.keys() != second.keys()


def test_damaged_images_are_left_out_and_counted():
    batches = Batches(numbered(10, broken=(2, 7)), unchanged, batch_size=4, epochs=2, seed=0)
    shown = [row for batch in itertools.islice(iterate(batches), 3) for row in rows(batch)]
    assert sorted(shown) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert batches.skipped == {2, 7}


def test_a_batch_of_damaged_images_alone_counts_for_nothing():
    batches = Batches(numbered(3, broken=(0, 1)), unchanged, batch_size=1, epochs=1, seed=0)
    assert sorted(int(batch["mask"].sum()) for batch in iterate(batches)) == [0, 0, 1]
    nothing = Batches(numbered(2, broken=(0, 1)), unchanged, batch_size=2, epochs=1, seed=0)
    with pytest.raises(ValueError, match="none of its 2 images can be read"):
        nothing[0]


def test_strict_runs_end_at_a_damaged_image():
    batches = Batches(
        numbered(4, broken=(1,)), unchanged, batch_size=4, epochs=1, seed=0, strict=True
    )
    with pytest.raises(ValueError, match="image 1 is damaged"):
        next(iterate(batches))


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"batch of 30 cannot be shared evenly by 8 .* example 32"):
        Batches(numbered(40), unchanged, batch_size=30, epochs=1, seed=0, devices=8)
    with pytest.raises(ValueError, match="memory: no images"):
        Batches(numbered(0), unchanged, batch_size=4, epochs=1, seed=0)
