"""The README's table of architectures is made from the tables of the package. To renew it: run this file."""

import inspect
import pathlib

import pytest

from keras_convnext import checkpoints, models
from keras_convnext.variants import VARIANTS

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- table: python tests/test_readme.py -->\n"
END = "<!-- end of table -->"

pytestmark = pytest.mark.once


def constructor_names():
    """{architecture: name of its constructor}."""
    functions = {name: function for name, function in vars(models).items() if inspect.isfunction(function)}
    return {
        inspect.signature(function).parameters["name"].default: name
        for name, function in functions.items()
        if "ConvNeXt" in name
    }


def table() -> str:
    """The table in Markdown."""
    names = constructor_names()
    rows = [
        '| constructor | parameters | `weights="imagenet"` | top-1 | licence |',
        "|---|--:|---|--:|---|",
    ]
    for name, variant in VARIANTS.items():
        tag = checkpoints.IMAGENET[name]
        cells = ["none published", "", ""]
        if tag is not None:
            row = checkpoints.CHECKPOINTS[tag]
            cells = [f"`{tag}`", f"{row.top1:.1f} @ {row.image_size}", row.licence]
        rows.append("| " + " | ".join([f"`{names[name]}`", f"{variant.parameters:,}", *cells]) + " |")
    return "\n".join(rows) + "\n"


def test_table_of_architectures_is_up_to_date():
    text = README.read_text()
    assert text.split(BEGIN)[1].split(END)[0] == table(), "run: python tests/test_readme.py"


def test_count_of_weight_files_is_right():
    assert f"All {len(checkpoints.CHECKPOINTS)} files" in README.read_text()


def test_no_placeholder_is_left():
    assert "_TABLE" not in README.read_text()


if __name__ == "__main__":
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + table() + END + after)
