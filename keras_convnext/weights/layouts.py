"""Weights under other projects' names: detect a layout, rename, reshape, cover every key exactly once.

A state dict is a dict {name: array}. The hub of all conversions is the *canonical* one: the names of the
official PyTorch code, dense, in PyTorch's shapes (convolutions O, I, H, W; linear layers out, in; vectors
1-D). A layout is one list of substitutions, canonical name -> its own name (`RULES`), and is both read and
written with it.
What the official code lacks has canonical names of the same style: `downsample_layers.0.2` (the norm after an
overlapping stem), `norm_pre`, `pre_logits`, `norm0` .. `norm3` (per-level norms of a pyramid). The heads of a
segmenter have mmsegmentation's names, `decode_head...` and `auxiliary_head...`, those of a detector
mmdetection's, `neck...`, `rpn_head...` and `roi_head...`; in a whole state dict of one the names of its body
start with "backbone.".

Sources of the names: facebookresearch/ConvNeXt 048efce and ConvNeXt-V2 2553895, timm 1.0.31, torchvision
0.28, transformers 5.23, facebookresearch/dinov3 6876159, open_clip as timm reads it, mmpretrain ee7f2e8.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Iterable

import numpy as np

from keras_convnext import _messages
from keras_convnext.architecture import STATISTICS, DetectorHeads, Heads, head_layers_of, layers_of
from keras_convnext.variants import VARIANTS, Variant

_logger = logging.getLogger("keras_convnext")

StateDict = dict[str, np.ndarray]


class StateDictError(ValueError):
    """A state dict that does not fit: what is missing, left over or of another shape is listed."""


def _double(offset):
    return lambda match: f"features.{2 * int(match[1]) + offset}.{match[2]}"


_BLOCK = r"^stages\.(\d)\.(\d+)\."
_DOWN = r"^downsample_layers\.([1-9])\.(\d)\."

# canonical name -> name in the layout: substitutions, applied in order
RULES: dict[str, list] = {
    "official": [],
    "timm": [
        (r"^downsample_layers\.0\.", "stem."),
        (_DOWN, r"stages.\1.downsample.\2."),
        (_BLOCK, r"stages.\1.blocks.\2."),
        (r"dwconv", "conv_dw"),
        (r"pwconv", "mlp.fc"),
        (r"grn\.gamma$", "mlp.grn.weight"),
        (r"grn\.beta$", "mlp.grn.bias"),
        (r"^head\.", "head.fc."),
        (r"^pre_logits\.", "head.pre_logits.fc."),
        (r"^norm\.", "head.norm."),
    ],
    "torchvision": [
        (r"^downsample_layers\.(\d)\.(\d)", _double(0)),
        (r"^stages\.(\d)\.(\d+)", _double(1)),
        (r"\.dwconv\.", ".block.0."),
        (r"\.norm\.", ".block.2."),
        (r"\.pwconv1\.", ".block.3."),
        (r"\.pwconv2\.", ".block.5."),
        (r"\.gamma$", ".layer_scale"),
        (r"^norm\.", "classifier.0."),
        (r"^head\.", "classifier.2."),
    ],
    "huggingface": [
        (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
        (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
        (_DOWN, r"encoder.stages.\1.downsampling_layer.\2."),
        (_BLOCK, r"encoder.stages.\1.layers.\2."),
        (r"grn\.gamma$", "grn.weight"),
        (r"grn\.beta$", "grn.bias"),
        (r"\.gamma$", ".layer_scale_parameter"),
        (r"\.norm\.", ".layernorm."),
        (r"^norm([0-3])\.", lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}."),
        (r"^norm\.", "layernorm."),
        (r"^head\.", "classifier."),
        (r"^(decode_head|auxiliary_head)\.conv_seg\.", r"\1.classifier."),
        (r"^((?:decode_head|auxiliary_head)\..*)\.bn\.", r"\1.batch_norm."),
    ],
    "dinov3_hf": [
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample_layers."),
        (_BLOCK, r"stages.\1.layers.\2."),
        (r"dwconv", "depthwise_conv"),
        (r"pwconv", "pointwise_conv"),
        (r"\.norm\.", ".layer_norm."),
        (r"^norm\.", "layer_norm."),
    ],
    "mmpretrain": [
        (r"dwconv", "depthwise_conv"),
        (r"pwconv", "pointwise_conv"),
        (r"^norm\.", "norm3."),
        (r"^head\.", "head.fc."),
    ],
    "fcmae": [
        (r"^(downsample_layers\.[1-9]\.0)\.", r"\1.ln."),
        (r"^(downsample_layers\.[1-9]\.1|stages\.\d\.\d+\.dwconv)\.weight$", r"\1.kernel"),
        (r"^(stages\.\d\.\d+\.norm)\.", r"\1.ln."),
        (r"(pwconv[12])\.", r"\1.linear."),
    ],
}
# open_clip wraps a timm trunk; its projection is the classifier, without a bias.
RULES["open_clip"] = [*RULES["timm"][:-3], (r"^norm\.", "head.norm.")]
RULES["mmsegmentation"] = RULES["mmdetection"] = RULES["mmpretrain"]  # whose bodies these have

# A name that only this layout has, looked for in this order; what stands in front of it is the prefix.
MARKERS = (
    ("open_clip", "visual.trunk.stem.0.weight"),
    ("torchvision", "features.0.0.weight"),
    ("huggingface", "embeddings.patch_embeddings.weight"),
    ("dinov3_hf", "stages.0.downsample_layers.0.weight"),
    ("fcmae", "downsample_layers.1.1.kernel"),
    ("mmpretrain", "stages.0.0.depthwise_conv.weight"),
    ("timm", "stem.0.weight"),
    ("official", "downsample_layers.0.0.weight"),
    ("official", "stem.weight"),
)

# What PyTorch's wrappers and timm's features_only leave in the middle of names, and what it stands for.
_WRAPPED = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FLATTENED = re.compile(r"(^|\.)(stem|stages)_(\d)\.")

# Of a classifier that repeats what it holds by strides of 0, since its file need not be large. ImageNet-22k's
# has 0.2 GB in the largest model.
_MAX_HEAD_BYTES = 2**30

# Beside open_clip's trunk: the projection, or a hidden layer and the projection.
_CLIP_HEADS = {
    "head.proj.weight": "head.weight",
    "head.mlp.fc1.weight": "pre_logits.weight",
    "head.mlp.fc1.bias": "pre_logits.bias",
    "head.mlp.fc2.weight": "head.weight",
}

# What published files hold besides the network, by what it is; without the layout's prefix. Other networks:
BESIDE = {
    "FCMAE mask token and decoder": r"(mask_token$|proj\.|decoder\.|pred\.)",
    "detection and segmentation heads": r"(neck|rpn_head|roi_head|decode_head|auxiliary_head)\.",
    "text tower of CLIP": r"(transformer|token_embedding|ln_final|text)\.|"
    r"(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$",
}
UNUSED = BESIDE | {
    "copies of the final norm (DINOv3, EUPE)": r"norms\.",
    "distillation projectors (EUPE)": r"projectors\.",
    "number of averaged checkpoints (torch.optim.swa_utils)": r"n_averaged$",
    "per-level norms of a pyramid": r"(norm[0-3]|hidden_states_norms\..*)\.",
}

_is_unused = re.compile("|".join(UNUSED.values())).match

STEMS = ("stem.weight", "downsample_layers.0.0.weight")
_ENDS = ("norm", "norm_pre", "pre_logits", "head")
WRITABLE_LAYOUTS = (
    "official",
    "timm",
    "torchvision",
    "huggingface",
    "mmsegmentation",
    "mmdetection",
    "fcmae",
)
# Those that have heads of a task. The two projects have no other models here.
_OF_TASK = {
    "segmentation": ("official", "mmsegmentation", "huggingface"),
    "detection": ("official", "mmdetection"),
}

# Of a segmenter, then of a detector; in every layout.
_OF_HEADS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.")
_COUNT = f".{STATISTICS[2]}"  # of training steps, which PyTorch keeps and nothing here reads
_BODY = "backbone."  # in front of the names of the body


def weight_shapes(
    variant: Variant, classes: int = 1000, channels: int = 3, pyramid_norms: bool = False
) -> dict[str, tuple[int, ...]]:
    """{canonical name: PyTorch shape} of the weights that `layers_of` lists, in its order."""
    layers = layers_of(variant, classes=classes, channels=channels, pyramid_norms=pyramid_norms)
    return {name: shape for layer in layers for name, shape in layer.weights.items()}


def head_shapes(variant: Variant, heads: Heads | DetectorHeads) -> dict[str, tuple[int, ...]]:
    """The same of the heads, with the statistics of their batch norms."""
    return {name: shape for layer in head_layers_of(variant, heads) for name, shape in layer.weights.items()}


def has_heads(names: Iterable[str]) -> bool:
    """Whether some of the names are of the heads of a segmenter or detector."""
    return any(name.startswith(_OF_HEADS) for name in names)


def with_body_prefix(state: StateDict) -> StateDict:
    """The whole state dict: with heads "backbone." before the body, and counts of steps, 0 where unknown."""
    if not has_heads(state):
        return state
    whole: StateDict = {}
    for name, array in state.items():
        whole[name if name.startswith(_OF_HEADS) else _BODY + name] = array
        count = name.removesuffix(".running_var") + _COUNT
        if name.endswith(".running_var") and count not in state:
            whole[count] = np.zeros((), "int64")
    return whole


def rename(name: str, layout: str) -> str:
    """A canonical name in `layout`, without the layout's prefix.

    Example: `rename("stages.0.1.dwconv.weight", "timm")` is "stages.0.blocks.1.conv_dw.weight".
    """
    for pattern, replacement in RULES[layout]:
        name = re.sub(pattern, replacement, name)
    return name


def detect_layout(names) -> tuple[str, str]:
    """The layout and the prefix of a state dict's names: ("timm", ""), or ("official", "backbone.").

    StateDictError when no layout fits, where the first names are shown; when two networks do.
    """
    names = list(names)
    found: dict[str, str] = {}  # prefix -> layout
    for layout, marker in MARKERS:
        for name in names:
            if name == marker or name.endswith("." + marker):
                trunk = "visual.trunk." if layout == "open_clip" else ""
                found.setdefault(name[: -len(marker)] + trunk, layout)
    if len(found) > 1:
        one = next(filter(None, found))  # every name starts with ""
        raise StateDictError(
            f"Expected one ConvNeXt, received {len(found)}, whose names start with "
            f"{_messages.listed(map(repr, found), 5)}. Leave one of them in the file: "
            f"{{name: value for name, value in state.items() if name.startswith({one!r})}}."
        )
    for prefix, layout in found.items():
        return layout, prefix
    shown = _messages.listed(names, 8) or "(no names at all)"
    raise StateDictError(
        f"Expected the weights of a ConvNeXt in one of the layouts {', '.join(RULES)}. Received {len(names)} "
        f"names that fit none of them: {shown}"
    )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a state dict holds, before it is known which architecture it is."""

    layout: str
    prefix: str
    classes: int  # outputs of its classifier, 0 when it has none
    channels: int  # of the images that its stem takes
    final_norm: bool  # the norm in front of the classifier, which FCMAE and detection files lack
    pyramid_norms: bool  # all of `norm0` .. `norm3`
    any_pyramid_norm: bool
    heads: Heads | DetectorHeads | None  # of a segmenter or detector, where it has them
    beside: tuple[str, ...]  # other networks, as `BESIDE` calls them
    others: tuple[str, ...]  # names of what is no part of the network, as a head of one's own or a loss


