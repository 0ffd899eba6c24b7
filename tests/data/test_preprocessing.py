"""`Preprocessing` as a value: what is equal, other sizes, and the names that files have for its fields."""

import dataclasses

import pytest

import keras_convnext
from keras_convnext.data.preprocessing import Preprocessing

pytestmark = pytest.mark.once


def test_it_is_public_under_the_names_of_eval_image():
    import inspect

    from keras_convnext.data import eval_image

    assert keras_convnext.Preprocessing is Preprocessing
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    assert names[:5] == list(inspect.signature(eval_image).parameters)[1:]
    defaults = [parameter.default for parameter in inspect.signature(eval_image).parameters.values()]
    assert defaults[2:] == [field.default for field in dataclasses.fields(Preprocessing)][1:5]


def test_equal_settings_are_equal_however_they_are_written():
    assert Preprocessing(64) == Preprocessing((64, 64)) == Preprocessing([64, 64])
    assert Preprocessing(64).size == (64, 64) and Preprocessing((64, 96)).size == (64, 96)
    assert Preprocessing(64, mean=[0, 0, 0]) == Preprocessing(64, mean=(0.0, 0.0, 0.0))
    assert hash(Preprocessing(64)) == hash(Preprocessing((64, 64)))
    assert Preprocessing(224).scale_size == (256, 256)
    assert Preprocessing((192, 256), 0.9).scale_size == (213, 284)
    assert Preprocessing(224, resize_size=236).scale_size == (236, 236)


def test_another_size_leaves_out_a_resize_size():
    published = Preprocessing(224, 0.95, "bilinear", resize_size=236)
    assert published.at(None) is published.at(224) is published.at((224, 224)) is published
    assert published.at(288) == Preprocessing(288, 0.95, "bilinear")


def test_files_have_names_of_their_own():
    squashed = Preprocessing(48, 0.9, "bilinear", "squash", 50, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    stored = squashed.stored()
    assert (stored["crop"], stored["resize_mode"]) == (0.9, "squash")
    assert Preprocessing(48).stored()["resize_mode"] == "shorter_side"
    for one in (squashed, Preprocessing(48), Preprocessing((48, 64))):
        assert Preprocessing.from_stored(**one.stored()) == one
    with pytest.raises(ValueError, match=r"Unknown resize_mode 'center'\. Known: shorter_side, squash\."):
        Preprocessing.from_stored(**stored | {"resize_mode": "center"})


@pytest.mark.parametrize(
    "std", [(1, 1), (1, 0, 1), (1, float("nan"), 1), 0.5, ("1", 1, 1), (1, 1, 2**99_999)]
)
def test_a_wrong_normaliser_is_refused(std):
    with pytest.raises(ValueError, match="std to be three numbers from 1e-06 to 1000, received"):
        Preprocessing(64, std=std)
