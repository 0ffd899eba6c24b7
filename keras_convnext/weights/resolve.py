"""What a name means, a tag, an architecture or a file, and what its weights hold: asked once, at the door.

name, weights --resolve--> ResolvedWeights --values--> arrays under canonical names, for `assign`
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
import pathlib
from typing import Any

import numpy as np

from keras_convnext import _messages
from keras_convnext.architecture import STATISTICS, DetectorHeads, Heads
from keras_convnext.data.detection.categories import coco
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation.ade20k import ade20k
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import (
    catalog,
    download,
    keras_files,
    labels_metadata,
    layouts,
    locate,
    repositories,
    torch_files,
)
from keras_convnext.weights.arrays import naming
from keras_convnext.weights.preprocessing_metadata import read_preprocessing
from keras_convnext.weights.published import (
    KERAS_SUFFIXES,
    NON_COMMERCIAL_LICENCES,
    WEIGHT_SUFFIXES,
    Checkpoint,
)
from keras_convnext.weights.repositories import Repository

_logger = logging.getLogger("keras_convnext")
_announced_licences: set[str] = set()

IMAGENET_CLASSES = 1000  # of random weights
TASKS = ("classification", "features", "segmentation", "detection")
_MAKERS = {  # what has heads of a task, and what makes one
    "segmentation": ("segmenter", "segmentation.UPerNet"),
    "detection": ("detector", "detection.MaskRCNN"),
}

Name = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ResolvedWeights:
    """The weights that a name means. Their file is found, downloaded and read when it is first asked for."""

    architecture: Variant | None  # as named; None where the file tells
    tagged: Checkpoint | None = None  # the row that was named: how images are prepared, whatever the weights
    published: Checkpoint | None = None  # the row that the weights are of
    file: pathlib.Path | None = None  # a file of one's own
    is_imagenet: bool = False  # whether the word "imagenet" named them, which promises its classes
    repository: Repository | None = None  # that the file is of, which says more of it

    @property
    def is_random(self) -> bool:
        return self.published is None and self.file is None

    @property
    def row(self) -> Checkpoint | None:
        """The row of the catalog that says how images are prepared, if any."""
        return self.published or self.tagged

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """The file, downloaded when it is not here. A licence without commercial use is logged, once each."""
        if self.file is not None:
            return self.file
        row = self.published
        if row is None:
            raise ValueError("Random weights have no file.")
        _announce(row.tag, row.licence)
        return download.fetch(row)

    @property
    def is_preset(self) -> bool:
        """Whether the file is the body in a preset folder, beside which lies the head."""
        return self.repository is not None and self.repository.is_preset

    @functools.cached_property
    def is_keras_applications(self) -> bool:
        if self.is_preset:
            return False
        return self.path.suffix in KERAS_SUFFIXES and keras_files.is_keras_applications(self.path)

    @functools.cached_property
    def is_model(self) -> bool:
        """Whether it is a file of one's own that holds a whole Keras model."""
        path = self.file
        if (
            path is None
            or self.is_preset
            or path.suffix not in KERAS_SUFFIXES
            or not keras_files.holds_model(path)
        ):
            return False
        return path.suffix == ".keras" or not self.is_keras_applications

    @functools.cached_property
    def is_other_network(self) -> bool:
        """Whether it holds a Keras model that is not one ConvNeXt, and is taken as it is."""
        if not self.is_model or self.is_keras_applications:
            return False
        from keras_convnext.weights import assign

        with contextlib.suppress(ValueError):  # of `places`: there is none, or there are two
            return not assign.places(self.model)[0]
        return True

    @functools.cached_property
    def model(self) -> Any:
        """The Keras model of a file that holds one, as it is."""
        import keras

        try:
            return keras.saving.load_model(self.path, compile=False)
        except Exception as error:  # damaged archives and unknown layers raise of many classes
            reason = _messages.shortened(_messages.one_line(error), 400)
            raise ValueError(f"{self.path} could not be opened as a Keras model: {reason}") from error

    @property
    def is_bare(self) -> bool:
        """Whether the file is an `.h5` of this package: weights without the model they belong to."""
        is_known = self.is_preset or self.is_keras_applications or self.is_model
        return self.path.suffix in KERAS_SUFFIXES and not is_known

    @functools.cached_property
    def state(self) -> layouts.StateDict:
        """{name: array} of the file, in its own layout; models of this package in the canonical one."""
        if self.is_bare:
            raise ValueError(
                f"{self.path} does not say which architecture it holds. Pass that as model, the file as "
                "weights: load(architecture, weights=path). Or take a .keras or .safetensors file of it."
            )
        if self.repository is not None and self.repository.is_preset and self.repository.architecture:
            return repositories.read_preset(self.path, self.repository.architecture)
        if self.path.suffix not in KERAS_SUFFIXES:
            return torch_files.read_state_dict(self.path)
        if self.is_keras_applications:
            return keras_files.read_keras_applications(self.path)
        from keras_convnext.weights import assign

        with naming(self.path):
            return assign.whole_state(self.model)

    @functools.cached_property
    def contents(self) -> layouts.Contents:
        """Layout, classes and channels of the file."""
        with naming(self.path):
            return layouts.inspect(self.state)

    @functools.cached_property
    def file_variant(self) -> Variant:
        """The architecture that the arrays of the file are of."""
        with naming(self.path):
            return layouts.find_variant(self.state)

    @property
    def variant(self) -> Variant:
        return self.architecture or self.file_variant

    @property
    def task(self) -> str:
        """What a model of all these weights is for, one of `TASKS`."""
        if self.heads is not None:
            return self.heads.task
        return "classification" if self.is_other_network or self.classes else "features"

    @property
    def kind(self) -> str:
        """What a model with its heads is called: a "segmenter" or "detector"; "classifier" without them."""
        return "classifier" if self.heads is None else _MAKERS[self.heads.task][0]

    @functools.cached_property
    def heads(self) -> Heads | DetectorHeads | None:
        """Those of a segmenter or detector; of random weights those of the tag."""
        if self.file is not None:
            if self.is_other_network:
                return None
            return keras_files.read_heads(self.file) if self.is_bare else self.contents.heads
        return None if self.row is None else self.row.heads

    @functools.cached_property
    def labels(self) -> Any:
        """`Labels` of a segmenter, `Categories` of a detector, as tag or file says; None where none does."""
        if self.heads is None:
            return None
        if self.file is not None:
            stored = labels_metadata.read_labels(self.file, self.heads.task)
            if stored is not None:
                return stored
        row = self.row
        if row is None or row.heads is None or row.heads.classes != self.heads.classes:
            return None
        return {"ade20k": ade20k, "coco": coco}[row.dataset.rpartition(">")[2]]()

    @functools.cached_property
    def stored(self) -> Preprocessing | None:
        """How the file says that images are prepared; a tag says it instead."""
        if self.file is None or self.tagged is not None:
            return None
        if self.repository is not None:
            return self.repository.preprocessing
        return read_preprocessing(self.file)

    @functools.cached_property
    def around(self) -> Any:
        """`assign.around` of the model of a file that holds one, else None."""
        if not self.is_model:
            return None
        from keras_convnext.weights import assign

        with naming(self.path):
            read = assign.around_applications if self.is_keras_applications else assign.around
            return read(self.model)

    @property
    def is_normalised(self) -> bool:
        """Whether a model of these weights normalises its images; not if that of a `.keras` file does not."""
        return self.is_described or self.around is None or self.around.normaliser is not None

    @property
    def input_sides(self) -> tuple[int | None, int | None]:
        """(height, width) that a classifier of these weights takes; None where any will do."""
        return self.preprocessing.size if self.is_described or self.around is None else self.around.sides

    @property
    def is_described(self) -> bool:
        """Whether a tag or the file says how images are prepared."""
        return self.row is not None or self.stored is not None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.preprocessing_at(None)

    def preprocessing_at(self, image_size: int | tuple[int, int] | None) -> Preprocessing:
        """How images of a size are prepared, None for the weights' own.

        As the tag says, else the file, else the published weights of the architecture, but with the size and
        normaliser of a `.keras` model.
        """
        if self.stored is not None:
            return self.stored.at(image_size)
        row = self.row or catalog.default_checkpoint(self.variant.name)
        if self.is_described or self.around is None:
            return row.preprocessing_at(image_size)
        sides, normaliser = self.around.sides, self.around.normaliser
        with naming(self.path):
            prepared = row.preprocessing_at(image_size or (sides if all(sides) else None))
            mean, std = normaliser or (prepared.mean, prepared.std)
            mean, std = (tuple(np.resize(values, 3).tolist()) for values in (mean, std))
            return dataclasses.replace(prepared, mean=mean, std=std)

    @property
    def classes(self) -> int:
        """Outputs of the classifier, 0 for none; of random weights those of the tag, else ImageNet's.

        A segmenter or detector has none: its classes are in `heads`.
        """
        return self._sizes[0]

    @property
    def channels(self) -> int:
        """Of the images that the weights are for."""
        return self._sizes[1]

    @functools.cached_property
    def _sizes(self) -> tuple[int, int]:
        if self.file is None and self.row is not None:
            return 0 if self.row.heads is not None else self.row.classes, 3
        if self.file is None:
            return IMAGENET_CLASSES, 3
        if self.is_bare:
            return keras_files.read_sizes(self.file)
        return self.contents.classes, self.contents.channels

    def activation(self, classes: int) -> Any:
        """The default activation of a classifier for so many classes: of the weights' own, theirs.

        A `.keras` model says it; the last layer of a CLIP tower is a projection of the image and has none.
        """
        if classes != self.classes:
            return "softmax"
        if self.row is not None and self.row.is_projection:
            return None
        if self.file is None or self.is_bare:
            return "softmax"
        if self.around is not None:
            return self.around.activation
        return None if self.contents.layout == "open_clip" else "softmax"

    @property
    def beside(self) -> str:
        """Names what the file holds beside the network, in a sentence; "" for nothing."""
        if self.file is None or self.is_bare or not self.contents.others:
            return ""
        return f" Beside the network it holds {_messages.listed(self.contents.others, 5)}."

    def starts_new_head(self, include_top: bool, classes: int, new_head: bool | None) -> bool:
        """Whether the classifier starts fresh; an error where that would surprise. See the constructors."""
        if not include_top:
            return False
        row = self.published
        if row is None:  # an encoder of FCMAE, where the number is none that stands for no choice
            is_body = self.file is not None and not self.is_bare and self.task == "features"
            is_body = is_body and not (self.contents.final_norm or self.contents.others)
            if new_head is not None or not is_body or classes == IMAGENET_CLASSES:
                return bool(new_head)
            name: object = self.file
        elif self.classes == classes or new_head:
            return bool(new_head)
        else:
            promised = self.classes != 0 and (self.is_imagenet or classes == IMAGENET_CLASSES)
            if new_head is False or promised:
                raise ValueError(_wrong_classes(row.tag, self.classes, classes))
            name = row.tag
        _logger.warning(
            "%s: a new classifier for %d classes, with random weights, on their body.", name, classes
        )
        return True

    def canonical(self) -> layouts.StateDict:
        """All that the file holds of the architecture under canonical names: its own heads and channels."""
        contents = self.contents
        shapes = layouts.weight_shapes(
            self.variant, contents.classes, contents.channels, contents.pyramid_norms
        )
        if contents.heads is not None:
            shapes |= layouts.head_shapes(self.variant, contents.heads)
        values = self._read(shapes, may_hold=() if contents.classes else ("pre_logits",))
        return layouts.with_body_prefix(values)

    def values(self, variant: Variant, options: Any, new_head: bool) -> layouts.StateDict:
        """The weights of the file that a model of settled `ModelOptions` takes, under canonical names."""
        contents = self.contents
        include_top, classes, pyramid_norms = options.include_top, options.classes, options.pyramid_norms
        if include_top and not new_head and contents.classes != classes:
            if contents.classes == 0:
                raise ValueError(
                    f"{self.path} has no classifier, and include_top=True asks for one.{self.beside} Pass "
                    "include_top=False for the features, or new_head=True to start a classifier of your own "
                    "on them."
                )
            raise ValueError(_wrong_classes(self.path, contents.classes, classes))
        shapes = layouts.weight_shapes(
            variant, classes if include_top else 0, contents.channels, pyramid_norms
        )
        may_hold: tuple[str, ...] = () if include_top else ("head", "pre_logits")
        if include_top and new_head:
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith("head.")}
            may_hold = ("head",)
        if pyramid_norms:
            may_hold += ("norm", "norm_pre")
        return self._adapted(self._read(shapes, may_hold), options)

    def values_with_heads(
        self, variant: Variant, options: Any, heads: Heads | DetectorHeads, new_head: bool
    ) -> layouts.StateDict:
        """The same with heads of a task, of which `new_head` leaves out the layers of the classes."""
        shapes = layouts.weight_shapes(variant, 0, self.contents.channels, pyramid_norms=True)
        shapes |= layouts.head_shapes(variant, heads)
        may_hold: tuple[str, ...] = ()
        if new_head:
            may_hold = heads.last
            fresh = tuple(f"{name}." for name in may_hold)
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(fresh)}
        values = self._adapted(self._read(shapes, may_hold), options)
        return {name: array for name, array in values.items() if not name.endswith(STATISTICS[2])}

    def _adapted(self, values: layouts.StateDict, options: Any) -> layouts.StateDict:
        """The values for images of as many channels as the options say."""
        prepared = self.preprocessing if options.include_preprocessing else None
        normaliser = () if prepared is None else (prepared.mean, prepared.std)
        with naming(self.path):
            return layouts.adapt_channels(values, options.input_shape[-1], *normaliser)

    def _read(self, shapes, may_hold):
        """`layouts.read`; names the file, logs what it lacks, refuses a model that is more than weights."""
        contents = self.contents
        may_lack: tuple[str, ...] = () if contents.classes else ("pre_logits.",)
        if not (contents.classes or contents.final_norm):
            may_lack += ("norm.", "norm_pre.")
        if not contents.any_pyramid_norm:
            may_lack += ("norm0.", "norm1.", "norm2.", "norm3.")
        with naming(self.path):
            if self.around is not None:
                self.around.check(self.model.name)
            values = layouts.read(self.state, shapes, may_lack, may_hold)
        takes_heads = contents.heads is not None and layouts.has_heads(shapes)
        if self.file is not None and contents.beside and not takes_heads:
            _logger.warning("Of %s the ConvNeXt is taken, not: %s.", self.path, ", ".join(contents.beside))
        lacking = sorted({name.rsplit(".", 1)[0] for name in shapes if name not in values})
        if lacking:
            _logger.info("%s has no %s; it starts fresh.", self.path, ", ".join(lacking))
        return values


