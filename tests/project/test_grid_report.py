"""The report of the grid: its metrics, tests and targets agree with independent computations."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
from builders.report_tables import section

from benchmarks import entry
from benchmarks.cells import costs, judged, paired, pictures, shown, targets, weighted
from benchmarks.cells.gathered import BASE, CAREFUL, LORA, load, problems
from benchmarks.cells.rows import Cell, Predicted, Result
from benchmarks.grid import report as command
from benchmarks.report import Report
from bnlora import metrics
from bnlora.prediction.selective import separation

SHORT, CORE, OTHER = "LoRA, 3 epochs", "core Gaussian", "core MAP"
N, CLASSES = 240, 3
SHARPNESS = {LORA: 4.0, SHORT: 0.5, CAREFUL: 1.6, CORE: 1.0, OTHER: 1.0, "MAP": 2.0}
"""Factor of the true logits: 1 is calibrated, above it is overconfident."""


def normalised(logits):
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def predicted(method, seed, shift):
    """Predictions of rows whose classes are drawn from the softmax of their logits."""
    random = np.random.default_rng([seed, int(10 * shift)])
    logits = random.normal(size=(N, CLASSES)) * (2.0 - shift)
    labels = (random.random((N, 1)) > np.exp(normalised(logits)).cumsum(1)).sum(1).clip(0, CLASSES - 1)
    own = np.random.default_rng([seed, len(method)])
    noise = own.normal(size=logits.shape)
    if method == BASE:
        return Predicted(labels, normalised(0.3 * noise), np.zeros(N))
    information = own.random(N) * 0.1 + 0.05 * shift if method == CORE else np.zeros(N)
    return Predicted(labels, normalised(SHARPNESS[method] * (logits + 0.1 * noise)), information)


def result(method, seed, *, task="topics", size=100, sets=None, options=None, seconds=None, machine="a"):
    sets = sets or {name: predicted(method, seed, shift) for name, shift in {"in": 0, "out": 0.5}.items()}
    seconds = seconds or {"fit": 2.0 * len(method) + seed, "predict": 1.0 + seed}
    cell = Cell(task, method, size, seed, options or {})
    return Result(cell, sets, seconds, 10 + seed, (seed + 1) * 2**20, {}, {"machine": machine})


ALL = (BASE, SHORT, LORA, CAREFUL, "MAP", CORE, OTHER)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A folder with seven methods, three seeds and two sets."""
    folder = tmp_path_factory.mktemp("grid")
    for method in ALL:
        for seed in range(3):
            result(method, seed).write(folder)
    return folder


@pytest.fixture(scope="module")
def problem(grid):
    (one,) = problems(load([grid]))
    return one


@pytest.fixture(scope="module")
def judgement(problem):
    return judged.judge(problem)


def only(results):
    (one,) = problems(results)
    return judged.judge(one)


def test_classwise_ece_of_a_case_by_hand():
    probs = np.array([[0.7, 0.2, 0.1], [0.7, 0.1, 0.2], [0.25, 0.7, 0.05]])
    # Class 0: bin of 0.7 has 1 hit against 1.4, bin of 0.25 has 0 against 0.25: 0.65.
    # Class 1: three bins, 0 against 0.2, 1 against 0.1, 1 against 0.7: 0.2 + 0.9 + 0.3.
    # Class 2: no hit against 0.1, 0.2 and 0.05: 0.35.
    value = judged.classwise_ece(np.log(probs), np.array([0, 1, 1]))
    assert value == pytest.approx((0.65 + 1.4 + 0.35) / 3 / 3)


def test_classwise_ece_refuses_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        judged.classwise_ece(np.zeros((0, 2)), np.zeros(0, int))


