r"""Trains a network as a config says.

    python scripts/train.py --config=configs/builtin.py --workdir=runs/builtin
    python scripts/train.py --config=configs/imagenette_topk.py --workdir=runs/topk \
        --config.data.path=imagenette2 --config.seed=1

A config's fields are overridden by --config.<field>=<value>; `topk_jax/training/settings.py`
explains them. The same command goes on where it was stopped. On several machines, start it on each
with --distributed: on TPU pods and under Slurm that is all, elsewhere with --coordinator_address,
--num_processes and --process_id.
"""

from absl import flags
from ml_collections import config_flags

from topk_jax import cli

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the experiment, in configs/.")
flags.DEFINE_string(
    "workdir", None, "Folder of the run, the same for all processes; made if missing. No default."
)
flags.DEFINE_bool("distributed", False, "Join other processes; each calls this script.")
flags.DEFINE_string("coordinator_address", None, "host:port of process 0. Default: found.")
flags.DEFINE_integer("num_processes", None, "Number of processes. Default: found.")
flags.DEFINE_integer("process_id", None, "Number of this process, from 0. Default: found.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_) -> None:
    config = _CONFIG.value
    try:
        config.to_dict()
    except OSError as error:  # a file that is not there; ml_collections says so only when asked
        path = config_flags.get_config_filename(FLAGS["config"])
        raise FileNotFoundError(f"--config={path}: no such file; see configs/") from error
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir)

    from topk_jax import parallel  # JAX's backends start after the cache is set
    from topk_jax.jobs import train

    if FLAGS.distributed:
        parallel.initialize(
            coordinator_address=FLAGS.coordinator_address,
            num_processes=FLAGS.num_processes,
            process_id=FLAGS.process_id,
        )
    first = parallel.is_first_process()

    def report(line: str) -> None:
        if first:
            print(line, flush=True)

    report(f"{cli.device_line()}; {config.network}, workdir {FLAGS.workdir}")
    result = train.run(
        config, FLAGS.workdir, report=report, progress=cli.progress if first else None
    )
    for name, value in result["accuracy"].items():
        report(f"{name}: {value:.4f} of {result['n_images'][name]} images")
    if "shape_bias" in result:
        report(
            f"cue conflicts: S {result['n_shape']}, X {result['n_texture']}, "
            f"shape bias {result['shape_bias']:.3f}, decided {result['decided_fraction']:.3f}"
        )
    names = "weights.safetensors, training.png and .pdf, metrics.jsonl, summary.json, checkpoints/"
    report(f"written to {FLAGS.workdir}: {names}")
    report(f"next: python scripts/run_table.py --runs={FLAGS.workdir},<other runs>")


if __name__ == "__main__":
    cli.run(main)