def inspect(state: StateDict) -> Contents:
    """Reads from a state dict what its architecture leaves open; StateDictError when no layout fits."""
    layout, prefix, present, full_names = _opened(state)

    def has(norm):
        return any(rename(f"{norm}.{leaf}", layout) in present for leaf in ("weight", "bias"))

    head = present.get(rename("head.weight", layout))
    for array in (head, *(array for name, array in present.items() if name.startswith(_OF_HEADS))):
        if array is not None and array.nbytes > _MAX_HEAD_BYTES and 0 in array.strides:
            raise StateDictError(
                "Expected as many numbers in the file as the classifier has, received one of shape "
                f"{array.shape} that repeats a few. Save it again from a model."
            )
    stems = (present.get(rename(name, layout)) for name in STEMS)
    stem = next((array for array in stems if array is not None and array.ndim == 4), None)
    levels = [has(f"norm{level}") for level in range(4)]
    return Contents(
        layout=layout,
        prefix=prefix,
        classes=0 if head is None or head.ndim == 0 else head.shape[0],
        channels=3 if stem is None else stem.shape[1],
        final_norm=has("norm") or has("norm_pre"),
        pyramid_norms=all(levels),
        any_pyramid_norm=any(levels),
        heads=_heads(present, layout),
        beside=tuple(kind for kind, names in BESIDE.items() if any(map(re.compile(names).match, present))),
        others=tuple(full_names[name] for name in present if _is_foreign(name, layout)),
    )