def test_auroc_counts_pairs_and_aupr_sums_precisions():
    random = np.random.default_rng(0)
    low, high = random.integers(0, 6, 40) / 10, random.integers(2, 9, 30) / 10  # many ties

    def of(doubts):
        size = len(doubts)
        return Predicted(np.zeros(size, int), normalised(np.zeros((size, 2))), doubts)

    found = judged.detection(of(low), of(high))
    pairs = [(h > x) + 0.5 * (h == x) for h in high for x in low]
    assert found["AUROC MI"] == pytest.approx(np.mean(pairs))
    steps = sorted({*low, *high}, reverse=True)
    hits = np.array([(high >= at).sum() for at in steps])
    named = hits + [(low >= at).sum() for at in steps]
    assert found["AUPR MI"] == pytest.approx((np.diff(hits / len(high), prepend=0) * hits / named).sum())
    assert "AUROC entropy" not in found  # the entropy of all rows is equal


def test_weights_are_repeated_rows():
    random = np.random.default_rng(1)
    confidence, correct = random.integers(1, 30, 35) / 30, random.random(35) < 0.6
    inside, outside = random.integers(0, 9, 35) / 9, random.integers(2, 12, 35) / 9
    weights, others = weighted.counts(35, (0,), 0), weighted.counts(35, (1,), 0)
    assert (weights.sum(1) == 35).all()
    assert (weights != others).any()
    area = weighted.auroc(weights, others, inside, outside)
    error = weighted.ece(weights, confidence, correct)
    selected = weighted.selective_accuracy(weights, -confidence, correct, 0.8)
    for b in range(5):
        rows, out = (
            np.repeat(np.arange(35), weights[b].astype(int)),
            np.repeat(outside, others[b].astype(int)),
        )
        assert area[b] == pytest.approx(separation(inside[rows], out))
        risks = metrics.selective_risks(-confidence[rows], ~correct[rows])
        assert selected[b] == pytest.approx(1 - risks[28 - 1])  # 80 % of 35 are 28
        bins = np.ceil(confidence[rows] * 15)
        gaps = [(correct[rows] * 1.0 - confidence[rows])[bins == k].sum() for k in range(16)]
        assert error[b] == pytest.approx(np.abs(gaps).sum() / 35)


def test_the_number_of_answered_rows_has_no_rounding_error():
    correct = np.arange(100) < 55  # 0.55 * 100 is 55.00000000000001 in floats
    value = weighted.selective_accuracy(np.ones((1, 100)), np.arange(100.0), correct, 0.55)
    np.testing.assert_array_equal(value, [1.0])


def test_replicates_are_the_first_of_more():
    def mean(weights):
        return weighted.mean(weights, np.arange(20.0)[:, None])

    few, more = (weighted.replicates(mean, [(20, (3,))], draws) for draws in (7, 300))
    assert few.shape == (7, 1)
    np.testing.assert_array_equal(few, more[:7])
    assert more.std() == pytest.approx(np.arange(20.0).std() / 20**0.5, rel=0.15)


def rows_of(seeds, values):
    """Values on resampled rows by seed; `seeds` gives the key of the rows of each."""
    return {
        seed: weighted.replicates(lambda w, v=v: weighted.mean(w, v[:, None]), [(len(v), (key,))], 2000)[:, 0]
        for (seed, key), v in zip(seeds.items(), values, strict=True)
    }


def test_shared_rows_are_not_averaged_away():
    values = np.random.default_rng(0).normal(size=200)
    shared = paired.seed_draws(rows_of({0: 0, 1: 0, 2: 0, 3: 0}, [values] * 4), {0, 1, 2, 3})
    other = paired.seed_draws(rows_of({0: 0, 1: 1, 2: 2, 3: 3}, [values] * 4), set())
    error = values.std() / 200**0.5
    assert shared.std() == pytest.approx(error, rel=0.1)
    assert other.std() == pytest.approx(error / 2, rel=0.1)


def test_seeds_are_resampled_too():
    draws = paired.seed_draws({s: np.full(4000, float(s)) for s in range(5)}, set())
    assert draws.std() == pytest.approx(np.arange(5).std() / 5**0.5, rel=0.1)
    assert draws.mean() == pytest.approx(2, abs=0.1)


