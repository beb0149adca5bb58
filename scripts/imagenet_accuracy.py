r"""Top-1 and top-5 accuracy of a network on ImageNet's classes, plain and with Top-K.

    python scripts/imagenet_accuracy.py --model=resnet50 --data=imagenet/val --sparsity=0.2,0.1
    python scripts/imagenet_accuracy.py --model=squeezenet1_1 --weights=my.pth --data=pictures \
        --transform=none

The folder has one folder a class, named by its WordNet id; a part of the classes will do.
"""

import shlex

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "alexnet", "Network, by torchvision's name such as vgg16.")
flags.DEFINE_string("weights", "imagenet", "imagenet (downloaded), or a .pth or .safetensors file.")
flags.DEFINE_string("data", None, "Folder <WordNet id>/<image> (no default).", required=True)
flags.DEFINE_string(
    "sparsity",
    None,
    "Kept fractions of each feature map, in (0, 1], separated by commas; the plain network is "
    "always evaluated. Default: the plain network alone.",
)
flags.DEFINE_list("sites", None, "Features made sparse, by name. Default: the published sites.")
flags.DEFINE_bool("rest", False, "Keep the complement of the top instead.")
flags.DEFINE_enum(
    "transform",
    "catalogue",
    ["catalogue", "none"],
    "catalogue: short side to 256 pixels, then the central 224, as for the published accuracies. "
    "none: pictures as they are; those that are not of the network's input size are fitted.",
)
flags.DEFINE_integer("batch_size", 64, "Images a call.", lower_bound=1)
flags.DEFINE_string("output_dir", "", "Folder for summary.json. Default: nothing is written.")


def main(_) -> None:
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir)
    sparsities = () if FLAGS.sparsity is None else cli.parse_fractions(FLAGS.sparsity)

    from topk_jax.jobs import imagenet_accuracy

    print(cli.device_line(), flush=True)
    imagenet_accuracy.run(
        FLAGS.output_dir,
        data=FLAGS.data,
        model=FLAGS.model,
        weights=FLAGS.weights,
        sparsities=sparsities,
        sites=FLAGS.sites,
        rest=FLAGS.rest,
        transform=FLAGS.transform,
        batch_size=FLAGS.batch_size,
        progress=cli.progress,
        report=lambda line: print(line, flush=True),
    )
    if FLAGS.output_dir:
        print(f"written to {FLAGS.output_dir}: summary.json")
    weights = "" if FLAGS.weights == "imagenet" else f" --weights={shlex.quote(FLAGS.weights)}"
    print(f"next, its shape bias: python scripts/shape_bias.py --model={FLAGS.model}{weights}")


if __name__ == "__main__":
    cli.run(main)
