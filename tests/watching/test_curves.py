"""What a log says: against closed forms and synthetic curves."""

import math
import random

import pytest

from hf_ebft.training.metric_table import METRIC_BY_NAME, Metric, label_of
from hf_ebft.watching.curves import Series, changes, ends, format_number, series_of, smooth

LOWER = Metric("x", "x", "lower", "", "")


def curve(*values: float) -> Series:
    return Series(tuple(range(1, len(values) + 1)), values)


def test_series_are_read_from_a_log_and_the_last_entry_of_a_step_counts() -> None:
    log = [
        {"step": 2, "loss": 1.0, "text": "x", "flag": True},
        {"step": 4, "loss": math.nan},
        {"step": 4, "eval_loss": 3.0},
        {"step": 2, "loss": 5},
        {"loss": 9.0},
    ]
    series = series_of(log)
    assert series.keys() == {"loss", "eval_loss"}
    assert series["loss"].steps == (2, 4)
    assert series["loss"].values[0] == 5.0
    assert math.isnan(series["loss"].values[1])
    assert series["loss"].finite() == Series((2,), (5.0,))


def test_smoothing_is_the_weighted_mean_of_the_past() -> None:
    values, weight = [3.0, -1.0, 4.0, 1.0], 0.7
    for place, smoothed in enumerate(smooth(values, weight)):
        weights = [weight ** (place - past) for past in range(place + 1)]
        pairs = zip(weights, values, strict=False)
        assert smoothed == pytest.approx(sum(w * v for w, v in pairs) / sum(weights))


def test_smoothing_passes_over_gaps_and_keeps_constants() -> None:
    smoothed = smooth([math.nan, 2.0, math.inf, 2.0], 0.9)
    assert math.isnan(smoothed[0])
    assert smoothed[1:] == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 5.0], 0.0) == [1.0, 5.0]
    assert smooth([1.0, 5.0]) == [1.0, 5.0], "short curves are left as they are"


@pytest.mark.parametrize("weight", [-0.1, 1.0, math.nan])
def test_smoothing_refuses_weights_that_are_none(weight: float) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0 \(no smoothing\) and below 1"):
        smooth([1.0], weight)


def test_ends_are_means_over_a_fifth() -> None:
    change = ends(curve(*[1.0, 3.0] + [0.0] * 6 + [10.0, 20.0]))
    assert (change.first, change.last, change.difference) == (2.0, 15.0, 13.0)
    squares = 4 + 9 + 100 + 100
    assert change.noise == pytest.approx(math.sqrt(2 * squares / (2 * 9) / 2))


def test_noise_alone_is_rarely_taken_for_a_change() -> None:
    generator = random.Random(0)
    verdicts = [
        ends(curve(*[generator.gauss(0, 1) for _ in range(50)])).verdict(LOWER) for _ in range(400)
    ]
    clear = sum(verdict != "no clear change" for verdict in verdicts) / len(verdicts)
    assert 0.01 < clear < 0.10, "two standard errors: about one in twenty"


def test_a_trend_is_seen_through_the_noise_and_its_direction_told() -> None:
    generator = random.Random(0)
    falling = curve(*[generator.gauss(-step / 10, 1) for step in range(50)])
    assert ends(falling).verdict(LOWER) == "better"
    assert ends(falling).verdict(Metric("x", "x", "higher", "", "")) == "worse"
    assert ends(falling).verdict(Metric("x", "x", None, "", "")) is None
    assert ends(falling).verdict(Metric("x", "x", "lower", "", "", matters=100.0)) == (
        "no clear change"
    )


def test_few_points_are_not_judged_and_none_cannot_be() -> None:
    assert ends(curve(5.0, 1.0)).verdict(LOWER) is None
    with pytest.raises(ValueError, match="no finite point"):
        ends(curve(math.nan))


def test_changes_hold_what_sums_a_run_up() -> None:
    series = {
        "ebft/cfm_loss": curve(1.0, 0.5),
        "eval_ebft/cfm_loss": curve(1.0, 0.5),
        "eval_loss": curve(3.0, 2.0),
        "learning_rate": curve(1.0, 0.0),
        "ebft/alignment": curve(0.1),
    }
    assert list(changes(series)) == ["eval_loss", "eval_ebft/cfm_loss", "ebft/cfm_loss"]


def test_names_for_people() -> None:
    assert label_of("eval_loss") == "cross-entropy, held-out"
    assert label_of("eval_ebft/cfm_loss") == "CFM loss, held-out"
    assert label_of("ebft/cfm_loss") == METRIC_BY_NAME["ebft/cfm_loss"].label
    assert label_of("my_metric") == "my_metric"
    shown = [format_number(value) for value in (1.5e-8, 0.123456, -2.0)]
    assert shown == ["0", "0.1235", "-2"]
