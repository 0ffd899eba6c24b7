"""What every layer of the package promises, and the two backend-specific steps that tests need."""

import functools
import pathlib
import tempfile

import keras
import numpy as np

BACKEND = keras.backend.backend()
POLICIES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "mixed_float16": "float16",
    "mixed_bfloat16": "bfloat16",
}

if BACKEND == "jax":
    import jax


def as_numpy(x):
    """A tensor, or a dict of tensors, as float32 or wider NumPy arrays."""
    if isinstance(x, dict):
        return {key: as_numpy(value) for key, value in x.items()}
    if keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16"):
        x = keras.ops.cast(x, "float32")
    return keras.ops.convert_to_numpy(x)


def forward(layer, x, **kwargs):
    """The output of a layer or model as NumPy arrays, compiled as one program on JAX."""
    x = keras.ops.convert_to_tensor(x)
    if BACKEND == "jax":
        layer(keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype)), **kwargs)  # builds it
        return as_numpy(jax.jit(lambda x: layer(x, **kwargs))(x))
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            return as_numpy(layer(x, **kwargs))
    return as_numpy(layer(x, **kwargs))


def gradients(layer, x, upstream):
    """Output and gradients of `sum(layer(x) * upstream)`: (y, dx, [one per trainable weight])."""
    x, upstream = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(upstream)
    if not layer.built:
        layer.build(x.shape)
    if BACKEND == "jax":
        fixed = [variable.value for variable in layer.non_trainable_variables]

        def loss(weights, x):
            y, _ = layer.stateless_call(weights, fixed, x)
            return (y * upstream).sum(), y

        weights = [variable.value for variable in layer.trainable_variables]
        (_, y), (dweights, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x)
    elif BACKEND == "torch":
        import torch

        x = x.detach().requires_grad_()
        weights = [variable.value for variable in layer.trainable_variables]
        y = layer(x)
        dx, *dweights = torch.autograd.grad((y * upstream).sum(), [x, *weights])
    else:
        import tensorflow as tf

        weights = [variable.value for variable in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            total = tf.reduce_sum(y * upstream)
        dx, *dweights = tape.gradient(total, [x, *weights])
    y = y.detach() if BACKEND == "torch" else y
    return as_numpy(y), as_numpy(dx), [as_numpy(gradient) for gradient in dweights]


def randomize(layer, seed=0, scale=0.5):
    """Gives every weight normal values; those that start at 0 or 1 too, which would hide mistakes."""
    generator = np.random.default_rng(seed)
    layer.set_weights([generator.normal(0, scale, weight.shape) for weight in layer.weights])


def relative_error(actual, expected):
    """Largest difference, as a share of the largest expected value; infinite for NaN."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    difference = np.max(np.abs(actual - expected))
    return float(difference / np.max(np.abs(expected))) if np.isfinite(difference) else np.inf


def _leaf_names(layer):
    return {weight.path.split(f"{layer.name}/", 1)[-1]: tuple(weight.shape) for weight in layer.weights}


def check_weights(make, shape, expected):
    """The weights are those listed, by name and shape, and nothing else."""
    layer = make()
    layer.build((None, *shape[1:]))
    assert _leaf_names(layer) == expected
    assert len(layer.weights) == len(layer.trainable_weights) == len(expected)


def check_output_spec(make, shape):
    """Shape and dtype are announced as they turn out, for a fixed and for an unknown size."""
    layer = make()
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    y = forward(layer, x)
    assert y.shape == tuple(layer.compute_output_shape(shape))
    assert y.dtype == layer.compute_dtype == "float32"
    symbolic = make()(keras.Input(shape[1:]))
    assert symbolic.shape == (None, *y.shape[1:]) and symbolic.dtype == "float32"
    open_shape = (None, None, None, shape[-1])
    assert tuple(make().compute_output_shape(open_shape)) == open_shape


def check_config(make, shape):
    """get_config and from_config give a layer with the same settings and the same output."""
    layer = make()
    layer.build(shape)
    randomize(layer)
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    copy.build(shape)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    for weight, other in zip(copy.get_weights(), layer.get_weights(), strict=True):
        assert not np.array_equal(weight, other)  # else equal outputs would show nothing
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(forward(copy, x), forward(layer, x))


def check_saving(make, shape):
    """A functional model with the layer is saved, and loaded without custom_objects."""
    image = keras.Input(shape[1:])
    model = keras.Model(image, make()(image))
    randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
    assert type(loaded.layers[1]) is type(model.layers[1])
    assert [weight.path for weight in loaded.weights] == [weight.path for weight in model.weights]
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    np.testing.assert_array_equal(forward(loaded, x), forward(model, x))


def learning(layer):
    """Which weights of a layer or model learn, by path; those of a layer alone without its own name."""
    prefix = "" if isinstance(layer, keras.Model) else f"{layer.name}/"
    return {weight.path.removeprefix(prefix): weight.trainable for weight in layer.weights}


def check_freezing(make, shape):
    """What is frozen, the layer or a part of it, is frozen in every layer made from its configuration."""
    parts = list(range(len(make()._layers)))

    def freeze(layer):
        layer.trainable = False

    def freeze_part(layer, number):
        layer._layers[number].trainable = False

    def freeze_others(layer, number):
        layer.trainable = False
        layer._layers[number].trainable = True

    choices = [lambda layer: None, freeze]
    choices += [functools.partial(choose, number=n) for choose in (freeze_part, freeze_others) for n in parts]
    for choose in choices:
        for built_first in (False, True):
            layer = make()
            if built_first:
                layer.build(shape)
            choose(layer)
            config = layer.get_config()
            copy = type(layer).from_config(config)
            assert copy.get_config() == config
            again = type(layer).from_config(copy.get_config())
            for each in (layer, copy, again):
                if not each.built:
                    each.build(shape)
            assert learning(copy) == learning(again) == learning(layer)
            _check_whole_models(layer, shape)
            copy.trainable = False  # on TensorFlow, setting what is set does nothing
            copy.trainable = True
            assert all(learning(copy).values())
    frozen = make(trainable=False)
    frozen.build(shape)
    assert not any(learning(frozen).values())


def _check_whole_models(layer, shape):
    """A model around the layer learns the same weights when it is cloned, and when it is saved and loaded."""
    image = keras.Input(shape[1:])
    model = keras.Model(image, layer(image))
    copies = [keras.models.clone_model(model)]
    with tempfile.TemporaryDirectory() as folder:
        model.save(pathlib.Path(folder) / "model.keras")
        copies.append(keras.saving.load_model(pathlib.Path(folder) / "model.keras"))
    for copy in copies:
        assert learning(copy) == learning(model)


def check_training(make, shape):
    """One step of fit has a finite loss and moves every weight of the layer."""
    image = keras.Input(shape[1:])
    layer = make()
    model = keras.Model(image, keras.layers.Dense(1)(layer(image)))
    model.compile(keras.optimizers.Adam(0.01, epsilon=1e-12), "mse")
    before = layer.get_weights()
    generator = np.random.default_rng(1)
    x = generator.normal(size=shape).astype("float32")
    y = generator.normal(size=(*shape[:-1], 1)).astype("float32")
    history = model.fit(x, y, batch_size=len(x), verbose=0)
    assert np.isfinite(history.history["loss"][0])
    for old, weight in zip(before, layer.weights, strict=True):
        assert not np.array_equal(old, as_numpy(weight.value)), weight.path


def check_gradients(make, shape):
    """Gradients are finite and, for the input, not all zero."""
    generator = np.random.default_rng(1)
    x, upstream = generator.normal(size=(2, *shape)).astype("float32")
    _, dx, dweights = gradients(make(), x, upstream)
    assert dx.shape == shape and np.all(np.isfinite(dx)) and np.any(dx)
    for gradient in dweights:
        assert np.all(np.isfinite(gradient))


@functools.cache
def _float32_output(make, shape):
    layer = make()
    layer.build(shape)
    randomize(layer)
    return forward(layer, np.random.default_rng(1).normal(size=shape).astype("float32"))


def check_policy(make, shape, policy):
    """Under a 16-bit policy the output is finite, of the compute dtype, and near the float32 output."""
    layer = make(dtype=policy)
    layer.build(shape)
    randomize(layer)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    symbolic = layer(keras.Input(shape[1:], dtype=layer.compute_dtype))
    assert symbolic.dtype == layer.compute_dtype == POLICIES[policy]
    variable_dtype = "float32" if policy.startswith("mixed") else policy
    assert {weight.dtype for weight in layer.weights} <= {variable_dtype}
    y, expected = forward(layer, x), _float32_output(make, shape)
    assert np.all(np.isfinite(y))
    assert relative_error(y, expected) < (0.005 if "bfloat16" not in policy else 0.04)
