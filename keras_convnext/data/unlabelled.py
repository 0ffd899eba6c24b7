"""Opens images without labels, of any layout, to learn from the images alone."""

import dataclasses

import numpy as np

from keras_convnext._files import StrPath
from keras_convnext.data import preprocess, sources
from keras_convnext.data.index import IMAGE_SUFFIXES, Source, SourceError, counted, images_below

SAMPLE = 100  # images that `described` decodes, evenly spaced; all where there are fewer


def list_splits(path: StrPath) -> list[str]:
    """Lists the splits at a path, as `sources.list_splits`, those without class folders too."""
    return [name for name in sources.locate(str(path))[1] if name is not None]


def open_source(path: StrPath, split: str | None = None) -> Source:
    """Indexes the images of a folder at any depth, or of one of its splits, without their labels.

    What else `sources.open_source` takes (ImageNet's tars, TensorFlow Datasets, TFRecords, what `prepare`
    wrote) is opened as there, and its labels are left. All images are of one class. `left_out` counts what
    else lies there.

    SourceError: there is no image, or what `sources.open_source` refuses.
    """
    path = str(path)
    kind, splits = sources.locate(path)
    if kind == "folder":
        root = splits[sources.choose_split(path, kind, splits, split)][0]
        files, left_out = images_below(root)
        if not files:
            but = f", but {counted(left_out)}" if left_out else ""
            raise SourceError(
                f"Expected images in '{root}' or its folders, found none{but}. Known suffixes: "
                f"{', '.join(IMAGE_SUFFIXES)}."
            )
        source = sources.files_source(root, files, np.zeros(len(files)), [], left_out)
    else:
        source = sources.open_source(path, split)
    return dataclasses.replace(source, labels=np.zeros(len(source), np.int32), classes=["images"])


def described(source: Source, title: str = "data") -> list[str]:
    """Says what was found: images, folders, what was left out, and how many of some cannot be decoded."""
    count = len(source)
    line = f"{title}: {count:,} image{'s' * (count > 1)} in '{source.path}'"
    if source.kind == "folder":
        folders = {source.name(number).rpartition("/")[0] for number in range(count)}
        line += f", in {len(folders):,} folder{'s' * (len(folders) > 1)}"
    lines = [line] + [f"  left out: {counted(source.left_out)}"] * bool(source.left_out)
    looked_at = np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(int)).tolist()
    reasons = []
    for number in looked_at:
        try:
            preprocess.decode_image(source.read(number), source.name(number))
        except (ValueError, OSError, MemoryError) as error:
            reasons.append(f"'{source.name(number)}': {error}")
    if reasons:
        lines.append(f"  unreadable: {len(reasons)} of {len(looked_at)} looked at, such as {reasons[0]}")
    return lines
