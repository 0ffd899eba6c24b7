"""The README's table of architectures is made from the tables of the package. To renew it: run this file."""

import csv
import inspect
import pathlib

import pytest

from keras_convnext import checkpoints, models
from keras_convnext.results import COLUMNS, IMAGENET_VALIDATION, read_results
from keras_convnext.variants import VARIANTS

README = pathlib.Path(__file__).parents[1] / "README.md"
RESULTS = (
    pathlib.Path(__file__).parents[1] / "benchmarks" / "results.csv"
)  # rows of `keras-convnext evaluate`
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


def measured(tag, path=RESULTS):
    """The latest row of results of a published file on the whole ImageNet validation set, or None."""
    row = checkpoints.CHECKPOINTS[tag]
    # A prefix beside a file on the Hub is that of the file it was made from.
    published = row.sha256 or (row.sha256_prefix if row.hub_id is None else None) or ""
    found = [
        result
        for result in (read_results(path) if path.exists() else [])
        if result["model"] == tag
        and (result["data_sha256"], result["n"]) == (IMAGENET_VALIDATION, "50000")
        and result["outputs"] == "all 1000"
        and result["weights_sha256"].startswith(published)
    ]
    return max(found, key=lambda result: result["time"], default=None)


def table(path=RESULTS) -> str:
    """The table in Markdown; with a column of what was measured here, when anything was."""
    names = constructor_names()
    tags = [tag for tag in checkpoints.IMAGENET.values() if tag is not None]
    is_measured = any(measured(tag, path) for tag in tags)
    rows = [
        '| constructor | parameters | `weights="imagenet"` | top-1 | licence |'
        + " measured top-1 |" * is_measured,
        "|---|--:|---|--:|---|" + "--:|" * is_measured,
    ]
    for name, variant in VARIANTS.items():
        tag = checkpoints.IMAGENET[name]
        cells = ["none published", "", ""]
        if tag is not None:
            row = checkpoints.CHECKPOINTS[tag]
            cells = [f"`{tag}`", f"{row.top1:.1f} @ {row.image_size}", row.licence]
        if is_measured:
            result = measured(tag, path) if tag is not None else None
            cells.append(f"{float(result['top1']):.1f} @ {result['image_size']}" if result else "")
        rows.append("| " + " | ".join([f"`{names[name]}`", f"{variant.parameters:,}", *cells]) + " |")
    return "\n".join(rows) + "\n"


def test_table_of_architectures_is_up_to_date():
    text = README.read_text()
    assert text.split(BEGIN)[1].split(END)[0] == table(), "run: python tests/test_readme.py"


def test_measured_scores_are_those_of_the_published_file_on_all_images(tmp_path):
    tag = "convnext_tiny.keras_applications"
    good = dict.fromkeys(COLUMNS, "") | {
        "model": tag,
        "weights_sha256": checkpoints.CHECKPOINTS[tag].sha256,
        "n": "50000",
        "data_sha256": IMAGENET_VALIDATION,
        "outputs": "all 1000",
        "time": "2026-11-22T12:00:00+00:00",
        "top1": "81.2640",
        "image_size": "224",
    }
    later = good | {"time": "2027-01-01T00:00:00+00:00", "top1": "11.1111"}

    def written(*rows):
        with open(tmp_path / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / "results.csv"

    path = written(
        good,
        later | {"n": "49999"},
        later | {"data_sha256": "0" * 64},
        later | {"weights_sha256": "0" * 64},
        later | {"model": "convnext_tiny.fb_in1k"},
        later | {"outputs": "200 of 1000, by WordNet id (ImageNet-A)"},
    )
    lines = table(path).splitlines()
    assert lines[0].endswith("| licence | measured top-1 |") and lines[1].endswith("---|--:|")
    assert {line.count("|") for line in lines} == {7}
    assert [line for line in lines if line.endswith(" | 81.3 @ 224 |")] == [
        next(line for line in lines if tag in line)
    ]
    assert table(written(good | {"n": "100"})) == table(tmp_path / "missing.csv")
    assert " 11.1 @ 224 |" in table(written(good, later))


def test_count_of_weight_files_is_right():
    assert f"All {len(checkpoints.CHECKPOINTS)} files" in README.read_text()


def test_no_placeholder_is_left():
    assert "_TABLE" not in README.read_text()


if __name__ == "__main__":
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + table() + END + after)