def resolve(
    name: Name | Variant | ResolvedWeights | None, weights: Name | None = "default", task: str | None = None
) -> ResolvedWeights:
    """Finds out what a name and its weights mean. Nothing else in the package asks that.

    Args:
        name: a tag, an architecture, or a weight file, which says itself what it is of; None beside a file.
            What was resolved before is returned as it is.
        weights: "default" for the file of the tag (of an architecture: "imagenet"); None for random weights;
            another tag, long or short; or a file, then a tag as name says how its images are prepared.
        task: "classification" to refuse weights without a classifier, "segmentation" and "detection" those
            that are not of a segmenter or detector; "features" where neither is needed, so that "imagenet"
            may be the smaller file without a classifier; None for any.

    Raises a ValueError where the name is unknown (near ones are listed), means a file as well as published
    weights, or the weights are not for the task; a TypeError where `weights` is none of these.

    Example:
        resolve("convnext_tiny.fb_in22k_ft_in1k_384").preprocessing.crop_fraction      # 1.0
    """
    if task not in (None, *TASKS):
        raise ValueError(_messages.unknown("task", task, TASKS))
    if isinstance(name, ResolvedWeights):
        return name
    named = None if name is None else meaning(name)
    if isinstance(named, pathlib.Path | str):
        if weights != "default":
            raise ValueError(
                f"Expected a tag or an architecture beside weights={str(weights)!r}, received the file "
                f"'{named}'. Pass one of the two."
            )
        named, weights = None, named
    tagged = named if isinstance(named, Checkpoint) else None
    architecture = VARIANTS[named.architecture] if isinstance(named, Checkpoint) else named
    if weights is not None and repositories.is_repository(weights):
        found = _of_repository(weights, architecture, tagged)
    elif weights is not None and is_path(weights):
        found = ResolvedWeights(architecture, tagged, file=existing_file(weights))
    elif architecture is None:
        if weights in (None, "default", ""):
            received = repr(weights) if weights == "" else None
            raise ValueError(f"Expected a tag, an architecture or a weight file, received {received}.")
        raise ValueError(
            f"Expected an architecture beside weights={weights!r}, received {name!r}. Pass the full tag "
            "alone, or a file as weights."
        )
    elif weights is None:
        found = ResolvedWeights(architecture, tagged)
    elif weights == "default" and tagged is not None:
        found = ResolvedWeights(architecture, tagged, tagged)
    else:
        word = "imagenet" if weights == "default" else weights
        published = _published(architecture, word, task)
        found = ResolvedWeights(architecture, tagged, published, is_imagenet=word == "imagenet")
    return _checked(found, task)


