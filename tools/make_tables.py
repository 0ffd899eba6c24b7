"""Makes the tables of README.md, keras_convnext/README.md and recipes/README.md from those of the package.

    python tools/make_tables.py

It rewrites what stands between the two comments of each table, and says which pages changed.
"""

import inspect
import pathlib
import sys
from collections.abc import Collection

from keras_convnext import models
from keras_convnext._settings import Settings, range_words
from keras_convnext.evaluation.results import IMAGENET_VALIDATION, read_results
from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.training.recipes.pretraining import PretrainingRecipe
from keras_convnext.training.recipes.segmentation import SegmentationRecipe
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import catalog

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PACKAGE_README = ROOT / "keras_convnext" / "README.md"
RECIPES_README = ROOT / "recipes" / "README.md"
RESULTS = ROOT / "benchmarks" / "results.csv"  # rows of `keras-convnext evaluate`
TABLE = ("<!-- table: python tools/make_tables.py -->\n", "<!-- end of table -->")
SIZES = ("<!-- sizes: python tools/make_tables.py -->\n", "<!-- end of sizes -->")
KEYS = ("<!-- keys: python tools/make_tables.py -->\n", "<!-- end of keys -->")
SEGMENTATION_KEYS = (
    "<!-- keys of segmentation: python tools/make_tables.py -->\n",
    "<!-- end of keys of segmentation -->",
)
PRETRAINING_KEYS = (
    "<!-- keys of pre-training: python tools/make_tables.py -->\n",
    "<!-- end of keys of pre-training -->",
)
SIZE_NAMES = ("Atto", "Femto", "Pico", "Nano", "Tiny", "Small", "Base", "Large", "XLarge", "Huge")


def constructor_names():
    """{architecture: name of its constructor}."""
    functions = {name: function for name, function in vars(models).items() if inspect.isfunction(function)}
    return {
        inspect.signature(function).parameters["name"].default: name
        for name, function in functions.items()
        if "ConvNeXt" in name
    }


def measured(tag, path=RESULTS):
    """The latest result of a published file on the whole ImageNet validation set, or None."""
    row = catalog.CHECKPOINTS[tag]
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
    tags = [tag for tag in catalog.IMAGENET.values() if tag is not None]
    is_measured = any(measured(tag, path) for tag in tags)
    rows = [
        '| constructor | parameters | `weights="imagenet"` | top-1 | licence |'
        + " measured top-1 |" * is_measured,
        "|---|--:|---|--:|---|" + "--:|" * is_measured,
    ]
    for name, variant in VARIANTS.items():
        tag = catalog.IMAGENET[name]
        cells = ["none published", "", ""]
        if tag is not None:
            row = catalog.CHECKPOINTS[tag]
            cells = [f"`{tag}`", f"{row.top1:.1f} @ {row.image_size}", row.licence]
        if is_measured:
            result = measured(tag, path) if tag is not None else None
            cells.append(f"{float(result['top1']):.1f} @ {result['image_size']}" if result else "")
        rows.append("| " + " | ".join([f"`{names[name]}`", f"{variant.parameters:,}", *cells]) + " |")
    return "\n".join(rows) + "\n"


def best(architecture, rows=catalog.CHECKPOINTS):
    """(top-1 to a tenth, image size, row) of the published ImageNet-1k classifier with the highest score.

    Where scores are equal to a tenth, the smaller image and then the row that stands first. None without any.
    """
    scores = [
        (round(top1, 1), size, row)
        for row in rows.values()
        if row.architecture == architecture and row.classes == 1000
        for top1, size in ((row.top1, row.image_size), (row.test_top1, row.test_image_size))
        if top1 is not None and size is not None
    ]
    return max(scores, key=lambda score: (score[0], -score[1]), default=None)


def sizes() -> str:
    """The short table in Markdown, a row for each size of V1 and V2, and the licences of what it names."""
    lines = [
        "| size | `ConvNeXt`, million weights | top-1 @ pixels, tag "
        "| `ConvNeXtV2`, million weights | top-1 @ pixels, tag |",
        "|---|--:|---|--:|---|",
    ]
    licences: dict[bool, set[str]] = {True: set(), False: set()}
    for name in SIZE_NAMES:
        cells = [name]
        for prefix in ("convnext_", "convnextv2_"):
            architecture = prefix + name.lower()
            score = best(architecture)
            cells.append(f"{VARIANTS[architecture].parameters / 1e6:.1f}" if architecture in VARIANTS else "")
            if score is None:
                cells.append("none published" if architecture in VARIANTS else "")
                continue
            top1, size, row = score
            licences[row.commercial_use].add(row.licence)
            tag = row.tag.removeprefix(architecture + ".")
            cells.append(f"{top1} @ {size} `{tag}`" + " NC" * (not row.commercial_use))
        lines.append("| " + " | ".join(cells) + " |")
    free, restricted = (", ".join(sorted(licences[allowed])) for allowed in (True, False))
    return "\n".join(lines) + f"\n\nNC: not for commercial use ({restricted}). The others: {free}.\n"


def keys(recipe: type[Settings] = Recipe, known: Collection[str] = ()) -> str:
    """The keys of a recipe in Markdown, with the table that each stands in; without those `known`."""
    rows = ["| key | value | what it is |", "|---|---|---|"]
    table = ""
    for name, field in recipe.fields().items():
        if name in known:
            continue
        before, (table, _, key) = table, name.rpartition(".")
        if table != before:
            rows.append(f"| **[{table}]** | | |")
        rows.append(f"| `{key}` | {range_words(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def keys_known(recipe: type[Settings] = SegmentationRecipe) -> set[str]:
    """The keys of a recipe that mean the same in a classifier's."""
    ours, theirs = recipe.fields(), Recipe.fields()
    return {
        name
        for name, field in ours.items()
        if name in theirs
        and (field.description, field.metadata) == (theirs[name].description, theirs[name].metadata)
    }


def between(text, marks):
    """What stands between the two comments."""
    if [text.count(mark) for mark in marks] != [1, 1]:
        raise ValueError(f"Expected a page in which each of {marks} stands once.")
    return text.split(marks[0])[1].split(marks[1])[0]


def renewed(text, marks, content):
    """The text with `content` between the two comments."""
    return text.replace(marks[0] + between(text, marks) + marks[1], marks[0] + content + marks[1])


def main(
    readme: pathlib.Path = README,
    package_readme: pathlib.Path = PACKAGE_README,
    recipes_readme: pathlib.Path = RECIPES_README,
) -> int:
    pages = (
        (readme, SIZES, sizes()),
        (package_readme, TABLE, table()),
        (recipes_readme, KEYS, keys()),
        (recipes_readme, SEGMENTATION_KEYS, keys(SegmentationRecipe, keys_known())),
        (recipes_readme, PRETRAINING_KEYS, keys(PretrainingRecipe, keys_known(PretrainingRecipe))),
    )
    for path, marks, content in pages:
        old = path.read_text()
        new = renewed(old, marks, content)
        if new != old:
            path.write_text(new)
        print(f"{path}: {'changed' if new != old else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
