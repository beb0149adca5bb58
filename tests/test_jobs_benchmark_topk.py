import json

import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import cli
from topk_jax.jobs import benchmark_topk
from topk_jax.jobs.benchmark_topk import Row


def make_row(ours=(1.0, 2.0), authors=(4.0, 4.0)):
    seconds = {"topk_jax": ours, "backward": (2.0, 3.0), "copy": (0.5, 0.5), "authors": authors}
    return Row((2, 7, 7, 8), "float32", 0.1, 1.5, 0.25, seconds | {"best": (2.0, 2.0)}, "kthvalue")


def test_measures_and_keeps_what_was_asked_for(tmp_path):
    lines, output = [], tmp_path / "speed.json"
    result = benchmark_topk.run(
        shapes=[(2, 5, 5, 8)],
        fractions=[0.2],
        dtypes=["float32"],
        data="coarse",
        rounds=2,
        compare=False,
        output=output,
        report=lines.append,
    )
    (row,) = result["rows"]
    assert (row["shape"], row["dtype"], row["fraction"]) == ((2, 5, 5, 8), "float32", 0.2)
    assert set(row["seconds"]) == {"topk_jax", "backward", "copy"}
    assert all(len(seconds) == 2 for seconds in row["seconds"].values())
    assert json.loads(output.read_text())[0]["data"] == "coarse"
    assert any(line.startswith("| 2x5x5x8") for line in lines)


def test_table_has_ratios_and_means():
    lines = benchmark_topk.format_rows([make_row()])
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[3:6] == ["1500.0 (1000.0-2000.0)*", "500.0", "1.75"]
    assert cells[6:8] == ["3.00 (2.00-4.00)", "1.50 (1.00-2.00)"]
    assert "authors 3.00 (smallest 3.00), best 1.50 (smallest 1.50), copy 1/" in "\n".join(lines)


def test_a_wrong_result_is_not_timed():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 5, 3), np.float32))
    with pytest.raises(RuntimeError, match="not the exact Top-K"):
        benchmark_topk._check_exact(x, x, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"data": "uniform"}, "expected one of normal"), ({"shapes": [(2, 5, 5)]}, "four positive")],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_topk.run(**arguments)


def test_shapes_on_the_command_line():
    assert cli.parse_shape("16x28x28x512") == (16, 28, 28, 512)
    for text in ("16x28x28", "0x1x1x1", "axbxcxd"):
        with pytest.raises(ValueError, match="images x height x width x channels"):
            cli.parse_shape(text)


def test_pytorch_forms_compute_the_same():
    torch = pytest.importorskip("torch")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 5, 3), np.float32))
    forms = benchmark_topk.benchmark_torch.topk_forms(torch, x, 0.2)
    assert next(iter(forms)) == "authors"
    for call in forms.values():
        call()
