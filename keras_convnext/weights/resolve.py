"""Finds the file that `weights` means, and reads from it what a model takes."""

import contextlib
import difflib
import logging
import os
import pathlib

import keras

from keras_convnext.weights import catalog, download, keras_files, layouts, locate, torch_files
from keras_convnext.weights.assign import PYRAMID_NORMS, state_dict
from keras_convnext.weights.published import WEIGHT_SUFFIXES

_logger = logging.getLogger("keras_convnext")
_announced_licences: set[str] = set()


def is_path(weights):
    """Whether `weights` is a path rather than a tag."""
    return isinstance(weights, os.PathLike) or (
        isinstance(weights, str)
        and (weights.endswith(WEIGHT_SUFFIXES) or os.sep in weights or weights.startswith(("~", ".")))
    )


def existing_file(weights):
    """The path of a weight file that is there.

    Raises:
        FileNotFoundError: there is no such file; near names in its folder are listed.
        IsADirectoryError: the path is a folder.
        ValueError: the path does not end as weight files do.
    """
    path = pathlib.Path(weights).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"Expected a weight file. Received a folder: {path}")
    if not path.exists():
        near = ""
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir()]
            found = difflib.get_close_matches(path.name, names, 3)
            near = f" Near names in that folder: {', '.join(found)}." if found else ""
        raise FileNotFoundError(f"No such weight file: {path}.{near}")
    if not path.name.endswith(WEIGHT_SUFFIXES):
        raise ValueError(f"Expected a weight file ending in {', '.join(WEIGHT_SUFFIXES)}. Received: {path}")
    return path


def find_published(variant, weights, include_top):
    """The published weights that "imagenet" or a tag means for an architecture, as `catalog.Checkpoint`."""
    if not isinstance(weights, str):
        raise TypeError(
            "weights must be None, 'imagenet', a tag or a path. Received: "
            f"{type(weights).__name__} {weights!r}"
        )
    if weights == "imagenet" and not include_top and variant.name in catalog.IMAGENET_NOTOP:
        # The file without the top is smaller; one with it serves as well when it is here already.
        without, full = catalog.IMAGENET_NOTOP[variant.name], catalog.IMAGENET[variant.name]
        weights = full if _is_here(full) and not _is_here(without) else without
    return catalog.find_checkpoint(weights, architecture=variant.name)


def find_file(published):
    """The path of published weights, which are downloaded where they are not here yet.

    A licence that forbids commercial use is logged, once each.
    """
    if not published.commercial_use and published.licence not in _announced_licences:
        _announced_licences.add(published.licence)
        _logger.warning(
            "The weights %s are licensed %s: not for commercial use.", published.tag, published.licence
        )
    return download.fetch(published)


def starts_new_head(published, weights, include_top, classes, new_head):
    """Whether the classifier starts fresh; an error where that would surprise. See the constructors."""
    if not include_top:
        return False
    if new_head is not None or published is None:
        if new_head is False and published is not None and published.classes != classes:
            raise ValueError(_wrong_classes(published.tag, published.classes, classes))
        return bool(new_head)
    if published.classes == classes:
        return False
    if published.classes != 0 and (weights == "imagenet" or classes == 1000):
        raise ValueError(_wrong_classes(published.tag, published.classes, classes))
    _logger.warning(
        "%s: a new classifier for %d classes, with random weights, on the body of these weights.",
        published.tag,
        classes,
    )
    return True


def read_file(path):
    """{name: array} of any weight file, in its own layout; models of this package in the canonical one.

    Raises:
        ValueError: for an `.h5` file of this package, which does not say what model it belongs to.
    """
    if keras_files.is_bare(path):
        raise ValueError(
            f"{path} does not say which model its weights belong to. Load it with "
            "keras_convnext.load(architecture, weights=path), or convert the .keras file instead."
        )
    if path.suffix not in (".h5", ".keras"):
        return torch_files.read_state_dict(path)
    if keras_files.is_keras_applications(path):
        return keras_files.read_keras_applications(path)
    return state_dict(keras.saving.load_model(path, compile=False))


def inspect_state(state, path):
    """`layouts.inspect` of what was read from a file; its errors name the file."""
    with naming(path):
        return layouts.inspect(state)


def read_canonical(state, variant, path):
    """All that a file holds of an architecture, under canonical names, with its own head and channels."""
    contents = layouts.inspect(state)
    shapes = layouts.weight_shapes(variant, contents.classes, contents.channels, contents.pyramid_norms)
    headless = contents.classes == 0
    may_lack = ("norm.", "norm_pre.") if headless and not contents.final_norm else ()
    return _read(state, shapes, path, may_lack, may_hold=("pre_logits",) if headless else ())


def read_for_model(state, variant, path, include_top, classes, channels, pyramid_norms, new_head):
    """The weights of a file that a model takes, under canonical names, without the others."""
    contents = inspect_state(state, path)
    if include_top and not new_head and contents.classes != classes:
        if contents.classes == 0:
            raise ValueError(
                f"{path} has no classifier, and include_top=True asks for one. Pass include_top=False for "
                "the features, or new_head=True to start a classifier of your own on them."
            )
        raise ValueError(_wrong_classes(path, contents.classes, classes))
    wanted_classes = classes if include_top else 0
    shapes = layouts.weight_shapes(variant, wanted_classes, channels, pyramid_norms)
    may_lack: tuple[str, ...] = ()
    may_hold: tuple[str, ...] = ()
    if include_top and new_head:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("head.")}
        may_hold = ("head",)
    if not include_top:
        may_hold = ("head", "pre_logits")
    if contents.classes == 0:
        may_lack = ("pre_logits.",)
        if not contents.final_norm:
            may_lack += ("norm.", "norm_pre.")
    if pyramid_norms:
        may_hold += ("norm", "norm_pre")
        if not contents.any_pyramid_norm:
            may_lack += tuple(f"{norm}." for norm in PYRAMID_NORMS)
    return _read(state, shapes, path, may_lack, may_hold)


@contextlib.contextmanager
def naming(path):
    """Puts the file in front of an error about its contents."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None


def _read(state, shapes, path, may_lack, may_hold):
    """`layouts.read`, with the file named in errors and what it lacks in the log."""
    with naming(path):
        values = layouts.read(state, shapes, may_lack, may_hold)
    lacking = sorted({name.rsplit(".", 1)[0] for name in shapes if name not in values})
    if lacking:
        _logger.info("%s has no %s; it starts fresh.", path, ", ".join(lacking))
    return values


def _is_here(tag):
    return locate.find_local(catalog.CHECKPOINTS[tag]) is not None


def _wrong_classes(weights, available, classes):
    return (
        f"The weights {str(weights)!r} have a classifier for {available} classes. "
        f"Received: classes={classes}. Pass classes={available} to use it, new_head=True to keep the "
        "body and start a new classifier, or include_top=False for the features alone."
    )
