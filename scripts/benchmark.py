r"""Measures speed, side by side with PyTorch where it is installed.

    python scripts/benchmark.py inference
    python scripts/benchmark.py inference --networks=vgg16 --batch_size=8 --output=speed.json

inference: images a second of whole networks, plain and with Top-K. Leave the machine alone
meanwhile. `taskset -c 0,1 python ...` limits both sides to two cores.
"""

import shlex
import sys

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "benchmark", "inference", ["inference"], "What is measured; also written as the first word."
)
flags.DEFINE_list(
    "networks", "alexnet,vgg16,resnet50,squeezenet1_1", "Networks, separated by commas."
)
flags.DEFINE_string(
    "sparsity",
    "0.1",
    "Kept fractions of each feature map, in (0, 1], separated by commas; the plain networks are "
    "always measured.",
)
flags.DEFINE_integer("batch_size", 32, "Images a call.", lower_bound=1)
flags.DEFINE_integer("image_size", 224, "Side of the images, pixels.", lower_bound=1)
flags.DEFINE_integer("rounds", 5, "How often each candidate is timed.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the random weights and images.", lower_bound=0)
flags.DEFINE_bool("compare", True, "Measure PyTorch too.")
flags.DEFINE_string("output", "", "A .md or .json file to add the results to. Default: none.")


def main(_) -> None:
    sparsities = cli.parse_fractions(FLAGS.sparsity)
    # Compiled anew unless a folder is named: the time that it takes is part of the result.
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir or "")

    from topk_jax.jobs import benchmark_inference

    print(cli.device_line(), flush=True)
    arguments = [word for word in sys.argv[1:] if not word.startswith("--output=")]
    benchmark_inference.run(
        FLAGS.networks,
        sparsities=sparsities,
        batch_size=FLAGS.batch_size,
        image_size=FLAGS.image_size,
        rounds=FLAGS.rounds,
        seed=FLAGS.seed,
        compare=FLAGS.compare,
        output=FLAGS.output,
        command=f"python scripts/benchmark.py {shlex.join(arguments)}",
        report=lambda line: print(line, flush=True),
    )


def with_first_word(argv: list[str]) -> list[str]:
    """Writes `inference` in front as the flag that it stands for."""
    if len(argv) > 1 and not argv[1].startswith("-"):
        return [argv[0], f"--benchmark={argv[1]}", *argv[2:]]
    return argv


if __name__ == "__main__":
    cli.run(main, argv=with_first_word(sys.argv))
