"""What the ladder of the road says of noise, by hand."""

import math

import pytest

from keras_convnext.training import road
from keras_convnext.training.road import Rung

pytestmark = pytest.mark.one_backend

LADDER = [Rung(1, (60.0, 61.0, 62.0)), Rung(7, (61.0, 62.0, 63.0)), Rung(16, (70.0, 71.0, 72.0))]


def test_the_deviation_is_pooled_and_the_threshold_is_students():
    assert road.noise(LADDER) == pytest.approx(1.0)  # each rung has 1
    # Six degrees of freedom: 2.447 (a table of Student's distribution) times sqrt(1 / 3 + 1 / 3).
    assert road.threshold(LADDER, *LADDER[:2]) == pytest.approx(2.447 * math.sqrt(2 / 3), rel=2e-3)
    uneven = [Rung(1, (60.0, 62.0)), Rung(7, (61.0,))]
    assert road.noise(uneven) == pytest.approx(math.sqrt(2))
    assert road.threshold(uneven, *uneven) == pytest.approx(12.71 * math.sqrt(2) * math.sqrt(1.5))


def test_a_difference_is_said_to_be_noise_or_more():
    first, second = road.comparisons(LADDER)
    assert first == "enhanced recipe -> move up depthwise conv: +1.00, within noise of 2.00"
    assert second == "move up depthwise conv -> separate downsampling: +9.00, more than noise of 2.00"
    one_seed = [Rung(rung.step, rung.scores[:1]) for rung in LADDER]
    assert road.noise(one_seed) is None and math.isnan(one_seed[0].deviation)
    assert all(line.endswith("one seed: nothing tells it from noise") for line in road.comparisons(one_seed))
    assert road.comparisons(LADDER[:1]) == []


def test_the_quantiles_are_students():
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(road.T_95, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.006)


@pytest.mark.parametrize("rungs", [LADDER, LADDER[:1], [Rung(rung.step, rung.scores[:1]) for rung in LADDER]])
def test_ladders_of_any_size_are_drawn(rungs, tmp_path):
    road.draw(rungs, tmp_path / "road.png", "a title with $ in it")
    assert (tmp_path / "road.png").read_bytes().startswith(b"\x89PNG")
