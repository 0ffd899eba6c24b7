"""The command `keras-convnext`: parses its arguments, calls one function, prints what that returns.

Exit codes: 0; 1 when some images could not be read; 2 when nothing could be done, with a line that says why;
3 when training stopped at a loss that is not finite; 70 for a bug in here; 130 after Ctrl-C and 143 after
SIGTERM (training has then written a checkpoint); 141 when the reader of a pipe has gone.

Keras and its backend are imported by the commands that need a model, so that the others answer at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from keras_convnext._environment import __version__
from keras_convnext.cli.data import look_command, prepare_command
from keras_convnext.cli.evaluate import evaluate_command, knn_command, probe_command
from keras_convnext.cli.export import export_command, page_command
from keras_convnext.cli.predict import predict_command
from keras_convnext.cli.shared import complain, error_message, positive_batch_size, positive_integer
from keras_convnext.cli.train import plan_command, train_command
from keras_convnext.cli.weights import convert_command, info_command, list_command
from keras_convnext.weights import catalog, layouts

_EPILOG = {
    "list": """examples:
  keras-convnext list
  keras-convnext list "convnextv2_*" --classes 1000 --image-size 384
  keras-convnext list convnext_tiny --commercial --downloadable
  keras-convnext list --architectures""",
    "info": """examples:
  keras-convnext info convnext_tiny
  keras-convnext info convnext_tiny.fb_in22k_ft_in1k_384
  keras-convnext info my_weights.safetensors --json""",
    "predict": """examples:
  keras-convnext predict cat.jpg
  keras-convnext predict photographs/ --model convnext_tiny.fb_in22k_ft_in1k_384 --top 3 --json
  keras-convnext predict cat.jpg --weights convnext_tiny_in1k.safetensors
  keras-convnext predict leaf.jpg --weights my_leaves.keras --labels leaves.txt

Without --model, a file given by --weights says itself which architecture it is, and how images are resized
where it was written by training; else they are as for that architecture's ImageNet weights. A .keras file
brings its own image size; it must take pixels in 0..255. Without --labels the names of the
classes are looked for beside the file: my_leaves.labels.txt.""",
    "convert": """examples:
  keras-convnext convert convnext_tiny_1k_224_ema.pth tiny.safetensors --layout timm
  keras-convnext convert convnext_tiny.fb_in1k tiny.pth
  keras-convnext convert tiny.safetensors tiny.keras""",
    "evaluate": """examples:
  keras-convnext evaluate convnext_tiny.fb_in1k --data imagenet/ILSVRC2012_img_val.tar
  keras-convnext evaluate convnext_tiny.fb_in22k_ft_in1k_384 --data imagenet/val --output report/
  keras-convnext evaluate convnext_tiny.fb_in1k --weights my_weights.safetensors --data imagenet/val
  keras-convnext evaluate my_leaves.keras --data leaves/ --split test --no-results

The tag decides how images are resized and cropped. --data is a folder of class folders, ImageNet's tars, a
set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote. Data with some of the
classes of ImageNet, such as ImageNet-A and -R, is classified among these alone. A row with all that a score
depends on is added to results.csv. --output gets predictions, confusions and accuracies by class as CSV
files, and a picture of the worst classes.""",
    "train": """examples:
  keras-convnext train recipes/smoke.toml --out runs/smoke
  keras-convnext train fine_tune --data flowers/ --out runs/flowers --set epochs=10
  keras-convnext train fine_tune --data flowers/ --out runs/head --set trainable=head
  keras-convnext train fine_tune --data flowers/ --out runs/flowers --distribute data_parallel
  keras-convnext train --list

RECIPE is a TOML file or the name of a published recipe. --data is a folder of class folders, ImageNet's tars,
a set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote. The same command goes on
where it was stopped, by Ctrl-C, by SIGTERM, by a kill or a reboot. DIR holds log.csv, curves.png,
tensorboard/, recipe.toml, checkpoints/, the best and the final weights: `keras-convnext predict --weights
DIR/final.safetensors photo.jpg` uses them. KERAS_BACKEND chooses tensorflow, jax or torch.""",
    "plan": """examples:
  keras-convnext plan imagenet1k_convnext_tiny --devices 64xh100 --set accumulation_steps=1
  keras-convnext plan imagenet22k_convnext_xlarge --devices 16xa100-40 --set precision=mixed_bfloat16
  keras-convnext plan recipes/smoke.toml --devices 8xcpu --engine model_parallel --json

