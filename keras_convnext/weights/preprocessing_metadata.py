"""Stores in a weight file how its images are prepared, and reads it back.

A `.safetensors` file has it in its metadata, an `.h5` file in an attribute, a `.keras` file in a member of
its archive; each as the same JSON under the same name, with the fields of `Preprocessing.stored`. Other
programs ignore it.
"""

import json
import pathlib
import zipfile

from keras_convnext._files import FileFormatError, StrPath
from keras_convnext._messages import short_repr
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.weights import keras_files, safetensors_files
from keras_convnext.weights.published import KERAS_SUFFIXES

KEY = "keras_convnext.images"


def to_json(preprocessing: Preprocessing) -> str:
    """The text that is stored in a file: one line, the same for the same preprocessing."""
    return json.dumps(preprocessing.stored(), sort_keys=True)


def from_json(text: str, file: StrPath) -> Preprocessing:
    """Reads what `to_json` wrote into `file`; a ValueError names it and what is damaged or unknown."""
    names = sorted(Preprocessing(1).stored())
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = text
    try:
        if not isinstance(values, dict) or sorted(values) != names:
            received = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"Expected the values {', '.join(names)}, received {short_repr(received)}.")
        return Preprocessing.from_stored(**values)
    except ValueError as error:
        raise ValueError(
            f"{file} does not say how its images are prepared: {KEY!r} is damaged. {error} Write the file "
            "again, or pass the tag of weights whose images are prepared in the same way."
        ) from None


def read_preprocessing(path: StrPath) -> Preprocessing | None:
    """Reads from a weight file of any format how its images are prepared; None where it does not say.

    ValueError when what it says is damaged, FileNotFoundError when there is no such file.
    """
    text = read_text(path, KEY)
    return None if text is None else from_json(text, path)


def read_text(path: StrPath, key: str) -> str | None:
    """What a weight file of any format has under a key of this package; None where it has nothing."""
    path = pathlib.Path(path)
    try:
        if path.suffix in KERAS_SUFFIXES:
            return keras_files.read_stored_text(path, key)
        return safetensors_files.read_safetensors_metadata(path).get(key)
    except FileFormatError:
        if path.suffix in (".h5", ".keras"):
            raise
        return None  # another format or a damaged file, which the reader of its weights tells


def add_preprocessing(path: StrPath, preprocessing: Preprocessing) -> None:
    """Writes how images are prepared into an `.h5` or `.keras` file that Keras has written without that."""
    add_text(path, KEY, to_json(preprocessing))


def add_text(path: StrPath, key: str, text: str) -> None:
    """Writes a text under a key into an `.h5` or `.keras` file.

    The file has a temporary name still, as a stop in between damages it.
    """
    path = pathlib.Path(path)
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path, "r+") as file:
            file.attrs[key] = text
    elif path.suffix == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            # With a fixed date: the same bytes again.
            archive.writestr(zipfile.ZipInfo(key), text)
    else:
        raise ValueError(f"Expected a file ending in .h5 or .keras, received '{path}'.")