def test_p_values_are_uniform_without_a_difference_and_small_with_one():
    random = np.random.default_rng(5)
    values = random.normal(size=(100, 400))  # 400 data sets of 100 rows
    table = weighted.replicates(lambda w: weighted.mean(w, values), [(100, (0,))], 999)
    null = np.array([paired.p_value(draws) for draws in table.T])
    assert abs(null.mean() - 0.5) < 0.06
    assert 0.02 < (null < 0.05).mean() < 0.11
    assert 0.42 < (null < 0.5).mean() < 0.58
    assert paired.p_value(table[:, 0] + 1) == pytest.approx(2 / 1000)
    assert paired.p_value(np.zeros(9)) == 1


def test_the_interval_of_a_known_difference_has_its_width():
    random = np.random.default_rng(2)
    logits = random.normal(size=(N, 2))
    labels = random.integers(0, 2, N)
    first = Predicted(labels, normalised(logits), np.zeros(N))
    second = Predicted(labels, normalised(logits + random.normal(size=(N, 2))), np.zeros(N))
    found = [result(CORE, seed, sets={"in": first}) for seed in range(4)]
    found += [result(LORA, seed, sets={"in": second}) for seed in range(1, 6)]
    (one,) = paired.compare([only(found)], 2000)
    at = np.arange(N), labels
    losses = second.log_probs[at] - first.log_probs[at]  # the rows of all seeds are the same
    assert one.seeds == 3
    assert one.nll.value == pytest.approx(losses.mean())
    width = 2 * 1.96 * losses.std() / N**0.5
    assert one.nll.high - one.nll.low == pytest.approx(width, rel=0.12)
    assert one.nll.low < one.nll.value < one.nll.high
    hits = (first.log_probs.argmax(1) == labels) * 1.0 - (second.log_probs.argmax(1) == labels)
    assert one.accuracy.value == pytest.approx(hits.mean())


def test_means_and_holm_agree_with_computations_by_hand(problem, judgement):
    assert problem.methods == [BASE, SHORT, LORA, CAREFUL, "MAP", CORE, OTHER]
    raw = [predicted(CORE, seed, 0.5) for seed in range(3)]
    losses = [-of.log_probs[np.arange(N), of.labels].mean() for of in raw]
    assert judgement.mean("out", CORE, "NLL") == pytest.approx(np.mean(losses), abs=2e-3)
    briers = [((np.exp(of.log_probs) - np.eye(CLASSES)[of.labels]) ** 2).sum(1).mean() for of in raw]
    assert judgement.mean("out", CORE, "Brier") == pytest.approx(np.mean(briers), abs=2e-3)
    errors = [metrics.debiased_ece(of.log_probs, of.labels, redraws=50) for of in raw]
    assert judgement.mean("out", CORE, "debiased ECE") == pytest.approx(np.mean(errors), abs=4e-3)
    found = paired.compare([judgement], 400)
    assert len(found) == 2 * 2 * 2  # sets, our methods, rivals
    ordered = sorted(found, key=lambda one: one.p)
    steps = np.maximum.accumulate([one.p * (8 - k) for k, one in enumerate(ordered)])
    np.testing.assert_allclose([one.adjusted for one in ordered], np.minimum(steps, 1))
    gap = judgement.mean("out", CORE, "NLL") - judgement.mean("out", LORA, "NLL")
    (one,) = [c for c in found if (c.set, c.method, c.rival) == ("out", CORE, LORA)]
    assert one.nll.value == pytest.approx(gap)
    assert one.nll.high < 0
    assert one.debiased.low < one.debiased.value < one.debiased.high < 0


@pytest.mark.parametrize("number", [1, 8, 336, 2000])
def test_there_are_enough_draws_for_holm(number):
    assert number * 2 / (paired.draws_needed(number) + 1) < paired.LEVEL