def _checked(found: ResolvedWeights, task: str | None) -> ResolvedWeights:
    """Refuses weights that are not for a task."""
    if task == "classification":
        _check_classifier(found)
    if task in _MAKERS and found.task != task:
        what = (found.row and found.row.tag) or found.file or found.variant.name
        kind, maker = _MAKERS[task]
        raise ValueError(
            f"Expected weights of a {kind}. Received {what}, which is for {found.task}. "
            f"`keras-convnext list --task {task}` lists such; keras_convnext.{maker} makes one of any "
            "ConvNeXt."
        )
    return found


def _of_repository(
    name: Name, architecture: Variant | None = None, tagged: Checkpoint | None = None
) -> ResolvedWeights:
    """The weights in a repository of the Hub that the catalog does not know, or in a folder."""
    found = repositories.open_repository(name)
    _announce(found.name, found.licence)
    variant = architecture or found.architecture
    return ResolvedWeights(variant, tagged, file=found.file, repository=found)


def _announce(name: str, licence: str) -> None:
    """Logs a licence without commercial use, once each."""
    if licence in NON_COMMERCIAL_LICENCES and licence not in _announced_licences:
        _announced_licences.add(licence)
        _logger.warning("The weights %s are licensed %s: not for commercial use.", name, licence)


def meaning(name: Name | Variant) -> Variant | Checkpoint | pathlib.Path | str:
    """What a name by itself means: an architecture, a row of the catalog, the path of a file or folder, or a
    repository of the Hub, "hf://user/name", that the catalog does not have.
    """
    if isinstance(name, Variant):
        return name
    if isinstance(name, str) and name.startswith(repositories.SCHEME):
        return repositories.row_of(name) or name
    if is_path(name):
        return pathlib.Path(name)
    name = os.fspath(name)
    if name in VARIANTS:
        return VARIANTS[name]
    if "." not in name and name not in catalog.ALIASES:
        raise ValueError(_messages.unknown("architecture", name, VARIANTS))
    return catalog.find_checkpoint(name)


