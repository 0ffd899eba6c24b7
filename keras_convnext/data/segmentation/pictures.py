"""Pictures of label maps: a PNG with a palette, the map over its photo, and a legend with shares."""

import colorsys
import contextlib
import importlib.util
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from keras_convnext._files import PNG_MARK, StrPath, replace_file
from keras_convnext.data.segmentation.labels import IGNORED, Labels, default_names

_ROW, _SWATCH, _MARGIN = 22, 14, 10  # pixels of a legend
_MOST_ROWS = 20


def default_labels(classes: int) -> Labels:
    """Names and colours for classes that nothing is known of: `default_names`, hues far from each other."""
    golden = (5**0.5 - 1) / 2  # the multiples of this lie evenly around the circle, however many they are
    tones = ((0.85, 0.95), (0.55, 0.75), (0.95, 0.6))  # saturation and value, in turns
    colours = [colorsys.hsv_to_rgb(i * golden % 1, *tones[i % len(tones)]) for i in range(classes)]
    palette = tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours)
    return Labels(default_names(classes), palette)


def shares(label_map: np.ndarray, labels: Labels) -> list[dict[str, Any]]:
    """The classes in a label map, with the share of the labelled pixels in [0, 1], the largest first."""
    counts = np.bincount(label_map.ravel(), minlength=IGNORED + 1)[: len(labels.names)]
    total = max(int(counts.sum()), 1)
    return [
        {"class_index": index, "name": labels.names[index], "share": float(counts[index] / total)}
        for index in np.argsort(-counts, kind="stable").tolist()
        if counts[index]
    ]


def as_palette_image(label_map: np.ndarray, labels: Labels) -> Image.Image:
    """A picture of the class numbers in the colours of the classes; what is ignored is black."""
    picture = Image.fromarray(label_map.astype("uint8")).convert("P")
    picture.putpalette(_table(labels).tobytes())
    return picture


def overlay(image: np.ndarray, label_map: np.ndarray, labels: Labels, opacity: float = 0.5) -> np.ndarray:
    """uint8 (H, W, 3): the colours of the classes over a photo; what is ignored shows the photo alone."""
    colours = _table(labels)[label_map]
    weight = np.where(label_map == IGNORED, 0.0, opacity).astype("float32")[..., None]
    return np.rint(image + (colours.astype("float32") - image) * weight).astype("uint8")


def with_legend(picture: np.ndarray, found: list[dict[str, Any]], labels: Labels) -> Image.Image:
    """A picture with the classes of `shares` beside it: colour, share and name, the smallest summed up."""
    shown, others = found[:_MOST_ROWS], found[_MOST_ROWS:]
    lines = [(labels.palette[row["class_index"]], row["share"], row["name"]) for row in shown]
    if others:
        rest = sum(row["share"] for row in others)
        lines.append(((128, 128, 128), rest, f"{len(others)} more classes"))
    letters = font(14)
    texts = [f"{100 * share:5.1f} %  {name}" for _, share, name in lines]
    width = 2 * _MARGIN + _SWATCH + 8 + int(max((letters.getlength(text) for text in texts), default=0))
    height = max(picture.shape[0], 2 * _MARGIN + _ROW * len(lines))
    sheet = Image.new("RGB", (picture.shape[1] + width, height), "white")
    sheet.paste(Image.fromarray(picture), (0, 0))
    pen = ImageDraw.Draw(sheet)
    left = picture.shape[1] + _MARGIN
    for number, ((colour, _, _), text) in enumerate(zip(lines, texts, strict=True)):
        top = _MARGIN + number * _ROW
        pen.rectangle((left, top + 2, left + _SWATCH, top + 2 + _SWATCH), colour, "black")
        pen.text((left + _SWATCH + 8, top), text, "black", letters)
    return sheet


def save_png(picture: Image.Image, path: StrPath) -> None:
    """Writes a PNG in one step, in place of nothing or of one that this package wrote (`check_target`)."""
    marked, (name, _, text) = PngImagePlugin.PngInfo(), PNG_MARK.decode().partition("\0")
    marked.add_text(name, text)
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=marked)
    replace_file(path, content.getvalue(), PNG_MARK)


def font(size: int) -> Any:
    """DejaVu Sans of the system or of matplotlib, for most alphabets; else Pillow's own, for ASCII."""
    found = importlib.util.find_spec("matplotlib")  # without importing it
    places = (found.submodule_search_locations if found is not None else None) or ()
    for folder in ("", *(f"{place}/mpl-data/fonts/ttf/" for place in places)):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(f"{folder}DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def _table(labels: Labels) -> np.ndarray:
    """uint8 (256, 3), the colour of each number in a label map."""
    table = np.zeros((256, 3), "uint8")
    table[: len(labels.palette)] = labels.palette
    return table
