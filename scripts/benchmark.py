r"""Measures speed, side by side with PyTorch where it is installed.

    python scripts/benchmark.py inference
    python scripts/benchmark.py inference --networks=vgg16 --batch_size=8 --output=speed.json
    python scripts/benchmark.py topk --shapes=16x28x28x512 --sparsity=0.05,0.5
    python scripts/benchmark.py synthesis --input=photos --weights=normalised --evaluations=150,500
    python scripts/benchmark.py training --input=imagenette96/train

inference: images a second of whole networks, plain and with Top-K. topk: the activation alone.
synthesis: an evaluation of the texture loss and, with --evaluations, whole searches.
training: steps of ResNets, plain and with Top-K after stage 2; memory, more devices, the input.
Leave the machine alone meanwhile. `taskset -c 0,1 python ...` limits both sides to two cores.
"""

import shlex
import sys

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "benchmark",
    "inference",
    ["inference", "topk", "synthesis", "training"],
    "What is measured; also written as the first word.",
)
flags.DEFINE_list(
    "networks",
    None,
    "Networks, separated by commas. Default: alexnet,vgg16,resnet50,squeezenet1_1 for inference, "
    "resnet18,resnet32 for training.",
)
flags.DEFINE_string(
    "sparsity",
    "",
    "Kept fractions of each feature map, in (0, 1], separated by commas. Default: 0.1 for "
    "inference and 0.2 for training, where the plain networks are always measured; "
    "0.05,0.1,0.2,0.5 for topk.",
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "inference, training: images a call. Default: 32 for inference; for training 128 of the "
    "networks for small images, 64 of the others.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "image_size",
    None,
    "Side of the images, pixels. Default: 224 for inference, 256 for synthesis; for training 32 "
    "with the networks for small images, 64 with the others.",
    lower_bound=1,
)
flags.DEFINE_string("preset", "li2023", "synthesis: as in synthesize.py, of a VGG.")
flags.DEFINE_string("weights", None, "synthesis: a tag or a file. Default: random.")
flags.DEFINE_string(
    "input",
    "builtin",
    "synthesis: builtin, a picture, or a folder of pictures. training: builtin, or a folder of "
    "class folders.",
)
flags.DEFINE_list(
    "devices",
    "1,2,4",
    "training: numbers of devices that a batch is divided among, fake ones on a CPU. Empty: none.",
)
flags.DEFINE_list("mode", "all", "synthesis: all, top, rest, separated by commas.")
flags.DEFINE_list(
    "evaluations",
    None,
    "synthesis: budgets at which L-BFGS is compared with PyTorch's and SciPy's. Default: none.",
)
flags.DEFINE_list("shapes", "", "topk: shapes, as 16x28x28x512 (NHWC). Default: thirteen.")
flags.DEFINE_list("dtypes", "float32,bfloat16", "topk: types, separated by commas.")
flags.DEFINE_enum(
    "data",
    "normal",
    ["normal", "relu", "coarse"],
    "topk: unit normal numbers, with half of them zero, or in quarter steps with many ties.",
)
flags.DEFINE_integer("rounds", 5, "How often each candidate is timed.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the random weights and images.", lower_bound=0)
flags.DEFINE_bool("compare", True, "Measure PyTorch too.")
flags.DEFINE_string("output", "", "A .md or .json file to add the results to. Default: none.")


def main(_) -> None:
    fractions = cli.parse_fractions(FLAGS.sparsity) if FLAGS.sparsity else None
    shapes = [cli.parse_shape(text) for text in FLAGS.shapes]
    # Compiled anew unless a folder is named: the time that it takes is part of the result.
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir or "")

    from topk_jax.jobs import (
        benchmark_inference,
        benchmark_synthesis,
        benchmark_topk,
        benchmark_training,
        synthesize,
    )

    print(cli.device_line(), flush=True)
    arguments = [word for word in sys.argv[1:] if not word.startswith("--output=")]
    common = {
        "rounds": FLAGS.rounds,
        "seed": FLAGS.seed,
        "compare": FLAGS.compare,
        "output": FLAGS.output,
        "command": f"python scripts/benchmark.py {shlex.join(arguments)}",
        "report": lambda line: print(line, flush=True),
    }
    if FLAGS.benchmark == "topk":
        benchmark_topk.run(
            shapes=shapes or benchmark_topk.SHAPES,
            fractions=fractions or benchmark_topk.FRACTIONS,
            dtypes=FLAGS.dtypes,
            data=FLAGS.data,
            **common,
        )
        return
    if FLAGS.benchmark == "synthesis":
        benchmark_synthesis.run(
            preset=FLAGS.preset,
            weights=FLAGS.weights,
            source=FLAGS.input,
            modes=cli.parse_choices(FLAGS.mode, synthesize.MODES, flag="mode"),
            image_size=FLAGS.image_size or 256,
            evaluations=cli.parse_counts(FLAGS.evaluations or [], flag="evaluations"),
            **common,
        )
        return
    if FLAGS.benchmark == "training":
        benchmark_training.run(
            FLAGS.networks or benchmark_training.NETWORKS,
            sparsities=fractions or (0.2,),
            batch_size=FLAGS.batch_size,
            image_size=FLAGS.image_size,
            devices=cli.parse_counts(FLAGS.devices, flag="devices"),
            source=FLAGS.input,
            **common,
        )
        return
    benchmark_inference.run(
        FLAGS.networks or benchmark_inference.NETWORKS,
        sparsities=fractions or (0.1,),
        batch_size=FLAGS.batch_size or 32,
        image_size=FLAGS.image_size or 224,
        **common,
    )


if __name__ == "__main__":
    cli.run(main, argv=cli.with_first_word(sys.argv, flag="benchmark"))
