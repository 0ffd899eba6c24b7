"""A picture of a training batch of photographs and label maps."""

import os

from PIL import Image, ImageDraw

from keras_convnext._files import PNG_MARK, check_target
from keras_convnext.data.segmentation import batches, pictures
from keras_convnext.data.segmentation.sources import SegmentationSource
from keras_convnext.data.segmentation.train_transform import SegmentationAugmentation

_TILE, _GAP, _LINE, _COLUMNS = 192, 6, 14, 4  # pixels; _COLUMNS examples in a row, each photo and overlay
_SHOWN = 12  # examples


def draw(
    source: SegmentationSource,
    output: str | os.PathLike[str],
    *,
    augmentation: SegmentationAugmentation = SegmentationAugmentation(),  # noqa: B008
    crop_size: int = 512,
    seed: int = 0,
) -> None:
    """Write a contact sheet as PNG, which appears whole or not at all.

    It has the first images of a training batch, each beside itself under its label map, and a legend of the
    classes. FileExistsError: there is something at `output` that is no contact sheet.
    """
    check_target(output, mark=PNG_MARK)
    if os.path.splitext(output)[1].lower() != ".png":
        raise ValueError(f"Expected the name of a PNG to write, received '{os.fspath(output)}'. Add .png.")
    count = min(_SHOWN, len(source))
    made = batches.train_batches(
        source, batch_size=count, crop_size=crop_size, augmentation=augmentation, seed=seed, dtype="uint8"
    )
    images, maps = (values.numpy() for values in next(iter(made)))
    step, labels = _TILE + _GAP, source.labels
    rows, names = -(-count // _COLUMNS), labels.names
    width, columns = 2 * _COLUMNS * step + _GAP, 2 * _COLUMNS
    sheet = Image.new("RGB", (width, rows * step + _GAP + -(-len(names) // columns) * _LINE + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, label_map) in enumerate(zip(images, maps, strict=True)):
        row, column = divmod(number, _COLUMNS)
        for place, pixels in enumerate((image, pictures.overlay(image, label_map, labels))):
            corner = (_GAP + (2 * column + place) * step, _GAP + row * step)
            sheet.paste(Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.BILINEAR), corner)
    for number, (name, colour) in enumerate(zip(names, labels.palette, strict=True)):
        row, column = divmod(number, columns)
        left, top = _GAP + column * step, rows * step + _GAP + row * _LINE
        pen.rectangle((left, top + 2, left + 9, top + 11), colour, "black")
        pen.text((left + 14, top), name[: _TILE // 7], "black")
    pictures.save_png(sheet, output)
