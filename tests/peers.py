"""The independent implementations that tests compare with, all in PyTorch, with every weight random.

timm, transformers, torchvision and keras.applications are used as installed. The official ConvNeXt code is
not on a package registry; `OfficialConvNeXt` is written here, from torch.nn alone, with the official names of
all weights (facebookresearch/ConvNeXt 048efce, ConvNeXt-V2 2553895), and is itself compared with timm and,
where a checkout is at hand, with the official code (test_peers.py).
"""

import pathlib

import keras
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import keras_convnext  # noqa: F401  (after conftest, so that frameworks load in the tested order)
from keras_convnext.variants import VARIANTS


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, of a size that keeps signals near 1 through the whole network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            squeezed = [size for size in parameter.shape if size > 1]
            if len(squeezed) >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith(("bias", "beta")):
                parameter.copy_(0.1 * noise)
            else:  # norm, layer scale and GRN weights
                parameter.copy_(1 + 0.2 * noise)
    return module.eval()


def reduced_depths(name: str) -> tuple[int, ...]:
    """Depths for a parity test: the real ones of the small architectures, few blocks of the others.

    On JAX, where compiling takes a second a block, only the two atto are compared at their real depth.
    """
    variant = VARIANTS[name]
    if variant.isotropic:
        return (2,)
    if keras.backend.backend() == "jax" and name not in ("convnext_atto", "convnextv2_atto"):
        return (1, 1, 1, 1)
    return variant.depths if sum(variant.depths) <= 14 else (1, 1, 2, 1)


class _LayerNorm(nn.Module):
    """Over channels, for channels-first maps; mean and biased variance, epsilon 1e-6."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        x = nn.functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6)
        return x.movedim(-1, 1)


class _GRN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):  # channels-last
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.gamma * x * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class _Block(nn.Module):
    def __init__(self, dim, version, layer_scale):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = _GRN(4 * dim) if version == 2 else nn.Identity()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim)) if layer_scale else None

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(nn.functional.gelu(self.pwconv1(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + y.permute(0, 3, 1, 2)


class OfficialConvNeXt(nn.Module):
    """V1, V2 and isotropic ConvNeXt with the official code's names and shapes."""

    def __init__(self, variant, depths=None, classes=1000):
        super().__init__()
        depths, dims = depths or variant.depths, variant.dims

        def blocks(depth, dim):
            scale = variant.layer_scale_init_value is not None
            return nn.Sequential(*[_Block(dim, variant.version, scale) for _ in range(depth)])

        self.isotropic = variant.isotropic
        if self.isotropic:
            self.stem = nn.Conv2d(3, dims[0], 16, 16)
            self.blocks = blocks(depths[0], dims[0])
        else:
            stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), _LayerNorm(dims[0]))
            down = [
                nn.Sequential(_LayerNorm(dims[i]), nn.Conv2d(dims[i], dims[i + 1], 2, 2)) for i in range(3)
            ]
            self.downsample_layers = nn.ModuleList([stem, *down])
            self.stages = nn.ModuleList(map(blocks, depths, dims))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], classes)

    def maps(self, x):
        if self.isotropic:
            return [self.blocks(self.stem(x))]
        result = []
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
            result.append(x)
        return result

    def forward(self, x):
        return self.head(self.norm(self.maps(x)[-1].mean((-2, -1))))


def images(size=(64, 64), channels=3, count=2, seed=0) -> np.ndarray:
    """float32 (count, height, width, channels), like normalised photographs in spread."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, *size, channels)).astype("float32")


def save(state: dict, path: pathlib.Path) -> pathlib.Path:
    """Writes a PyTorch state dict as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def relative_error(actual, expected) -> float:
    """Largest absolute difference over the largest absolute value."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    if actual.shape != expected.shape:
        raise ValueError(f"Shapes differ: {actual.shape} and {expected.shape}")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