def test_targets_of_a_grid_that_reaches_some(judgement):
    found = paired.compare([judgement], 2000)
    gained, led = targets.gains([judgement]), targets.leads([judgement])
    assert {(g.set, g.method) for g in gained} == {(s, m) for s in ("in", "out") for m in (CORE, OTHER)}
    by = {(t.what, t.method): t for t in targets.targets([judgement], found, gained, led)}
    assert len(by) == 6 * 2

    def mean(method, metric):
        return np.mean([judgement.mean(name, method, metric) for name in ("in", "out")])

    target = by[targets.CALIBRATION, CORE]
    assert target.verdict == "reached"
    expected = max(mean(CORE, "debiased ECE"), 0) / mean(LORA, "debiased ECE")
    assert float(target.value) == pytest.approx(expected, abs=0.006)
    assert "paper: up to 84 %" in target.about
    assert by[targets.LIKELIHOOD, CORE].value == "1.00"
    assert by[targets.WORSE, CORE].verdict == "reached"
    lead = by[targets.DETECTION, CORE]
    area = judgement.mean("out", CORE, "AUROC MI") - judgement.mean("out", LORA, "AUROC entropy")
    assert lead.value.startswith(f"{area:+.3f} (")
    assert by[targets.DETECTION, OTHER].verdict == "no data"  # it has no mutual information
    selective = by[targets.SELECTIVE, OTHER]
    assert selective.value.startswith(f"{mean(OTHER, 'ACC at 80 %') - mean(LORA, 'ACC at 80 %'):+.3f}")
    seconds = (2 * len(CORE) * 3 + 3) / (2 * len(LORA) * 3 + 3)
    assert float(by[targets.SECONDS, CORE].value) == pytest.approx(seconds, abs=0.006)


def test_a_worse_method_misses_its_targets():
    sets = {m: {"in": predicted(m, 0, 0)} for m in (BASE, CAREFUL, LORA)}
    found = [result(m, 0, sets=sets[m], seconds={"fit": 1.0}) for m in sets]
    # As sharp as LoRA, and slower.
    found += [result(CORE, 0, sets=sets[LORA], seconds={"fit": 3.0})]
    judgement = only(found)
    compared = paired.compare([judgement])
    gained, led = targets.gains([judgement]), targets.leads([judgement])
    by = {t.what: t for t in targets.targets([judgement], compared, gained, led)}
    assert [by[what].value for what in (targets.CALIBRATION, targets.LIKELIHOOD)] == ["1.00", "0.00"]
    assert by[targets.WORSE].value == "1"
    assert "topics, 100 rows, in" in by[targets.WORSE].about
    assert by[targets.SECONDS].value == "3.00"
    assert by[targets.DETECTION].verdict == "no data"
    assert {t.verdict for what, t in by.items() if what != targets.DETECTION} == {"missed"}


def test_calibration_at_a_lower_accuracy_misses_its_target(problem):
    def gain(accuracy):
        return targets.Gain(problem, "in", CORE, 3, 0.01, 0.1, 0.2, accuracy)

    def verdict(accuracy):
        found = targets.targets([judged.Judged(problem, {})], [], [gain(accuracy)], [])
        return {t.verdict for t in found if (t.what, t.method) == (targets.CALIBRATION, CORE)}

    assert verdict(-0.009) == verdict(0.05) == {"reached"}
    assert verdict(-0.011) == {"missed"}


@pytest.mark.parametrize(
    ("gap", "words"),
    [(0.0099, "yes"), (-0.01, "yes"), (0.02, "no, 2.0 points higher"), (-0.013, "no, 1.3 points lower")],
)
def test_equal_accuracy_in_words(gap, words):
    assert targets.equal(gap) == words


def test_a_ratio_needs_an_error_to_divide_by():
    assert targets.ratio(-0.01, 0.1) == 0
    assert targets.ratio(0.05, 0.1) == pytest.approx(0.5)
    assert np.isnan(targets.ratio(0.05, -0.01))


