r"""Textures and reconstructions of pictures from all, the Top-K, or the other activations.

    python scripts/synthesize.py
    python scripts/synthesize.py --preset=li2023 --input=photos --output_dir=runs/textures
    python scripts/synthesize.py --preset=li2023_reconstruction --input=jeep.jpg --mode=all,top,rest

The first needs no download (built-in network and pictures); the others fetch the normalised VGG-19
of Gatys et al. once, or take it from --weights. Ctrl-C leaves a picture in snapshots/, and the same
command goes on from the last snapshot.
"""

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("input", "builtin", "builtin, a picture, or a folder of pictures.")
flags.DEFINE_string("output_dir", "runs/synthesize", "Folder of the results.")
flags.DEFINE_string(
    "preset",
    "builtin",
    "builtin, li2023, li2023_reconstruction, gatys2015, ye2024, or the name of a VGG or AlexNet.",
)
flags.DEFINE_string(
    "weights",
    None,
    "builtin, imagenet, normalised, or a .pth or .safetensors file. Default: the preset's.",
)
flags.DEFINE_enum(
    "objective",
    None,
    ["texture", "reconstruction"],
    "Gram matrices or activations. Default: the preset's.",
)
flags.DEFINE_list(
    "mode",
    "all,top,rest",
    "Which activations count, one image each: all, top (the Top-K), rest (the others).",
)
flags.DEFINE_string(
    "sparsity", None, "Kept fraction that is the top, in (0, 1]. Default: the preset's, 0.05."
)
flags.DEFINE_list("layers", None, "Features compared, by name. Default: the preset's.")
flags.DEFINE_string(
    "size",
    None,
    "Pixels: the short side, as 256, or WIDTHxHEIGHT, which may stretch. Default: the preset's.",
)
flags.DEFINE_list("seeds", "0", "Seeds of the noise, one image each, separated by commas.")
flags.DEFINE_integer("steps", None, "L-BFGS iterations at most. Default: no limit.", lower_bound=1)
flags.DEFINE_integer(
    "max_evaluations",
    None,
    "Evaluations of loss and gradient at most. Default: the preset's.",
    lower_bound=1,
)
flags.DEFINE_integer("memory_size", 100, "Pairs of differences that L-BFGS keeps.", lower_bound=1)
flags.DEFINE_bool(
    "mask_image", False, "Reconstruction compares only the positions that the target's mask keeps."
)
flags.DEFINE_bool(
    "histogram_match", True, "Give each channel of the result the target's grey levels."
)
flags.DEFINE_integer(
    "histogram_bins",
    None,
    "Bins of the target's grey levels (the authors: 100). Default: one for each level.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "snapshot_every", 100, "Evaluations between snapshots; 0 for none.", lower_bound=0
)
flags.DEFINE_bool("list_layers", False, "Print the preset's features, its own marked *, and stop.")


def main(_) -> None:
    from topk_jax.jobs import synthesize

    size = cli.parse_size(FLAGS.size) if FLAGS.size else None
    modes = cli.parse_choices(FLAGS.mode, synthesize.MODES, flag="mode")
    seeds = cli.parse_counts(FLAGS.seeds, flag="seeds", least=0) or (0,)
    sparsity = cli.parse_fraction(FLAGS.sparsity) if FLAGS.sparsity else None
    if FLAGS.list_layers:
        preset = synthesize.setting_of(FLAGS.preset, layers=FLAGS.layers)
        print("\n".join(synthesize.list_layers(preset)))
        return
    cli.enable_compilation_cache(FLAGS.compilation_cache_dir)
    print(cli.device_line(), flush=True)
    synthesize.run(
        FLAGS.output_dir,
        source=FLAGS.input,
        preset=FLAGS.preset,
        weights=FLAGS.weights,
        objective=FLAGS.objective,
        modes=modes,
        sparsity=sparsity,
        layers=FLAGS.layers,
        size=size,
        seeds=seeds,
        steps=FLAGS.steps,
        max_evaluations=FLAGS.max_evaluations,
        memory_size=FLAGS.memory_size,
        mask_image=FLAGS.mask_image,
        histogram_match=FLAGS.histogram_match,
        histogram_bins=FLAGS.histogram_bins,
        snapshot_every=FLAGS.snapshot_every,
        progress=cli.progress,
        report=lambda line: print(line, flush=True),
    )
    print(f"written to {FLAGS.output_dir}: pictures, sheet.png, losses.csv, summary.json")
    if FLAGS.preset == "builtin":
        print(
            "next, VGG-19 (downloads 80 MB) and your pictures: python scripts/synthesize.py "
            "--preset=li2023 --input=FOLDER --output_dir=runs/textures"
        )


if __name__ == "__main__":
    cli.run(main)
