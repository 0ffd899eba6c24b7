"""The architectures of the family: one literal table, one row each.

Sources, by the beginning of the name:
  convnext_tiny .. xlarge       Liu et al. 2022 (arXiv:2201.03545), appendix A.4; facebookresearch/ConvNeXt
                                models/convnext.py at 048efce
  convnext_isotropic_*          the same paper, section 3.3; models/convnext_isotropic.py at 048efce
                                (large trains with layer scale, TRAINING.md: small and base switch it off)
  convnextv2_*                  Woo et al. 2023 (arXiv:2301.00808), appendix A.1; facebookresearch/ConvNeXt-V2
                                models/convnextv2.py at 2553895
  all others, and `parameters`  timm 1.0.31, timm/models/convnext.py and its registry
Parameter counts are for 1000 classes and three input channels; tests assert every one.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Variant:
    """One architecture, as plain values."""

    name: str  # timm's name; the official name for the isotropic models
    version: int  # 1 or 2, the paper whose block is used
    depths: tuple[int, ...]  # number of blocks of each stage; one number for the isotropic models
    dims: tuple[int, ...]  # channels of each stage
    parameters: int  # number of weights at 1000 classes and 3 input channels
    # "patch" (4x4, stride 4), "overlap", "overlap_tiered" or "overlap_act" (two 3x3, stride 2), or "isotropic"
    # (16x16, stride 16, no norm).
    stem: str = "patch"
    kernel_sizes: tuple[int, ...] = (7, 7, 7, 7)  # side of the depthwise kernel in each stage
    norm: str = "layer_norm"  # or "rms_norm", "simple_norm"
    epsilon: float = 1e-6  # of every norm
    activation: str = "gelu"  # the exact one; or "gelu_tanh", "silu"
    layer_scale_init_value: float | None = 1e-6  # start of LayerScale, or None where there is none
    # "norm_last" (pool, norm, classifier), "norm_first" (norm, pool, classifier) or "mlp" (pool, norm, a
    # hidden layer with GELU, classifier).
    head: str = "norm_last"
    pointwise_as_conv: bool = False  # whether timm stores the pointwise kernels as 1x1 convolutions

    @property
    def isotropic(self) -> bool:
        """Whether the model keeps one resolution and one width throughout."""
        return self.stem == "isotropic"

    @property
    def stem_dim(self) -> int:
        """Channels between the two convolutions of an overlapping stem.

        When the stem is tiered: half of the first width, as a multiple of 8, at least 8, and not below 90 %
        of the half (timm 1.0.31 layers/helpers.py, `make_divisible`). Else the first width.
        """
        if self.stem != "overlap_tiered":
            return self.dims[0]
        half = self.dims[0] // 2
        rounded = max(8, (half + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * half else rounded


# fmt: off
_ROWS = (
    # ConvNeXt, smaller than Tiny (timm)
    Variant("convnext_zepto_rms", 1, (2, 2, 4, 2), (32, 64, 128, 256), 2_155_656, norm="simple_norm", pointwise_as_conv=True),
    Variant("convnext_zepto_rms_ols", 1, (2, 2, 4, 2), (32, 64, 128, 256), 2_164_232, stem="overlap_act", norm="simple_norm", pointwise_as_conv=True),
    Variant("convnext_atto", 1, (2, 2, 6, 2), (40, 80, 160, 320), 3_695_520, pointwise_as_conv=True),
    Variant("convnext_atto_ols", 1, (2, 2, 6, 2), (40, 80, 160, 320), 3_702_912, stem="overlap_tiered", pointwise_as_conv=True),
    Variant("convnext_atto_rms", 1, (2, 2, 6, 2), (40, 80, 160, 320), 3_693_040, norm="rms_norm", pointwise_as_conv=True),
    Variant("convnext_femto", 1, (2, 2, 6, 2), (48, 96, 192, 384), 5_217_784, pointwise_as_conv=True),
    Variant("convnext_femto_ols", 1, (2, 2, 6, 2), (48, 96, 192, 384), 5_226_520, stem="overlap_tiered", pointwise_as_conv=True),
    Variant("convnext_pico", 1, (2, 2, 6, 2), (64, 128, 256, 512), 9_045_672, pointwise_as_conv=True),
    Variant("convnext_pico_ols", 1, (2, 2, 6, 2), (64, 128, 256, 512), 9_061_928, stem="overlap_tiered", pointwise_as_conv=True),
    Variant("convnext_nano", 1, (2, 2, 8, 2), (80, 160, 320, 640), 15_593_560, pointwise_as_conv=True),
    Variant("convnext_nano_ols", 1, (2, 2, 8, 2), (80, 160, 320, 640), 15_649_560, stem="overlap", pointwise_as_conv=True),
    Variant("convnext_tiny_hnf", 1, (3, 3, 9, 3), (96, 192, 384, 768), 28_589_128, head="norm_first", pointwise_as_conv=True),
    # ConvNeXt, Liu et al. appendix A.4; xxlarge and the MLP head are timm's, for CLIP towers
    Variant("convnext_tiny", 1, (3, 3, 9, 3), (96, 192, 384, 768), 28_589_128),
    Variant("convnext_small", 1, (3, 3, 27, 3), (96, 192, 384, 768), 50_223_688),
    Variant("convnext_base", 1, (3, 3, 27, 3), (128, 256, 512, 1024), 88_591_464),
    Variant("convnext_large", 1, (3, 3, 27, 3), (192, 384, 768, 1536), 197_767_336),
    Variant("convnext_large_mlp", 1, (3, 3, 27, 3), (192, 384, 768, 1536), 200_128_168, head="mlp"),
    Variant("convnext_xlarge", 1, (3, 3, 27, 3), (256, 512, 1024, 2048), 350_196_968),
    Variant("convnext_xxlarge", 1, (3, 4, 30, 3), (384, 768, 1536, 3072), 846_471_016, epsilon=1e-5),
    # ConvNeXt V2, Woo et al. appendix A.1; small is timm's
    Variant("convnextv2_atto", 2, (2, 2, 6, 2), (40, 80, 160, 320), 3_708_400, layer_scale_init_value=None, pointwise_as_conv=True),
    Variant("convnextv2_femto", 2, (2, 2, 6, 2), (48, 96, 192, 384), 5_233_240, layer_scale_init_value=None, pointwise_as_conv=True),
    Variant("convnextv2_pico", 2, (2, 2, 6, 2), (64, 128, 256, 512), 9_066_280, layer_scale_init_value=None, pointwise_as_conv=True),
    Variant("convnextv2_nano", 2, (2, 2, 8, 2), (80, 160, 320, 640), 15_623_800, layer_scale_init_value=None, pointwise_as_conv=True),
    Variant("convnextv2_tiny", 2, (3, 3, 9, 3), (96, 192, 384, 768), 28_635_496, layer_scale_init_value=None),
    Variant("convnextv2_small", 2, (3, 3, 27, 3), (96, 192, 384, 768), 50_318_440, layer_scale_init_value=None),
    Variant("convnextv2_base", 2, (3, 3, 27, 3), (128, 256, 512, 1024), 88_717_800, layer_scale_init_value=None),
    Variant("convnextv2_large", 2, (3, 3, 27, 3), (192, 384, 768, 1536), 197_956_840, layer_scale_init_value=None),
    Variant("convnextv2_huge", 2, (3, 3, 27, 3), (352, 704, 1408, 2816), 660_289_640, layer_scale_init_value=None),
    # isotropic ConvNeXt, Liu et al. section 3.3
    Variant("convnext_isotropic_small", 1, (18,), (384,), 22_308_712, stem="isotropic", kernel_sizes=(7,), layer_scale_init_value=None),
    Variant("convnext_isotropic_base", 1, (18,), (768,), 87_083_752, stem="isotropic", kernel_sizes=(7,), layer_scale_init_value=None),
    Variant("convnext_isotropic_large", 1, (36,), (1024,), 305_942_504, stem="isotropic", kernel_sizes=(7,)),
    # very small ones for tests of user code (timm)
    Variant("test_convnext", 1, (1, 2, 4, 2), (24, 32, 48, 64), 272_128, epsilon=1e-5, activation="gelu_tanh"),
    Variant("test_convnext2", 1, (1, 1, 1, 1), (32, 64, 96, 128), 477_800, epsilon=1e-5, activation="gelu_tanh"),
    Variant("test_convnext3", 1, (1, 1, 1, 1), (32, 64, 96, 128), 468_840, kernel_sizes=(7, 5, 5, 3), epsilon=1e-5, activation="silu"),
)
# fmt: on

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