def is_path(name: object) -> bool:
    """Whether a name is that of a file, or a SavedModel, rather than of published weights or an architecture.

    A ValueError names the two readings where it is both.
    """
    if isinstance(name, os.PathLike):
        return True
    if not isinstance(name, str):
        return False
    if name.startswith(repositories.SCHEME):
        return False
    if name.endswith(WEIGHT_SUFFIXES) or os.sep in name or name.startswith(("~", ".")):
        return True
    is_model = any(os.path.isfile(os.path.join(name, file)) for file in ("saved_model.pb", "config.json"))
    if name in ("default", "imagenet") or not (is_model or os.path.isfile(name)):
        return False
    known = [*VARIANTS, *catalog.ALIASES, *catalog.CHECKPOINTS]
    readings = [other for other in known if name == other or other.endswith(f".{name}")]
    if readings and not is_model:
        return False  # a file without a suffix cannot be opened as weights, so this one is not meant
    if readings:
        raise ValueError(
            f"{name!r} means two things: the published {readings[0]!r}, and a model in this folder. "
            f"Pass '.{os.sep}{name}' for the latter, or rename it."
        )
    return True


def existing_file(weights: Name) -> pathlib.Path:
    """The path of a weight file that is there and ends as weight files do."""
    path = pathlib.Path(os.path.expanduser(weights))  # Path.expanduser raises for an unknown user
    if path.is_dir():
        raise IsADirectoryError(f"Expected a weight file. Received a folder: {path}")
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        found = difflib.get_close_matches(path.name, names, 3)
        near = f" Near names in that folder: {', '.join(found)}." if found else ""
        raise FileNotFoundError(f"No such weight file: {path}.{near}")
    if not path.name.endswith(WEIGHT_SUFFIXES) and not (path.is_file() and torch_files.is_weight_file(path)):
        raise ValueError(f"Expected a weight file ending in {', '.join(WEIGHT_SUFFIXES)}. Received: {path}")
    return path


