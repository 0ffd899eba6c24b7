"""The pages of the project: their tables, counts, links and blocks of code."""

import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import pathlib
import re
import shlex
import shutil
import tomllib
from urllib.parse import unquote

import numpy as np
import programs
import pytest
from PIL import Image

import keras_convnext
from keras_convnext import loading, models
from keras_convnext.cli import main as cli
from keras_convnext.evaluation.results import COLUMNS, IMAGENET_VALIDATION
from keras_convnext.training.recipes.files import known_recipes
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import catalog

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("benchmarks", "demo", "keras_convnext", "notebooks", "recipes", "tests")  # that have pages
README = ROOT / "README.md"
PACKAGE_README = ROOT / "keras_convnext" / "README.md"

make_tables = programs.load("make_tables", ROOT / "tools")

pytestmark = pytest.mark.once


def anchors(text) -> set[str]:
    """What "#..." can name in a Markdown text: its headings as GitHub writes them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", without_code_blocks(text), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return {name + (f"-{found[:i].count(name)}" if name in found[:i] else "") for i, name in enumerate(found)}


def without_code_blocks(text) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def broken_links(text, path, root=ROOT) -> list[str]:
    """The relative links and pictures of a page at `path` that lead nowhere, each with the reason."""
    prose = re.sub(r"`[^`]*`", "", without_code_blocks(text))
    links = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", prose) + re.findall(
        r"\b(?:src|href)=\"([^\"]+)\"", prose
    )
    links += re.findall(r"^\[[^\]]+\]: +(\S+)", prose, re.MULTILINE)
    broken = []
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_relative_to(root.resolve()):
            broken.append(f"{link}: outside the repository")
        elif name and not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text() if name else text):
            broken.append(f"{link}: no such heading")
    return broken


def pages():
    """(path, Markdown) of every page and every notebook's text."""
    paths = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    for path in sorted(paths):
        yield path, path.read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        yield path, "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_tables_of_architectures_are_up_to_date(tmp_path, capsys):
    """The program that makes them would change nothing."""
    pages = (README, PACKAGE_README, make_tables.RECIPES_README)
    copies = {path: tmp_path / str(number) / path.name for number, path in enumerate(pages)}
    for path, copy in copies.items():
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    assert make_tables.main(*copies.values()) == 0
    assert [copy.read_text() for copy in copies.values()] == [path.read_text() for path in copies], (
        "run: python tools/make_tables.py"
    )
    assert capsys.readouterr().out.count(": up to date\n") == 5


def test_a_table_that_was_changed_by_hand_is_seen_and_renewed():
    text = README.read_text()
    changed = text.replace("85.2 @ 384", "85.9 @ 384")
    assert changed != text and make_tables.between(changed, make_tables.SIZES) != make_tables.sizes()
    assert make_tables.renewed(changed, make_tables.SIZES, make_tables.sizes()) == text
    with pytest.raises(ValueError, match="stands once"):
        make_tables.renewed(text.replace(make_tables.SIZES[1], ""), make_tables.SIZES, make_tables.sizes())


def test_best_published_score_is_the_highest_of_imagenet_classifiers():
    tiny = catalog.find_checkpoint("convnext_tiny.in12k_ft_in1k_384")
    assert make_tables.best("convnext_tiny") == (85.2, 384, tiny)
    assert make_tables.best("convnext_atto")[:2] == (77.0, 288)  # at the larger test size
    base = make_tables.best("convnextv2_base")[2]
    assert base.tag == "convnextv2_base.official_fcmae_ft_in22k_in1k_384"  # 87.7, where timm has 87.6
    assert make_tables.best("convnextv2_small") is None
    rows = {"few classes": dataclasses.replace(tiny, classes=200, top1=99.0), "tiny": tiny}
    assert make_tables.best("convnext_tiny", rows) == (85.2, 384, tiny)
    rows = {"none": dataclasses.replace(tiny, top1=None), "large": tiny}
    rows |= {"small": dataclasses.replace(tiny, image_size=224, top1=85.16), "last": tiny}
    assert make_tables.best("convnext_tiny", rows) == (85.2, 224, rows["small"])


