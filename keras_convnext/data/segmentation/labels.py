"""What the numbers of a label map mean: names, colours, and the values that stand for no class."""

import dataclasses
from collections.abc import Sequence

import numpy as np

IGNORED = 255  # the number of "not labelled" in every label map of this package, once it is read
MEANS = ("all", "labelled")  # which pixels a loss or a recipe may take the mean of

Colour = tuple[int, int, int]


def default_names(classes: int) -> tuple[str, ...]:
    """Names for classes that nothing is known of: "class 0", "class 1" and on."""
    return tuple(f"class {number}" for number in range(classes))


def are_default(names: Sequence[str]) -> bool:
    """Whether names are those of `default_names`, which say nothing and contradict no others."""
    return tuple(names) == default_names(len(names))


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a segmentation, and which values of the label maps on disk they have.

    Class 0 has the smallest value from 0 up that is not ignored, class 1 the next, and so on: with
    `ignored_values=(0,)`, as in ADE20K, class 0 is the value 1; with `(11,)`, as in CamVid's eleven classes,
    the values are the class numbers.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]  # RGB, 0 to 255, one for each class
    ignored_values: tuple[int, ...] = ()  # that stand for "not labelled" in the files

    @property
    def values(self) -> np.ndarray:
        """int64 (classes,), the value that each class has in the files."""
        numbers = np.arange(len(self.names) + len(self.ignored_values))
        return np.setdiff1d(numbers, self.ignored_values)[: len(self.names)]