def _published(variant: Variant, weights: object, task: str | None) -> Checkpoint:
    """The row that "imagenet" or a tag means for an architecture."""
    if not isinstance(weights, str):
        raise TypeError(
            "weights must be None, 'imagenet', a tag or a path. Received: "
            f"{type(weights).__name__} {weights!r}"
        )
    if weights == "imagenet" and task == "features" and variant.name in catalog.IMAGENET_NOTOP:
        # The file without the top is smaller; one with it serves as well when it is here already.
        full = catalog.CHECKPOINTS[str(catalog.IMAGENET[variant.name])]
        without = catalog.CHECKPOINTS[catalog.IMAGENET_NOTOP[variant.name]]
        return full if locate.find_local(full) and not locate.find_local(without) else without
    return catalog.find_checkpoint(weights, architecture=variant.name)


def _check_classifier(found: ResolvedWeights) -> None:
    row = found.published
    if row is not None and (row.is_projection or row.task != "classification"):
        instead = catalog.IMAGENET[row.architecture] or catalog.IMAGENET["convnext_tiny"]
        what = "has no classifier"
        if row.heads is not None:
            of = "pixel" if row.task == "segmentation" else "object"
            what = f"gives {row.classes} classes for each {of}, not for the image"
        elif row.classes:
            what = f"gives {row.classes} features of CLIP, not classes"
        raise ValueError(f"{row.tag!r} {what}. Use weights that have one, for example {instead}.")
    # A model's file may hold any, which whoever opens it checks.
    if found.file is not None and not found.is_model and not found.classes:
        what = "has no classifier"
        if found.heads is not None:
            what = f"is of a {found.kind} and has no classifier"
        raise ValueError(f"{found.file} {what}. Pass weights that have one.")


def _wrong_classes(weights, available, classes):
    return (
        f"The weights {str(weights)!r} have a classifier for {available} classes. "
        f"Received: classes={classes}. Pass classes={available} to use it, new_head=True to keep the "
        "body and start a new classifier, or include_top=False for the features alone."
    )
