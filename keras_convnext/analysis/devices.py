"""The table of devices whose memory and speed are known, and the reader of "64xh100"."""

import re
from dataclasses import dataclass

from keras_convnext._messages import near_names, short_repr

USABLE_MEMORY = 0.9  # of a device; the rest is for libraries, their workspaces and pieces too small to use
FRACTION = 0.4  # of the peak figures, where nothing else is said
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """The peak figures of one device, as its maker states them, without sparsity."""

    kind: str  # "gpu", "tpu" or "cpu"
    bfloat16: float  # FLOP/s of matrix products in 16 bits
    # FLOP/s in float32: of GPUs without TensorFloat-32; of TPUs that of bfloat16, in which JAX multiplies by
    # default there (`jax.lax.Precision.DEFAULT`).
    float32: float
    memory: float  # bytes
    bandwidth: float  # bytes/s between memory and processor
    link: float  # bytes/s to the other devices of a host, or of a pod, in one direction
    host_devices: int  # that such links connect
    network: float  # bytes/s of one device to other hosts, in one direction
    source: str


_CLOUD = "Cloud TPU documentation"
# fmt: off
DEVICES: dict[str, Device] = {
    "h100": Device("gpu", 989e12, 67e12, 80e9, 3.35e12, 450e9, 8, 50e9, "NVIDIA H100 SXM data sheet; network: DGX H100 data sheet, 400 Gbit/s a GPU"),
    "h200": Device("gpu", 989e12, 67e12, 141e9, 4.8e12, 450e9, 8, 50e9, "NVIDIA H200 SXM data sheet; network: DGX H200 data sheet, 400 Gbit/s a GPU"),
    "a100-40": Device("gpu", 312e12, 19.5e12, 40e9, 1.555e12, 300e9, 8, 25e9, "NVIDIA A100 data sheet, SXM 40 GB; network: DGX A100 data sheet, 200 Gbit/s a GPU"),
    "a100-80": Device("gpu", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 8, 25e9, "NVIDIA A100 data sheet, SXM 80 GB; network: DGX A100 data sheet, 200 Gbit/s a GPU"),
    "v100": Device("gpu", 125e12, 15.7e12, 32e9, 0.9e12, 150e9, 8, 6.25e9, "NVIDIA V100 data sheet, SXM2 32 GB, whose 16 bits are float16; network: DGX-1 data sheet, 4 x 100 Gbit/s"),
    "l4": Device("gpu", 121e12, 30.3e12, 24e9, 0.3e12, 32e9, 8, 1.56e9, "NVIDIA L4 data sheet, PCIe 4 x16; network: assumed, 100 Gbit/s for 8"),
    "rtx4090": Device("gpu", 165.2e12, 82.6e12, 24e9, 1.008e12, 32e9, 8, 1.56e9, "NVIDIA Ada architecture paper, RTX 4090, PCIe 4 x16; network: assumed, 100 Gbit/s for 8"),
    # JAX sees the two cores of a v3 chip as two devices; a later chip is one.
    "tpu-v3": Device("tpu", 61.5e12, 61.5e12, 16 * GIB, 450e9, 164e9, 2048, 164e9, f"{_CLOUD}, TPU v3, half a chip; links: Jouppi et al. 2020 (CACM 63:7), 4 x 656 Gbit/s a chip"),
    "tpu-v4": Device("tpu", 275e12, 275e12, 32 * GIB, 1.2e12, 300e9, 4096, 300e9, f"{_CLOUD}, TPU v4"),
    "tpu-v5e": Device("tpu", 197e12, 197e12, 16e9, 0.819e12, 200e9, 256, 200e9, f"{_CLOUD}, TPU v5e"),
    "tpu-v5p": Device("tpu", 459e12, 459e12, 95e9, 2.765e12, 600e9, 8960, 600e9, f"{_CLOUD}, TPU v5p"),
    "tpu-v6e": Device("tpu", 918e12, 918e12, 32e9, 1.64e12, 400e9, 256, 400e9, f"{_CLOUD}, TPU v6e"),
    # What products and copies reached, not a peak; links as copies, for simulated devices.
    "cpu": Device("cpu", 0.471e12, 0.471e12, 16e9, 45.5e9, 22e9, 1024, 22e9, "two cores of a Zen 5, measured, benchmarks/speed/results/zen5/table.md; memory assumed"),
}
# fmt: on


def parse_devices(text: str) -> tuple[int, str]:
    """Reads "64xh100": 64 and a key of `DEVICES`; without a number, one. ValueError: there is none such."""
    count, name = re.fullmatch(r"(?:(\d{1,9})x)?(.*)", text.strip().lower(), re.S).groups()  # type: ignore[union-attr]
    if name not in DEVICES:
        near = near_names(name, DEVICES, cutoff=0.5)
        raise ValueError(
            f"Expected devices such as 64xh100, received {short_repr(text)}.{near} Known: {', '.join(DEVICES)}."
        )
    if count is not None and int(count) < 1:
        raise ValueError(f"Expected at least one device, such as 8x{name}, received {text!r}.")
    return int(count or 1), name
