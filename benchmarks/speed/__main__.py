"""`python -m benchmarks.speed`: parses the words, runs what they name, returns its exit code.

Exit codes: 0; 1 when nothing could be measured; 2 for wrong usage, with a line that says why; 130 after
Ctrl-C.
"""

if __name__ == "__main__":
    import keras_convnext_main  # noqa: F401, first: the package then imports no Keras into this process

import argparse
import sys
from collections.abc import Sequence

from benchmarks.speed import cases

PROGRAM = "python -m benchmarks.speed"
EPILOG = """examples:
  python -m benchmarks.speed convnext_tiny --against timm,keras.applications --output speed/
  python -m benchmarks.speed convnextv2_atto --mode training --batch 32 --backends jax
  python -m benchmarks.speed convnext_tiny --dtype float32,bfloat16 --against timm-compile,openvino
  python -m benchmarks.speed all --output speed/

Times this package on each backend and the peers that --against names: timm, timm-compile, torchvision,
keras.applications, onnxruntime, openvino, litert. Each has a process of its own, and they work in turns, so
that ratios hold on a machine whose speed changes. Lists are separated by commas.

WHAT is architectures, default convnext_tiny, or one of these words, and architectures: all (the full run
and its bars), depthwise and pointwise (candidates for the 7x7 convolution and the products of the blocks),
growth (speed against batch, resolution and variant), stages (fractions of what the machine can do), startup
(from a new process to the first image).

A training step is forward, backward and AdamW. int8 quantises the pointwise layers. --output gets bench.csv,
table.md and bench.png."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the words name.

    Args:
        arguments: words of the command line without the program; default those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: by argparse, after --help (0) and wrong usage (2).

    Example:
        main(["convnext_atto", "--backends", "torch", "--rounds", "2"])
    """
    options = parser().parse_args(arguments)
    try:
        return cases.dispatch(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; `cases.resolve` reads the lists."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measures speed, against named peers in the same run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("what", nargs="*", metavar="WHAT", help="architectures, or a word; see below")
    for name, listed, summary in (
        (
            "--backends",
            "NAMES",
            "tensorflow, jax, torch, openvino; default those installed, without openvino",
        ),
        ("--mode", "NAMES", "inference, training; default inference"),
        ("--batch", "NUMBERS", "images in a step, default 1,8"),
        ("--image-size", "NUMBERS", "pixels, default 224"),
        ("--dtype", "NAMES", "float32, bfloat16, float16, int8; default float32"),
        ("--against", "NAMES", "peers, default timm where it is installed"),
    ):
        made.add_argument(name, metavar=listed, help=summary)
    made.add_argument("--rounds", type=_positive, default=5, metavar="N", help="turns of each, default 5")
    made.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn, default 1")
    made.add_argument("--threads", type=_positive, metavar="N", help="cores of each, default all")
    made.add_argument("--rematerialize", action="store_true", help="train ours with less memory")
    made.add_argument("--output", metavar="DIR", help="folder for the tables and the plot")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, received {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
