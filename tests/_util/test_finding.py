"""One form of finding for all checks: five objects that give them, and the table that shows them."""

from html import unescape

import jax
import numpy as np
import pytest
from rich.console import Console

from bnlora._util.display import as_html, as_text
from bnlora._util.finding import MARKS, Finding, Findings, count_words
from bnlora.assess.comparison import Draws, compare_draws
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.assess.sbc.calibration import Calibration
from bnlora.infer.mcmc.certificate import Evidence, Thresholds, certify

RANDOM = np.random.default_rng(0)


def certificate(*, shift=0.0):
    values = RANDOM.normal(size=(4, 1000, 2))
    values[0] += shift
    shape = values.shape[:2]
    return certify(
        Evidence(("f", "g"), values, np.zeros(shape, bool), RANDOM.normal(size=shape)), Thresholds()
    )


def comparison(*, shift=0.0):
    one, two = (Draws(("f", "g"), RANDOM.normal(size=(1, 400, 2)) + x, "independent") for x in (0.0, shift))
    return compare_draws(jax.random.key(1), one, two)


def calibration(*, shift=0.0):
    ranks = np.stack([RANDOM.permutation(np.arange(200) // 2) for _ in range(2)], 1)
    if shift:
        ranks[:, 0] = ranks[:, 0] // 2  # the truth is in the lower half of the draws
    return Calibration(("f", "g"), ranks, 99, np.zeros(200, bool))


def prior_predictive(*, shift=0.0):
    logits = RANDOM.normal(size=(50, 8, 2))
    return PriorPredictive(logits * (1e-3 if shift else 1.0), np.zeros((8, 2)))


GIVERS = {
    "certificate": (certificate, "R-hat", "problem"),
    "comparison": (comparison, "means", "caution"),
    "calibration": (calibration, "SBC", "problem"),
    "prior predictive": (prior_predictive, "prior predictive", "problem"),
}
"""What gives findings, and one that a shift makes bad. The fifth, a diagnosis, is in `test_diagnose.py`."""


@pytest.mark.parametrize("name", GIVERS)
def test_every_check_gives_findings(name):
    make, bad, status = GIVERS[name]
    good, other = make(), make(shift=1.0)
    assert good.passed, good.findings
    assert {f.status for f in good.findings} <= {"fine", "not asked"}
    assert other[bad].status == status
    assert not other.passed
    assert other[bad] in other.problems + other.cautions
    for one in (good, other):
        assert all(isinstance(f, Finding) for f in one.findings)
        assert len({f.name for f in one.findings}) == len(one.findings)
        for finding in one.findings:
            assert (finding.number is None) == (finding.threshold is None)
            assert finding.remedy or finding.status != "problem"
            assert finding.sentence in unescape(as_html(one.overview))
    with pytest.raises(KeyError, match="no finding 'x'; there are"):
        good["x"]


def test_the_table_has_the_worst_first_and_escapes_what_it_shows():
    findings = tuple(
        Finding(f"<{status}>", status, "1 & 2", remedy="do <this>" if status == "problem" else "")
        for status in ("fine", "not asked", "caution", "problem")
    )
    table = Findings("<b>Title</b>", findings)
    assert [f.status for f in table.ordered] == list(MARKS)
    html = as_html([table])
    assert html.count("<tr") == 4
    assert "<b>" not in html
    assert "<this>" not in html
    text = as_text([table])
    assert text.index("✗") < text.index("!") < text.index("✓") < text.index("–")
    assert "→ do <this>" in text
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(table)
    assert "<b>Title</b>" in captured.get()
    assert count_words(findings) == "1 problem, 1 caution, 1 fine, 1 not asked"
    assert count_words((*findings, *findings)).startswith("2 problems, 2 cautions, 2 fine")
