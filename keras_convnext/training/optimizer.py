"""The optimizer of the ConvNeXt papers as one Keras optimizer, for `model.compile` on every backend.

V1 is facebookresearch/ConvNeXt at 4eddc6b, with the mmcv_custom of object_detection and
semantic_segmentation; V2 facebookresearch/ConvNeXt-V2 at 2553895.
"""

import contextlib
import math
import numbers
from collections.abc import Iterator

import keras
from keras import ops

from keras_convnext._messages import unknown
from keras_convnext.training.layer_decay import LAYER_DECAY_GROUPS, learning_rate_scales

_NO_DECAY = ("bias", "gamma", "beta")


@keras.saving.register_keras_serializable(package="keras_convnext")
class AdamW(keras.optimizers.AdamW):
    """AdamW as the ConvNeXt papers train: torch.optim.AdamW with layer-wise rates and a moving average.

    With rate `r = learning_rate * scale` and step number t from 1: `w *= 1 - r * weight_decay`, then
    `m += (1 - beta_1) * (g - m)`, `v = beta_2 * v + (1 - beta_2) * g^2` and
    `w -= r / (1 - beta_1^t) * m / (sqrt(v / (1 - beta_2^t)) + epsilon)`. `keras.optimizers.AdamW` has epsilon
    where it weighs up to 30 times more in the first steps. Beyond that:

    - weights of one dimension, all named bias, gamma or beta, and those of `exclude_from_weight_decay` do not
      decay, but those of `decayed` do;
    - `scale` falls from the head to the stem by `layer_decay`, see `layer_ids`; it multiplies the decay too;
    - the moving average (`use_ema=True`) starts as a copy of the weights, in Keras after the first step, and
      follows once an optimizer step, in Keras once a micro-batch: `average += (1 - ema_momentum) * (w -
      average)`. `ema_weights` puts it in the model for an evaluation;
    - the gradients of `gradient_accumulation_steps` micro-batches are averaged, then clipped, then used once;
      schedules and bias corrections count optimizer steps, where Keras gives a schedule the micro-batches;
    - `global_clipnorm` is torch.nn.utils.clip_grad_norm_: factor `min(1, norm / (total + 1e-6))`.

    Reference: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; Liu et al. 2022, table 5; Woo et
    al. 2023, appendix A; optim_factory.py of both.

    Args:
        learning_rate: float or schedule, such as `WarmupCosine`. Default 4e-3, the paper's at batch 4096.
        weight_decay, epsilon: float >= 0. Default 0.05 and 1e-8, as in the official code.
        beta_1, beta_2: float in [0, 1). Default 0.9 and 0.999.
        layer_decay: float in (0, 1], factor on the rate from a layer to the one before. Default 1: none.
        layer_decay_groups: "group", "single", "layer_wise", "stage_wise" or "timm"; see `layer_ids`.
        decayed: list of str, endings of the paths of weights that decay whatever their dimensions and names,
            such as "mask_token". Default: none.
        overwrite_after_fit: bool, whether `fit` ends by setting the model to the averages, as in Keras.
        clipnorm, clipvalue, global_clipnorm: float or None, clipping of the gradients; at most one.
        use_ema: bool, keep a moving average of the weights.
        ema_momentum: float in [0, 1]. Default 0.9999, the papers' (Keras: 0.99).
        ema_overwrite_frequency, loss_scale_factor: number or None, as in Keras.
        gradient_accumulation_steps: int or None, micro-batches of an optimizer step. None or 1 for none.
        name: str.

    Attributes:
        across: function from a list of gradients to those of all devices, or None. Engines that compute a
            part of the batch on each device set it; all that follows is then the same on each.

    Raises:
        TypeError: a number is no number.
        ValueError: a number is out of its range, layer_decay_groups unknown; when the first batch comes, a
            model without the stages that layer_decay needs.

    Example:
        >>> optimizer = AdamW(WarmupCosine(5e-5, 3000), 1e-8, layer_decay=0.8, use_ema=True)
        >>> model.compile(optimizer, keras.losses.CategoricalCrossentropy(label_smoothing=0.1))
    """

    def __init__(
        self,
        learning_rate=4e-3,
        weight_decay=0.05,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        *,
        layer_decay=1.0,
        layer_decay_groups="group",
        decayed=(),
        overwrite_after_fit=True,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.9999,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name="adamw",
    ):
        betas = {"beta_1": beta_1, "beta_2": beta_2}
        check_numbers("AdamW", weight_decay=weight_decay, epsilon=epsilon, layer_decay=layer_decay, **betas)
        for beta_name, beta in betas.items():
            if beta >= 1:
                raise ValueError(f"AdamW needs {beta_name} in [0, 1). Received: {beta_name}={beta}")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"AdamW needs layer_decay in (0, 1]. Received: layer_decay={layer_decay}")
        if layer_decay_groups not in LAYER_DECAY_GROUPS:
            raise ValueError(unknown("layer_decay_groups", layer_decay_groups, LAYER_DECAY_GROUPS))
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=(
                None if gradient_accumulation_steps == 1 else gradient_accumulation_steps
            ),
            name=name,
        )
        self.layer_decay = float(layer_decay)
        self.layer_decay_groups = layer_decay_groups
        self.decayed = list(decayed)
        self.overwrite_after_fit = bool(overwrite_after_fit)
        self.across = None

    def build(self, variables):
        if self.built:
            return
        # By index: TensorFlow hands update_step variables without a path, and copies of them across devices.
        paths = [getattr(variable, "path", variable.name) for variable in variables]
        self._scales = (1.0,) * len(paths)
        if self.layer_decay != 1:
            self._scales = tuple(learning_rate_scales(paths, self.layer_decay_groups, self.layer_decay))
        self._decays = tuple(
            path.endswith(tuple(self.decayed))
            or (len(variable.shape) > 1 and path.rsplit("/", 1)[-1] not in _NO_DECAY)
            for variable, path in zip(variables, paths, strict=True)
        )
        with _outside_of_graphs():
            super().build(variables)

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        if name == "average":
            initializer = _copy_of(reference_variable)
        return super().add_variable_from_reference(reference_variable, name=name, initializer=initializer)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        momentum, velocity = self._momentums[index], self._velocities[index]
        dtype = keras.backend.result_type(keras.backend.standardize_dtype(variable.dtype), "float32")
        rate = ops.cast(learning_rate, dtype) * self._scales[index]
        correction_1, correction_2 = self._bias_corrections(dtype)

        g = ops.cast(ops.convert_to_tensor(gradient), dtype)
        m, v, w = ops.cast(momentum, dtype), ops.cast(velocity, dtype), ops.cast(variable, dtype)
        m = m + (1 - self.beta_1) * (g - m)
        v = v * self.beta_2 + (1 - self.beta_2) * g * g
        if self._use_weight_decay(variable):
            w = w * (1 - rate * self.weight_decay)
        self.assign(momentum, m)
        self.assign(velocity, v)
        self.assign(variable, w - rate / correction_1 * m / (ops.sqrt(v) / correction_2 + self.epsilon))

    def _bias_corrections(self, dtype):
        """`1 - beta_1^t` and `sqrt(1 - beta_2^t)`, without the cancellation of the first steps."""
        step = ops.cast(self.iterations + 1, dtype)
        correction_1, correction_2 = (
            -ops.expm1(step * (math.log(beta) if beta else -math.inf)) for beta in (self.beta_1, self.beta_2)
        )
        return correction_1, ops.sqrt(correction_2)

    def _backend_apply_gradients(self, grads, trainable_variables):
        if self.across is not None:
            grads = self.across(grads)
        super()._backend_apply_gradients(grads, trainable_variables)

    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        if self.across is not None:
            for gradient, accumulator in zip(grads, acc_grads, strict=True):
                accumulator.assign(accumulator + gradient)
        else:
            super()._backend_increment_gradient_accumulators(grads, acc_grads)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if keras.backend.backend() == "torch":
            self._torch_update(grads, trainable_variables, learning_rate)
        elif self.across is not None:
            # Each device by itself, where Keras sums, and leaves the device, which it cannot in a condition.
            for gradient, variable in zip(grads, trainable_variables, strict=True):
                self.update_step(gradient, variable, learning_rate)
        else:
            super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _torch_update(self, grads, trainable_variables, learning_rate):
        """`update_step` for variables of one scale and decay at once: PyTorch pays for each call."""
        import torch

        groups: dict[tuple[float, bool], list] = {}
        for variable, gradient in zip(trainable_variables, grads, strict=True):
            index = self._get_variable_index(variable)
            tensors = variable.value, gradient, self._momentums[index].value, self._velocities[index].value
            key = self._scales[index], self._use_weight_decay(variable)
            groups.setdefault(key, []).append(tensors)
        # PyTorch's own kernel reads and writes each number once.
        is_fused = not torch.compiler.is_compiling() and all(
            tensor.dtype == torch.float32 and tensor.device.type in ("cpu", "cuda") and tensor.is_contiguous()
            for members in groups.values()
            for weight, _, m, v in members
            for tensor in (weight, m, v)
        )
        learning_rate, step = ops.cast(learning_rate, "float32"), ops.cast(self.iterations + 1, "float32")
        settings = {"beta1": self.beta_1, "beta2": self.beta_2, "eps": self.epsilon}
        settings |= {"amsgrad": False, "maximize": False}
        with torch.no_grad():
            for (scale, decays), members in groups.items():
                weights, gradients, m, v = map(list, zip(*members, strict=True))
                rate, decay = learning_rate * scale, self.weight_decay if decays else 0.0
                if not is_fused:
                    self._torch_foreach_update(weights, gradients, m, v, rate, decay)
                    continue
                gradients = [gradient.contiguous() for gradient in gradients]
                steps = [step] * len(weights)
                torch._fused_adamw_(
                    weights, gradients, m, v, [], steps, lr=rate, weight_decay=decay, **settings
                )

    def _torch_foreach_update(self, weights, grads, m, v, rate, decay):
        import torch

        correction_1, correction_2 = self._bias_corrections("float32")
        torch._foreach_lerp_(m, grads, 1 - self.beta_1)
        torch._foreach_mul_(v, self.beta_2)
        torch._foreach_addcmul_(v, grads, grads, 1 - self.beta_2)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_div_(denominators, correction_2)
        torch._foreach_add_(denominators, self.epsilon)
        if decay:
            torch._foreach_mul_(weights, 1 - rate * decay)
        updates = torch._foreach_mul(m, rate / correction_1)
        torch._foreach_div_(updates, denominators)
        torch._foreach_sub_(weights, updates)

    def _use_weight_decay(self, variable):
        return self._decays[self._get_variable_index(variable)] and super()._use_weight_decay(variable)

    def _apply_weight_decay(self, variables):
        """Nothing: the decay is part of the update, where the scale of the variable is known."""

    def _clip_gradients(self, grads):
        if not self.global_clipnorm:
            return super()._clip_gradients(grads)
        grads = [ops.convert_to_tensor(gradient) for gradient in grads]
        squares = [ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in grads]
        total = ops.sqrt(ops.sum(ops.stack(squares)))
        factor = ops.minimum(1.0, self.global_clipnorm / (total + 1e-6))
        return [gradient * ops.cast(factor, gradient.dtype) for gradient in grads]

    def _get_current_learning_rate(self):
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def _update_model_variables_moving_average(self, trainable_variables):
        rate = 1 - self.ema_momentum
        if self.gradient_accumulation_steps:
            is_update_step = (self._iterations + 1) % self.gradient_accumulation_steps == 0
            rate = ops.where(is_update_step, rate, 0.0)
        pairs = _pairs(trainable_variables, self._model_variables_moving_average)
        if keras.backend.backend() != "torch":
            for variable, average in pairs:
                difference = ops.subtract(variable, average)
                average.assign(average + ops.cast(rate, average.dtype) * difference)
        elif rate:  # not between two optimizer steps
            import torch

            with torch.no_grad():
                values = [variable.value for variable, _ in pairs]
                torch._foreach_lerp_([average.value for _, average in pairs], values, float(rate))

    def finalize_variable_values(self, var_list):
        if self.overwrite_after_fit:
            super().finalize_variable_values(var_list)
            if self.use_ema and keras.backend.backend() == "jax":
                for variable in var_list:  # the next fit cannot donate one array as weight and as average
                    variable.assign(ops.copy(variable.value))

    def get_config(self):
        config = super().get_config()
        del config["amsgrad"]
        own = ("layer_decay", "layer_decay_groups", "decayed", "overwrite_after_fit")
        return config | {name: getattr(self, name) for name in own}