def find_variant(state: StateDict) -> Variant:
    """The architecture whose names and shapes a state dict has; head and input channels may differ.

    StateDictError when none fits; the nearest is named with what it lacks.
    """
    contents = inspect(state)
    layout, _, present, _ = _opened(state)
    depthwise = re.compile(r"(dwconv|depthwise_conv|conv_dw|\.block\.0)\.bias$")  # in any layout
    blocks = sum(bool(depthwise.search(name)) for name in present)
    misfits: list[tuple[float, str, list[str]]] = []
    for variant in VARIANTS.values():
        # What tells architectures apart: all but heads and norms at the end.
        shapes = {
            name: shape
            for name, shape in weight_shapes(variant, 1, contents.channels).items()
            if not name.startswith(("norm.", "pre_logits.bias", "head."))
        }
        arrays = {name: present.get(rename(name, layout)) for name in shapes}
        wrong = [name for name in shapes if _to_canonical(arrays[name], name, shapes[name], layout) is None]
        surplus = blocks - sum(variant.depths)
        surplus += rename("pre_logits.weight", layout) in present and variant.head != "mlp"
        if not wrong and surplus == 0:
            return variant
        misfits.append(((len(wrong) + abs(surplus)) / len(shapes), variant.name, wrong))
    _, name, wrong = min(misfits, key=lambda misfit: misfit[0])
    raise StateDictError(
        f"No architecture fits this state dict (layout {layout}, {len(state)} names). The nearest is "
        f"{name!r}, in which {len(wrong)} weights are missing or of another shape, among them: "
        f"{', '.join(wrong[:5])}"
    )


