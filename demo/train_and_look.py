"""A first look: trains a small ConvNeXt, saves it, loads it in a new process, draws what it says.

Without arguments it learns the 1,797 handwritten digits that come with scikit-learn. That takes a minute or
two on two cores and must end above 95 % on images it was not trained on, else the exit status is 1. With
`--data` it learns the photos in your own folder, one folder in it per class. Wrong usage or unusable input:
exit status 2.

    python demo/train_and_look.py
    python demo/train_and_look.py --data photos --out out/photos

Training is plain `compile` and `fit`. From random weights a few thousand photos teach little; for real work
start from published ones: `keras_convnext.ConvNeXtTiny(weights="fb_in1k", classes=5)` takes the same steps.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

TARGET = 0.95  # held-out accuracy on the digits
HELD_OUT_FRACTION = 0.25
VALIDATION_FRACTION = 0.1  # of what is not held out
BATCH_SIZE = 64
DIGIT_SIZE = 32  # 8 x 8 grey values, each 4 x 4 pixels: one patch of the stem
DIGIT_EPOCHS = 15
PHOTO_SIZE = 64
PHOTOS_SEEN = 26_000  # in training without --epochs: about three minutes on two cores
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class UnusableError(Exception):
    """Something the user can put right; the message says how."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one of the two stages and returns the exit status."""
    options = parse(arguments)
    try:
        choose_backend()
        check_writable(options.out)
        if options.classify:
            classify(options.classify, options.out)
            return 0
        return train(options)
    except UnusableError as error:
        print(f"train_and_look: {error}", file=sys.stderr)
        return 2


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="train_and_look.py",
        description="Trains a small ConvNeXt, saves it, loads it in a new process and draws its predictions.",
        epilog=textwrap.dedent("""\
            examples:
              python demo/train_and_look.py                        handwritten digits
              python demo/train_and_look.py --data photos          photos/cats/*.jpg, photos/dogs/*.jpg, ...
              KERAS_BACKEND=jax python demo/train_and_look.py      tensorflow, jax or torch
              python demo/train_and_look.py --classify out/demo/model.keras      the second stage alone
            """),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=pathlib.Path, metavar="FOLDER", help="a folder with a folder per class"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/demo"), help="default: %(default)s"
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        help=f"default: {DIGIT_EPOCHS} for digits; for photos, the more the fewer they are",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, weights and order; default: 0")
    parser.add_argument(
        "--limit", type=positive, default=20_000, help="most images to use, drawn by seed; default: 20000"
    )
    parser.add_argument("--architecture", default="convnext_atto", help="default: %(default)s")
    parser.add_argument(
        "--classify", type=pathlib.Path, metavar="MODEL", help="do not train: load this and draw predictions"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def choose_backend():
    """Settles KERAS_BACKEND, before the first import of Keras: yours, else the first one installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Else the threads of PyTorch spin while they wait: a step took six times as long on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    known = ("tensorflow", "jax", "torch")
    installed = [name for name in known if importlib.util.find_spec(name)]
    backend = os.environ.get("KERAS_BACKEND")
    if not installed:
        raise UnusableError(
            "found none of tensorflow, jax, torch; install one: pip install 'keras-convnext[jax]'"
        )
    if backend and backend not in installed:
        raise UnusableError(f"KERAS_BACKEND is {backend!r}; installed here: {', '.join(installed)}")
    os.environ["KERAS_BACKEND"] = backend or installed[0]


def check_writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusableError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --out"
        ) from None


@contextlib.contextmanager
def quiet_stderr():
    """Holds back what is written to stderr, and lets it out after an error.

    TensorFlow 2.21 greets from C++ on import, whatever TF_CPP_MIN_LOG_LEVEL says, with lines that begin with
    WARNING and mean nothing to a newcomer.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(stderr, held_back.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary name to write to and renames it to `path` at the end: whole files or none."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# The first stage: images -> model.keras


def train(options) -> int:
    if options.data is None:
        images, labels, class_names = read_digits(options.limit, options.seed)
    else:
        images, labels, class_names = read_folder(options.data, options.limit, options.seed)
    training, validation, held_out = split(labels, options.seed)
    if len(training) < len(class_names):
        raise UnusableError(f"{len(images)} images of {len(class_names)} classes are too few; raise --limit")
    batch_size = min(BATCH_SIZE, len(training))
    epochs = options.epochs or DIGIT_EPOCHS
    if options.data is not None and options.epochs is None:
        epochs = min(max(round(PHOTOS_SEEN / len(training)), 2), 40)
    print(
        f"{len(images):,} images of {len(class_names)} classes: {len(training):,} to train, "
        f"{len(validation):,} to watch the training, {len(held_out):,} held out",
        flush=True,
    )

    with quiet_stderr():
        import keras

        import keras_convnext

    # Keras draws the seeds of initial weights from here. Its own set_random_seed would load TensorFlow under
    # every backend.
    random.seed(options.seed)
    try:
        model = keras_convnext.load(
            options.architecture,
            weights=None,
            input_shape=images.shape[1:],
            classes=len(class_names),
            # With the published 1e-6 the blocks do next to nothing for the few hundred steps that this takes.
            layer_scale_init_value=0.1,
        )
    except ValueError as error:
        raise UnusableError(error) from None
    steps_per_epoch = len(training) // batch_size
    steps = epochs * steps_per_epoch
    warmup_steps = steps // 10
    peak = 2e-3 if options.data is None else 1e-3
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup_steps, warmup_target=peak, warmup_steps=warmup_steps
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=0.05),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    epoch_ends = []
    print("The first step compiles the model, which takes longer than the steps after it.", flush=True)
    start = time.perf_counter()
    # No early stop: a cosine schedule gains most at its end. The validation images choose nothing here; they
    # show in the picture whether the model learns or only remembers.
    history = model.fit(
        batches(
            images[training], labels[training], batch_size, flip=options.data is not None, seed=options.seed
        ),
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        shuffle=False,  # the generator does
        verbose=1 if sys.stdout.isatty() else 2,  # a progress bar in a log file is thousands of characters
        validation_data=(images[validation], labels[validation]),
        validation_batch_size=batch_size,
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: epoch_ends.append(time.perf_counter()))
        ],
    ).history
    seconds = time.perf_counter() - start
    probabilities = model.predict(images[held_out], batch_size=batch_size, verbose=0)
    accuracy = np.mean(probabilities.argmax(-1) == labels[held_out])

    path = options.out / "model.keras"
    with quiet_stderr(), replacing(path) as partial:
        model.save(partial)  # imports TensorFlow, if installed, under every backend
    with replacing(path.with_suffix(".labels.txt")) as partial:
        partial.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    with replacing(path.with_suffix(".history.json")) as partial:
        partial.write_text(json.dumps(history, indent=1))
    with replacing(path.with_suffix(".held_out.npz")) as partial:
        np.savez(partial, images=images[held_out], labels=labels[held_out], probabilities=probabilities)

    rate = ""
    if epochs > 1:
        per_second = steps_per_epoch * batch_size * (epochs - 1) / (epoch_ends[-1] - epoch_ends[0])
        rate = f", then {per_second:.0f} images/s"
    print(
        f"\nbackend            {keras.backend.backend()}\n"
        f"model              {options.architecture}, {model.count_params():,} parameters\n"
        f"training           {epochs} epochs in {seconds:.0f} s: first {epoch_ends[0] - start:.0f} s{rate}\n"
        f"held-out accuracy  {accuracy:.1%} of {len(held_out)} images\n"
        f"written            {path}\n",
        flush=True,
    )

    command = [sys.executable, __file__, "--classify", str(path), "--out", str(options.out)]
    status = subprocess.run(command, check=False).returncode
    if status:
        return status
    if options.data is None and accuracy <= TARGET:
        print(
            f"train_and_look: {accuracy:.1%} of the held-out digits are right, expected more than "
            f"{TARGET:.0%}; train longer with --epochs",
            file=sys.stderr,
        )
        return 1
    return 0


