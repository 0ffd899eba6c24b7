"""UPerNet of transformers with every weight and batch statistic random, for tests of segmenters."""

import dataclasses

import peers
import torch
import transformers

from keras_convnext.variants import VARIANTS

CLASSES = 11
CHANNELS = 16


def one_block_a_stage(patch, *names):
    """The table of architectures with reduced depths, for `load` and everything behind it."""
    for name in names:
        patch.setitem(VARIANTS, name, dataclasses.replace(VARIANTS[name], depths=(1, 1, 1, 1)))


def transformers_config(variant, classes=CLASSES, channels=CHANNELS):
    kind = transformers.ConvNextV2Config if variant.version == 2 else transformers.ConvNextConfig
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = kind(hidden_sizes=list(variant.dims), depths=list(variant.depths), out_features=stages)
    return transformers.UperNetConfig(
        backbone_config=backbone,
        num_labels=classes,
        hidden_size=channels,
        auxiliary_in_channels=variant.dims[2],
        auxiliary_channels=channels // 2,
    )


def transformers_model(name, classes=CLASSES, channels=CHANNELS, seed=0):
    config = transformers_config(VARIANTS[name], classes, channels)
    model = peers.randomise(transformers.UperNetForSemanticSegmentation(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif key.endswith("running_var"):
            buffer.copy_(0.5 + 2 * torch.rand(buffer.shape, generator=generator))
        elif key.endswith("num_batches_tracked"):
            buffer.fill_(160_000)
    return model


@torch.no_grad()
def transformers_logits(model, images):
    """(N, H, W, 3) normalised to the logits of both heads, NumPy (N, H, W, classes)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    maps = model.backbone(x).feature_maps
    both = {"logits": model(x).logits, "auxiliary": model.auxiliary_head(maps)}
    size = x.shape[2:]
    both["auxiliary"] = torch.nn.functional.interpolate(
        both["auxiliary"], size=size, mode="bilinear", align_corners=False
    )
    return {name: logits.permute(0, 2, 3, 1).numpy() for name, logits in both.items()}
