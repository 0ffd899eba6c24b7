"""The implementations that can be measured: this package on each backend, and the peers.

Each builds its model and one step of it. Frameworks are imported inside the functions, so that
a process holds those of one implementation only.
"""

import contextlib
import dataclasses
import getpass
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np

from keras_convnext._environment import available_cores, library_settings
from keras_convnext._messages import unknown
from keras_convnext.exporting import runtimes
from keras_convnext.variants import VARIANTS

Step = Callable[[], object]
ROOT = pathlib.Path(__file__).parents[2]

OURS = ("tensorflow", "jax", "torch", "openvino")
KERAS_BACKENDS = ("tensorflow", "jax", "torch")
KERAS_APPLICATIONS = {
    f"convnext_{size}": f"ConvNeXt{'XLarge' if size == 'xlarge' else size.capitalize()}"
    for size in ("tiny", "small", "base", "large", "xlarge")
}
TORCHVISION = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
PEERS = (
    "timm",
    "timm-compile",
    "torchvision",
    *(f"keras.applications:{backend}" for backend in KERAS_BACKENDS),
    "onnxruntime",
    "openvino-timm",
    "litert",
)
# Words of --against; cases.entrants makes peers of them.
AGAINST = ("timm", "timm-compile", "torchvision", "keras.applications", "onnxruntime", "openvino", "litert")
MODES = ("inference", "training")
DTYPES = ("float32", "bfloat16", "float16", "int8")

TITLES = {
    "tensorflow": "ours, TensorFlow",
    "jax": "ours, JAX",
    "torch": "ours, PyTorch",
    "openvino": "ours, exported to OpenVINO",
    "timm": "timm, eager",
    "timm-compile": "timm, torch.compile",
    "torchvision": "torchvision",
    "keras.applications:tensorflow": "keras.applications, TensorFlow",
    "keras.applications:jax": "keras.applications, JAX",
    "keras.applications:torch": "keras.applications, PyTorch",
    "onnxruntime": "onnxruntime (timm's model)",
    "openvino-timm": "OpenVINO (timm's model)",
    "litert": "LiteRT (our model)",
}
_MODULES = {  # implementation -> modules that must be installed
    "tensorflow": ("tensorflow",),
    "jax": ("jax",),
    "torch": ("torch",),
    "openvino": ("openvino",),
    "timm": ("torch", "timm"),
    "timm-compile": ("torch", "timm"),
    "torchvision": ("torch", "torchvision"),
    "keras.applications:tensorflow": ("tensorflow",),
    "keras.applications:jax": ("jax",),
    "keras.applications:torch": ("torch",),
    "onnxruntime": ("torch", "timm", "onnx", "onnxscript", "onnxruntime"),
    "openvino-timm": ("torch", "timm", "openvino"),
    "litert": ("tensorflow", "ai_edge_litert"),
}
_DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert", "tensorflow": "tensorflow_cpu"}
_EXPORTED = ("openvino", "onnxruntime", "openvino-timm", "litert")  # run a file that is written beforehand


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the step that is measured.

    Attributes:
        model: architecture, such as "convnext_tiny".
        mode: "inference" or "training".
        batch: images in a step.
        image_size: side in pixels.
        dtype: "float32", "bfloat16", "float16" (on a GPU) or "int8" (weights of the pointwise layers).
        rematerialize: whether the blocks are computed again in the backward pass.
    """

    model: str
    mode: str = "inference"
    batch: int = 8
    image_size: int = 224
    dtype: str = "float32"
    rematerialize: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        again = ", rematerialised" if self.rematerialize else ""
        return f"{self.model}, {self.mode}, batch {self.batch}, {self.image_size} pixels, {self.dtype}{again}"


class NotOfferedError(ValueError):
    """An implementation cannot run a case; the message says why."""


def check_implementation(name: str) -> str:
    """Returns the name of an implementation.

    Raises:
        ValueError: it is none; near names are listed.
    """
    if name not in TITLES:
        raise ValueError(unknown("implementation", name, TITLES))
    return name


def is_ours(name: str) -> bool:
    """Returns whether an implementation is this package: on a backend of Keras, or exported from it."""
    return name in OURS


def is_exported(name: str) -> bool:
    """Returns whether an implementation runs a file, which `export` writes in a process of its own."""
    return name in _EXPORTED


def installed_backends() -> list[str]:
    """Returns the backends of Keras that can be measured here."""
    return [name for name in KERAS_BACKENDS if importlib.util.find_spec(name) is not None]


def check_offered(name: str, case: Case) -> None:
    """Checks what can be known without importing a framework.

    Raises:
        NotOfferedError: a package is missing, or the implementation has no such model, mode or dtype.
    """
    missing = [module for module in _MODULES[name] if importlib.util.find_spec(module) is None]
    if missing:
        packages = " ".join(_DISTRIBUTIONS.get(module, module) for module in missing).replace("_", "-")
        raise NotOfferedError(f"not installed: {packages}")
    if "timm" in _MODULES[name] and VARIANTS[case.model].isotropic:
        raise NotOfferedError(f"timm has no {case.model}")
    if name == "torchvision" and case.model not in TORCHVISION:
        raise NotOfferedError(f"torchvision has no {case.model}")
    if name.startswith("keras.applications:") and case.model not in KERAS_APPLICATIONS:
        raise NotOfferedError(f"keras.applications has no {case.model}")
    if case.mode == "training" and is_exported(name):
        raise NotOfferedError("does not train")
    offered = {
        "onnxruntime": ("float32",),
        "litert": ("float32", "int8"),
        "openvino": ("float32", "bfloat16"),
        "openvino-timm": ("float32", "bfloat16"),
    }.get(name, DTYPES if is_ours(name) else ("float32", "bfloat16", "float16"))
    if case.dtype not in offered or (case.dtype == "int8" and case.mode == "training"):
        raise NotOfferedError(f"no {case.mode} in {case.dtype}")
    if case.rematerialize and not is_ours(name):
        raise NotOfferedError("does not rematerialise")


def environment(name: str, threads: int | None) -> dict[str, str]:
    """Returns the environment variables of an implementation's process, above those of this one."""
    backend = name.partition(":")[2] or name
    # An exported model is made by TensorFlow where it is needed anyway, else by OpenVINO itself.
    backend = {"litert": "tensorflow", "openvino": "openvino"}.get(name, backend)
    variables = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_CONVNEXT_QUIET": "1", "HF_HUB_OFFLINE": "1"}
    # The packages of this repository, whatever the working directory is.
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, given)])
    if backend in (*KERAS_BACKENDS, "openvino"):
        variables["KERAS_BACKEND"] = backend
    if is_ours(name):
        variables |= library_settings()  # as the import of the package does
    if threads is not None:
        variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        variables["TF_NUM_INTRAOP_THREADS"] = str(threads)
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # torch.compile finds its programs again whatever the processor is limited to, and one that was made
        # for AVX2 destroys memory when it is compiled for AVX-512.
        folder = pathlib.Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return variables


