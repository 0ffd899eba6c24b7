"""The picture of the training pipeline."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_convnext import _files
from keras_convnext.cli import main
from keras_convnext.data import contact_sheet, sources

pytestmark = pytest.mark.once

IMAGES = pathlib.Path(__file__).parents[1] / "images"


@pytest.fixture
def folder(tmp_path):
    for place, name in enumerate(("coffee.jpg", "rocket.jpg", "chelsea.png")):
        path = tmp_path / "data" / f"class{place % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((IMAGES / name).read_bytes())
    return tmp_path / "data"


def test_the_sheet_is_a_png(tmp_path):
    with pytest.raises(ValueError, match=r"name of a PNG to write, received '.*x.jpg'"):
        contact_sheet.draw(None, tmp_path / "x.jpg")


def test_look_draws_every_operation_and_a_batch(folder, tmp_path, capsys):
    output = tmp_path / "sheet.png"
    assert main.main(["look", str(folder), str(output)]) == 0
    assert "sheet.png: operations and a training batch of" in capsys.readouterr().out
    sheet = np.asarray(Image.open(output))
    rows = 1 + 15 + 1  # the original, the operations, erasing
    assert sheet.shape[0] > rows * 112
    # Magnitude 8; at 10 solarize is invert and posterize black.
    cells = [sheet[14 + row * 118 :][:112, 150 + 118 * 4 :][:, :112] for row in range(rows)]
    blank = [bool((cell == 255).all()) for cell in cells]
    assert blank == [True] + [False] * 16  # the original stands alone in its row
    assert len({cell.tobytes() for cell in cells[1:]}) == 16  # no two operations do the same
    assert not list(tmp_path.glob("*.tmp"))
    _files.check_target(output, mark=_files.PNG_MARK)  # may be written over


@pytest.mark.slow
def test_look_draws_the_policy_of_keras_beside_ours(folder, tmp_path, capsys):
    sheets = []
    for number, policy in enumerate(("rand-m9-mstd0.5-inc1", "keras")):
        output = tmp_path / f"{number}.png"
        assert main.main(["look", str(folder), str(output), "--policy", policy]) == 0
        sheets.append(np.asarray(Image.open(output)))
    one, two = sheets
    height = two.shape[0] - one.shape[0]  # of the second batch
    np.testing.assert_array_equal(two[: one.shape[0] - height], one[: one.shape[0] - height])
    batches = one[-height:][20:130], two[-2 * height : -height][20:130], two[-height:][20:130]
    np.testing.assert_array_equal(batches[0], batches[1])
    assert np.abs(batches[1].astype(int) - batches[2]).mean() > 1


def test_a_sheet_that_cannot_be_drawn_says_why(folder, tmp_path, capsys):
    for name in ("class0/chelsea.png", "class0/coffee.jpg"):
        (folder / name).unlink()
    (folder / "class0").rmdir()
    with pytest.raises(ValueError, match="Expected at least two images to draw, received 1 in"):
        contact_sheet.draw(sources.open_source(folder), tmp_path / "sheet.png")
    assert main.main(["look", str(folder), str(tmp_path / "sheet.png"), "--policy", "rond-m9"]) == 2
    assert "did you mean 'rand'?" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()