def test_lora_that_is_not_better_than_the_majority_has_not_learned():
    random = np.random.default_rng(0)
    labels = (random.random(N) < 0.2).astype(int)
    at_chance = Predicted(labels, np.log(np.tile([0.8, 0.2], (N, 1))), np.zeros(N))
    wrong = Predicted(labels, np.log(np.tile([0.2, 0.8], (N, 1))), np.zeros(N))
    (problem,) = problems([result(LORA, 0, sets={"in": at_chance}), result(BASE, 0, sets={"in": wrong})])
    assert not targets.learned(problem, "in")
    (alone,) = problems([result(LORA, 0)])
    assert not targets.learned(alone, "in")


def test_costs_are_divided_on_the_same_machine_and_seed():
    found = [result(LORA, seed, seconds={"fit": 10.0}) for seed in (0, 1)]
    found += [result(CORE, seed, seconds={"fit": 5.0 + 10 * seed}) for seed in (1, 2)]
    found += [result("MAP", 0, machine="b")]
    (problem,) = problems(found)
    assert costs.relative_seconds(problem, CORE, "fit") == pytest.approx(1.5)
    rows = {row[0]: row for row in shown.costs(problem).rows}
    assert rows[CORE][3] == "1.50"
    assert rows["MAP"][2] == "6.0"
    assert rows["MAP"][3] == ""  # another machine
    assert rows[CORE][5] == ""  # LoRA has no seconds of prediction
    assert rows[CORE][7] == "2"  # MiB: seeds 1 and 2 have 2 and 3


