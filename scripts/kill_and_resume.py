r"""Kills a training run again and again (kill -9) and checks that it goes on bit for bit.

    python scripts/kill_and_resume.py --kills=20

Compares the losses, accuracies and weights of killed runs with those of a run that was left alone.
Half of the kills come while a checkpoint is being written. The arguments of the run itself are
those of train.py, given in --train.
"""

import pathlib
import shlex
import sys

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_integer("kills", 20, "Number of kills.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the moments.", lower_bound=0)
flags.DEFINE_string(
    "train",
    "--config=configs/builtin.py --config.data.builtin_images=1024 --config.epochs=4 "
    "--config.log_every=2 --config.checkpoint_every=4 --config.evaluate_every=1 "
    "--config.data.builtin_test_per_category=2 --config.data.cue_conflict=",
    "Flags of train.py; a run of about a minute. Default: a short run of the built-in network.",
)


def main(_) -> None:
    from topk_jax.jobs import kill_and_resume

    script = pathlib.Path(__file__).with_name("train.py")
    result = kill_and_resume.run(
        [sys.executable, str(script), *shlex.split(FLAGS.train)],
        kills=FLAGS.kills,
        seed=FLAGS.seed,
        report=lambda line: print(line, flush=True),
    )
    print(", ".join(f"{name} {value}" for name, value in result.items()))


if __name__ == "__main__":
    cli.run(main)
