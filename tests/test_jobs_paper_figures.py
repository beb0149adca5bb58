"""The paper's panels: what is drawn, and the numbers beside it."""

import json

import numpy as np
import pytest

from topk_jax import images
from topk_jax.jobs import paper_figures, synthesize


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run whose images are drawn, not searched for."""
    rng = np.random.default_rng(0)
    sources = tmp_path / "photos"
    for stem in ("a", "b"):
        images.write_image(
            sources / f"{stem}.png", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        )
    calls = []

    def run(output_dir, **settings):
        calls.append(settings)
        rows = []
        for number, (stem, mode) in enumerate((s, m) for s in "ab" for m in synthesize.MODES):
            name = f"{stem}_{settings['objective']}_{mode}_seed0"
            picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            images.write_image(tmp_path / "out" / f"{name}.png", picture)
            rows.append(
                {"image": name, "target": stem, "mode": mode, "gram_distance": float(number),
                 "activation_distance": 10.0 * number}
            )  # fmt: skip
        return {"images": rows}

    monkeypatch.setattr(synthesize, "run", run)
    return sources, tmp_path / "out", calls


@pytest.mark.parametrize(
    ("figure", "preset", "objective"),
    [("fig2", "li2023", "texture"), ("fig3", "li2023_reconstruction", "reconstruction")],
)
def test_panel_and_numbers(made, figure, preset, objective):
    sources, out, calls = made
    lines: list[str] = []
    summaries = paper_figures.run(figure, out, source=sources, size=(16, 16), report=lines.append)
    (settings,) = calls
    assert (settings["preset"], settings["objective"]) == (preset, objective)
    assert (out / f"{figure}.png").exists()
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers["classifier"] is None
    assert [each["mode"] for each in numbers["modes"]] == ["all", "top", "rest"]
    # Images 0 to 5: modes in turn, targets one after the other.
    assert [each.gram_distance for each in summaries] == [1.5, 2.5, 3.5]
    assert [each.activation_distance for each in summaries] == [15.0, 25.0, 35.0]
    assert lines[-3].split() == ["all", "2", "1.500", "15.000"]


def test_names_are_counted_by_the_class_of_the_target():
    targets = {"a": np.zeros((2, 2, 3), np.uint8), "b": np.ones((2, 2, 3), np.uint8)}
    levels = {"a_all": 2, "a_top": 3, "b_all": 12, "b_top": 13}
    pictures = {key: np.full((2, 2, 3), level, np.uint8) for key, level in levels.items()}
    answers = {0: [0.9, 0.1], 1: [0.2, 0.8], 2: [0.6, 0.4], 3: [0.3, 0.7], 12: [0.1, 0.9],
               13: [0.5, 0.5]}  # fmt: skip
    rows = [
        {"image": f"{t}_{m}", "target": t, "mode": m, "gram_distance": 0.0,
         "activation_distance": 0.0}
        for t in "ab" for m in ("all", "top")
    ]  # fmt: skip

    def name(picture):
        return np.array(answers[int(picture[0, 0, 0])], np.float32)

    both, top = paper_figures.summarize(rows, pictures, targets, name)
    assert (both.n_named, top.n_named) == (2, 0)
    assert both.probability == pytest.approx((0.6 + 0.9) / 2)
    assert top.probability == pytest.approx((0.3 + 0.5) / 2)
    assert both.target_probability == top.target_probability == pytest.approx(0.85)
    lines = paper_figures.format_table([both, top], "net")
    assert lines[1].endswith("2 of 2, 0.750 (0.850)")


def test_unknown_figure(tmp_path):
    with pytest.raises(ValueError, match="unknown figure 'fig4': expected fig2 or fig3"):
        paper_figures.run("fig4", tmp_path, source="photos")
