"""`list`, `info` and `convert` deal with published weights and weight files."""

import argparse
import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from keras_convnext._files import check_target
from keras_convnext._messages import listed, shortened, size_text
from keras_convnext.architecture import STATISTICS, head_layers_of, layers_of
from keras_convnext.cli import shared
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import catalog, layouts, locate, safetensors_files
from keras_convnext.weights.published import KERAS_SUFFIXES, Checkpoint
from keras_convnext.weights.resolve import ResolvedWeights, meaning, resolve

LIST_EXAMPLES = """examples:
  keras-convnext list
  keras-convnext list "convnextv2_*" --classes 1000 --image-size 384
  keras-convnext list convnext_tiny --commercial --downloadable
  keras-convnext list --task detection
  keras-convnext list --architectures"""


_SCORES = {"segmentation": "mIoU, one scale / several", "detection": "AP, boxes / masks"}


def list_options(option: Callable) -> None:
    option("architecture", "ARCHITECTURE", 'name, or a pattern such as "convnextv2_*"', nargs="?")
    option(
        "--classes",
        "N",
        "width of the classifier, or classes of a segmenter or detector; 0 for none",
        type=int,
    )
    option("--task", "TASK", "classification, features, segmentation or detection")
    option("--image-size", "N", "side of the images in pixels", type=int)
    option("--licence", "ID", "licence identifier, such as apache-2.0")
    option("--commercial", None, "only licences that allow commercial use")
    option("--downloadable", None, "only files with a known address")
    option("--architectures", None, "the architectures of these files instead")
    option("--json")


def list_command(options: argparse.Namespace) -> int:
    tags = catalog.list_weights(
        options.architecture,
        classes=options.classes,
        image_size=options.image_size,
        licence=options.licence,
        commercial_use=True if options.commercial else None,
        downloadable=True if options.downloadable else None,
        task=options.task,
    )
    rows = [catalog.CHECKPOINTS[tag] for tag in tags]
    cells: list[tuple] = []
    if options.architectures:
        files = collections.Counter(row.architecture for row in rows)
        variants = [variant for variant in VARIANTS.values() if variant.name in files]
        facts = map(_variant_facts, variants)
        titles, alignments = ("architecture", "paper", "depths", "dims", "parameters", "files"), "<<<<>>"
        for variant in variants:
            sizes = listed(variant.depths), listed(variant.dims), f"{variant.parameters:,}"
            cells.append((variant.name, _paper(variant), *sizes, files[variant.name]))
        count, name = f"{len(variants)} of {len(VARIANTS)} architectures", "NAME"
    else:
        facts = map(_checkpoint_facts, rows)
        titles, alignments = ("tag", "classes", "size @ crop", "score", "licence", "layout"), "<><><<"
        if options.task in _SCORES:
            titles = ("tag", "classes", "size", _SCORES[options.task], "licence", "layout")
        for row in rows:
            size, score, classes = f"{row.image_size} @ {row.crop:.3g}", row.top1, str(row.classes or "-")
            if row.heads is not None:
                score, of = (row.miou, "px") if row.task == "segmentation" else (row.box_ap, "box")
                classes = f"{classes}/{of}"
            text = "-" if score is None else f"{score:.2f}"
            if options.task in _SCORES:
                size, text = str(row.image_size), _scores_text(row)
            cells.append((row.tag, classes, size, text, shortened(row.licence, 15), row.layout))
        count, name = f"{len(rows)} of {len(catalog.CHECKPOINTS)} weight files", "TAG"
    if options.json:
        shared.print_json([*facts])
        return 0
    shared.print_table(titles, alignments, cells)
    marked = " Scores are top-1, of segmenters (classes/px) mIoU, of detectors (classes/box) box AP."
    marked *= not options.architectures
    print(f"\n{count}. `keras-convnext info {name}` says more.{marked}")
    return 0


INFO_EXAMPLES = """examples:
  keras-convnext info convnext_tiny
  keras-convnext info convnext_tiny.fb_in22k_ft_in1k_384
  keras-convnext info my_weights.safetensors --json"""


def info_options(option: Callable) -> None:
    option("name", "NAME|FILE", "architecture, tag, or path of a weight file")
    option("--json")


def info_command(options: argparse.Namespace) -> int:
    name = options.name
    found = meaning(name)
    if isinstance(found, Variant):
        facts, lines = _variant_facts(found), _variant_lines(found)
    elif isinstance(found, Checkpoint):
        name, local = found.tag, locate.find_local(found)
        facts = {**_checkpoint_facts(found), "local_file": None if local is None else str(local)}
        lines = _checkpoint_lines(found, facts)
    else:
        shared.import_quietly("keras_convnext.models")
        source = resolve(name)
        facts = _file_facts(source)
        lines = _file_lines(facts, source)
    if options.json:
        shared.print_json(facts)
        return 0
    shared.print_facts(name, lines)
    return 0


