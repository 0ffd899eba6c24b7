"""Finds published weights by their names: `CHECKPOINTS` has one row for each file.

A tag is "<architecture>.<pretrained tag>", and the timm rows use timm's ids. The rows, with the sources of
their values, are in `catalog_rows`; what a row says is in `published`.
"""

import fnmatch

from keras_convnext._messages import near_names, unknown
from keras_convnext.weights.catalog_rows import ROWS
from keras_convnext.weights.published import Checkpoint

CHECKPOINTS: dict[str, Checkpoint] = {row.tag: row for row in ROWS}

# timm 1.0.31, register_model_deprecations in timm/models/convnext.py.
ALIASES: dict[str, str] = {
    "convnext_tiny_in22ft1k": "convnext_tiny.fb_in22k_ft_in1k",
    "convnext_small_in22ft1k": "convnext_small.fb_in22k_ft_in1k",
    "convnext_base_in22ft1k": "convnext_base.fb_in22k_ft_in1k",
    "convnext_large_in22ft1k": "convnext_large.fb_in22k_ft_in1k",
    "convnext_xlarge_in22ft1k": "convnext_xlarge.fb_in22k_ft_in1k",
    "convnext_tiny_384_in22ft1k": "convnext_tiny.fb_in22k_ft_in1k_384",
    "convnext_small_384_in22ft1k": "convnext_small.fb_in22k_ft_in1k_384",
    "convnext_base_384_in22ft1k": "convnext_base.fb_in22k_ft_in1k_384",
    "convnext_large_384_in22ft1k": "convnext_large.fb_in22k_ft_in1k_384",
    "convnext_xlarge_384_in22ft1k": "convnext_xlarge.fb_in22k_ft_in1k_384",
    "convnext_tiny_in22k": "convnext_tiny.fb_in22k",
    "convnext_small_in22k": "convnext_small.fb_in22k",
    "convnext_base_in22k": "convnext_base.fb_in22k",
    "convnext_large_in22k": "convnext_large.fb_in22k",
    "convnext_xlarge_in22k": "convnext_xlarge.fb_in22k",
}

# The tag that weights="imagenet" means. The five of keras.applications keep its files, so that a
# change of import changes nothing; the others take timm's default tag, isotropic ones Meta's file.
IMAGENET: dict[str, str | None] = {
    "convnext_atto": "convnext_atto.d2_in1k",
    "convnext_atto_ols": "convnext_atto_ols.a2_in1k",
    "convnext_atto_rms": None,
    "convnext_base": "convnext_base.keras_applications",
    "convnext_femto": "convnext_femto.d1_in1k",
    "convnext_femto_ols": "convnext_femto_ols.d1_in1k",
    "convnext_large": "convnext_large.keras_applications",
    "convnext_large_mlp": "convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320",
    "convnext_nano": "convnext_nano.in12k_ft_in1k",
    "convnext_nano_ols": "convnext_nano_ols.d1h_in1k",
    "convnext_pico": "convnext_pico.d1_in1k",
    "convnext_pico_ols": "convnext_pico_ols.d1_in1k",
    "convnext_small": "convnext_small.keras_applications",
    "convnext_tiny": "convnext_tiny.keras_applications",
    "convnext_tiny_hnf": "convnext_tiny_hnf.a2h_in1k",
    "convnext_xlarge": "convnext_xlarge.keras_applications",
    "convnext_xxlarge": "convnext_xxlarge.clip_laion2b_soup_ft_in1k",
    "convnext_zepto_rms": "convnext_zepto_rms.ra4_e3600_r224_in1k",
    "convnext_zepto_rms_ols": "convnext_zepto_rms_ols.ra4_e3600_r224_in1k",
    "convnextv2_atto": "convnextv2_atto.fcmae_ft_in1k",
    "convnextv2_base": "convnextv2_base.fcmae_ft_in22k_in1k",
    "convnextv2_femto": "convnextv2_femto.fcmae_ft_in1k",
    "convnextv2_huge": "convnextv2_huge.fcmae_ft_in22k_in1k_384",
    "convnextv2_large": "convnextv2_large.fcmae_ft_in22k_in1k",
    "convnextv2_nano": "convnextv2_nano.fcmae_ft_in22k_in1k",
    "convnextv2_pico": "convnextv2_pico.fcmae_ft_in1k",
    "convnextv2_small": None,
    "convnextv2_tiny": "convnextv2_tiny.fcmae_ft_in22k_in1k",
    "test_convnext": "test_convnext.r160_in1k",
    "test_convnext2": "test_convnext2.r160_in1k",
    "test_convnext3": "test_convnext3.r160_in1k",
    "convnext_isotropic_small": "convnext_isotropic_small.official_in1k",
    "convnext_isotropic_base": "convnext_isotropic_base.official_in1k",
    "convnext_isotropic_large": "convnext_isotropic_large.official_in1k",
}

# The same for include_top=False in keras.applications; other architectures drop the head instead.
IMAGENET_NOTOP: dict[str, str] = {
    "convnext_tiny": "convnext_tiny.keras_applications_notop",
    "convnext_small": "convnext_small.keras_applications_notop",
    "convnext_base": "convnext_base.keras_applications_notop",
    "convnext_large": "convnext_large.keras_applications_notop",
    "convnext_xlarge": "convnext_xlarge.keras_applications_notop",
}


