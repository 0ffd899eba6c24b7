"""Label maps as files: one number a pixel, read to class numbers; and the names and colours of the classes.

Nothing is guessed: which values of a file stand for no class is said by `Labels.ignored_values`, and a value
that is neither a class nor ignored is an error.
"""

import io
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from keras_convnext._files import read_text
from keras_convnext._messages import one_line, shortened
from keras_convnext.data.index import SourceError, check_bytes, first_few
from keras_convnext.data.segmentation.labels import IGNORED, Colour, Labels

MAX_CLASSES = 255  # class numbers 0 to 254, as 255 is `IGNORED`
NAME_FILES = ("classes.txt", "labels.txt", "objectInfo150.txt")  # beside the maps; the last is ADE20K's own
_OUTSIDE = -1  # in a table: neither a class nor ignored


class LabelMapError(SourceError):
    """A label map does not fit its image or the classes: which file, which value, and what to do."""


def decode(content: bytes, name: str) -> np.ndarray:
    """Decodes the PNG of a label map to the numbers in it: uint8 or uint16 (H, W).

    Palette images give the numbers, not the colours, and so do gray ones of 1, 2, 4, 8 and 16 bits.
    LabelMapError: it is no PNG, is damaged, has colours, or would take too much memory.
    """
    if content[:3] == b"\xff\xd8\xff":
        raise LabelMapError(
            f"Expected a PNG with one number a pixel in '{name}', received a JPEG, which changes them. "
            "Export the label maps as PNG."
        )
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise LabelMapError(
            f"Expected a PNG with one number a pixel in '{name}', received "
            f"{f'a file that begins with {content[:8]!r}' if content else 'an empty file'}. Export it again."
        )
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            check_bytes(len(content) + 4 * image.width * image.height, f"'{name}'", LabelMapError)
            if image.mode not in ("1", "L", "P", "I;16", "I"):
                raise LabelMapError(
                    f"Expected one number a pixel in '{name}', received an image of the colours "
                    f"{'+'.join(image.getbands())}. Save the maps as gray or palette PNG, in which a number "
                    "is that of the class; which colour means which class is not guessed."
                )
            values = np.asarray(image)
    except LabelMapError:
        raise
    except Exception as error:  # decoders raise of many classes on damaged data
        raise LabelMapError(
            f"Expected a PNG with one number a pixel in '{name}', which is damaged or something else: "
            f"{shortened(one_line(error), 200)}. Export it again."
        ) from error
    bits, kind = content[24], content[25]  # of the header
    if kind == 0 and bits in (2, 4):
        values = values // np.uint8(255 // (2**bits - 1))  # Pillow spreads them over 0 to 255
    return values.astype(np.uint16 if bits == 16 else np.uint8)


def encode(label_map: np.ndarray) -> bytes:
    """Encodes numbers, uint8 (H, W), as a PNG that `decode` reads back."""
    file = io.BytesIO()
    Image.fromarray(label_map).save(file, "PNG")
    return file.getvalue()


def table(labels: Labels) -> np.ndarray:
    """Returns int16 (65536,), the class number of each value in a file, `IGNORED`, or -1 for neither."""
    numbers = np.full(1 << 16, _OUTSIDE, np.int16)
    numbers[labels.values] = np.arange(len(labels.names))
    numbers[list(labels.ignored_values)] = IGNORED
    return numbers


def class_numbers(values: np.ndarray, table: np.ndarray, labels: Labels, name: str) -> np.ndarray:
    """Turns the values of a file into class numbers, uint8 (H, W); LabelMapError for a value of no class."""
    numbers = table[values]
    if numbers.size and numbers.min() == _OUTSIDE:
        raise LabelMapError(_outside(values, numbers == _OUTSIDE, labels, name))
    return numbers.astype(np.uint8)