def read(
    state: StateDict,
    shapes: dict[str, tuple[int, ...]],
    may_lack: tuple[str, ...] = (),
    may_hold: tuple[str, ...] = (),
) -> StateDict:
    """The canonical state dict of a file: every expected weight once, every name of the file accounted for.

    Other networks are left out, heads of a task too unless `shapes` has them. What is no part of the
    network (a loss, metrics, a head of one's own) is left out, with a warning that names it, where the head
    may be there too, or where a classifier lies with the network under a prefix and it beside. Arrays are
    views of the file's where possible, in the order of `shapes`.

    Args:
        state: {name: array} as read from the file.
        shapes: what is expected, from `weight_shapes`.
        may_lack: prefixes of canonical names that the file need not have.
        may_hold: those of names that it may have besides, as the head when only the body is wanted.

    A StateDictError lists what is missing, what is left over and what has another shape.
    """
    layout, prefix, present, full_names = _opened(state)
    result: StateDict = {}
    missing, mis_shaped = [], []
    for name, shape in shapes.items():
        key = rename(name, layout)
        array = present.pop(key, None)
        is_count, full = name.endswith(_COUNT), _full_name(key, prefix)
        if array is None:
            if not is_count and not name.startswith(may_lack):
                missing.append(f"{full} {shape}")
        elif not (is_count or "float" in array.dtype.name):  # to NumPy bfloat16 and its kin are of kind "V"
            mis_shaped.append(f"{full}: expected floating point numbers, received {array.dtype}")
        elif (canonical := _to_canonical(array, name, shape, layout)) is None:
            mis_shaped.append(f"{full}: expected {shape}, received {array.shape}")
        else:
            result[name] = canonical
    allowed = tuple(rename(name + ".", layout) for name in may_hold)
    asked = _OF_HEADS if has_heads(shapes) else ()
    left_over = [
        name
        for name in present
        if not name.startswith(allowed) and (name.startswith(asked) or not _is_unused(name))
    ]
    others = [full_names[name] for name in left_over if _is_foreign(name, layout)]
    is_asked_for = "head" not in may_hold and any(_is_of_other_head(name, layout) for name in left_over)
    if others and not is_asked_for and ("head" in may_hold or (prefix and "head.weight" in result)):
        _logger.warning("Left out what is no part of the network: %s.", _messages.listed(others))
        left_over, others = [name for name in left_over if full_names[name] not in others], []
    left_over = [full_names[name] for name in left_over]
    faults = {"Missing": missing, "Left over": left_over, "Of another shape or type": mis_shaped}
    if any(faults.values()):
        parts = [f"The state dict (layout {layout}) does not fit the model."]
        parts += [f"{what} ({len(rows)}): {_messages.listed(rows)}." for what, rows in faults.items() if rows]
        if others:
            parts.append(
                "What is no part of the network is left out with include_top=False or new_head=True; or take "
                "it out of the file."
            )
        with contextlib.suppress(StateDictError):
            parts.append(f"The names and shapes are those of {find_variant(state).name!r}.")
        raise StateDictError(" ".join(parts))
    return result


