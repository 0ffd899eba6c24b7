"""Images without labels: any layout is opened, what was found is said, and an empty folder is refused."""

import numpy as np
import PIL.Image
import pytest

from keras_convnext.data import unlabelled
from keras_convnext.data.index import SourceError

pytestmark = pytest.mark.once


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for place in ("a.png", "x/b.png", "x/y/c.jpg", "z/b.png"):
        photo(tmp_path / place)
    (tmp_path / "x" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("")
    return tmp_path


def test_images_at_any_depth_are_opened_and_told(folder):
    source = unlabelled.open_source(folder)
    names = [source.name(number) for number in range(len(source))]
    assert names == ["a.png", "x/b.png", "x/y/c.jpg", "z/b.png"]
    assert source.classes == ["images"] and not source.labels.any()
    lines = unlabelled.described(source, "training")
    assert lines[0] == f"training: 4 images in '{folder}', in 4 folders"
    assert lines[1] == "  left out: 1 .txt, 1 hidden"
    assert len(lines) == 2


def test_what_cannot_be_read_is_counted_before_work_begins(folder):
    (folder / "z" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    lines = unlabelled.described(unlabelled.open_source(folder))
    assert "unreadable: 1 of 5 looked at, such as 'z/broken.jpg': " in lines[-1]


def test_folders_named_after_splits_are_splits(tmp_path):
    photo(tmp_path / "train" / "deep" / "a.png")
    photo(tmp_path / "val" / "b.png")
    assert unlabelled.list_splits(tmp_path) == ["train", "val"]
    assert unlabelled.open_source(tmp_path, "validation").name(0) == "b.png"


@pytest.mark.parametrize("beside", [None, "notes.txt"])
def test_a_folder_without_images_is_refused_by_name(tmp_path, beside):
    (tmp_path / "inner").mkdir()
    if beside:
        (tmp_path / "inner" / beside).write_text("")
    but = ", but 1 .txt" if beside else ""
    with pytest.raises(
        SourceError, match=rf"Expected images in '.*' or its folders, found none{but}\. Known"
    ):
        unlabelled.open_source(tmp_path)


def test_sets_with_labels_are_opened_without_them(digits):
    source = unlabelled.open_source(digits, "train")
    assert len(source) == 1347 and source.classes == ["images"] and not source.labels.any()


@pytest.fixture
def digits():
    from keras_convnext.training.recipes.files import recipes_folder

    return recipes_folder() / "digits"