def _outside(values: np.ndarray, is_outside: np.ndarray, labels: Labels, name: str) -> str:
    """Says which value is neither a class nor ignored, and what would take it."""
    found = np.unique(values[is_outside]).tolist()
    value, ignored = found[0], labels.ignored_values
    known = f"from 0 to {int(labels.values.max())}"
    known += f" or the ignored {', '.join(map(str, ignored))}" if ignored else ""
    share = f"{is_outside.mean():.2%} of its pixels"
    more = f" and {len(found) - 1} more values" if len(found) > 1 else ""

    def taking(value: int) -> str:
        return passing({*ignored, value})

    if value in (255, 65535):
        fix = f"If {value} means not labelled, pass {taking(value)}."
        if set(np.unique(values).tolist()) <= {0, value}:
            fix += f" If it is a class, as in a black and white mask, write 1 for {value}."
    else:
        fix = f"If {value} means not labelled, pass {taking(value)}."
        if not ignored and value == len(labels.names):
            fix += f" If 0 does, and classes are counted from 1, pass {taking(0)}."
        fix += f" Else the list of {len(labels.names)} classes is too short: name all of them."
    return (
        f"Expected values {known} in '{name}', the {len(labels.names)} classes "
        f"({first_few(labels.names)}), received {value} in {share}{more}. {fix}"
    )


def passing(values: Iterable[int]) -> str:
    """Says how values are ignored, in Python and in a shell."""
    text = ", ".join(map(str, sorted(values)))
    words = text.replace(" ", "")
    python = f"ignored_values=({text}{',' * (',' not in text)})"
    return f"{python} (--ignored {words}; with train, --set ignored_values={words})"


def check_ignored(values: Sequence[int]) -> tuple[int, ...]:
    """Returns ignored values sorted, after a check that each is a number that a file can hold."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= 65535:
            raise ValueError(
                f"Expected ignored_values of whole numbers from 0 to 65535, received {value!r}. Pass those "
                "that stand for not labelled in the files, such as (255,)."
            )
    return tuple(sorted({int(value) for value in values}))


def check_names(names: Sequence[str], origin: str) -> tuple[str, ...]:
    """Returns the names of classes, after a check that they differ and are not too many."""
    twice = [name for number, name in enumerate(names) if name in names[:number] or not name]
    if twice or not names:
        raise SourceError(
            f"Expected a name of its own for each class in {origin}, received "
            f"{f'{twice[0]!r} again' if twice and twice[0] else 'an empty one'}. Write one name a line, "
            "class 0 first."
        )
    if len(names) > MAX_CLASSES:
        raise SourceError(
            f"Expected at most {MAX_CLASSES} classes, the numbers 0 to 254, received {len(names)} in "
            f"{origin}. Merge some of them."
        )
    return tuple(names)


def read_names(folder: str) -> tuple[str, list[list[str]]] | None:
    """Returns the file of a folder that names its classes, and of each class all names; None for no file.

    That is `classes.txt` or `labels.txt` with a name a line, class 0 first, or ADE20K's `objectInfo150.txt`,
    whose last column has several names of a class.
    """
    found = [name for name in NAME_FILES if os.path.isfile(os.path.join(folder, name))]
    if len(found) > 1:
        raise SourceError(
            f"Expected one list of classes in '{folder}', received {' and '.join(found)}. Remove one."
        )
    if not found:
        return None
    lines = [line.strip() for line in read_text(os.path.join(folder, found[0])).rstrip().splitlines()]
    if found[0] != "objectInfo150.txt":
        return found[0], [[line] for line in lines]
    rows = [line.split("\t") for line in lines[1:]]
    if [row[0].strip() for row in rows] != [str(number + 1) for number in range(len(rows))]:
        raise SourceError(
            f"Expected rows numbered from 1 with tabs between columns in '{folder}/objectInfo150.txt', "
            "received others. Take the file as it comes with ADE20K."
        )
    return found[0], [[name.strip() for name in re.split("[,;]", row[-1])] for row in rows]


def file_palette(content: bytes, values: np.ndarray) -> tuple[Colour, ...] | None:
    """Returns the colours of some values in a palette PNG; None where it has none for each of them."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        colours = image.getpalette("RGB") if image.mode == "P" else None
    if colours is None or 3 * (int(values.max()) + 1) > len(colours):
        return None
    rows = np.reshape(colours, (-1, 3))[values].tolist()
    return tuple((red, green, blue) for red, green, blue in rows)