def write(canonical: StateDict, variant: Variant, layout: str) -> StateDict:
    """A whole canonical state dict as another project loads it with `strict=True`.

    Hugging Face computes its last norm with `config.layer_norm_eps`, which must be set to 1e-6 there (its
    default is 1e-12). "fcmae" is the body alone under official names, as in the published encoders of FCMAE;
    GRN has one axis less than there, since `remap_checkpoint_keys`, through which official fine-tuning reads
    such a file, adds two. A ValueError says why that project cannot express the architecture.
    """
    heads = inspect(canonical).heads if any(name.startswith(_OF_HEADS) for name in canonical) else None
    _check_writable(variant, layout, "norm0.weight" in canonical, None if heads is None else heads.task)
    family = "convnextv2." if variant.version == 2 else "convnext."
    result = {}
    for whole_name, array in canonical.items():
        name = whole_name.removeprefix(_BODY)
        if layout == "fcmae":
            if not name.startswith(("norm.", "head.")):
                result[name] = array[None] if ".grn." in name else array
            continue
        key = rename(name, layout)
        if name != whole_name:
            key = _BODY + key
        elif layout == "huggingface" and not name.startswith(("head.", *_OF_HEADS)):
            key = family + key
        if layout == "timm" and variant.pointwise_as_conv and re.search(r"pwconv\d\.weight$", name):
            array = array[:, :, None, None]
        elif layout == "torchvision" and name.endswith(".gamma"):
            array = array[:, None, None]
        elif layout in ("official", "huggingface") and ".grn." in name:
            array = array[None, None, None]
        result[key] = array
    return result


def adapt_channels(state: StateDict, channels: int, mean=None, std=None) -> StateDict:
    """A canonical state dict whose stem takes images with another number of channels than 3.

    One channel: a gray picture gives what its three equal channels give. Without `mean` and `std` the kernel
    is summed over R, G and B. With those of R, G and B, where the model normalises with their averages,
    kernel and bias take up the rest; exact, but for the border where a stem pads.
    Four: the fourth, as in RGBA, starts at zero. Others: R, G, B repeated in turn, scaled by 3 / channels, so
    that the response to an image whose channels are all alike stays the same.
    Reference: timm 1.0.31 models/_manipulate.py, `adapt_input_conv`, for all but four channels and the bias.
    """
    name = next(name for name in STEMS if name in state)
    kernel = state[name]
    changed: StateDict = {}
    if kernel.shape[1] == channels:
        return state
    if kernel.shape[1] != 3:
        raise ValueError(
            f"Can adapt a stem for 3 channels to {channels}. Received one for {kernel.shape[1]} channels, "
            f"of shape {kernel.shape}: build the model with input_shape=(H, W, {kernel.shape[1]})."
        )
    values = kernel.astype("float32")
    if channels == 1 and mean is not None:
        means, stds = (np.asarray(value, "float64")[:, None, None] for value in (mean, std))
        scaled = values / stds  # (O, 3, H, W), of pixels
        bias = name.replace("weight", "bias")
        shift = (scaled * (means.mean() - means)).sum((1, 2, 3))
        changed[bias] = (state[bias] + shift).astype("float32")
        values = scaled.sum(axis=1, keepdims=True) * stds.mean()
    elif channels == 1:
        values = values.sum(axis=1, keepdims=True)
    elif channels == 4:
        values = np.pad(values, ((0, 0), (0, 1), (0, 0), (0, 0)))
    else:
        values = np.tile(values, (1, math.ceil(channels / 3), 1, 1))[:, :channels] * (3 / channels)
    return {**state, **changed, name: values.astype("float32" if changed else kernel.dtype)}


