"""Detections as COCO's results files have them."""

from typing import Any

from keras_convnext.data.segmentation.coco import run_lengths


def as_result(one: dict[str, Any]) -> dict[str, Any]:
    """What `DetectionPredictor.detect` tells of an object: "category_id", "bbox", "score", "segmentation".

    "bbox" is x, y, width and height in pixels of the photo, "segmentation" of a mask its run lengths.
    """
    x0, y0, x1, y1 = (round(float(side), 2) for side in one["box"])
    result: dict[str, Any] = {
        "category_id": one["category_id"],
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "score": round(one["score"], 5),
    }
    return result | ({"segmentation": run_lengths(one["mask"])} if "mask" in one else {})