def read_digits(limit, seed):
    """The digits of scikit-learn, as (images, labels, class names).

    Returns:
        uint8 (N, 32, 32, 1), ink 255 on 0; int32 (N,); list of str.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()  # (1797, 8, 8), 0..16
    chosen = np.random.default_rng(seed).permutation(len(digits.target))[:limit]
    images = [
        np.asarray(Image.fromarray(image).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC))
        for image in np.uint8(digits.images[chosen] * (255 / 16))
    ]
    return np.stack(images)[..., None], digits.target[chosen].astype("int32"), [str(i) for i in range(10)]


def read_folder(folder, limit, seed):
    """Photos in one folder per class, as (images, labels, class names).

    Args:
        folder: path; its folders are the classes, in order of name, with images at any depth.
        limit: most images to read; of more, a draw by `seed`.

    Returns:
        uint8 (N, 64, 64, 3), RGB, shorter side resized and centre cropped; int32 (N,); list of str.

    Raises:
        UnusableError: when there is no folder, fewer than two classes, or a class with fewer than 3 images.
    """
    if not folder.is_dir():
        raise UnusableError(f"no folder {folder}")
    class_names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not class_names:
        raise UnusableError(
            f"{folder} has no folders in it; expected one per class, such as {folder / 'cats'}"
        )
    if len(class_names) == 1:
        raise UnusableError(
            f"{folder} has one class only, {class_names[0]!r}; there is nothing to tell apart"
        )
    files = []
    for label, name in enumerate(class_names):
        paths = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise UnusableError(f"class {name!r} is empty: no {', '.join(IMAGE_SUFFIXES)} in {folder / name}")
        files += [(path, label) for path in paths]
    if len(files) > limit:
        print(f"{len(files):,} images found; {limit:,} of them, drawn with seed {seed}, are used (--limit)")
        files = [files[i] for i in sorted(np.random.default_rng(seed).permutation(len(files))[:limit])]

    print(f"Reading {len(files):,} images ...", flush=True)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read_photo, [path for path, _ in files]))
    bad = [str(path) for (path, _), image in zip(files, images, strict=True) if image is None]
    if bad:
        names = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        print(f"train_and_look: skipped {len(bad)} unreadable image(s): {names}", file=sys.stderr)
    kept = [(image, label) for image, (_, label) in zip(images, files, strict=True) if image is not None]
    labels = np.array([label for _, label in kept], "int32")
    counts = np.bincount(labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if count < 3:
            raise UnusableError(
                f"class {name!r} has {count} usable image(s); 3 are the least: train, watch, hold out"
            )
    return np.stack([image for image, _ in kept]), labels, class_names


def read_photo(path):
    """A file as uint8 (64, 64, 3), or None when Pillow cannot read it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * PHOTO_SIZE, 2 * PHOTO_SIZE))  # a large JPEG is decoded small
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(upright, (PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.BICUBIC))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ):  # what Pillow raises for bad files
        return None


