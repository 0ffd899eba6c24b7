"""Our models and optimizer under what Keras offers beside plain `fit`: copies, threads, devices, restarts."""

import contextlib
import copy
import gc
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from layer_contract import BACKEND
from test_models import V2, build

import keras_convnext

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("uint8")
LABELS = np.arange(8) % 3
OPTIMIZERS = {
    "ours": lambda: keras_convnext.AdamW(
        keras_convnext.WarmupCosine(1e-3, 20, 2), layer_decay=0.9, layer_decay_groups="single", use_ema=True
    ),
    "accumulating": lambda: keras_convnext.AdamW(1e-3, gradient_accumulation_steps=2, global_clipnorm=1.0),
    "Keras's": lambda: keras.optimizers.AdamW(1e-3),
}


def compiled(optimizer="ours", **settings):
    keras.utils.set_random_seed(1)
    model = build(V2, classes=3, random=False)
    model.compile(OPTIMIZERS[optimizer](), "sparse_categorical_crossentropy", **settings)
    return model


def fit(model, epochs=1, **settings):
    model.fit(IMAGES, LABELS, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **settings)
    return model.get_weights()


def difference(first, second):
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def trained():
    model = compiled()
    fit(model)
    return model


@pytest.mark.one_backend
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_where_the_model_is_and_shares_nothing(trained, copied):
    before = trained.get_weights()
    other = copied(trained)
    assert type(other) is keras_convnext.ConvNeXt
    assert int(other.optimizer.iterations) == int(trained.optimizer.iterations) == 2
    assert difference(other.get_weights(), before) == 0
    after = fit(other)
    assert difference(trained.get_weights(), before) == 0
    again = fit(copied(trained))
    assert difference(after, again) == 0 and difference(after, before) > 0


@pytest.mark.one_backend
def test_threads_that_predict_together_get_what_one_gets():
    model = build(V2, classes=3)
    found = []

    def predict():
        if BACKEND != "jax":  # where Keras hands the weights over to the program of one call
            found.append(model.predict_on_batch(IMAGES))
        found.append(keras.ops.convert_to_numpy(model(IMAGES, training=False)))

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == (4 if BACKEND == "jax" else 8)
    for each in found:
        np.testing.assert_allclose(each, found[0], atol=1e-5)


@pytest.mark.slow
def test_predict_in_a_loop_takes_no_more_memory():
    model = build(V2, classes=3)

    def resident():
        gc.collect()
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = None
    for number in range(200):
        model.predict(IMAGES, verbose=0)
        if number == 20:
            before = resident()
    assert resident() - before < 20 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_program_learns_as_an_eager_one(optimizer):
    settings = contextlib.nullcontext()
    if BACKEND == "torch":
        import torch._dynamo

        # Inductor of PyTorch 2.13 cannot order the strides of a view of unknown height and width.
        settings = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with settings:
        jit, plain = (fit(compiled(optimizer, jit_compile=jit), 2) for jit in (True, False))
    assert difference(jit, plain) < 1e-4


class Interrupted(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_backup_of_keras_goes_on_where_it_was(optimizer, tmp_path):
    expected = fit(compiled(optimizer), 4)

    def backup():
        return keras.callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)

    with pytest.raises(KeyboardInterrupt):
        fit(compiled(optimizer), 4, callbacks=[backup(), Interrupted()])
    assert difference(fit(compiled(optimizer), 4, callbacks=[backup()]), expected) < 1e-6


GO_ON = """
import sys
sys.path.insert(0, "tests"), sys.path.insert(0, "tests/training")
import keras, numpy as np, test_plain_fit
model = keras.models.load_model(sys.argv[1])
assert int(model.optimizer.iterations) == int(sys.argv[3]) > 0
np.savez(sys.argv[2], *test_plain_fit.fit(model))
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_another_backend_goes_on_from_a_file(optimizer, tmp_path):
    if optimizer == "Keras's" and BACKEND == "torch":
        pytest.skip("Keras 3.15 writes the name of PyTorch's own class of its optimizer into the file")
    model = compiled(optimizer)
    fit(model)
    model.save(tmp_path / "model.keras")
    other = {"torch": "jax", "jax": "tensorflow", "tensorflow": "torch"}[BACKEND]
    words = [sys.executable, "-W", "ignore", "-c", GO_ON, tmp_path / "model.keras", tmp_path / "weights.npz"]
    words.append(str(int(model.optimizer.iterations)))
    subprocess.run(words, env={**os.environ, "KERAS_BACKEND": other}, check=True)
    with np.load(tmp_path / "weights.npz") as found:
        assert difference(fit(model), [found[name] for name in found.files]) < 1e-4


DEVICES = {
    "tensorflow": """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope
""",
    "jax": """
import contextlib
def scope():
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    return contextlib.nullcontext()
""",
}
ON_DEVICES = """
import test_plain_fit as t
for name in t.OPTIMIZERS:
    if name == "accumulating" and t.BACKEND == "tensorflow":
        continue  # no optimizer of Keras accumulates under a strategy: its condition cannot leave the device
    keras.distribution.set_distribution(None) if "jax" in sys.modules else None
    expected = t.fit(t.compiled(name), 2)
    with scope():
        model = t.compiled(name)
    found = t.fit(model, 2)
    print(name, t.difference(found, expected))
    assert t.difference(found, expected) < 1e-4
    assert model.predict(t.IMAGES, verbose=0).shape == (8, 3)
    model.save(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND not in DEVICES, reason="Keras has no data parallelism of its own on it")
def test_two_devices_of_keras_learn_as_one(tmp_path):
    start = 'import sys\nsys.path[:0] = ["tests", "tests/training"]\nimport keras\n'
    code = start + DEVICES[BACKEND] + ON_DEVICES
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    words = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.keras"]
    subprocess.run(words, env=environment, check=True)