@contextlib.contextmanager
def ema_weights(model: keras.Model) -> Iterator[None]:
    """Puts the moving averages into a model for the time of a `with` block.

    After it, also when it raises, the model has its own weights again, bit for bit. Weights that do not train
    have no average and stay. No training inside the block.

    Args:
        model: compiled with an optimizer that has `use_ema=True`, and trained or built.

    Raises:
        ValueError: the optimizer keeps no averages, or has none yet.

    Example:
        >>> with ema_weights(model):
        ...     scores = model.evaluate(batches, return_dict=True)
    """
    optimizer = inner_optimizer(getattr(model, "optimizer", None))
    if not getattr(optimizer, "use_ema", False):
        raise ValueError(
            "ema_weights needs a model whose optimizer keeps a moving average of the weights: compile it with"
            f" AdamW(..., use_ema=True). Received: optimizer={optimizer}"
        )
    if not optimizer.built:
        raise ValueError(
            "The optimizer has no moving averages yet. Train first, or call "
            f"model.optimizer.build(model.trainable_variables). Received: {model.name!r}, not trained"
        )
    if hasattr(model, "jax_state_sync"):  # in the midst of fit, JAX keeps the weights outside the model
        model.jax_state_sync()
    pairs = _pairs(optimizer._trainable_variables, optimizer._model_variables_moving_average)
    # Copies, all: assignment works in place on PyTorch and TensorFlow, and JAX donates the model's buffers.
    own = [ops.copy(variable.value) for variable, _ in pairs]
    try:
        for variable, average in pairs:
            variable.assign(ops.copy(average.value))
        yield
    finally:
        for (variable, _), value in zip(pairs, own, strict=True):
            variable.assign(value)


def inner_optimizer(optimizer):
    """The optimizer itself, without the loss scaling that Keras puts around it for float16."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _pairs(variables, averages):
    """Each variable and its average; variables that Keras overwrites with their gradient have none."""
    pairs = zip(variables, averages, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def _copy_of(variable):
    """An initializer that gives the present value of a variable, in memory of its own."""

    def initializer(shape, dtype=None):
        if keras.backend.backend() != "tensorflow":
            return ops.copy(variable.value)
        import tensorflow as tf

        with tf.init_scope():
            return tf.identity(variable)

    return initializer


def _outside_of_graphs():
    """On TensorFlow `fit` builds the optimizer while it traces, and XLA refuses averages that begin so."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return contextlib.nullcontext() if tf.distribute.has_strategy() else tf.init_scope()


def check_numbers(owner, **values):
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{owner} needs a number for {name}. Received: {name}={value!r}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"{owner} needs {name} >= 0, and finite. Received: {name}={value}")
