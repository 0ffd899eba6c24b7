"""The 150 classes of ADE20K's scene parsing benchmark, with the colours that segmenters draw them in.

Zhou et al. 2017, "Scene Parsing through ADE20K Dataset". Names and colours are those of mmsegmentation 1.2.2,
mmseg/datasets/ade.py, and of the "CLASSES" and "PALETTE" in its files.
"""

import csv
import functools
import importlib.resources

from keras_convnext.data.segmentation.labels import Labels


@functools.cache
def ade20k() -> Labels:
    """The classes of ADE20K; its label maps have 0 where nothing is labelled, and class 0 as 1."""
    table = importlib.resources.files("keras_convnext.data.segmentation") / "ade20k.csv"
    rows = list(csv.reader(table.read_text(encoding="utf-8").splitlines()))[1:]
    palette = tuple((int(red), int(green), int(blue)) for _, red, green, blue in rows)
    return Labels(tuple(name for name, *_ in rows), palette, ignored_values=(0,))