def find_checkpoint(name: str, architecture: str | None = None) -> Checkpoint:
    """Finds the published weights that a name means.

    Args:
        name: a full tag ("convnext_tiny.fb_in1k"), a name that timm has deprecated
            ("convnext_tiny_in22k"), or, with `architecture`, a pretrained tag ("fb_in1k") or
            "imagenet".
        architecture: architecture the weights are for, e.g. "convnext_tiny". None: any.

    Returns:
        The row of `CHECKPOINTS`.

    Raises:
        ValueError: the name is unknown (tells near names and which architectures have the tag),
            belongs to another architecture, needs an `architecture`, or the architecture is
            unknown or has no ImageNet file.

    Example:
        find_checkpoint("convnext_tiny.fb_in22k_ft_in1k_384").top1                   # 84.098
        find_checkpoint("fb_in22k_ft_in1k_384", architecture="convnext_tiny").tag
        find_checkpoint("imagenet", architecture="convnextv2_atto").tag  # "convnextv2_atto.fcmae_ft_in1k"
    """
    if architecture is not None and architecture not in IMAGENET:
        raise ValueError(unknown("architecture", architecture, IMAGENET))
    if name == "imagenet":
        return _imagenet(architecture)
    full = ALIASES.get(name, name)
    if full not in CHECKPOINTS and architecture is not None:
        full = f"{architecture}.{name}"
    if full not in CHECKPOINTS:
        raise ValueError(_unknown_weights(name, architecture))
    row = CHECKPOINTS[full]
    if architecture is not None and row.architecture != architecture:
        raise ValueError(
            f"Weights {name!r} are for {row.architecture!r}, received architecture "
            f"{architecture!r}. Weights of {architecture}: {_of_architecture(architecture)}"
        )
    return row


def list_weights(
    architecture: str | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    licence: str | None = None,
    commercial_use: bool | None = None,
    downloadable: bool | None = None,
) -> list[str]:
    """Lists the tags that meet every given condition.

    Args:
        architecture: name or pattern with "*", e.g. "convnextv2_*". Default None: all.
        classes: width of the classifier, 0 for none. Default None: all.
        image_size: side in pixels. Default None: all.
        licence: licence identifier, e.g. "apache-2.0". Default None: all.
        commercial_use: whether the licence allows commercial use. Default None: both.
        downloadable: whether the catalog knows where the file is. Default None: both.

    Returns:
        The tags in the order of `CHECKPOINTS`; empty when no row meets all conditions.

    Raises:
        ValueError: no architecture matches, or no row has the licence; tells near names.

    Example:
        list_weights("convnext_tiny", classes=21841)
        # ["convnext_tiny.fb_in22k", "convnext_tiny.official_in22k"]
        list_weights("convnextv2_*", commercial_use=True, downloadable=True)   # []
    """
    if architecture is not None and not any(fnmatch.fnmatchcase(known, architecture) for known in IMAGENET):
        raise ValueError(unknown("architecture", architecture, IMAGENET))
    licences = sorted({row.licence for row in CHECKPOINTS.values()})
    if licence is not None and licence not in licences:
        raise ValueError(unknown("licence", licence, licences))
    return [
        row.tag
        for row in CHECKPOINTS.values()
        if (architecture is None or fnmatch.fnmatchcase(row.architecture, architecture))
        and (classes is None or row.classes == classes)
        and (image_size is None or row.image_size == image_size)
        and (licence is None or row.licence == licence)
        and (commercial_use is None or row.commercial_use == commercial_use)
        and (downloadable is None or row.downloadable == downloadable)
    ]


def default_checkpoint(architecture: str) -> Checkpoint:
    """The published weights whose image size and preparation hold for an architecture with any weights.

    They are its ImageNet weights, or the first in the catalog where none were published.
    """
    return CHECKPOINTS[IMAGENET[architecture] or list_weights(architecture)[0]]


def _imagenet(architecture: str | None) -> Checkpoint:
    if architecture is None:
        raise ValueError(
            "weights 'imagenet' mean another file for each architecture, received "
            "architecture None. Pass architecture='convnext_tiny' or a full tag such as "
            "'convnext_tiny.fb_in1k'."
        )
    tag = IMAGENET[architecture]
    if tag is None:
        raise ValueError(
            f"No ImageNet weights have been published for architecture {architecture!r}. "
            f"Weights of {architecture}: {_of_architecture(architecture)}"
        )
    return CHECKPOINTS[tag]


def _of_architecture(architecture: str) -> str:
    rows = [row for row in CHECKPOINTS.values() if row.architecture == architecture]
    names = [row.tag.removeprefix(f"{architecture}.") for row in rows]
    return ", ".join(
        name if row.downloadable else f"{name} (no download)" for name, row in zip(names, rows, strict=True)
    )


def _unknown_weights(name: str, architecture: str | None) -> str:
    owners = [row.architecture for row in CHECKPOINTS.values() if row.tag.endswith(f".{name}")]
    if architecture is None and name in IMAGENET:
        return (
            f"Weights {name!r} name an architecture only. Add '.' and one of the weights of "
            f"{name}: {_of_architecture(name)}"
        )
    if architecture is None and owners:
        return (
            f"Weights {name!r} need an architecture, received None. "
            f"Architectures that have them: {', '.join(owners)}"
        )
    if architecture is None:
        near = near_names(name, [*CHECKPOINTS, *ALIASES])
        return f"Unknown weights {name!r}.{near} list_weights() lists all {len(CHECKPOINTS)}."
    known = f"Weights of {architecture}: {_of_architecture(architecture)}"
    if owners:
        return (
            f"Weights {name!r} do not exist for architecture {architecture!r}. "
            f"Architectures that have them: {', '.join(owners)}. {known}"
        )
    prefix = f"{architecture}."
    candidates = ["imagenet", *CHECKPOINTS, *ALIASES]
    candidates += [tag.removeprefix(prefix) for tag in CHECKPOINTS if tag.startswith(prefix)]
    near = near_names(name, candidates)
    return f"Unknown weights {name!r} for architecture {architecture!r}.{near} {known}"
