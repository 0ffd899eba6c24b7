"""A picture of what the training pipeline does: every operation at rising strength, and one batch."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from keras_convnext._files import PNG_MARK, check_target, replacing_file
from keras_convnext.data import batches, preprocess, sources
from keras_convnext.data.augment import erase_and_mix, policies
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from keras_convnext.data.train_transform import Augmentation

MAGNITUDES = (0, 2, 4, 6, 8, 10)
_TILE, _STEP, _GAP, _LINE, _NAME = 112, 118, 6, 14, 150  # pixels; _STEP from a tile to the next
_COLUMNS = 8


def draw(
    source: Source,
    output: str | os.PathLike[str],
    *,
    augmentation: Augmentation = Augmentation(),  # noqa: B008
    seed: int = 0,
    **options: Any,
) -> None:
    """Write a contact sheet as PNG, which appears whole or not at all.

    Above stands one image under each operation of the policy, from magnitude 0 to 10, then erased; below the
    first 32 images of a training batch, each with its largest targets; for the policy "keras" those of ours
    with the default policy too. `seed` is of the batch and of the
    choice of the image above; `options` are others of `batches.train_batches`, such as image_size.
    FileExistsError: there is something at `output` that is no contact sheet.
    """
    check_target(output, mark=PNG_MARK)
    if os.path.splitext(output)[1].lower() != ".png":
        raise ValueError(f"Expected the name of a PNG to write, received '{os.fspath(output)}'. Add .png.")
    sources.check_outside(source.path, output)
    policy = policies.parse_policy(augmentation.policy)
    levels = policy.levels if isinstance(policy, policies.RandAugment) else policies.RandAugment().levels
    count = min(4 * _COLUMNS, len(source) // 2 * 2)
    if not count:
        raise ValueError(f"Expected at least two images to draw, received {len(source)} in '{source.path}'.")
    # Pairs, so that as many mixtures as possible are seen.
    options = {"batch_size": count, "seed": seed, "dtype": "uint8", "mix_group": 2, **options}
    shown = {"a training batch": augmentation}
    if augmentation.policy == "keras":
        ours = augmentation.replaced({"policy": Augmentation().policy})
        shown = {f'a training batch, policy "{ours.policy}"': ours, 'the same, policy "keras"': augmentation}
    made = {
        title: next(iter(batches.train_batches(source, augmentation=chosen, **options)))
        for title, chosen in shown.items()
    }
    plain = augmentation.replaced({"policy": "none", "erase": 0, "mixup": 0, "cutmix": 0, "color_jitter": 0})
    sample = next(iter(batches.train_batches(source, augmentation=plain, **options)))[0][0].numpy()
    rows = _operations(sample, levels)
    top = 2 * _LINE + len(rows) * _STEP  # of the batch
    height = _LINE + -(-count // _COLUMNS) * (_STEP + 2 * _LINE)  # of a batch
    sheet = Image.new("RGB", (_COLUMNS * _STEP + _GAP, top + len(made) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, magnitude in enumerate(MAGNITUDES):
        pen.text((_NAME + column * _STEP, 1), f"magnitude {magnitude}", "black")
    for number, (name, tiles) in enumerate(rows):
        pen.text((_GAP, _LINE + number * _STEP + _TILE // 2), name, "black")
        for column, image in enumerate(tiles):
            sheet.paste(_thumbnail(image), (_NAME + column * _STEP, _LINE + number * _STEP))
    for number, (title, (images, targets)) in enumerate(made.items()):
        pen.text((_GAP, top + number * height), title, "black")
        _draw_batch(
            sheet, pen, top + number * height + _LINE, images.numpy(), targets.numpy(), source.classes
        )
    marked = PngImagePlugin.PngInfo()
    name, _, text = PNG_MARK.decode().partition("\0")
    marked.add_text(name, text)
    with replacing_file(output, PNG_MARK) as file:
        sheet.save(file, "PNG", pnginfo=marked)


def _draw_batch(
    sheet, pen, top: int, images: np.ndarray, targets: np.ndarray, classes: Sequence[str]
) -> None:
    """Draws images, each with its two largest targets below."""
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        row, column = divmod(number, _COLUMNS)
        left, upper = _GAP + column * _STEP, top + row * (_STEP + 2 * _LINE)
        sheet.paste(_thumbnail(image), (left, upper))
        for line, place in enumerate(np.argsort(-target, kind="stable")[:2]):
            if target[place] > 0.5 / len(target) + 1e-3 and place < len(classes):
                text = f"{target[place]:.0%} {classes[place]}"[: _TILE // 6]
                pen.text((left, upper + _TILE + line * _LINE), text, "black")


def _operations(image: np.ndarray, levels: Sequence[str]) -> list[tuple[str, list[np.ndarray]]]:
    """Returns the name of each operation, and the image after it at each magnitude."""
    rows = [("original", [image])]
    for level in dict.fromkeys(levels):
        made = []
        for magnitude in MAGNITUDES:
            policy = policies.RandAugment((level,), num_operations=1, magnitude=magnitude, probability=1.0)
            plan = policies.plan_augment(policy, np.zeros((1, 4)), image.shape[:2])
            row = {name: values[0] for name, values in plan.items()}
            made.append(policies.apply_augment(image, row).numpy())
        rows.append((level.replace("_", " "), made))
    uniforms = np.random.default_rng(0).random((len(MAGNITUDES), erase_and_mix.NUM_ERASE_UNIFORMS))
    boxes = erase_and_mix.plan_erase(uniforms, 1.0, image.shape[:2])
    noise = (IMAGENET_MEAN, IMAGENET_STD)
    erased = [erase_and_mix.apply_erase(image, box, (0, n), *noise).numpy() for n, box in enumerate(boxes)]
    return [*rows, ("erasing", erased)]


def _thumbnail(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize((_TILE, _TILE), preprocess.INTERPOLATIONS["bilinear"])