Nothing is trained or built: all is counted from the architecture. DEVICES are a number and a name: h100,
h200, a100-40, a100-80, v100, l4, rtx4090, tpu-v3, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, cpu. Memory is what a
step holds at its peak, without the framework and its libraries (measured on a CPU: benchmarks/memory.md).
Time is a rough bound from the makers' peak figures, of which --fraction is taken; it was not measured on any
of these devices. KERAS_BACKEND chooses whose program is counted.""",
    "knn": """examples:
  keras-convnext knn --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext knn --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set neighbours=20

Cosine similarity, votes weighted by exp(similarity / 0.07), as DINO evaluates. Data without a split of its
own is divided by class.""",
    "probe": """examples:
  keras-convnext probe --model convnext_tiny.dinov3_lvd1689m --data flowers/
  keras-convnext probe --model convnextv2_tiny.fcmae --data imagenet/ --cache features/ --set epochs=20

SGD on features that are computed once, without augmentation. The learning rate is chosen on a part of the
training images, never on those that the score is of.""",
    "look": """examples:
  keras-convnext look flowers/ sheet.png
  keras-convnext look imagenet/ sheet.png --split train --policy ta_wide --seed 3""",
    "prepare": """examples:
  keras-convnext prepare imagenet/ prepared/
  keras-convnext prepare imagenet/ prepared/ --split validation --shards 64 --verify
  keras-convnext prepare flowers/ prepared/

Writes shuffled TFRecord files of about 150 MB, with the encoded images as they are, and an index. The same
command goes on after an interruption, and repairs damaged files.""",
    "export": """examples:
  keras-convnext export convnext_tiny.fb_in1k tiny.tflite --precision dynamic_int8
  keras-convnext export my_leaves.keras leaves.onnx
  keras-convnext export my_leaves.safetensors leaves.tflite --precision int8 --calibration leaves/
  keras-convnext export convnext_tiny.fb_in1k exported/ --format litert,onnx --precision all --report report/

MODEL is a tag, an architecture or a file. The file's suffix tells the format: .tflite (LiteRT), .onnx, .xml
(OpenVINO), .pt2 (PyTorch), none for a SavedModel. Several formats or precisions, or "all", go to a folder.
Every file takes pixels in 0..255 in the order N, H, W, C, and is run and compared with the model before it is
kept. --calibration is a folder of images or a data set; by default, crops of three photographs.""",
    "page": """examples:
  keras-convnext export convnext_atto.d2_in1k atto.onnx
  keras-convnext page atto.onnx atto.html
  keras-convnext page leaves.onnx leaves.html --runtime onnxruntime-web-1.30.0.tgz

MODEL is a .onnx file that `keras-convnext export` wrote, with its .metadata.json beside it. OUTPUT is one
file with the model and all it needs to run: open it with a double click, offline too, and drop a picture on
it, or put it on a server of static files. npm fetches ONNX Runtime Web at the first use; without npm, pass
--runtime what `npm pack` wrote on another machine.""",
    "bench": """examples:
  keras-convnext bench convnext_tiny --against timm,keras.applications --output speed/
  keras-convnext bench convnextv2_atto --mode training --batch 32 --backends jax
  keras-convnext bench convnext_tiny --dtype float32,bfloat16 --against timm-compile,openvino
  keras-convnext bench all --output speed/

Times this package on each backend and the peers that --against names: timm, timm-compile, torchvision,
keras.applications, onnxruntime, openvino, litert. Each has a process of its own, and they work in turns, so
that ratios hold on a machine whose speed changes. Lists are separated by commas.

WHAT is architectures, default convnext_tiny, or one of these words, and architectures: all (the standard run
and its bars), depthwise (candidates for the 7x7 convolution), growth (speed against batch, resolution and
variant), stages (fractions of what the machine can do), startup (from nothing to the first image).