def limit_threads(threads: int) -> None:
    """Leaves the process that many cores: every framework sizes its pool of threads by these."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def prepare(name: str, case: Case, threads: int | None, folder: str) -> Step:
    """Builds an implementation's model, with random weights, and returns one step of it.

    A step has ended when its result can be read. In inference, this package and keras.applications are
    called as a user does: `predict_on_batch`, float32 NumPy pixels in 0..255 in, NumPy out. The peers get a
    tensor of their best layout and type that is ready in memory, and leave their result where it is: that
    favours them. In training a step is forward, cross-entropy with soft targets, backward and AdamW, on all
    sides without drop path; Keras gets NumPy images and targets in each step, the others the same tensors.

    Args:
        name: implementation.
        case: what to run.
        threads: cores to use, None for all.
        folder: with the files of `export`.

    Raises:
        NotOfferedError: the implementation cannot run the case.
    """
    check_offered(name, case)
    if name in KERAS_BACKENDS:
        return _keras_step(our_model(case), case, _our_optimizer)
    if name.startswith("keras.applications:"):
        return _keras_step(_keras_applications_model(case), case, _keras_optimizer)
    if name == "onnxruntime":
        return _onnxruntime_step(case, threads, folder)
    if name in ("openvino", "openvino-timm"):
        return _openvino_step(name, case, threads, folder)
    if name == "litert":
        return _litert_step(case, threads, folder)
    return _torch_step(name, case)


def export(name: str, case: Case, folder: str) -> None:
    """Writes the file that an implementation of `is_exported` runs."""
    path = os.path.join(folder, name)
    if name == "openvino":
        from keras_convnext.exporting.deploy import deploy

        deploy(our_model(case)).export(f"{path}.xml", format="openvino", verbose=False)
    elif name == "litert":
        _export_litert(case, f"{path}.tflite")
    elif name == "onnxruntime":
        import torch

        images = torch.from_numpy(_normalised(case))
        torch.onnx.export(_timm_model(case), (images,), f"{path}.onnx", dynamo=True, input_names=["images"])
    else:
        import openvino
        import torch

        images = torch.from_numpy(_normalised(case))
        model = openvino.convert_model(_timm_model(case), example_input=images, input=[list(images.shape)])
        openvino.save_model(model, f"{path}.xml", compress_to_fp16=False)


def versions(name: str) -> dict[str, str]:
    """Returns the versions of the packages that an implementation is made of; none of a foreign one."""
    packages = {"keras"} if is_ours(name) or name.startswith("keras.applications") else set()
    found = {}
    for module in (*_MODULES.get(name, ()), *packages):
        for distribution in (_DISTRIBUTIONS.get(module, module), module):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[module] = importlib.metadata.version(distribution)
                break
    return found


def device() -> str:
    """Returns the accelerator that this process computes on, else "cpu"."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    if (jax := sys.modules.get("jax")) is not None:
        accelerators = [found.device_kind for found in jax.local_devices() if found.platform != "cpu"]
        return accelerators[0] if accelerators else "cpu"
    if (tensorflow := sys.modules.get("tensorflow")) is not None and tensorflow.config.list_physical_devices(
        "GPU"
    ):
        found = tensorflow.config.list_physical_devices("GPU")[0]
        return tensorflow.config.experimental.get_device_details(found).get("device_name", "gpu")
    return "cpu"


