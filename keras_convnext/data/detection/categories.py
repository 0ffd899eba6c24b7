"""What the classes of a detector are: names, and the ids that annotations and results files have for them."""

import csv
import dataclasses
import functools
import importlib.resources


@dataclasses.dataclass(frozen=True)
class Categories:
    """The classes 0 to n - 1 of a detector, in the order of their ids.

    Ids are those of the annotations: any whole numbers, with gaps or from 0. ValueError for other than an id
    of its own for each name.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        are_right = all(isinstance(name, str) for name in self.names) and all(
            isinstance(number, int) for number in self.ids
        )
        if not (are_right and self.names and len(set(self.ids)) == len(self.ids) == len(self.names)):
            raise ValueError(
                "Expected a name and an id of its own for each category. Received: "
                f"names={self.names}, ids={self.ids}"
            )


@functools.cache
def coco() -> Categories:
    """The 80 categories of COCO 2017, whose ids end at 90.

    Source: annotations/instances_val2017.json; the order is that of mmdetection 3.3.0, datasets/coco.py.
    """
    table = importlib.resources.files("keras_convnext.data.detection") / "coco.csv"
    rows = [*csv.DictReader(table.read_text(encoding="utf-8").splitlines())]
    return Categories(tuple(row["name"] for row in rows), tuple(int(row["id"]) for row in rows))


def default_categories(classes: int) -> Categories:
    """Those that nothing is known of: "class 0" and on, with the numbers from 1 up."""
    return Categories(tuple(f"class {number}" for number in range(classes)), tuple(range(1, classes + 1)))
