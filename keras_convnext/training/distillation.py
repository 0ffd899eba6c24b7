"""Knowledge distillation as a layer: the loss that Keras does not have."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_convnext")
class Distillation(keras.layers.Layer):
    """Returns the student's logits, and adds the distance to the teacher's to the loss while training.

    The added loss is `weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))`, averaged;
    the loss that the model is compiled with gets the other part by `loss_weights=[1 - weight]`. Nothing flows
    back into the teacher.
    Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section
    2, with T^2 as explained there; with these weights Touvron et al. 2021 (arXiv:2012.12877), equation 2.

    Args:
        weight: float in [0, 1], share of the teacher in the loss.
        temperature: float above 0, T.

    Call arguments:
        logits: [student's (N, K), teacher's (N, K)].
        training: bool; outside training nothing is added.

    Returns:
        The student's logits, (N, K).

    Raises:
        ValueError: for a weight or temperature outside its range.
    """

    def __init__(self, weight, temperature=1.0, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= weight <= 1:
            raise ValueError(f"Expected a weight in [0, 1], the teacher's share. Received: weight={weight!r}")
        if not temperature > 0:
            raise ValueError(f"Expected a temperature above 0. Received: temperature={temperature!r}")
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
    """Makes a model to train in place of the student, whose weights it shares; the teacher is frozen.

    Args:
        student, teacher: models of the same images, to logits (N, K).
        weight, temperature: see `Distillation`.

    Returns:
        A `keras.Model` to compile with `loss_weights=[1 - weight]`.

    Raises:
        ValueError: the teacher has another number of classes.
    """
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