def _heads(present: StateDict, layout: str) -> Heads | DetectorHeads | None:
    """The heads of UPerNet or Mask R-CNN among the arrays of a file, by their names."""

    def shapes(names, dimensions):
        arrays = [present.get(rename(f"{name}.weight", layout)) for name in names]
        are_there = all(array is not None and array.ndim == dimensions for array in arrays)
        return [array.shape for array in arrays] if are_there else None  # type: ignore[union-attr]

    if found := shapes(("decode_head.conv_seg", "decode_head.psp_modules.0.1.conv"), 4):
        return Heads(found[0][0], found[0][1], any(name.startswith("auxiliary_head.") for name in present))
    for cascade in (False, True):
        place = DetectorHeads(1, cascade=cascade).places("bbox_head")[0]
        linear = shapes((f"{place}.fc_cls", f"{place}.shared_fcs.0"), 2)
        if linear and linear[0][0] > 1 and (pyramid := shapes(("rpn_head.rpn_conv",), 4)):
            has_masks = any(name.startswith("roi_head.mask_head.") for name in present)
            return DetectorHeads(linear[0][0] - 1, pyramid[0][0], linear[1][0], has_masks, cascade)
    return None


def _full_name(key: str, prefix: str) -> str:
    """A name of the layout as the file has it: heads stand beside the body, not behind its prefix."""
    outer = prefix.removesuffix(_BODY) if key.startswith(_OF_HEADS) else prefix
    return outer + key


def _opened(state: StateDict) -> tuple[str, str, StateDict, dict[str, str]]:
    """Layout, prefix, the arrays by their names in the layout, and their full names in the file by these.

    A head beside the network loses what it shares with the prefix: behind "model.backbone." it is
    "head.fc.weight", whether the file has "model.head.fc.weight" or "head.fc.weight". What else is beside
    gets a "/" in front, which no name of a layout has.
    """
    plain = {name: _FLATTENED.sub(r"\1\2.\3.", _WRAPPED.sub("", name)) for name in state}
    layout, prefix = detect_layout(dict.fromkeys(plain.values()))
    ends = tuple(rename(f"{name}.", layout) for name in _ENDS)
    full_names: dict[str, str] = {}
    for full, name in plain.items():
        is_beside = not name.startswith(prefix)
        for part in prefix.split(".")[:-1]:
            if not name.startswith(f"{part}."):
                break
            name = name.removeprefix(f"{part}.")
        if layout == "open_clip":
            name = _CLIP_HEADS.get(name, name)
        if is_beside and not name.startswith(ends) and not _is_unused(name):
            name = f"/{full}"
        if name in full_names:
            raise StateDictError(
                f"Some weights are there twice, with and without the prefix {prefix!r}, among them "
                f"{full_names[name]} and {full}: leave one of the two in the file."
            )
        full_names[name] = full
    head = rename("head.", layout)
    leaves = [head + leaf for leaf in ("weight", "bias") if head + leaf in full_names]
    if head + "weight" in leaves and state[full_names[head + "weight"]].ndim == 4:  # for each place of a map
        for full in [full_names.pop(name) for name in leaves]:
            full_names[f"/{full}"] = full
    # A Sequential of one linear layer and some without weights, as dropout in front of a classifier.
    numbered = [name for name in full_names if re.fullmatch(re.escape(head) + r"\d+\.(weight|bias)", name)]
    inner = {name.rpartition(".")[0] for name in numbered}
    if len(inner) == 1 and len(numbered) == 2 and head + "weight" not in full_names:
        for name in numbered:
            full_names[head + name.rpartition(".")[2]] = full_names.pop(name)
    present = {name: state[full] for name, full in full_names.items()}
    if layout == "open_clip" and "head.weight" in present and "head.bias" not in present:
        weight = present["head.weight"]
        present["head.bias"], full_names["head.bias"] = np.zeros(weight.shape[:1], weight.dtype), "head.bias"
    return layout, prefix, present, full_names


@functools.cache
def _modules(layout: str) -> frozenset[str]:
    """The first parts of the names that the layout has."""
    firsts = ("downsample_layers.0.0", "downsample_layers.1.0", "stages.0.0.norm", "blocks.0.norm", "stem")
    norms = ("norm0", "norm1", "norm2", "norm3")
    return frozenset(rename(f"{name}.weight", layout).partition(".")[0] for name in (*firsts, *_ENDS, *norms))


