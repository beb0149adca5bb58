"""The side-by-side measurement of synthesis, on small images."""

import json

import pytest

from topk_jax.jobs import benchmark_synthesis

SMALL = {"preset": "vgg11", "image_size": 32, "rounds": 1}


def run(**changes):
    lines: list[str] = []
    return benchmark_synthesis.run(report=lines.append, **(SMALL | changes)), lines


def test_ours_alone(tmp_path):
    output = tmp_path / "speed.json"
    result, lines = run(compare=False, preset="builtin", evaluations=(3, 6), output=output)
    assert json.loads(output.read_text()) == [json.loads(json.dumps(result))]
    (row,) = result["rows"]
    assert list(row["seconds"]) == [benchmark_synthesis.OURS]
    assert len(result["searches"]) == 3  # the built-in targets
    for search in result["searches"]:
        assert search["losses"][6] <= search["losses"][3]
    assert any(line.startswith("| target") for line in lines)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["all", "top", "rest"])
def test_the_loss_and_its_gradient_are_those_of_pytorch(mode):
    torch = pytest.importorskip("torch")
    import dataclasses

    import jax
    import numpy as np

    from topk_jax import synthesis
    from topk_jax.jobs import synthesize

    preset = dataclasses.replace(synthesis.find_preset("vgg11"), size=(48, 64))
    weights = benchmark_synthesis._random(preset, 0)
    target = synthesize.read_targets("builtin", preset)[0].pixels
    problem = synthesis.create_problem(preset, weights, target, mode=mode)
    image = np.random.default_rng(0).normal(size=problem.shape).astype(np.float32) * 30
    value, gradient = jax.jit(lambda o, x: jax.value_and_grad(o)(x))(problem.objective, image)
    theirs = benchmark_synthesis.TorchTexture(torch, preset, weights, problem, mode=mode)
    expected, slope = theirs.value_and_gradient(theirs.image(image))
    assert float(value) == pytest.approx(expected, rel=1e-4)
    slope = slope.permute(0, 2, 3, 1).numpy()
    assert np.abs(np.asarray(gradient) - slope).max() <= 1e-3 * np.abs(slope).max()


@pytest.mark.parity
def test_three_optimisers_side_by_side():
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    result, lines = run(evaluations=(5, 20))
    assert [search["optimizer"] for search in result["searches"][:3]] == [
        benchmark_synthesis.OURS,
        benchmark_synthesis.TORCH_LBFGS,
        benchmark_synthesis.SCIPY,
    ]
    for search in result["searches"]:
        assert 0 < search["losses"][20] < search["losses"][5] < 1
    assert any("Ours / scipy L-BFGS-B after 20: geometric mean" in line for line in lines)


def test_bad_settings():
    with pytest.raises(ValueError, match="alexnet: expected a preset with a VGG"):
        run(preset="alexnet")
    with pytest.raises(ValueError, match=r"\.md or \.json"):
        run(output="speed.txt")