CONVERT_EXAMPLES = """examples:
  keras-convnext convert convnext_tiny_1k_224_ema.pth tiny.safetensors --layout timm
  keras-convnext convert convnext_tiny.fb_in1k tiny.pth
  keras-convnext convert tiny.safetensors tiny.keras"""


def convert_options(option: Callable) -> None:
    option("source", "SOURCE", "weight file, or a tag to download")
    option("target", "TARGET", ".safetensors, .pth, .pt, .bin, .keras or .weights.h5")
    known = f"names and shapes to write: {', '.join(layouts.WRITABLE_LAYOUTS)}; default official"
    option("--layout", "NAME", known, default="official")
    expected = "refuse a source of another architecture; a tag also sets the normaliser of a .keras target"
    option("--architecture", "NAME", expected)
    option("--force", None, "replace an existing TARGET")


def convert_command(options: argparse.Namespace) -> int:
    target = pathlib.Path(options.target)
    check_target(target, options.force)
    shared.import_quietly("keras_convnext.models")
    from keras_convnext.conversion import KERAS_TARGETS, convert

    named = options.architecture
    source = resolve(options.source) if named is None else resolve(named, options.source)
    convert(source, target, options.layout)
    found = _file_facts(source)
    written = "Keras" if target.name.endswith(KERAS_TARGETS) else options.layout
    read = f"{source.path}: {found['architecture']}, layout {found['layout']}"
    classes = f"{found['classes']} classes" if found["classes"] else "no classifier"
    size = size_text(target.stat().st_size)
    print(f"{read}, {classes}, {found['parameters']:,} parameters -> {target}: {written}, {size}")
    return 0


# Facts are for --json; lines are printed.


def _variant_facts(variant: Variant) -> dict:
    return {
        **dataclasses.asdict(variant),
        "imagenet": catalog.IMAGENET[variant.name],
        "weights": catalog.list_weights(variant.name),
    }


def _variant_lines(variant: Variant) -> Iterable[tuple[str, object]]:
    facts = {
        "paper": _reference(variant),
        "parameters": f"{variant.parameters:,} at 1000 classes",
        "depths": listed(variant.depths),
        "dims": listed(variant.dims),
        "kernel sizes": listed(variant.kernel_sizes),
        "stem": variant.stem,
        "norm": f"{variant.norm}, epsilon {variant.epsilon:g}",
        "activation": variant.activation,
        "head": variant.head,
        '"imagenet" is': catalog.IMAGENET[variant.name] or "nothing: no ImageNet file was published",
    }
    tags = catalog.list_weights(variant.name)
    return [*facts.items(), *(("" if number else "weight files", tag) for number, tag in enumerate(tags))]


def _checkpoint_facts(row: Checkpoint) -> dict:
    variant, heads = VARIANTS[row.architecture], []
    if row.heads is not None:
        heads = head_layers_of(variant, row.heads)
    layers = layers_of(variant, classes=0 if heads else row.classes, pyramid_norms=bool(heads))
    return {
        **dataclasses.asdict(row),
        "parameters": sum(layer.num_weights for layer in [*layers, *heads]),
        "commercial_use": row.commercial_use,
        "downloadable": row.downloadable,
    }


def _checkpoint_lines(row: Checkpoint, facts: dict) -> Iterable[tuple[str, object]]:
    variant = VARIANTS[row.architecture]
    hub = f"{row.hub_id}, {row.hub_filename}{', after an agreement' * row.gated}"
    address = None if row.downloadable else "none"
    if row.url is not None:
        address = row.url + " when the hub is out of reach" * (row.hub_id is not None)
    larger = f"{row.test_image_size}, crop {row.test_crop:.4g}" if row.test_image_size else None
    projected = f"none, but {row.classes} features of the CLIP projection"
    return {
        "architecture": f"{row.architecture}, {_reference(variant)}",
        "task": row.task,
        "parameters": f"{facts['parameters']:,}",
        "depths": listed(variant.depths),
        "dims": listed(variant.dims),
        "classes": projected if row.is_projection else row.classes or "none",
        "trained on": row.dataset,
        "licence": shared.licence_text(row.licence),
        "image size": f"{row.image_size}, crop {row.crop:.4g}",
        "resize": _resize_text(row.preprocessing, row.task)
        + f"; in windows of {row.image_size} x {row.image_size}" * (row.task == "segmentation"),
        "mean": f"{listed(row.mean)} of pixels in 0..1",
        "std": listed(row.std),
        "larger test size": larger,
        "top-1": _score_text(row, row.top1, row.image_size),
        "top-5": _score_text(row, row.top5, row.image_size),
        "top-1, larger": _score_text(row, row.test_top1, row.test_image_size),
        "mIoU": _scores_line(row, "segmentation"),
        "AP": _scores_line(row, "detection"),
        "layout": row.layout if row.state_key is None else f"{row.layout}, under {row.state_key!r}",
        "hub": None if row.hub_id is None else hub,
        "address": address,
        "SHA-256": row.sha256 or (f"{row.sha256_prefix}..." if row.sha256_prefix else None),
        "on this machine": facts["local_file"] or "no",
        "note": row.note or None,
    }.items()


