"""Converts a file of weights (torch's .pth, either format) into a checked .safetensors file.

python scripts/convert_weights.py --model=resnet50 --weights=my.pth --output=my.safetensors
python scripts/convert_weights.py --list
"""

from absl import flags

from topk_jax import cli

_MODEL = flags.DEFINE_string("model", None, "The network that the weights are for (no default).")
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "A .pth or .safetensors file, or a name that --list shows (no default)."
)
_OUTPUT = flags.DEFINE_string("output", None, "The .safetensors file to write (no default).")
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "Classes the weights were trained for (default: the network's).",
    lower_bound=1,
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace an output file that is there.")
_LIST = flags.DEFINE_boolean("list", False, "Show the known weights and end.")


def main(argv):
    del argv
    from topk_jax import weights  # after the flags: --help needs no JAX

    if _LIST.value:
        print(weights.format_catalogue())
        return
    done = weights.convert_file(
        _given(_MODEL),
        _given(_WEIGHTS),
        _given(_OUTPUT),
        num_classes=_NUM_CLASSES.value,
        overwrite=_OVERWRITE.value,
    )
    print(f"read     {done.source.path} (sha256 {done.source.sha256})")
    print(f"wrote    {done.path} (sha256 {done.sha256})")
    print(f"holding  {done.tensors} tensors, {done.parameters:,} parameters for {_MODEL.value}")
    print(f"next     --model={_MODEL.value} --weights={done.path}")


def _given(flag):
    if not flag.value:
        raise ValueError(f"--{flag.name} is missing; --help lists the flags")
    return flag.value


if __name__ == "__main__":
    cli.run(main)