def split(labels, seed):
    """Indices to train with, to watch and to hold out: the same shares of each class, at least one image."""
    generator = np.random.default_rng(seed)
    parts = [], [], []
    for label in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == label))
        held_out = max(1, round(HELD_OUT_FRACTION * len(indices)))
        validation = held_out + max(1, round(VALIDATION_FRACTION * (len(indices) - held_out)))
        for part, chosen in zip(parts, np.split(indices, [held_out, validation])[::-1], strict=True):
            part.append(chosen)
    training, validation, held_out = (generator.permutation(np.concatenate(part)) for part in parts)
    return training, validation, held_out


def batches(images, labels, batch_size, flip, seed):
    """Shuffled batches without end, images shifted by up to a tenth, half of them mirrored if `flip`.

    Yields:
        uint8 (batch_size, H, W, C), int32 (batch_size,). The incomplete last batch of an epoch is left out:
        JAX would compile the training step once more for it.
    """
    generator = np.random.default_rng(seed)
    height, width = images.shape[1:3]
    margin = height // 10
    border = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            corners = generator.integers(0, 2 * margin + 1, (batch_size, 2))
            crops = [
                image[top : top + height, left : left + width]
                for image, (top, left) in zip(np.pad(images[chosen], border), corners, strict=True)
            ]
            if flip:
                crops = [crop[:, ::-1] if generator.random() < 0.5 else crop for crop in crops]
            yield np.stack(crops), labels[chosen]


# The second stage, in a process that has never seen the model: model.keras -> predictions.png


def classify(path, out):
    """Loads the model, classifies the held-out images beside it, writes predictions.png."""
    held_out_path = path.with_suffix(".held_out.npz")
    for file in (path, held_out_path):
        if not file.is_file():
            raise UnusableError(f"no file {file}; train first, without --classify")

    with quiet_stderr():
        import keras

        import keras_convnext  # noqa: F401  registers the layers, so that load_model needs no custom_objects

    model = keras.saving.load_model(path)
    class_names = path.with_suffix(".labels.txt").read_text(encoding="utf-8").splitlines()
    history = json.loads(path.with_suffix(".history.json").read_text())
    with np.load(held_out_path) as file:
        images, labels, before = file["images"], file["labels"], file["probabilities"]
    probabilities = model.predict(images, batch_size=min(BATCH_SIZE, len(images)), verbose=0)
    accuracy = np.mean(probabilities.argmax(-1) == labels)
    print(
        f"In a new process {path} gives {accuracy:.1%} of {len(labels)} images, probabilities within "
        f"{np.abs(probabilities - before).max():.1g} of those before it was saved."
    )
    picture = out / "predictions.png"
    with replacing(picture) as partial:
        draw(partial, images, labels, probabilities, class_names, history, keras.backend.backend())
    print(f"Look at {picture}")


