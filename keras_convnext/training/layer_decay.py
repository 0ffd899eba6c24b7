"""Layer-wise learning rate decay: which group a weight belongs to."""

import re
from collections.abc import Sequence

LAYER_DECAY_GROUPS = ("group", "single", "layer_wise", "stage_wise", "timm")

_STAGES = 4
_PLACE = re.compile(r"(?:^|/|_)(stages|downsample_layers)_(\d+)_(\d+)(?:/|$)")
_NORM_PRE = re.compile(r"(?:^|/|_)norm_pre(?:/|$)")


def layer_ids(paths: Sequence[str], groups: str) -> tuple[list[int], int]:
    """Returns the layer number of each weight, and that of the head, as the official code counts them.

    - "group": V1 classification and V2; 12 groups of about three blocks. Stem 0, stage 0: 1, stage 1 and the
      downsampling before it 2, downsampling before stage 2: 3, its block j 3 + j // 3, stage 3 and the
      downsampling before it 12, the rest 13.
    - "single": V2; a number for each block, from 1. A downsampling, the stem too, has the number of the block
      after it; the rest has the next number after the last block.
    - "layer_wise": V1 on COCO; "group" with 6 in place of 12 when stage 2 has at most nine blocks.
    - "stage_wise": V1 on ADE20K; stem and downsamplings 0, stage i: i + 1, the rest 7 or 13 as before.
    - "timm": timm's `param_groups_layer_decay`; "single" with 0 for the stem.

    "The rest" is final norm, norms of a pyramid and all heads. The official configurations give 6 (T) and 12
    (S to XL) by hand; the border at nine blocks is that of mmpretrain's `get_layer_depth` (ee7f2e8).

    The depths are taken from the paths, such as "stages_2_7/pwconv1/kernel", maybe with a model's name in
    front. First stages that do not train may be missing; "single" and "timm" then count from the first block
    that is there. ValueError: no path is of a ConvNeXt stage, or the depth of one that matters is not told.
    """
    places = [_PLACE.search(path) for path in paths]
    depths = _depths(paths, places, groups)
    is_by_block = groups in ("single", "timm")
    last_group = 12 if groups == "group" or depths[2] > 9 else 6
    last = 1 + (sum(depths) if is_by_block else last_group)

    def number(path, place):
        if place is None:
            return last - 1 if groups == "timm" and _NORM_PRE.search(path) else last
        is_downsampling, stage, block = place[1] == "downsample_layers", int(place[2]), int(place[3])
        if is_by_block:
            is_stem = is_downsampling and stage == 0 and groups == "timm"
            return 0 if is_stem else sum(depths[:stage]) + (0 if is_downsampling else block) + 1
        if groups == "stage_wise":
            return 0 if is_downsampling else stage + 1
        return ((0, 2, 3, last_group) if is_downsampling else (1, 2, 3 + block // 3, last_group))[stage]

    return [number(path, place) for path, place in zip(paths, places, strict=True)], last


def learning_rate_scales(paths: Sequence[str], groups: str, decay: float) -> list[float]:
    """Returns the factor on the learning rate of each weight: `decay ** (last_id - id)`, 1 for the head.

    The rest is as for `layer_ids`. Reference: `LayerDecayValueAssigner` of optim_factory.py and main.py.
    """
    ids, last = layer_ids(paths, groups)
    return [float(decay) ** (last - number) for number in ids]


def _depths(paths, places, groups):
    """Blocks of each stage, 0 where none is seen; refuses what `groups` cannot be counted with."""
    stages = [int(place[2]) for place in places if place]
    if not stages or max(stages) >= _STAGES:
        raise ValueError(
            "Layer-wise learning-rate decay needs weights of the four stages of a ConvNeXt, with paths such "
            "as 'stages_0_0/dwconv/kernel'; for isotropic models and others it is not defined, and a head by "
            "itself has one rate. Set layer_decay=1.0. Received paths: "
            f"{', '.join(map(repr, paths[:3]))}{', ...' if len(paths) > 3 else ''}"
        )
    depths = [0] * _STAGES
    for place in places:
        if place and place[1] == "stages":
            depths[int(place[2])] = max(depths[int(place[2])], int(place[3]) + 1)
    needed = {"group": [], "layer_wise": [2], "stage_wise": [2]}.get(groups, range(min(stages), _STAGES))
    if missing := [f"stages_{stage}_*" for stage in needed if depths[stage] == 0]:
        raise ValueError(
            f"layer_decay_groups={groups!r} counts blocks that are not among the trainable weights: "
            f"{', '.join(missing)}. Train them too, or take layer_decay_groups='group', which counts none."
        )
    return depths