def _scores_text(row: Checkpoint) -> str:
    scores = (row.miou, row.miou_multi_scale) if row.task == "segmentation" else (row.box_ap, row.mask_ap)
    return " / ".join(map(str, scores))


def _scores_line(row: Checkpoint, task: str) -> str | None:
    if row.task != task:
        return None
    return f"{_scores_text(row)} %, {_SCORES[task].partition(' ')[2]}: {row.score_source}"


def _score_text(row: Checkpoint, score: float | None, size: int | None) -> str | None:
    published = ", as published" * (row.packaged is None)
    return None if score is None else f"{score} % at {size}{published}: {row.score_source}"


def _file_facts(source: ResolvedWeights) -> dict:
    from keras_convnext.weights import labels_metadata, preprocessing_metadata

    path, state, contents = source.path, source.state, source.contents
    layout, metadata = contents.layout, {}
    own = (preprocessing_metadata.KEY, labels_metadata.KEY)
    if path.suffix in KERAS_SUFFIXES:
        layout = "keras_applications" if source.is_keras_applications else "keras_convnext"
    elif path.suffix == ".safetensors":
        metadata = safetensors_files.read_safetensors_metadata(path)
    around: dict[str, object] = {}
    if source.around is not None:
        mean, std = source.around.normaliser or (None, None)
        activation = getattr(source.around.activation, "__name__", str(source.around.activation))
        around = {"mean": mean, "std": std, "activation": activation, "lost": source.around.lost}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "layout": layout,
        "prefix": contents.prefix,
        "architecture": source.file_variant.name,
        "arrays": len(state),
        "task": source.task,
        "parameters": sum(array.size for name, array in state.items() if not name.endswith(STATISTICS)),
        "dtypes": sorted({str(array.dtype) for array in state.values()}),
        "classes": contents.classes if contents.heads is None else contents.heads.classes,
        "labels": None if source.labels is None else source.labels.names,
        "channels": contents.channels,
        "final_norm": contents.final_norm,
        "pyramid_norms": contents.pyramid_norms,
        "others": contents.others,
        "model": around or None,
        "images": None if source.stored is None else source.stored.stored(),
        "metadata": {key: value for key, value in metadata.items() if key not in own},
    }


def _file_lines(facts: dict, source: ResolvedWeights) -> Iterable[tuple[str, object]]:
    variant = VARIANTS[facts["architecture"]]
    prefix = f", after the prefix {facts['prefix']!r}" if facts["prefix"] else ""
    lines = {
        "architecture": f"{variant.name}, {_reference(variant)}",
        "task": facts["task"],
        "layout": f"{facts['layout']}{prefix}",
        "arrays": facts["arrays"],
        "parameters": f"{facts['parameters']:,}",
        "dtype": ", ".join(facts["dtypes"]),
        "classes": facts["classes"] or "none",
        "labels": listed(facts["labels"], 8) if facts["labels"] else None,
        "channels": facts["channels"],
        "final norm": "yes" if facts["final_norm"] else "no",
        "size": size_text(facts["bytes"]),
        "pyramid norms": "yes" if facts["pyramid_norms"] else None,
        "beside": listed(facts["others"]) or None,
        "resize": None if source.stored is None else _resize_text(source.stored, source.task),
    }
    if model := facts["model"]:
        mean, std = (", ".join(map(str, model[name] or ())) for name in ("mean", "std"))
        lines |= {
            "mean": f"{mean} of pixels in 0..1" if mean else "no normaliser",
            "std": std or None,
            "activation": model["activation"],
            "not in weights": listed(model["lost"]) or None,  # so neither `load` nor `convert` takes the file
        }
    return [*lines.items(), *((f"metadata {key!r}", value) for key, value in facts["metadata"].items())]


def _paper(variant: Variant) -> str:
    return "V1, isotropic" if variant.isotropic else f"V{variant.version}"


def _reference(variant: Variant) -> str:
    reference = "Woo et al. 2023" if variant.version == 2 else "Liu et al. 2022"
    return f"ConvNeXt {_paper(variant)} ({reference})"


def _resize_text(preprocessing: Preprocessing, task: str) -> str:
    height, width = preprocessing.size
    if task == "segmentation":
        size = min(height, width)
        return f"shorter side to {size}, longer to {4 * size} at most, bilinear"
    if task == "detection":
        size = min(height, width)
        return (
            f"shorter side to {size}, longer to {5 * size // 3} at most, bilinear; padded to multiples of 32"
        )
    how = "both sides" if preprocessing.crop_mode == "squash" else "shorter side"
    scale, interpolation = preprocessing.scale_size[0], preprocessing.interpolation
    return f"{how} to {scale}, {interpolation}, then the central {height} x {width}"
