r"""Shows finished training runs side by side: means and spreads over seeds.

    python scripts/run_table.py --runs='runs/in96_*'

Runs that differ by their seed alone are one row. Prints Markdown.
"""

import glob

from absl import flags

from topk_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_list("runs", "", "Folders of runs or patterns of them, separated by commas.")
flags.DEFINE_bool(
    "per_class", False, "Add the classes of the first set, with the ranks of their sizes."
)
flags.DEFINE_string("output", "", "A file that gets the tables too. Default: none.")


def main(_) -> None:
    from topk_jax.jobs import run_table

    folders = [path for pattern in FLAGS.runs for path in sorted(glob.glob(pattern)) or [pattern]]
    run_table.run(folders, per_class=FLAGS.per_class, output=FLAGS.output, report=print)


if __name__ == "__main__":
    cli.run(main)