def peak_bytes() -> int:
    """Returns the largest memory of this process so far: of the device, or resident where that is the CPU."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (jax := sys.modules.get("jax")) is not None:
        statistics = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics:
            return statistics["peak_bytes_in_use"]
    if (tensorflow := sys.modules.get("tensorflow")) is not None and tensorflow.config.list_physical_devices(
        "GPU"
    ):
        return tensorflow.config.experimental.get_memory_info("GPU:0")["peak"]
    # Not ru_maxrss where this file exists: that starts at the memory of the process which started this one.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    units = 1 if sys.platform == "darwin" else 1024
    return units * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Inputs.


def pixels(case: Case) -> np.ndarray:
    """float32 (N, H, W, 3), 0..255: what this package and keras.applications take."""
    shape = (case.batch, case.image_size, case.image_size, 3)
    return 255 * np.random.default_rng(0).random(shape, dtype=np.float32)


def _normalised(case: Case) -> np.ndarray:
    """float32 (N, 3, H, W), mean 0, deviation 1: what models of PyTorch take."""
    shape = (case.batch, 3, case.image_size, case.image_size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _targets(case: Case) -> np.ndarray:
    """float32 (N, 1000), soft labels: smoothed by 0.1."""
    return np.eye(1000, dtype=np.float32)[np.arange(case.batch)] * 0.9 + 0.0001


# Keras.


def _set_dtype(case: Case) -> None:
    """bfloat16 and float16 inference with weights of that type; training with float32 weights."""
    import keras

    if case.dtype in ("bfloat16", "float16"):
        mixed = "mixed_" if case.mode == "training" else ""
        keras.config.set_dtype_policy(f"{mixed}{case.dtype}")


def our_model(case: Case):
    """Builds this package's model of a case, with random weights, on this process's backend."""
    import keras

    import keras_convnext

    keras.utils.set_random_seed(0)
    _set_dtype(case)
    model = keras_convnext.load(
        case.model,
        weights=None,
        input_shape=(case.image_size, case.image_size, 3),
        classifier_activation=None if case.mode == "training" else "softmax",
        rematerialize=case.rematerialize,
    )
    if case.dtype == "int8":
        model.quantize("int8")
    return model


def _keras_applications_model(case: Case):
    import keras

    keras.utils.set_random_seed(0)
    _set_dtype(case)
    return getattr(keras.applications, KERAS_APPLICATIONS[case.model])(
        weights=None,
        input_shape=(case.image_size, case.image_size, 3),
        classifier_activation=None if case.mode == "training" else "softmax",
    )


def _our_optimizer():
    from keras_convnext.training.optimizer import AdamW

    return AdamW(learning_rate=1e-4, weight_decay=0.05)


def _keras_optimizer():
    import keras

    return keras.optimizers.AdamW(learning_rate=1e-4, weight_decay=0.05)


def _keras_step(model, case: Case, make_optimizer) -> Step:
    import keras

    images, targets = pixels(case), _targets(case)
    if device() != "cpu":  # as the peers' are; an input pipeline copies while the last step is computed
        images, targets = map(keras.ops.convert_to_tensor, (images, targets))
    if case.mode == "inference":
        return lambda: model.predict_on_batch(images)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=make_optimizer(), loss=loss)
    wait = _wait_for_gpu if keras.backend.backend() == "torch" else _nothing

    def step():
        result = model.train_on_batch(images, targets)  # a number: it has been computed
        wait()
        return result

    return step


# PyTorch.


def _import_timm():
    try:
        import timm
    except RuntimeError:
        _declare_torchvision_operators()
        import timm
    return timm


def _declare_torchvision_operators() -> None:
    """Lets a CUDA build of torchvision, the one that is published, be imported with a CPU build of torch.

    Two of its operators are not registered then, and its import fails; ConvNeXt uses neither.
    """
    import torch

    for module in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # the declarations end with it


_kept: list = []


def _timm_model(case: Case):
    import torch

    torch.manual_seed(0)
    return _import_timm().create_model(case.model, pretrained=False, drop_path_rate=0.0).eval()


def _torchvision_model(case: Case):
    import torch

    try:
        import torchvision
    except RuntimeError:
        _declare_torchvision_operators()
        import torchvision
    torch.manual_seed(0)
    return getattr(torchvision.models, case.model)(weights=None, stochastic_depth_prob=0.0).eval()


def _wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _nothing() -> None:
    pass


def _torch_step(name: str, case: Case) -> Step:
    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    if case.dtype == "float16" and on == "cpu":
        raise NotOfferedError("no float16 without a GPU")
    dtype = getattr(torch, case.dtype)
    layout = torch.channels_last
    model = (_torchvision_model if name == "torchvision" else _timm_model)(case)
    model = model.to(on, memory_format=layout)
    images = torch.from_numpy(_normalised(case)).to(on).contiguous(memory_format=layout)
    if case.mode == "inference":
        model, images = model.to(dtype), images.to(dtype)
        compiled = torch.compile(model) if name == "timm-compile" else model

        def infer():
            with torch.inference_mode():
                result = compiled(images)
            _wait_for_gpu()
            return result

        return infer
    model.train()
    compiled = torch.compile(model) if name == "timm-compile" else model
    targets = torch.from_numpy(_targets(case)).to(on)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def train():
        with torch.autocast(on, dtype, enabled=case.dtype != "float32"):
            logits = compiled(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait_for_gpu()
        return loss

    return train


# Runtimes.


def _onnxruntime_step(case: Case, threads: int | None, folder: str) -> Step:
    exported = runtimes.open_exported(os.path.join(folder, "onnxruntime.onnx"), "onnx", threads)
    images = _normalised(case)
    return lambda: exported.call(images)


def _openvino_step(name: str, case: Case, threads: int | None, folder: str) -> Step:
    import openvino

    # Without this hint OpenVINO computes in bfloat16 where the CPU can.
    hint = "bf16" if case.dtype == "bfloat16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_NUM_THREADS"] = str(threads or available_cores())
    core = openvino.Core()
    model = core.read_model(os.path.join(folder, f"{name}.xml"))
    images = pixels(case) if name == "openvino" else _normalised(case)
    model.reshape(images.shape)
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([images], share_inputs=True)


def _litert_step(case: Case, threads: int | None, folder: str) -> Step:
    exported = runtimes.open_exported(os.path.join(folder, "litert.tflite"), "litert", threads)
    images = pixels(case)
    return lambda: exported.call(images)


def _export_litert(case: Case, path: str) -> None:
    """Our model with the batch fixed; int8 is of weights, and of activations as they come."""
    from keras_convnext.data.preprocessing import Preprocessing
    from keras_convnext.exporting import writers

    precision = "dynamic_int8" if case.dtype == "int8" else "float32"
    model = our_model(dataclasses.replace(case, dtype="float32"))
    preprocessing = Preprocessing(case.image_size)
    request = writers.Request("litert", precision, path, case.batch, preprocessing.size, None, preprocessing)
    writers.write(model, request)
