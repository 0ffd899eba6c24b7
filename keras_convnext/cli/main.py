"""The command `keras-convnext`: parses its arguments, calls one function, prints what that returns.

Exit codes: 0; 1 when some images could not be read; 2 when nothing could be done, with a line that says why;
3 when training stopped at a loss that is not finite; 70 for a bug in here; 130 after Ctrl-C and 143 after
SIGTERM (training has then written a checkpoint); 141 when the reader of a pipe has gone.

Keras and its backend are imported by the commands that need a model, so that the others answer at once.
"""

import argparse
import functools
import importlib
import io
import os
import sys
from collections.abc import Iterable, Sequence

from keras_convnext._environment import __version__
from keras_convnext._terminal import drop_unwritten
from keras_convnext.cli.shared import add_option, complain, error_message

# command -> (module of this folder, summary). For `list` the module has `list_options`, which calls its
# argument for each option (`shared.add_option`), `list_command`, which runs it and returns the exit code, and
# LIST_EXAMPLES, the end of the help.
COMMANDS = {
    "list": ("weights", "list the published weight files, or the architectures"),
    "info": ("weights", "describe an architecture, a published tag or a weight file"),
    "predict": ("predict", "classify images"),
    "segment": ("segment", "say of every pixel of photos what it belongs to"),
    "detect": ("detect", "find the objects on photos, with boxes and masks"),
    "convert": ("weights", "convert a weight file for another project"),
    "evaluate": ("evaluate", "measure accuracy, or mIoU of a segmenter, on a data set"),
    "prepare": ("data", "copy a data set into shuffled TFRecord shards"),
    "train": ("train", "train a model by a recipe; the same command resumes"),
    "plan": ("train", "estimate memory, traffic and time of a training run"),
    "knn": ("evaluate", "classify by the nearest neighbours in a frozen model's features"),
    "probe": ("evaluate", "train a linear classifier on a frozen model's features"),
    "look": ("data", "draw a contact sheet of augmentations and a training batch"),
    "export": ("export", "write a model for LiteRT, ONNX, OpenVINO, TensorFlow or PyTorch"),
    "roadmap": ("roadmap", "show the steps from ResNet-50 to ConvNeXt, or train some of them"),
    "preset": ("export", "write a folder for keras-hub, or put it on the Hugging Face Hub"),
    "page": ("export", "write a page that classifies or segments pictures in the browser"),
}
_MOVED = {"demo": "`make demo`", "bench": "`make bench`, or `python -m benchmarks.speed`,"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, by default the command line's words, and returns the exit code.

    Argparse raises SystemExit after --help, --version (0) and wrong usage (2).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read by TensorFlow when it is imported
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    if words and words[0] in _MOVED:
        complain(
            f"error: `keras-convnext {words[0]}` has left the command. Run {_MOVED[words[0]]} in a checkout."
        )
        return 2
    try:
        try:
            options = _parser(words).parse_args(words or ["--help"])
        finally:
            sys.stdout.flush()  # of --help
        _refuse_empty(options)
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, ImportError, TypeError) as error:
        complain(f"error: {error_message(error)}")
        return 2
    except Exception as error:
        complain(
            f"internal error: {type(error).__name__}: {error} (set KERAS_CONVNEXT_DEBUG=1 for the traceback)"
        )
        return 70
    finally:
        for stream in (sys.stdout, sys.stderr):
            drop_unwritten(stream)


def _refuse_empty(options: argparse.Namespace) -> None:
    """Refuses what a shell makes of a variable that is not set: as a path it is the working folder."""
    for name, value in vars(options).items():
        if "" in (value if isinstance(value, list) else [value]):
            raise ValueError(
                f"Expected a value of {name!r}, received ''. Is a variable of the shell not set?"
            )


def _open_closed_streams() -> None:
    """Opens what the shell has closed by `>&-`: else a later file would get its number, and stray prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 - to the end


def _parser(chosen: Iterable[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Returns the parser; only the chosen commands, by default all, get their options."""
    parser = argparse.ArgumentParser(
        prog="keras-convnext",
        description="ConvNeXt V1, V2 and isotropic in Keras: finds and converts published weights,\n"
        "classifies images, trains, evaluates and exports.",
        epilog="examples:\n  keras-convnext list convnext_tiny\n  keras-convnext predict cat.jpg\n\n"
        "KERAS_BACKEND chooses tensorflow, jax or torch, in place of keras.json or what is installed;\n"
        "KERAS_CONVNEXT_WEIGHTS_DIR names folders with files placed by hand; KERAS_CONVNEXT_OFFLINE=1\n"
        "forbids downloads.\n"
        "`keras-convnext COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-convnext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in chosen:
            module = importlib.import_module(f"keras_convnext.cli.{module_name}")
            getattr(module, f"{name}_options")(functools.partial(add_option, command))
            command.epilog = getattr(module, f"{name.upper()}_EXAMPLES")
            command.set_defaults(run=getattr(module, f"{name}_command"))
    return parser
