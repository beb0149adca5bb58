"""Trains a network: python scripts/train.py --config=configs/builtin.py --workdir=runs/builtin.

Overrides: --config.epochs=2 and so on. Writes weights.safetensors, metrics.jsonl and summary.json.
"""

from absl import flags
from ml_collections import config_flags

from topk_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the experiment, in configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; made if missing.", required=True
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    try:
        config.to_dict()
    except OSError as error:  # a file that is not there; ml_collections says so only when asked
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise FileNotFoundError(f"--config={path}: no such file; see configs/") from error
    cli.enable_compilation_cache(flags.FLAGS.compilation_cache_dir)
    from topk_jax import training  # JAX's backends start after the cache is set

    print(cli.device_line(), flush=True)
    result = training.train_builtin(
        config, _WORKDIR.value, report=lambda line: print(line, flush=True)
    )
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print(f"written to {_WORKDIR.value}: weights.safetensors, metrics.jsonl, summary.json")


if __name__ == "__main__":
    cli.run(main)