A training step is forward, backward and AdamW. int8 quantises the pointwise layers. --output gets bench.csv,
table.md and bench.png.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: words of the command line without the program; default those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: by argparse, after --help, --version (0) and wrong usage (2).

    Example:
        >>> main(["list", "test_convnext2"])
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read by TensorFlow when it is imported
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    if words[:1] == ["demo"]:
        complain("error: `keras-convnext demo` has left the command. Run `make demo` in a checkout.")
        return 2
    try:
        options = _parser().parse_args(words or ["--help"])
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, TypeError) as error:
        complain(f"error: {error_message(error)}")
        return 2
    except Exception as error:
        complain(
            f"internal error: {type(error).__name__}: {error} (set KERAS_CONVNEXT_DEBUG=1 for the traceback)"
        )
        return 70


def bench_command(options: argparse.Namespace) -> int:
    """Measures speed, of this package and of peers in the same run."""
    from benchmarks.speed import cases

    return cases.dispatch(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-convnext",
        description="ConvNeXt V1, V2 and isotropic in Keras: which weights there are, what they see in an\n"
        "image, and how they get to other projects.",
        epilog="examples:\n  keras-convnext list convnext_tiny\n  keras-convnext predict cat.jpg\n\n"
        "KERAS_BACKEND chooses tensorflow, jax or torch, in place of keras.json or what is installed;\n"
        "KERAS_CONVNEXT_WEIGHTS_DIR names folders with files placed by hand; KERAS_CONVNEXT_OFFLINE=1\n"
        "forbids downloads.\n"
        "`keras-convnext COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-convnext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, summary):
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=_EPILOG[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    listing = command("list", list_command, "list the published weight files, or the architectures")
    listing.add_argument(
        "architecture", nargs="?", metavar="ARCHITECTURE", help='name, or a pattern such as "convnextv2_*"'
    )
    listing.add_argument("--classes", type=int, metavar="N", help="width of the classifier, 0 for none")
    listing.add_argument("--image-size", type=int, metavar="N", help="side of the images in pixels")
    listing.add_argument("--licence", metavar="ID", help="licence identifier, such as apache-2.0")
    listing.add_argument("--commercial", action="store_true", help="only licences that allow commercial use")
    listing.add_argument("--downloadable", action="store_true", help="only files with a known address")
    listing.add_argument(
        "--architectures", action="store_true", help="the architectures of these files instead"
    )

    info = command("info", info_command, "describe an architecture, a published tag or a weight file")
    info.add_argument("name", metavar="NAME|FILE", help="architecture, tag, or path of a weight file")

    predict = command("predict", predict_command, "classify images")
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="folders are searched for images"
    )
    predict.add_argument(
        "--model",
        metavar="TAG",
        help=f"tag or architecture, default {catalog.IMAGENET['convnext_tiny']} or what --weights holds",
    )
    predict.add_argument("--weights", metavar="FILE", help="weight file, or a .keras model, to use instead")
    predict.add_argument(
        "--top", type=positive_integer, default=5, metavar="N", help="classes an image, default 5"
    )
    predict.add_argument(
        "--image-size", type=positive_integer, metavar="N", help="pixels, default the weights' own"
    )
    predict.add_argument(
        "--batch-size", type=positive_integer, default=8, metavar="N", help="images, default 8"
    )
    predict.add_argument("--labels", metavar="FILE", help="text file with the name of a class in each line")

    conversion = command("convert", convert_command, "convert a weight file for another project")
    conversion.add_argument("source", metavar="SOURCE", help="weight file, or a tag to download")
    conversion.add_argument(
        "target", metavar="TARGET", help=".safetensors, .pth, .pt, .bin, .keras or .weights.h5"
    )
    conversion.add_argument(
        "--layout",
        default="official",
        metavar="NAME",
        help=f"names and shapes to write: {', '.join(layouts.WRITABLE_LAYOUTS)}; default official",
    )
    conversion.add_argument(
        "--architecture",
        metavar="NAME",
        help="refuse a source of another architecture; a tag also sets the normaliser of a .keras target",
    )
    conversion.add_argument("--force", action="store_true", help="replace an existing TARGET")

    evaluation = command("evaluate", evaluate_command, "measure top-1 and top-5 accuracy on a data set")
    evaluation.add_argument(
        "model", metavar="MODEL", help="tag, architecture, weight file, .keras file or exported file"
    )
    evaluation.add_argument("--data", required=True, metavar="PATH", help="folder or file with the images")
    evaluation.add_argument("--weights", metavar="FILE", help="weight file in place of the tag's own")
    evaluation.add_argument("--split", metavar="NAME", help="default validation, where there are splits")
    evaluation.add_argument(
        "--labels", metavar="FILE", help="'file,label' lines for a folder without classes"
    )
    evaluation.add_argument(
        "--real",
        nargs="?",
        const=True,
        metavar="FILE",
        help="measure ReaL accuracy too; real.json, unless the data has these labels",
    )
    evaluation.add_argument(
        "--image-size", type=positive_integer, metavar="N", help="pixels, default the tag's own"
    )
    evaluation.add_argument("--batch-size", type=positive_integer, metavar="N", help="images, default 64")
    evaluation.add_argument(
        "--limit",
        type=positive_integer,
        metavar="N",
        help="that many images only, spread evenly over the data",
    )
    evaluation.add_argument(
        "--max-faults", type=float, default=0.01, metavar="SHARE", help="damaged images allowed, default 0.01"
    )
    evaluation.add_argument("--output", metavar="DIR", help="folder for CSV files and a picture")
    evaluation.add_argument(
        "--results", default="results.csv", metavar="FILE", help="file to add a row to, default results.csv"
    )
    evaluation.add_argument("--no-results", action="store_true", help="add no row")

    preparation = command("prepare", prepare_command, "copy a data set into shuffled TFRecord shards")
    preparation.add_argument("source", metavar="SOURCE", help="what evaluate takes as --data")
    preparation.add_argument("output", metavar="OUTPUT", help="folder to write to")
    preparation.add_argument("--split", metavar="NAME", help="default all")
    preparation.add_argument(
        "--labels", metavar="FILE", help="'file,label' lines for a folder without classes"
    )
    preparation.add_argument(
        "--shards", type=positive_integer, metavar="N", help="files of a split, default by size"
    )
    preparation.add_argument(
        "--workers", type=positive_integer, metavar="N", help="threads, default one a processor"
    )
    preparation.add_argument("--seed", type=int, default=0, metavar="N", help="of the order, default 0")
    preparation.add_argument("--verify", action="store_true", help="read all back and compare")

    training = command("train", train_command, "train a model by a recipe; the same command resumes")
    training.add_argument("recipe", nargs="?", metavar="RECIPE", help="TOML file, or a published name")
    training.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
    training.add_argument("--out", metavar="DIR", help="folder of the run")
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the recipe; repeatable",
    )
    training.add_argument(
        "--distribute",
        metavar="ENGINE",
        help="how a step is divided among devices; short for --set distribution.engine=ENGINE",
    )
    training.add_argument(
        "--workers", type=positive_integer, metavar="N", help="threads that make the batches"
    )
    training.add_argument("--quiet", action="store_true", help="show no progress")
    training.add_argument("--list", action="store_true", help="list the published recipes")

    planning = command("plan", plan_command, "say what a recipe takes on devices, before it is trained")
    planning.add_argument("recipe", metavar="RECIPE", help="TOML file, or a published name")
    planning.add_argument(
        "--devices", required=True, metavar="DEVICES", help="number and name, such as 64xh100; see below"
    )
    planning.add_argument(
        "--engine", metavar="ENGINE", help="short for --set distribution.engine=ENGINE; default the recipe's"
    )
    planning.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
    planning.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the recipe; repeatable",
    )
    planning.add_argument(
        "--fraction", type=float, default=0.4, metavar="X", help="of the peak figures, default 0.4"
    )

    for name, run, recipe, summary in (
        ("knn", knn_command, "knn", "classify by the nearest neighbours in a frozen model's features"),
        ("probe", probe_command, "linear_probe", "train a linear classifier on a frozen model's features"),
    ):
        features = command(name, run, summary)
        features.add_argument(
            "recipe",
            nargs="?",
            default=recipe,
            metavar="RECIPE",
            help=f"TOML file, default the published {recipe}",
        )
        features.add_argument("--model", metavar="MODEL", help="tag or weight file, in place of the recipe's")
        features.add_argument("--data", metavar="PATH", help="images, in place of the recipe's")
        features.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the recipe"
        )
        features.add_argument("--cache", metavar="DIR", help="folder that keeps the features for next time")
        features.add_argument("--quiet", action="store_true", help="show no progress")
        features.add_argument("--json", action="store_true", help="print JSON")

    look = command("look", look_command, "draw a contact sheet of augmentations and a training batch")
    look.add_argument("data", metavar="DATA", help="what evaluate takes as --data")
    look.add_argument("output", metavar="OUTPUT", help="the PNG to write")
    look.add_argument("--split", metavar="NAME", help="train, validation; needed where there are several")
    look.add_argument(
        "--policy",
        default="rand-m9-mstd0.5-inc1",
        metavar="NAME",
        help="RandAugment, AutoAugment or TrivialAugment, default rand-m9-mstd0.5-inc1",
    )
    look.add_argument("--seed", type=int, default=0, metavar="N", help="of the batch, default 0")

    exporting = command(
        "export", export_command, "write a model for LiteRT, ONNX, OpenVINO, TensorFlow or PyTorch"
    )
    exporting.add_argument("model", metavar="MODEL", help="tag, architecture, weight file or .keras file")
    exporting.add_argument("output", metavar="OUTPUT", help="the file, or a folder for several")
    exporting.add_argument(
        "--format",
        metavar="NAMES",
        help="saved_model, litert, onnx, openvino, torch, or all; default by suffix",
    )
    exporting.add_argument(
        "--precision",
        default="float32",
        metavar="NAMES",
        help="float32, float16, dynamic_int8, int8, or all; default float32",
    )
    exporting.add_argument(
        "--batch-size",
        type=positive_batch_size,
        default="default",
        metavar="N",
        help="images in a call, or any; default 1 for LiteRT, any for the others",
    )
    exporting.add_argument(
        "--image-size", type=positive_integer, metavar="N", help="pixels, default the weights' own"
    )
    exporting.add_argument(
        "--calibration", metavar="PATH", help="images for the check and for int8, default three photographs"
    )
    exporting.add_argument("--labels", metavar="FILE", help="text file with the name of a class in each line")
    exporting.add_argument("--logits", action="store_true", help="leave out the softmax")
    exporting.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="difference allowed, in times of the largest output; default by precision",
    )
    exporting.add_argument("--no-check", action="store_true", help="do not run what was written")
    exporting.add_argument("--report", metavar="DIR", help="folder for a table and a picture")
    exporting.add_argument("--force", action="store_true", help="replace what is at OUTPUT")

    page = command("page", page_command, "write a page that classifies pictures in the browser")
    page.add_argument("model", metavar="MODEL", help=".onnx file that export wrote")
    page.add_argument("output", metavar="OUTPUT", help="the .html file")
    page.add_argument(
        "--runtime", metavar="DIR", help="onnxruntime-web as a folder or a .tgz file; default by npm, once"
    )
    page.add_argument("--force", action="store_true", help="replace what is at OUTPUT")

    bench = command("bench", bench_command, "measure speed, against named peers in the same run")
    bench.add_argument("what", nargs="*", metavar="WHAT", help="architectures, or a word; see below")
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
        bench.add_argument(name, metavar=listed, help=summary)
    bench.add_argument(
        "--rounds", type=positive_integer, default=5, metavar="N", help="turns of each, default 5"
    )
    bench.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn, default 1")
    bench.add_argument("--threads", type=positive_integer, metavar="N", help="cores of each, default all")
    bench.add_argument("--rematerialize", action="store_true", help="train ours with less memory")
    bench.add_argument("--output", metavar="DIR", help="folder for the tables and the plot")

    for printing in (listing, info, predict, evaluation, preparation, planning, exporting, bench):
        printing.add_argument("--json", action="store_true", help="print JSON")
    return parser
