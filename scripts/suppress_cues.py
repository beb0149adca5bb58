r"""Folders of images with one cue taken away: colour, detail, texture, or the order of parts.

    python scripts/suppress_cues.py --input=imagenette2-320/val --output_dir=runs/suppressed
    python scripts/suppress_cues.py --input=photos --suppress=blur4,shuffle8 --image_size=448

Writes <output_dir>/<word>/<class>/<image>.png for each word of --suppress, and sheet.png to look
at. A network that goes by shape loses less than another on gray, blur and bilateral, and more on
shuffle. The same command goes on where it stopped.
"""

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "input", None, "Folder of class folders, or of images (no default).", required=True
)
flags.DEFINE_string("output_dir", "runs/suppress_cues", "Folder of the results.")
flags.DEFINE_list(
    "suppress",
    "gray,blur1,blur2,bilateral,shuffle4",
    "gray: no colour. blur<sigma>: Gaussian blur, sigma in pixels. bilateral: texture smoothed, "
    "edges kept. shuffle<n>: n x n tiles in another order.",
)
flags.DEFINE_integer(
    "image_size",
    224,
    "Pixels: the short side is resized to it and the centre cut out first. 0: images as they are.",
    lower_bound=0,
)
flags.DEFINE_integer("seed", 0, "Seed of the order of shuffled tiles.", lower_bound=0)
flags.DEFINE_bool("strict", False, "Stop at an image that cannot be read.")


def main(_) -> None:
    from topk_jax.jobs import suppress_cues

    suppress_cues.run(
        FLAGS.output_dir,
        source=FLAGS.input,
        words=FLAGS.suppress,
        image_size=FLAGS.image_size,
        seed=FLAGS.seed,
        strict=FLAGS.strict,
        progress=cli.progress,
        report=lambda line: print(line, flush=True),
    )
    print(f"written to {FLAGS.output_dir}: a folder a word, sheet.png, summary.json")


if __name__ == "__main__":
    cli.run(main)