def draw(path, images, labels, probabilities, class_names, history, backend):
    """The picture: 40 held-out images, up to 8 mistakes, the confusion matrix and the training curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    predicted = probabilities.argmax(-1)
    confidence = probabilities.max(-1)
    wrong = np.flatnonzero(predicted != labels)
    mistakes = wrong[np.argsort(-confidence[wrong])][:8]

    figure = pyplot.figure(figsize=(15, 9.6), facecolor="white")
    figure.suptitle(
        f"{1 - len(wrong) / len(labels):.1%} of {len(labels)} held-out images are right "
        f"(ConvNeXt trained from random weights, {backend})",
        fontsize=15,
        x=0.025,
        ha="left",
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    sample, errors = left.subfigures(2, 1, height_ratios=(5, 1.28))
    sample.text(0.04, 0.922, f"The first {min(40, len(labels))} of them", fontsize=11, color="0.3")
    title = f"The most confident of {len(wrong)} mistakes" if len(wrong) else "No mistakes to show"
    errors.text(0.04, 0.93, title, fontsize=11, color="0.3")
    for part, rows, shown, top in (
        (sample, 5, np.arange(len(labels))[:40], 0.865),
        (errors, 1, mistakes, 0.72),
    ):
        grid = part.subplots(
            rows,
            8,
            squeeze=False,
            gridspec_kw={"left": 0.04, "right": 0.98, "bottom": 0.01, "top": top, "hspace": 0.45},
        )
        for axes in grid.flat:
            axes.axis("off")
        for axes, i in zip(grid.flat, shown, strict=False):
            axes.imshow(
                images[i].squeeze(-1) if images.shape[-1] == 1 else images[i], cmap="gray_r", vmin=0, vmax=255
            )
            text = f"{shortened(class_names[predicted[i]])}  {confidence[i]:.0%}"
            right_answer = predicted[i] == labels[i]
            if not right_answer:
                text += f"\nis {shortened(class_names[labels[i]])}"
            axes.set_title(text, fontsize=9, pad=3, color="0.15" if right_answer else "crimson")

    matrix_axes, curve_axes = right.subplots(
        2,
        1,
        gridspec_kw={
            "left": 0.2,
            "right": 0.95,
            "bottom": 0.07,
            "top": 0.89,
            "hspace": 0.4,
            "height_ratios": (1.5, 1),
        },
    )
    draw_confusions(matrix_axes, labels, predicted, class_names)
    epochs = range(1, len(history["accuracy"]) + 1)
    curve_axes.plot(epochs, history["accuracy"], marker=".", label="training (shifted images)")
    curve_axes.plot(epochs, history["val_accuracy"], marker=".", label="validation")
    curve_axes.set(title="Accuracy while training", xlabel="epoch", ylim=(0, 1.02))
    curve_axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    curve_axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    curve_axes.grid(alpha=0.25)
    curve_axes.legend(loc="lower right", frameon=False)
    curve_axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)


def draw_confusions(axes, labels, predicted, class_names):
    """How often each true class (row) was taken for each class (column)."""
    count = len(class_names)
    confusions = np.zeros((count, count), int)
    np.add.at(confusions, (labels, predicted), 1)
    shares = confusions / np.maximum(confusions.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title="Held-out images by true and predicted class", xlabel="predicted", ylabel="true")
    if count > 20:  # names and numbers would not fit
        return
    names = [shortened(name) for name in class_names]
    slanted = max(map(len, names)) > 3
    axes.set_xticks(range(count), names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(count), names)
    for row, column in np.ndindex(count, count):
        if confusions[row, column]:
            color = "white" if shares[row, column] > 0.5 else "0.2"
            axes.text(column, row, confusions[row, column], ha="center", va="center", fontsize=8, color=color)


def shortened(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


if __name__ == "__main__":
    sys.exit(main())
