"""Knowledge distillation as a layer: the loss that Keras does not have."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_convnext")
class Distillation(keras.layers.Layer):
    """Returns the student's logits, and adds the distance to the teacher's to the loss while training.

    Called with [student's logits (N, K), teacher's (N, K)]. The added loss is `weight * T^2 *
    KL(softmax(teacher / T) || softmax(student / T))`, averaged; the loss that the model is compiled with gets
    the other part by `loss_weights=[1 - weight]`. Nothing flows back into the teacher. `weight` is in [0, 1],
    the temperature T above 0.

    Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section
    2, with T^2 as explained there; with these weights Touvron et al. 2021 (arXiv:2012.12877), equation 2.
    """

    def __init__(self, weight, temperature=1.0, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight
        self.temperature = temperature

    def call(self, logits, training=False):
        student, teacher = logits
        if training:
            dtype = "float32"
            target = ops.log_softmax(ops.stop_gradient(ops.cast(teacher, dtype)) / self.temperature)
            value = ops.log_softmax(ops.cast(student, dtype) / self.temperature)
            distances = ops.sum(ops.exp(target) * (target - value), axis=-1)  # (N,)
            self.add_loss(self.weight * self.temperature**2 * ops.mean(distances))
        return student

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self):
        return {**super().get_config(), "weight": self.weight, "temperature": self.temperature}


def with_teacher(student, teacher, weight: float, temperature: float) -> keras.Model:
    """Returns a model that trains the student, to compile with `loss_weights=[1 - weight]`."""
    expected, received = student.output_shape[-1], teacher.output_shape[-1]
    if expected != received:
        raise ValueError(
            f"Expected a teacher of the student's {expected} classes, received one of {received}. Choose a "
            "teacher trained on the same classes."
        )
    teacher.trainable = False
    image = keras.Input(student.input_shape[1:], name="image")
    logits = [student(image), teacher(image, training=False)]
    return keras.Model(image, Distillation(weight, temperature, dtype="float32", name="distillation")(logits))
