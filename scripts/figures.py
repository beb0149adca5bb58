r"""The paper's pictures of what Top-K responses hold, for a folder of pictures.

    python scripts/figures.py fig2 --input=photos --output_dir=runs/fig2
    python scripts/figures.py fig3 --input=photos --output_dir=runs/fig3 --classifier=squeezenet1_1

fig2: textures; fig3: reconstructions; each from all activations of VGG-19, from the Top-K, and from
the others. Both fetch the normalised VGG-19 of Gatys et al. once, or take it from --weights.
"""

import sys

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "figure", None, ["fig2", "fig3"], "Which; also written as the first word.", required=True
)
flags.DEFINE_string("input", None, "A picture, or a folder of pictures.", required=True)
flags.DEFINE_string("output_dir", "runs/figures", "Folder of the results.")
flags.DEFINE_string(
    "weights", None, "normalised, imagenet, or a .pth or .safetensors file. Default: normalised."
)
flags.DEFINE_string("sparsity", None, "Kept fraction that is the top, in (0, 1]. Default: 0.05.")
flags.DEFINE_string(
    "size", None, "Pixels: the short side, or WIDTHxHEIGHT, which may stretch. Default: 256x256."
)
flags.DEFINE_integer(
    "max_evaluations", None, "For each image. Default: 500 for fig2, 25 for fig3.", lower_bound=1
)
flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0)
flags.DEFINE_string("classifier", None, "Network that names the results. Default: none.")
flags.DEFINE_string("classifier_weights", None, "Its weights. Default: imagenet (downloaded).")


def main(_) -> None:
    size = cli.parse_size(FLAGS.size) if FLAGS.size else None
    sparsity = cli.parse_fraction(FLAGS.sparsity) if FLAGS.sparsity else None
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir)

    from topk_jax.jobs import paper_figures

    print(cli.device_line(), flush=True)
    paper_figures.run(
        FLAGS.figure,
        FLAGS.output_dir,
        source=FLAGS.input,
        weights=FLAGS.weights,
        sparsity=sparsity,
        size=size,
        max_evaluations=FLAGS.max_evaluations,
        seed=FLAGS.seed,
        classifier=FLAGS.classifier,
        classifier_weights=FLAGS.classifier_weights,
        progress=cli.progress,
        report=lambda line: print(line, flush=True),
    )
    print(
        f"written to {FLAGS.output_dir}: {FLAGS.figure}.png, numbers.json, pictures, summary.json"
    )


if __name__ == "__main__":
    cli.run(main, argv=cli.with_first_word(sys.argv, flag="figure"))
