"""The certificate of a reference passes what is right, and names what is wrong with what is not."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from bnlora.infer.mcmc.certificate import Certificate, Evidence, Thresholds, autocorrelation, bfmi, certify

RANDOM = np.random.default_rng(0)
CHAINS, DRAWS = 4, 2000


def evidence(values=None, divergent=None, energy=None, bias="none"):
    values = RANDOM.normal(size=(CHAINS, DRAWS, 2)) if values is None else values
    none = np.zeros(values.shape[:2], bool)
    energy = RANDOM.normal(size=values.shape[:2]) if energy is None else energy
    return Evidence(("f", "g"), values, none if divergent is None else divergent, energy, bias)


def ar1(phi, draws=DRAWS, chains=CHAINS):
    """A stationary autoregression with variance one."""
    x = RANDOM.normal(size=(chains, draws))
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + (1 - phi**2) ** 0.5 * x[:, t]
    return x


def with_second(first):
    return np.stack([first, RANDOM.normal(size=first.shape)], axis=2)


def test_independent_draws_pass():
    found = certify(evidence(), Thresholds())
    assert found.passed
    assert found.failures == ()
    assert found.verdict.startswith("Certified: 2 functions, 0 divergences")


def test_autocorrelation_is_that_of_the_process():
    # The standard error is sqrt((1 - phi^2) / n) (Bartlett).
    for phi in (0.0, 0.3, -0.5):
        x = ar1(phi, draws=8000)
        assert abs(autocorrelation(x[:, :, None])[0] - phi) < 4 * ((1 - phi**2) / x.size) ** 0.5 + 2 / 8000


def test_bfmi_of_white_noise_is_two_and_of_a_slow_walk_small():
    assert abs(bfmi(RANDOM.normal(size=20000)) - 2.0) < 4 * (20000**-0.5) * 4
    walk = ar1(0.99, draws=20000, chains=1)[0]
    # E (x_t - x_{t-1})^2 = 2 (1 - phi) for variance one.
    assert 0.01 < bfmi(walk) < 0.04


BAD = {
    "shifted chain": (
        lambda: evidence(
            with_second(RANDOM.normal(size=(CHAINS, DRAWS)) + np.array([[0.0], [0], [0], [0.5]]))
        ),
        "R-hat of f is .*at most 1.01; run longer chains",
    ),
    "chain of another width": (
        lambda: evidence(
            with_second(RANDOM.normal(size=(CHAINS, DRAWS)) * np.array([[1.0], [1], [1], [2.0]]))
        ),
        "R-hat of f is",
    ),
    "few effective draws": (
        lambda: evidence(with_second(ar1(0.98))),
        r"bulk ESS of f is .*at least 400; draw more, about [3-9](\.\d)? times as many",
    ),
    "stuck": (
        lambda: evidence(with_second(np.ones((CHAINS, DRAWS)))),
        "R-hat of f is not finite, because all draws of it are equal",
    ),
    "divergent": (
        lambda: evidence(divergent=np.arange(CHAINS * DRAWS).reshape(CHAINS, DRAWS) < 3),
        "3 transitions diverged, at most 0 may; raise target_acceptance",
    ),
    "energy": (lambda: evidence(energy=ar1(0.95)), "least E-BFMI is 0.*at least 0.3"),
    "unmoved particles": (
        lambda: replace(evidence(), ancestry=(0.4, 0.9), moves=100),
        # 0.9 is left by 100 moves, so 0.5 by 100 log(0.5) / log(0.9) of them.
        "correlation of 0.90 .* after 100 moves, at most 0.7 may be left; raise max_moves, to about 658, or",
    ),
    "no accept step": (lambda: evidence(bias="step"), "no accept step.*use sample_nuts"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_every_kind_of_bad_chain_is_named(make, message):
    found = certify(make(), Thresholds())
    assert not found.passed
    text = "; ".join(found.failures)
    assert {f.status for f in found.problems} == {"problem"}
    assert all(f.remedy for f in found.problems)
    assert re.search(message, text), text
    assert found.verdict.startswith("Not certified")


def test_thresholds_are_the_callers():
    values = with_second(ar1(0.3))
    assert certify(evidence(values), Thresholds()).passed
    assert not certify(evidence(values), Thresholds(ess=1e6)).passed
    assert certify(evidence(values), Thresholds(autocorrelation=0.4)).passed


def test_dependence_passes_by_its_effective_draws_and_says_which_to_keep():
    """In an autoregression neighbours k apart have the correlation phi^k: below 0.05 from k = 7 for 0.642."""
    values = with_second(ar1(0.642, draws=8000))
    found = certify(evidence(values), Thresholds())
    assert found.passed
    k = found.keep_every
    assert 6 <= k <= 8  # the estimate has an error of about 0.01
    assert f"every {k}th draw is nearly independent" in found.verdict
    asked = certify(evidence(values), Thresholds(autocorrelation=0.05))
    assert asked.failures[0].startswith("lag-1 autocorrelation of f is 0.6")
    kept = f"keep every {k}th draw, `chains.thin({k})`, which leaves {8000 // k:,} of 8,000 in each chain"
    assert asked.failures[0].endswith(kept)
    thin = values[:, ::k]
    assert autocorrelation(thin)[0] < 0.05 + 4 / thin[..., 0].size ** 0.5
    assert certify(evidence(with_second(ar1(0.999, draws=200))), Thresholds()).keep_every == 0


def test_what_nothing_changes_is_named_and_not_judged():
    given = evidence()
    found = certify(replace(given, constant=("norm[q_proj]",)), Thresholds())
    assert found.passed
    assert "left out, because no sampled site changes them: norm[q_proj]" in found.verdict


def test_kernels_without_energy_are_not_asked_for_it():
    found = certify(evidence(energy=np.full((CHAINS, DRAWS), np.nan)), Thresholds())
    assert found.passed
    assert "E-BFMI was not checked" in found.verdict


def test_json_round_trip_keeps_everything():
    found = certify(evidence(with_second(ar1(0.5))), Thresholds(ess=100, autocorrelation=0.05))
    stored = json.loads(json.dumps(found.to_json()))
    assert Certificate.from_json(stored) == found
    assert stored["passed"] is False
    for name in (
        "constant",
        "keep_every",
        "num_draws",
        "ancestry",
        "moves",
    ):  # certificates of earlier versions lack them
        del stored[name]
    assert not Certificate.from_json(stored).passed


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least two chains of four draws.*got 1 of 50"):
        certify(evidence(RANDOM.normal(size=(1, 50, 2))), Thresholds())
    with pytest.raises(ValueError, match="finite at every draw; these are not: g"):
        certify(evidence(np.stack([np.zeros((2, 9)), np.full((2, 9), np.nan)], 2)), Thresholds())