def test_front_of_the_points_that_no_other_beats():
    points = [(3, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (4, 1.0)]
    assert pictures.front(points) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_rows_without_a_class_count_for_detection_only():
    inside = predicted(CORE, 0, 0)
    outside = Predicted(np.full(N, -1), inside.log_probs, inside.mutual_information + 1)
    judgement = only([result(m, 0, sets={"in": inside, "far": outside}) for m in (CORE, LORA)])
    assert judgement.values["far"][CORE][0]["AUROC MI"] == 1
    assert np.isnan(judgement.mean("far", CORE, "NLL"))
    assert [name for name, *_ in paired.pairs(judgement)] == ["in"]
    assert pictures.reliability(judgement.problem, "far") is None
    assert [x.set for x in targets.leads([judgement]) if x.what == targets.DETECTION] == ["far"]


def test_an_ablation_is_shown_but_not_tested():
    found = [result(LORA, 0), result(CORE, 0), result(CORE, 0, options={"rank": 2})]
    judgement = only(found)
    assert judgement.problem.methods == [LORA, CORE, f"{CORE} (rank=2)"]
    assert {method for _, method, _ in paired.pairs(judgement)} == {CORE}


def test_results_that_contradict_each_other_are_refused():
    of = predicted(LORA, 0, 0)
    other = Predicted((of.labels + 1) % CLASSES, of.log_probs, of.mutual_information)
    with pytest.raises(ValueError, match="other labels in the set 'in'"):
        problems([result(LORA, 0, sets={"in": of}), result(CORE, 0, sets={"in": other})])
    with pytest.raises(ValueError, match="must be 'in'.*starts with 'out'"):
        problems([result(LORA, 0, sets={"in": of}), result(CORE, 0, sets={"out": of})])


def test_results_of_this_machine_replace_stored_ones(tmp_path, monkeypatch):
    stored, own = tmp_path / "stored" / "grid", tmp_path / "own" / "grid"
    for folder in (stored, own):
        folder.mkdir(parents=True)
    result(LORA, 0, seconds={"fit": 1.0}).write(stored)
    result(CORE, 0).write(stored)
    result(LORA, 0, seconds={"fit": 7.0}).write(own)
    (own / ".17.unfinished.parquet").write_bytes(b"half")
    monkeypatch.setattr(command, "RESULTS", stored.parent)
    monkeypatch.setattr(command, "cache_folder", lambda: own.parent)
    (problem,) = command.gathered(None)
    assert problem.methods == [LORA, CORE]
    assert problem.results[LORA][0].seconds == {"fit": 7.0}


def test_without_results_the_command_ends_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no results of the grid in"):
        entry.main(["report", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="does not exist"):
        entry.main(["report", "--folder", str(tmp_path / "absent")])


@pytest.mark.parametrize("damage", ["short", "text", "columns"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = result(LORA, 0).write(tmp_path)
    if damage == "columns":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes(path.read_bytes()[:-40] if damage == "short" else b"no table")
    with pytest.raises(SystemExit, match=f"{re.escape(str(path))} cannot be read"):
        entry.main(["report", "--folder", str(tmp_path)])


def test_the_whole_report_with_pages(tmp_path):
    for method in (LORA, CORE):  # two methods only: drawing takes most of the time
        for seed in range(3):
            result(method, seed).write(tmp_path)
    report = Report("python -m benchmarks report")
    parser = argparse.ArgumentParser()
    command.options(parser)
    command.run(
        parser.parse_args(["--folder", str(tmp_path), "--draws", "300", "--html", str(tmp_path)]), report
    )
    (row,) = [r for r in section(report, "topics, 100 rows") if (r["set"], r["method"]) == ("in", CORE)]
    raw = [predicted(CORE, seed, 0) for seed in range(3)]
    accuracy = np.mean([(of.log_probs.argmax(1) == of.labels).mean() for of in raw])
    assert float(row["ACC"]) == pytest.approx(accuracy, abs=0.006)
    assert row["seeds"] == "3"
    assert len(section(report, "Targets")) == 6
    assert "2 comparisons with 300 bootstrap draws" in "\n".join(report.sections["Paired differences"])
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    (link,) = re.findall(r'href="([^"]+)"', index)
    page = (tmp_path / link).read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 6  # three pictures for each of two sets
    for text in (index, page):
        assert not re.search(r"https?://|src=\"(?!data:)", text)
        assert "width=device-width" in text
        assert "color-scheme: light dark" in text


def test_one_seed_without_lora_is_reported(tmp_path):
    for method in (CAREFUL, CORE):
        result(method, 4).write(tmp_path)
    report = Report("python -m benchmarks report")
    command.run(argparse.Namespace(folder=tmp_path, draws=None, html=None), report)
    verdicts = {row["target"]: row[CORE] for row in section(report, "Targets")}
    absent = (targets.CALIBRATION, targets.DETECTION, targets.SELECTIVE, targets.SECONDS)
    assert {verdicts[what] for what in absent} == {"no data"}
    assert verdicts[targets.LIKELIHOOD] != "no data"
    assert {row["seeds"] for row in section(report, "Paired differences")} == {"1"}
    assert {row["to fit / LoRA"] for row in section(report, "topics, 100 rows: cost")} == {""}


def test_a_grid_without_our_methods_has_no_data_for_any_target(tmp_path):
    result(LORA, 0).write(tmp_path)
    report = Report("python -m benchmarks report")
    command.run(argparse.Namespace(folder=tmp_path, draws=None, html=None), report)
    assert [row["no method"] for row in section(report, "Targets")] == ["no data"] * len(targets.GOALS)


def test_the_folder_of_pages_has_a_default():
    parser = argparse.ArgumentParser()
    command.options(parser)
    assert parser.parse_args([]).html is None
    assert parser.parse_args(["--html"]).html == Path("build/grid")
    with pytest.raises(SystemExit):
        parser.parse_args(["--draws", "0"])


def test_fewer_seeds_than_the_protocol_requires_are_said(problem):
    assert f"fewer have topics, 100 rows ({', '.join(problem.results)})." in shown.provisional([problem])
    enough, few = [result(LORA, seed) for seed in range(5)], [result(CORE, seed) for seed in range(4)]
    assert shown.provisional(problems(enough)) == ""
    assert shown.provisional(problems(enough + few)).endswith(f"rows ({CORE}).")