def test_short_table_has_every_size_and_marks_what_is_not_for_commerce():
    lines = make_tables.sizes().splitlines()
    rows = {name: line for line in lines[2:-2] for name in [line.split(" | ")[0].removeprefix("| ")]}
    assert tuple(rows) == make_tables.SIZE_NAMES and {line.count("|") for line in rows.values()} == {6}
    marked = {name for name, line in rows.items() if line.endswith(" NC |")}
    assert marked == set(make_tables.SIZE_NAMES) - {"Small", "XLarge"}  # none published, and no such V2
    assert all(line.count(" NC") == (name in marked) for name, line in rows.items())  # never V1
    assert lines[-1] == "NC: not for commercial use (cc-by-nc-4.0). The others: apache-2.0."


def test_links_lead_to_files_and_headings_of_the_repository():
    broken = {str(path.relative_to(ROOT)): broken_links(text, path) for path, text in pages()}
    assert {path: links for path, links in broken.items() if links} == {}
    paths = {str(path.relative_to(ROOT)) for path, _ in pages()}
    assert {"README.md", "CONTRIBUTING.md", "recipes/README.md", "notebooks/export.ipynb"} <= paths


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, with `code`!\n## Twice\n## Twice\n```\n# not one\n```\n")
    page = tmp_path / "page.md"
    good = (
        "# Here\n[a](there.md) ![b](there.md#a-heading-with-code) [c](#here) [d](https://example.org/no#x)\n"
        '[e](there.md#twice-1) `[f](no.md)`\n```\n[g](no.md)\n```\n[h](<there.md>) [i](there.md "title")\n'
        "[j]: there.md\n"
    )
    assert broken_links(good, page, tmp_path) == []
    bad = {
        "[a](not.md)": "not.md: no such file",
        "![a](no/picture.png)": "no/picture.png: no such file",
        "[a](there.md#not-one)": "there.md#not-one: no such heading",
        "[a](there.md#twice-2)": "there.md#twice-2: no such heading",
        "[a](#there)": "#there: no such heading",
        "[a](../page.md)": "../page.md: outside the repository",
        '<img src="not.png">': "not.png: no such file",
        "[a]: not.md": "not.md: no such file",
    }
    for text, reason in bad.items():
        assert broken_links(good + text + "\n", page, tmp_path) == [reason]


