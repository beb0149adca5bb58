import pytest

from topk_jax import figures


def records(biased=False):
    made = []
    for step in range(1, 5):
        made.append(
            {"kind": "train", "step": step, "epoch": step / 2, "loss": 1 / step, "accuracy": 0.5}
        )
        if step % 2 == 0:
            check = {"kind": "validation", "step": step, "epoch": step // 2,
                     "accuracy": {"clean": 0.1 * step, "stylized": 0.05 * step}}  # fmt: skip
            if biased:
                check |= {"shape_bias": None if step == 2 else 0.4, "decided_fraction": 0.2 * step}
            made.append(check)
    return made


@pytest.mark.parametrize("biased", [False, True])
def test_panels_hold_the_records(biased):
    figure = figures.training_curves(records(biased), title="run")
    loss, accuracy, *rest = figure.axes
    assert len(rest) == biased
    assert loss.lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5, 2.0]
    assert loss.lines[0].get_ydata().tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    labels = [line.get_label() for line in accuracy.lines]
    assert labels == ["training (with augmentation)", "clean", "stylized"]
    assert accuracy.lines[2].get_ydata().tolist() == pytest.approx([0.1, 0.2])
    if biased:
        bias, decided = (line.get_ydata().tolist() for line in rest[0].lines[:2])
        assert bias[0] != bias[0]  # no decision, no point
        assert bias[1] == 0.4
        assert decided == pytest.approx([0.4, 0.8])


def test_without_validations_or_records():
    only = [record for record in records() if record["kind"] == "train"]
    assert len(figures.training_curves(only).axes) == 2
    with pytest.raises(ValueError, match="no records"):
        figures.training_curves([])
