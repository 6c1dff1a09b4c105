"""The monitor: what it finds, when, what it recommends, and that it goes on where it stopped."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from builders.mutations import write_changed

import bnlora as bl
from bnlora.assess.monitor import Logged, Monitor, load_monitor, read_notes, save_monitor
from bnlora.assess.monitor.state import POINTS

KEY = jax.random.key(0)


def rows(random, count, *, scale=2.0, temperature=1.0, noise=0.0, draws=4):
    """A calibrated prediction with its labels; then a temperature and wrong labels are put in."""
    logits = scale * (random.normal(size=(count, 2)) + 0.3 * random.normal(size=(draws, count, 2)))
    prediction = bl.Prediction(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    labels = (random.random(count) < prediction.probs[:, 1]).astype(int)
    labels = np.where(random.random(count) < noise, 1 - labels, labels)
    return bl.approximate.tempered(prediction, temperature), labels


def part(prediction, labels, rows):
    return bl.Prediction(prediction.draw_log_probs[:, rows]), labels[rows]


def started(random, **options):
    return Monitor.start(KEY, *rows(random, 400), **options)


def same(first, second):
    """Whether two monitors have the same numbers, to rounding."""
    for test in first.watches:
        one, two = first.watches[test], second.watches[test]
        assert one.alert == two.alert or one.alert.row == two.alert.row
        np.testing.assert_allclose(one.evidence.log_capital, two.evidence.log_capital, rtol=1e-9)
        assert one.evidence.log_peak == pytest.approx(two.evidence.log_peak)
    for name in first.sequences:
        assert first.sequences[name].interval == pytest.approx(second.sequences[name].interval)
    assert first.bins.ece == pytest.approx(second.bins.ece)
    for test in first.ranks:
        np.testing.assert_array_equal(first.ranks[test].counts, second.ranks[test].counts)


def test_running_means_are_those_of_the_metrics():
    random = np.random.default_rng(0)
    prediction, labels = rows(random, 300)
    monitor = started(random).update(prediction, labels)
    for name, metric in (
        ("accuracy", bl.metrics.accuracy),
        ("brier", bl.metrics.brier),
        ("nll", bl.metrics.nll),
    ):
        assert monitor.sequences[name].mean == pytest.approx(metric(prediction, labels))
        low, high = monitor.sequences[name].interval
        assert low < metric(prediction, labels) < high
    gap = prediction.probs.max(1).mean() - bl.metrics.accuracy(prediction, labels)
    assert monitor.sequences["confidence minus accuracy"].mean == pytest.approx(gap)
    assert monitor.bins.ece == pytest.approx(bl.metrics.ece(prediction, labels))
    assert (monitor.num_rows, monitor.num_labelled) == (300, 300)


def test_the_negative_log_likelihood_is_clipped_at_its_bound():
    prediction = bl.Prediction(np.log([[[1 - 1e-9, 1e-9], [0.5, 0.5]]]))
    monitor = Monitor.start(KEY, nll_bound=3.0).update(prediction, np.array([1, 0]))
    assert monitor.sequences["nll"].mean == pytest.approx((3 + np.log(2)) / 2)
    assert "nll, at most 3 a row" in repr(bl.monitor.tables.means(monitor))


def test_rows_one_at_a_time_are_the_rows_together():
    random = np.random.default_rng(1)
    monitor = started(random)
    new = rows(random, 120, noise=0.4)
    one = some = monitor
    for row in range(120):
        one = one.update(*part(*new, slice(row, row + 1)))
    for piece in np.split(np.arange(120), [3, 50, 51]):
        some = some.update(*part(*new, piece))
    whole = monitor.update(*new)
    same(one, whole)
    same(some, whole)
    assert whole.watches["accuracy"].alert is not None
    assert (len(one.history), len(some.history), len(whole.history)) == (120, 4, 1)
    assert monitor.num_rows == 0  # unchanged


def test_a_stationary_stream_raises_few_alarms():
    """All tests together, at alpha 0.3 so that few streams suffice: 100 streams, read at each of 60 rows."""
    random, alarms = np.random.default_rng(2), 0
    for stream in range(100):
        monitor = Monitor.start(jax.random.key(stream), *rows(random, 60), alpha=0.3)
        alarms += bool(monitor.update(*rows(random, 60)).alerts)
    assert alarms / 100 <= 0.3 + 3 * (0.21 / 100) ** 0.5


FAULTS = {
    "accuracy": ({"noise": 0.4}, "Refit on recent labelled rows"),
    "calibration": ({"temperature": 0.4}, "Recalibrate by a temperature"),
    "entropy": ({"scale": 0.7}, "Collect labels of recent rows"),
}


@pytest.mark.parametrize("test", FAULTS)
def test_a_planted_fault_is_found_and_named(test):
    """In each of five streams, within 400 rows of its begin at row 300."""
    fault, remedy = FAULTS[test]
    for seed in range(5):
        random = np.random.default_rng(seed)
        monitor = started(random).update(*rows(random, 300), time="before")
        assert monitor.alerts == ()
        assert monitor.passed
        prediction, labels = rows(random, 400, **fault)
        after = monitor.update(prediction, None if test == "entropy" else labels, "after")
        alert = after.watches[test].alert
        assert 300 < alert.row <= 700
        assert alert.time == "after"
        assert alert.evidence >= after.watches[test].threshold
        assert after.recommendation.startswith(remedy)
        assert not after.passed
        assert f"alarm at row {alert.row} (after)" in after[test].sentence


def test_labels_are_doubted_where_only_they_raised_an_alarm():
    """Wrong labels of unchanged texts, the same with other texts, and a monitor that cannot compare texts."""
    random = np.random.default_rng(5)
    monitor, (wrong, labels) = started(random), rows(random, 400, noise=0.4)
    doubt = "Check first how these rows were labelled"
    assert doubt in monitor.update(wrong, labels).recommendation
    both = monitor.update(*rows(random, 400, noise=0.4, scale=0.7))
    assert "entropy" in {alert.test for alert in both.alerts}
    assert both.recommendation == "Refit on recent labelled rows: accuracy has fallen below its floor."
    assert doubt not in Monitor.start(KEY, floor=0.9).update(wrong, labels).recommendation


def test_a_shift_without_harm_asks_for_nothing_once_there_are_labels():
    random = np.random.default_rng(3)
    monitor = started(random, floor=0.5)
    after = monitor.update(*rows(random, 200, scale=1.4))
    while not after.alerts:
        after = after.update(*rows(random, 50, scale=1.4))
    assert {alert.test for alert in after.alerts} <= {"entropy", "mutual information"}
    assert after.recommendation.startswith("Collect labels")
    after = after.update(*rows(random, 150, scale=1.4))
    assert after.recommendation.startswith("Nothing to do yet")
    assert not after.problems
    assert after.cautions


def test_the_seed_of_a_stream_decides_ties_only():
    """Constant scores: no alarm whatever the key, and other p-values."""
    prediction = Logged(np.full((60, 2), 0.5))
    first, second = (Monitor.start(jax.random.key(i), prediction).update(prediction) for i in range(2))
    assert first.watches["entropy"].evidence.log_value != second.watches["entropy"].evidence.log_value
    assert first.alerts == second.alerts == ()
    assert "mutual information" not in first.watches
    assert first["mutual information"].status == first["accuracy"].status == "not asked"


def test_labels_that_come_later_are_the_same_labels():
    random = np.random.default_rng(4)
    monitor, (prediction, labels) = started(random), rows(random, 200)
    late = monitor.update(prediction).label(prediction, labels)
    same(late, monitor.update(prediction, labels))
    assert (late.num_rows, late.num_labelled) == (200, 200)
    mixed = np.where(np.arange(200) % 3 == 0, labels, -1)
    half = monitor.update(prediction, mixed).label(prediction, np.where(np.arange(200) % 3, labels, -1))
    assert half.num_labelled == 200
    assert half.sequences["accuracy"].mean == pytest.approx(late.sequences["accuracy"].mean)
    assert monitor.update(prediction, np.full(200, -1)).num_labelled == 0


def test_the_floor_is_that_of_the_reference_or_the_stated_one():
    random = np.random.default_rng(5)
    prediction, labels = rows(random, 400)
    accuracy = bl.metrics.accuracy(prediction, labels)
    free = Monitor.start(KEY, prediction, labels)
    assert accuracy - 0.08 < free.floor < accuracy - 0.03
    assert Monitor.start(KEY, prediction, labels, tolerance=0.1).floor == pytest.approx(free.floor - 0.1)
    stated = Monitor.start(KEY, prediction, labels, floor=0.8)
    assert stated.floor == 0.8
    assert (free.watches["accuracy"].threshold, stated.watches["accuracy"].threshold) == (160, 80)
    assert Monitor.start(KEY, prediction).floor is None
    assert Monitor.start(KEY, prediction, 1 - prediction.probs.argmax(1)).floor is None  # all wrong


def test_the_record_of_the_chart_stays_short():
    monitor = Monitor.start(KEY, floor=0.5)
    point = monitor.update(Logged(np.full((1, 2), 0.5)), np.array([0])).history[0]
    full = replace(monitor, history=tuple(point._replace(rows=i) for i in range(POINTS)))
    after = full.update(Logged(np.full((1, 2), 0.5)))
    assert len(after.history) == POINTS // 2 + 1
    assert [point.rows for point in after.history[-3:]] == [509, 511, 1]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A monitor with an alarm, and its file."""
    random = np.random.default_rng(6)
    monitor = started(random).update(*rows(random, 200, noise=0.4), [f"day {i}" for i in range(200)])
    path = tmp_path_factory.mktemp("state") / "state.json"
    save_monitor(monitor, path, notes={"classes": ["bad", "good"]})
    return monitor, path