def test_measured_scores_are_those_of_the_published_file_on_all_images(tmp_path):
    tag = "convnext_tiny.keras_applications"
    good = dict.fromkeys(COLUMNS, "") | {
        "model": tag,
        "weights_sha256": catalog.CHECKPOINTS[tag].sha256,
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
    lines = make_tables.table(path).splitlines()
    assert lines[0].endswith("| licence | measured top-1 |") and lines[1].endswith("---|--:|")
    assert {line.count("|") for line in lines} == {7}
    assert [line for line in lines if line.endswith(" | 81.3 @ 224 |")] == [
        next(line for line in lines if tag in line)
    ]
    assert make_tables.table(written(good | {"n": "100"})) == make_tables.table(tmp_path / "missing.csv")
    assert " 11.1 @ 224 |" in make_tables.table(written(good, later))


def test_counts_of_files_are_right():
    text = README.read_text()
    assert f"All {len(catalog.CHECKPOINTS)} files" in text
    assert f"[All {len(VARIANTS)} architectures]" in text
    assert f"# all {len(known_recipes())}\n" in (ROOT / "recipes" / "README.md").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n- {len(catalog.CHECKPOINTS)} weight files by tag" in changes
    assert f"\n- Training: {len(known_recipes())} recipes" in changes


def test_picture_and_table_of_speed_say_what_was_measured(tmp_path):
    program = programs.load("speed_summary")
    found = program.read(program.FOLDER)
    assert len(program.machines(found)) >= 3
    assert program.table(found) in README.read_text()
    for machine in program.machines(found):  # the rows of a table are those of its CSV file
        lines = (program.FOLDER / machine / "table.md").read_text(encoding="utf-8").splitlines()
        for mode, batch in program.CASES:
            start = lines.index(f"### convnext_tiny, {mode}, batch {batch}, 224 pixels, float32")
            rows = [line.strip("| ").split(" | ") for line in lines[start : lines.index("", start + 2)]]
            place = next(row for row in rows if row[0] == "implementation").index("x timm")
            cells = {row[0]: row[place] for row in rows if row[0].startswith("ours, ")}
            for backend, title in program.BACKENDS.items():
                ratio = found[mode, batch, backend, "timm"][machine]
                assert f"{ratio:.2f}" == cells[f"ours, {title}"].strip(" |")
    program.draw(found, tmp_path / "summary.png")
    with Image.open(tmp_path / "summary.png") as picture:
        assert picture.width == 1200


def test_no_placeholder_is_left():
    for path in (README, PACKAGE_README):
        assert "_TABLE" not in path.read_text()


def blocks(text, language) -> list[str]:
    """The blocks of code in one language; "" for those that name none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def first_example():
    """(the first block of Python in README.md, what it prints)."""
    text = README.read_text()
    code = blocks(text, "python")[0]
    return code, blocks(text.split(code)[1].removeprefix("```\n"), "")[0]


def test_the_first_lines_of_python_print_what_stands_below_them(tmp_path, monkeypatch, capsys):
    code, printed = first_example()
    assert code.splitlines()[-1].startswith("print(") and len(code.splitlines()) < 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def small_in_place_of_published_weights(monkeypatch):
    """Constructors and `load` check their arguments and tags, and build a small model with random weights."""

    def instead_of(function):
        def build(*args, **settings):
            given = inspect.signature(function).bind(*args, **settings)
            given.apply_defaults()
            weights = given.arguments.pop("weights")
            name = given.arguments.pop("architecture_or_tag", None) or given.arguments.pop("name")
            if "." in name or weights not in ("imagenet", "default", None):
                tag = name if "." in name else f"{name}.{weights}"
                assert tag.endswith((".pth", ".safetensors")) or catalog.find_checkpoint(tag)
            kept = ("classes", "drop_path_rate", "include_top")
            settings = {key: value for key, value in settings.items() if key in kept}
            return small(weights=None, input_shape=(64, 64, 3), **settings)

        return build

    small = models.ConvNeXtV2Atto  # the official code has it, unlike those for tests
    for name in ("load", *make_tables.constructor_names().values()):
        module = loading if name == "load" else models
        monkeypatch.setattr(module, name, instead_of(getattr(module, name)))
    return small


@pytest.mark.slow
def test_the_other_blocks_of_python_run(tmp_path, monkeypatch):
    """With small models and data; published weights and exports are checked up to the arguments."""
    pytest.importorskip("tensorflow", reason="batches are tf.data")
    monkeypatch.chdir(tmp_path)
    small = small_in_place_of_published_weights(monkeypatch)
    exporting = importlib.import_module("keras_convnext.exporting.export")
    preset = importlib.import_module("keras_convnext.exporting.preset")  # which needs Keras
    exported = []
    for name in keras_convnext.__all__:  # what earlier tests imported is found there, not where it is made
        monkeypatch.delitem(vars(keras_convnext), name, raising=False)
    signature = inspect.signature(exporting.export)
    monkeypatch.setattr(
        exporting, "export", lambda *args, **settings: exported.append(signature.bind(*args, **settings))
    )
    keras_convnext.save_weights(small(weights=None), "convnext_tiny_1k_224_ema.pth", layout="official")
    shutil.copytree(ROOT / "tests" / "images", "tests/images")
    for number in range(8):
        folder = pathlib.Path("imagenet/train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy("tests/images/coffee.jpg", folder / f"{number}.jpg")
    names = {
        "keras_convnext": keras_convnext,
        "images": np.zeros((4, 64, 64, 3), "uint8"),
        "labels": np.array([0, 1, 2, 3]),
        "photos": np.zeros((2, 64, 64, 3), "uint8"),
    }
    rest = blocks(README.read_text(), "python")[1:]
    for code in rest:
        if "train_batches" in code:
            names["model"] = small(weights=None, classes=2, input_shape=(224, 224, 3))
            names["model"].compile("sgd", "categorical_crossentropy")
            code = code.replace("1024", "4").replace("epochs=300", "epochs=1")
        code = code.replace("epochs=100", "epochs=1")
        if "keras_hub" in code:
            if importlib.util.find_spec("keras_hub") is None:
                continue
            preset.write_preset("convnextv2_atto.tiny_imagenet200", "DIR")
            names["photos"] = np.zeros((1, 80, 90, 3), "uint8")
        exec(compile(code, "README.md", "exec"), names)
    assert len(rest) == 7 and len(exported) == 2
    assert set(names["maps"]) == {"P2", "P3", "P4", "P5"} and names["steps"] == 2
    assert all(
        pathlib.Path(name).stat().st_size
        for name in ("flowers.keras", "photos.safetensors", "tiny.safetensors", "tiny.pth")
    )


def faults_of_command(words, root=ROOT) -> list[str]:
    """What a command on a page names in vain: a command, an option, a recipe, a target, a program."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "torchrun" and "keras_convnext" in words:
        words = ["keras-convnext", *words[words.index("keras_convnext") + 1 :]]
    program, *rest = words
    if program == "make":
        makefile = (root / "Makefile").read_text()
        return [
            f"no target {word}"
            for word in rest
            if "=" not in word and not re.search(f"^{word}:", makefile, re.MULTILINE)
        ]
    if program == "pip":
        known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = [
            extra for word in rest for extra in re.sub(r".*\[|\].*", "", word).split(",") if "[" in word
        ]
        return [f"no extra {extra}" for extra in extras if extra not in known]
    if program.endswith("python") and rest[0].endswith(".py"):
        return [f"no program {rest[0]}"] * (not (root / rest[0]).exists())
    if program != "keras-convnext":
        return []
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = cli.main([rest[0], "--help"])
        except SystemExit as end:
            code = end.code
    if code:
        return [f"no command {rest[0]}"]
    options = set(re.findall(r"(?<!\S)-{1,2}[\w-]+", re.sub(r"[\[\]|,]", " ", text.getvalue())))
    faults = [f"no option {word}" for word in rest if word.startswith("-") and word not in options]
    if rest[0] in ("train", "plan") and not rest[1].startswith("-"):
        known = (*known_recipes(), *(f"recipes/{name}.toml" for name in known_recipes()))
        faults += [f"no recipe {rest[1]}"] * (rest[1] not in known)
    return faults


def test_commands_of_the_pages_are_there():
    seen, faults = set(), {}
    for path, text in pages():
        for line in "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                seen.add(words[0])
                faults |= {
                    f"{path.relative_to(ROOT)}: {line}": found
                    for found in [faults_of_command(words)]
                    if found
                }
    assert faults == {}
    assert {"keras-convnext", "make", "pip", "torchrun"} <= seen


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("keras-convnext trian smoke", "no command trian"),
        ("KERAS_BACKEND=jax keras-convnext list --colour red", "no option --colour"),
        (
            "keras-convnext train imagenet1k_convnext_tinny --out runs/x",
            "no recipe imagenet1k_convnext_tinny",
        ),
        ("make tests", "no target tests"),
        ("pip install '.[jax,cuda]'", "no extra cuda"),
        ("python tools/no.py", "no program tools/no.py"),
    ],
)
def test_a_command_that_is_not_there_is_seen(line, fault):
    assert faults_of_command(shlex.split(line)) == [fault]
