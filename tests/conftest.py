"""What every test process needs before its first import."""

import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_CONVNEXT_QUIET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else PyTorch spins while other processes need the core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers must not look for a network
# TensorFlow before PyTorch: the order that was tested.
if os.environ.get("KERAS_BACKEND") == "tensorflow":
    import tensorflow  # noqa: F401

import torch

# The published torchvision wheels are CUDA builds. With the CPU build of torch two of its operators are not
# registered, and its import fails; declaring them is all that timm and transformers need.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.set_num_threads(2)
warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
