"""Average precision: a perfect results file, perturbed ones, other ids, and what cannot be used."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_convnext.data.detection.annotations import Annotations
from keras_convnext.data.detection.categories import Categories
from keras_convnext.data.index import SourceError
from keras_convnext.data.segmentation import coco

pytestmark = pytest.mark.one_backend

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def write(folder, **changes):
    """A JSON with ids {3, 90, 7}: two photos, the second without objects; a category without objects."""
    for name in ("a.png", "b/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(folder / name)
    box = {"image_id": 12, "category_id": 90, "bbox": [5, 5, 30, 20], "id": 0}
    content = {
        "images": [
            {"id": 12, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 5, "file_name": "b/c.png", "height": 40, "width": 60},
        ],
        "categories": [
            {"id": number, "name": name} for number, name in ((7, "dog"), (3, "cat"), (90, "bird"))
        ],
        "annotations": [box, {**box, "category_id": 3, "bbox": [30, 10, 20, 20]}],
        **changes,
    }
    (folder / "x.json").write_text(json.dumps(content))
    return folder / "x.json"


def test_annotations_of_any_ids_are_read(tmp_path):
    read = Annotations(write(tmp_path))
    assert read.categories == Categories(("cat", "dog", "bird"), (3, 7, 90))
    assert [one["id"] for one in read.content["annotations"]] == [1, 2]  # 0 is none for pycocotools
    assert [one["area"] for one in read.content["annotations"]] == [600, 400]
    assert not read.has_masks and (len(read), read.name(1)) == (2, "b/c.png")
    assert read.file(1) == str(tmp_path / "b" / "c.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "photos" / "a.png")
    with pytest.raises(SourceError, match=r"missing: a\.png.*--images"):
        Annotations(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": [{"id": 3, "name": "cat"}]}, "the category_id of each annotation among those"),
        ({"images": []}, "the image_id of each annotation"),
        ({"images": [], "annotations": []}, r"Expected images in '.*', received none"),
        ({"categories": "none"}, "COCO-style annotations"),
        (
            {"annotations": [{"image_id": 12, "category_id": 3, "bbox": [1, 2, -3, 4]}]},
            "x, y, width and height",
        ),
        ({"annotations": [{"image_id": 12, "category_id": 3}]}, "COCO-style annotations"),
    ],
)
def test_annotations_that_cannot_be_used_are_told(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Annotations(write(tmp_path, **changes))


def perfect(content):
    """A results file with each annotation once."""
    size = {one["id"]: (one["height"], one["width"]) for one in content["images"]}
    found = []
    for one in content["annotations"]:
        result = {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": one["bbox"],
            "score": 0.9,
        }
        if one.get("segmentation"):
            result["segmentation"] = coco.run_lengths(coco.draw(one["segmentation"], size[one["image_id"]]))
        found.append(result)
    return found


def scores(content, found, kind="box"):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from keras_convnext.evaluation.detection import average_precision

    images = [one["id"] for one in content["images"]]
    return average_precision(content, found, images, [one["id"] for one in content["categories"]], kind)


def test_all_found_is_a_hundred_percent_and_nothing_is_zero(tmp_path):
    read = Annotations(write(tmp_path))
    found = scores(read.content, perfect(read.content))
    assert found.means["AP"] == found.means["AP small"] == pytest.approx(100)
    assert found.by_category == pytest.approx({"dog": np.nan, "cat": 100, "bird": 100}, nan_ok=True)
    assert scores(read.content, []).means["AP"] == 0
    moved = perfect(read.content)
    moved[0]["bbox"] = [5 + 6, 5, 30, 20]  # IoU 2 / 3: right up to 0.65
    assert scores(read.content, moved).by_category["bird"] == pytest.approx(40)
    wrong = [{**one, "image_id": 5} for one in perfect(read.content)]  # on the photo without objects
    assert scores(read.content, wrong).means["AP"] == 0


@pytest.mark.skipif(not (SHARED / "coco128").exists(), reason="coco128 is not here")
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_scores_equal_those_of_faster_coco_eval_on_coco128(kind):
    """With each annotation moved a little, some doubled, some of another category."""
    other = pytest.importorskip("faster_coco_eval", reason="faster_coco_eval is not installed")
    read = Annotations(SHARED / "coco128" / "instances.json", SHARED / "coco128" / "images")
    rng = np.random.default_rng(0)
    found = []
    for one in perfect(read.content) * 2:
        x, y, width, height = one["bbox"]
        dx, dy = rng.normal(0, 0.08, 2) * (width, height)
        other_id = one["category_id"] if rng.random() < 0.9 else int(rng.choice(read.categories.ids))
        found.append(
            {
                **one,
                "bbox": [x + dx, y + dy, width, height],
                "category_id": other_id,
                "score": float(rng.random()),
            }
        )
    received = scores(read.content, found, kind)
    assert 10 < received.means["AP"] < 95
    truth = other.COCO()
    truth.dataset = read.content
    truth.createIndex()
    drop = "segmentation" if kind == "box" else "bbox"
    results = truth.loadRes([{key: value for key, value in one.items() if key != drop} for one in found])
    run = other.COCOeval_faster(truth, results, {"box": "bbox", "mask": "segm"}[kind])
    run.evaluate()
    run.accumulate()
    run.summarize()
    np.testing.assert_allclose(
        list(received.means.values()), 100 * np.array(run.stats[:6]), rtol=0, atol=1e-10
    )