def test_a_stored_monitor_goes_on_with_equal_numbers(kept):
    monitor, path = kept
    again = load_monitor(path)
    assert repr(again.overview) == repr(monitor.overview)
    assert again.history == monitor.history
    assert again.alerts == monitor.alerts != ()
    assert again.alerts[0].time.startswith("day ")
    assert read_notes(path) == {"classes": ["bad", "good"]}
    new = rows(np.random.default_rng(7), 50)
    one, two = again.update(*new), monitor.update(*new)
    for test in one.watches:
        np.testing.assert_array_equal(
            one.watches[test].evidence.log_capital, two.watches[test].evidence.log_capital
        )
    assert one.history == two.history
    fresh = Monitor.start(KEY, *rows(np.random.default_rng(8), 60))
    save_monitor(fresh, path.with_name("fresh.json"))
    same(load_monitor(path.with_name("fresh.json")).update(*new), fresh.update(*new))


def test_a_changed_state_is_refused_with_a_sentence(kept, tmp_path):
    random, content, path = np.random.default_rng(9), kept[1].read_bytes(), tmp_path / "state.json"
    refused, new = 0, rows(random, 3)
    for _ in range(40):
        write_changed(random, path, content)
        try:
            load_monitor(path).update(*new)
        except (ValueError, OSError):
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "'format' must be 1; got 2"),
        ({"alpha": 1.5}, r"'alpha' must be a number in \(0, 1\); got 1.5"),
        ({"num_rows": -1}, "'num_rows' must be a whole number"),
        ({"watches": {}}, "its tests or sequences are not those of its settings"),
        ({"watches": {"x": 1}}, "'watches' must be an object with names among"),
        ({"history": [1]}, "a point of its history is 1"),
        ({"bins": 3}, "'bins' must be an object"),
    ],
)
def test_what_is_wrong_with_a_state_is_named(kept, tmp_path, change, message):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(json.loads(kept[1].read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_monitor(path)


def test_wrong_arguments_are_refused():
    random = np.random.default_rng(10)
    prediction, labels = rows(random, 40)
    for options, message in (
        ({"alpha": 0.0}, "alpha must lie in"),
        ({"floor": 1.0}, "floor must lie in"),
        ({"tolerance": -0.1}, "tolerance must lie in"),
        ({"nll_bound": 0.0}, "nll_bound must be a positive number"),
        ({"labels": labels}, "labels are those of the reference"),
    ):
        with pytest.raises(ValueError, match=message):
            Monitor.start(KEY, **options)
    monitor = Monitor.start(KEY, prediction)
    with pytest.raises(ValueError, match="has 2 classes; got 3"):
        monitor.update(Logged(np.full((5, 3), 1 / 3), np.zeros(5)))
    with pytest.raises(ValueError, match="the reference has mutual information, but these rows have none"):
        monitor.update(Logged(np.full((5, 2), 0.5)))
    with pytest.raises(ValueError, match="must be in 0..1; got 0..7"):
        monitor.update(prediction, np.r_[np.zeros(39, int), 7])
    with pytest.raises(ValueError, match="time must be one time, or one for each of the 40 rows; got 2"):
        monitor.update(prediction, labels, ["a", "b"])
    with pytest.raises(ValueError, match="row 0 is not a distribution"):
        monitor.update(Logged(np.full((5, 2), np.nan), np.zeros(5)))


def test_the_monitor_is_shown_and_drawn(kept):
    monitor, _ = kept
    text = bl._util.display.as_text(monitor.overview)
    for piece in (
        "P(any false alarm, ever) at most 0.05",
        "Refit",
        "running ECE",
        "brier",
        "without guarantee",
    ):
        assert piece in text
    assert "200 rows" in repr(monitor)
    assert "<table>" in monitor._repr_html_()
    figure = bl.plots.monitoring(monitor)
    assert len(figure.axes[1].lines) >= 5
    fresh = Monitor.start(KEY, *rows(np.random.default_rng(11), 40))
    assert {finding.status for finding in fresh.findings} == {"not asked"}
    with pytest.raises(ValueError, match="the monitor has seen no rows"):
        bl.plots.monitoring(fresh)
    unlabelled = fresh.update(rows(np.random.default_rng(12), 40)[0])
    assert "no labels" in [text.get_text() for text in bl.plots.monitoring(unlabelled).axes[0].texts]
