"""The class names, compared with timm's own lists."""

import gzip
import inspect
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

from keras_convnext.data.class_names import (
    class_names,
    decode_predictions,
    from_lines,
    synset_ids,
    to_lines,
)

pytestmark = pytest.mark.once

SUBSETS = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k"}


@pytest.fixture(scope="module")
def timm_data():
    """timm.data, imported when it is needed."""
    import timm.data

    return timm.data


@pytest.mark.parametrize("classes", SUBSETS)
def test_names_and_ids_equal_those_of_timm(classes, timm_data):
    info = timm_data.ImageNetInfo(SUBSETS[classes])
    assert synset_ids(classes) == info.label_names()
    assert class_names(classes) == info.label_descriptions()
    assert len(class_names(classes)) == len(set(synset_ids(classes))) == classes


def test_well_known_classes_have_their_well_known_index():
    names = class_names(1000)
    assert names[0] == "tench, Tinca tinca"
    assert names[281] == "tabby, tabby cat"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert synset_ids(1000)[0] == "n01440764"
    assert synset_ids(1000)[281] == "n02123045"
    assert synset_ids(1000)[999] == "n15075141"
    assert class_names(21841)[0] == "organism, being"
    assert synset_ids(21841)[0] == "n00004475"


def test_every_class_order_is_the_order_of_the_ids():
    for classes in SUBSETS:
        assert synset_ids(classes) == sorted(synset_ids(classes))


def test_22k_holds_all_of_12k_and_all_of_1k_but_one():
    known = set(synset_ids(21841))
    assert set(synset_ids(11821)) <= known
    assert set(synset_ids(1000)) - known == {"n04399382"}  # teddy bear, not in the 2011 release


@pytest.mark.parametrize("function", [class_names, synset_ids])
def test_unknown_number_of_classes_is_refused_with_the_known_ones(function):
    message = (
        r"No class names for 1001 classes\. Known: 1000 \(ImageNet-1k\), "
        r"11821 \(ImageNet-12k\), 21841 \(ImageNet-22k\)"
    )
    with pytest.raises(ValueError, match=message):
        function(1001)


def test_returned_list_belongs_to_the_caller():
    class_names(1000).clear()
    assert len(class_names(1000)) == 1000


def test_file_is_small_and_its_header_has_no_time_or_name():
    data = (resources.files("keras_convnext.data") / "imagenet_names.txt.gz").read_bytes()
    assert len(data) < 400_000
    assert data[3:8] == bytes(5)  # no flags (so no file name), modification time 0
    assert len(gzip.decompress(data).decode("utf-8").splitlines()) == 21842


def test_notice_names_wordnet_and_timm():
    notice = (resources.files("keras_convnext.data") / "NOTICE.txt").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in notice
    assert "timm 1.0.31" in notice and "Apache-2.0" in notice


def test_module_needs_the_standard_library_only():
    source = inspect.getsource(sys.modules["keras_convnext.data.class_names"])
    imports = [
        line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
    ]
    assert set(imports) - {"keras_convnext"} <= sys.stdlib_module_names


def test_importing_the_module_reads_no_file():
    code = (
        "import keras_convnext.data.class_names as c; "
        "assert c._synsets.cache_info().currsize == 0; print('lazy')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lazy" in result.stdout


ODD_NAMES = (
    "caf\udce9",
    "two\nlines",
    "  ",
    "",
    " cat",
    "a\u2028b",
    "a\rb",
    "a\x0bb",
    "\x85",
    '"cat"',
    '"',
    "\udce9",
)


def test_a_labels_file_gives_back_every_name(tmp_path):
    names = [*ODD_NAMES, "cat", "Schäferhund", "a, b", "\\udce9", "cat'"]
    (tmp_path / "x.labels.txt").write_bytes(to_lines(names).encode())
    text = (tmp_path / "x.labels.txt").read_bytes().decode()
    assert from_lines(text) == names
    assert text.splitlines()[-5:] == names[-5:]  # plain names stay as they are
    # What a person wrote: blank lines and blanks around a name do not count.
    assert from_lines('\n cat \n\n"a" dog\n"b\n') == ["cat", '"a" dog', '"b']


def test_decoded_predictions_have_the_form_of_keras_applications():
    preds = np.full((2, 1000), 0.0001, "float32")
    preds[0, [2, 134, 517]] = 0.5, 0.3, 0.1  # both cranes
    preds[1, 999] = 0.9
    first, second = decode_predictions(preds, top=3)
    assert [row[:2] for row in first] == [
        ("n01484850", "great_white_shark"), ("n02012849", "crane"), ("n03126707", "crane"),
    ]  # fmt: skip
    assert [row[2] for row in first] == pytest.approx([0.5, 0.3, 0.1]) and type(first[0][2]) is float
    assert second[0][:2] == ("n15075141", "toilet_tissue")
    assert [len(row) for row in decode_predictions(preds)] == [5, 5]
    assert len(decode_predictions(preds, top=2000)[0]) == 1000


def test_names_of_other_lists_are_asked_for():
    assert decode_predictions(np.eye(21841)[[0]], 1)[0][0][0] == synset_ids(21841)[0]
    tiny = np.eye(200)[[3]]
    assert decode_predictions(tiny, 1, classes="tiny_imagenet200") == [
        [(synset_ids("tiny_imagenet200")[3], "tailed_frog", 1.0)]
    ]
    with pytest.raises(ValueError, match=r"No class names for \['a', 'b'\] classes"):
        decode_predictions(np.eye(2), classes=["a", "b"])
    with pytest.raises(ValueError, match=r"No class names for 200 classes.*'tiny_imagenet200'"):
        decode_predictions(tiny)


@pytest.mark.parametrize(
    ("preds", "settings", "message"),
    [
        (np.zeros(1000), {}, r"\(N, classes\).*shape \(1000,\)"),
        (np.full((1, 1000), np.nan), {}, "0 of 1000 finite"),
        (np.zeros((1, 5)), {"classes": 1000}, r"of 1000 classes. Received: shape \(1, 5\)"),
        (np.zeros((1, 1000)), {"top": 0}, "top from 1. Received: top=0"),
    ],
)
def test_what_is_not_a_table_of_probabilities_is_refused(preds, settings, message):
    with pytest.raises(ValueError, match=message):
        decode_predictions(preds, **settings)