def _is_foreign(name: str, layout: str) -> bool:
    """Whether a name is neither one of the layout nor of what published files hold besides."""
    is_known = name.partition(".")[0] in _modules(layout) and not _is_of_other_head(name, layout)
    return not is_known and not _is_unused(name)


def _is_of_other_head(name: str, layout: str) -> bool:
    """Whether a name is of a head of another kind: of two layers, of weight norm, of LoRA."""
    if name.partition(".")[0] != rename("head.weight", layout).partition(".")[0]:
        return False
    return name not in [rename(f"{end}.{leaf}", layout) for end in _ENDS for leaf in ("weight", "bias")]


def _to_canonical(array, name, shape, layout):
    """`array` in the canonical shape; None when it does not fit, or is not there."""
    if array is None:
        return None
    if layout == "fcmae" and rename(name, layout).endswith(".kernel"):
        return _dense_kernel(array, shape)
    if array.shape == shape:
        return array
    if [size for size in array.shape if size != 1] == [size for size in shape if size != 1]:
        return array.reshape(shape)
    return None


def _dense_kernel(array, shape):
    """A kernel of the sparse code, [taps, in, out] or [taps, C], as a dense one of `shape` (O, I, H, W).

    The sparse engine counts its taps column by column, hence the swap of height and width.
    Reference: ConvNeXt-V2 utils.py, `remap_checkpoint_keys`.
    """
    outputs, inputs, height, width = shape
    if array.shape == (height * width, outputs) and inputs == 1:
        return array.reshape(width, height, outputs).transpose(2, 1, 0)[:, None]
    if array.shape == (height * width, inputs, outputs):
        return array.reshape(width, height, inputs, outputs).transpose(3, 2, 1, 0)
    return None


def is_writable(variant: Variant, layout: str, task: str | None = None) -> bool:
    """Whether the weights of a model can be written in a layout, as the code that it is of has them.

    `task`: of the heads, "segmentation" or "detection", if it has such.
    """
    try:
        _check_writable(variant, layout, has_pyramid_norms=task is not None, task=task)
    except ValueError:
        return False
    return True


def _check_writable(variant: Variant, layout: str, has_pyramid_norms: bool, task: str | None) -> None:
    if layout not in WRITABLE_LAYOUTS:
        raise ValueError(_messages.unknown("layout to write", layout, WRITABLE_LAYOUTS))
    kinds = {"segmentation": ("UPerNet", "segmenters"), "detection": ("Mask R-CNN", "detectors")}
    if task is not None and layout not in _OF_TASK[task]:
        *firsts, last = _OF_TASK[task]
        reason = f"{layout} has no {kinds[task][0]}, as {', '.join(firsts)} and {last} have"
    elif task is None and (of := {"mmsegmentation": "segmentation", "mmdetection": "detection"}.get(layout)):
        reason = f"{layout}'s layout is of {kinds[of][1]}, and this is none"
    elif variant.isotropic and layout != "official":
        reason = f"{layout} has no isotropic ConvNeXt"
    elif has_pyramid_norms and layout in ("timm", "torchvision"):
        reason = f"{layout} has no place for norms at each level, as official and huggingface have"
    elif layout == "timm":
        return  # it has all others
    elif variant.stem not in ("patch", "isotropic"):
        reason = f"it has the stem {variant.stem!r}"
    elif variant.norm != "layer_norm":
        reason = f"it has the norm {variant.norm!r}"
    elif variant.head != "norm_last":
        reason = f"it has the head {variant.head!r}"
    elif variant.epsilon != 1e-6 or variant.activation != "gelu" or set(variant.kernel_sizes) != {7}:
        reason = (
            f"it has epsilon {variant.epsilon:g}, activation {variant.activation!r} and kernels "
            f"{variant.kernel_sizes}, and that code has 1e-6, 'gelu' and 7 built in"
        )
    elif layout == "torchvision" and variant.version == 2:
        reason = "torchvision has no ConvNeXt V2"
    elif layout == "fcmae" and variant.version == 1:
        reason = "FCMAE is of ConvNeXt V2"
    elif layout == "fcmae" and (task is not None or has_pyramid_norms):
        reason = "FCMAE's encoders have neither norms at each level nor other heads"
    else:
        return
    raise ValueError(
        f"{variant.name!r} cannot be written in the layout {layout!r}: {reason}. "
        f"Layouts: {', '.join(WRITABLE_LAYOUTS)}"
    )
