r"""Shape bias of a network, plain and with Top-K.

    python scripts/shape_bias.py --sparsity=0.1
    python scripts/shape_bias.py --model=alexnet --sparsity=0.5,0.4,0.3,0.2,0.1,0.05

The first needs no download (built-in network and stimuli); the second fetches torchvision's weights
and the 1,280 images of Geirhos et al., once.
"""

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "builtin", "Network: builtin, or a torchvision name such as vgg16.")
flags.DEFINE_string(
    "weights",
    None,
    "builtin, imagenet, or a .pth or .safetensors file. Default: builtin for the built-in network, "
    "else imagenet (downloaded).",
)
flags.DEFINE_string(
    "data",
    None,
    "builtin, cue-conflict (downloaded and verified), or a folder "
    "<shape>/<shape><i>-<texture><j>.png. Default: builtin for the built-in network, else "
    "cue-conflict.",
)
flags.DEFINE_string(
    "sparsity", "0.1", "Kept fractions of each feature map, in (0, 1], separated by commas."
)
flags.DEFINE_bool("baseline", True, "Add the plain network.")
flags.DEFINE_list("sites", None, "Features made sparse, by name. Default: the published sites.")
flags.DEFINE_bool("rest", False, "Keep the complement of the top instead.")
flags.DEFINE_enum(
    "aggregation",
    "mean",
    ["mean", "sum", "max"],
    "How the probabilities of a category's classes are combined.",
)
flags.DEFINE_string("humans", None, "Folder of the benchmark's CSVs of people, to be shown beside.")
flags.DEFINE_integer("batch_size", 64, "Images a call.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the built-in stimuli and of the bootstrap.", lower_bound=0)
flags.DEFINE_string("output_dir", "runs/shape_bias", "Folder of the results.")


def main(_) -> None:
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir)
    sparsities = cli.parse_fractions(FLAGS.sparsity)

    from topk_jax.jobs import shape_bias

    print(cli.device_line(), flush=True)
    shape_bias.run(
        FLAGS.output_dir,
        model=FLAGS.model,
        weights=FLAGS.weights,
        data=FLAGS.data,
        sparsities=sparsities,
        baseline=FLAGS.baseline,
        sites=FLAGS.sites,
        rest=FLAGS.rest,
        aggregation=FLAGS.aggregation,
        humans=FLAGS.humans,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        progress=cli.progress,
        report=print,
    )
    print(f"written to {FLAGS.output_dir}: summary.json, shape_bias.png, stimuli.png, raw-data/")
    if FLAGS.model == "builtin":
        print(
            "next, the real networks and images (downloads 0.4 GB): python scripts/shape_bias.py "
            "--model=alexnet --sparsity=0.5,0.4,0.3,0.2,0.1,0.05 --output_dir=runs/alexnet"
        )


if __name__ == "__main__":
    cli.run(main)
