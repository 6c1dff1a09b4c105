"""Rules of the page on measurements made by hand: advice fits the fit, and numbers fit each other."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.autoguide import AutoNormal

import bnlora as bl
from bnlora.assess.diagnostics import (
    Bound,
    ClassCounts,
    KHats,
    Restarts,
    randomised_pit,
)
from bnlora.assess.diagnostics.bound import convergence, guessing
from bnlora.assess.diagnostics.classes import counted
from bnlora.assess.diagnostics.divergence import SiteDivergence
from bnlora.assess.diagnostics.pit import transforms
from bnlora.assess.diagnostics.restarts import agreement
from bnlora.assess.diagnostics.sensitivity import Sensitivity, power_scaling
from bnlora.assess.diagnostics.shrinkage import Shrinkage
from bnlora.assess.diagnostics.subject import Subject, subject
from bnlora.assess.diagnostics.weights import judge_families, judge_weights
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.infer.svi.elbo import TERMS
from bnlora.metrics.khat import KHat
from bnlora.testing import tiny_base

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=1)


def bound_of(*elbo, kl=(0.0,) * 5, rhat=1.0, error=0.1):
    """Five windows of 100 steps; one value stands for all of them."""
    windows = {n: np.zeros(5) for n in TERMS} | {"elbo": np.broadcast_to(np.array(elbo, float), 5)}
    errors = {n: np.zeros(5) for n in TERMS} | {"elbo": np.full(5, error)}
    return Bound(windows | {"inducing_kl": np.array(kl)}, errors, np.arange(100, 501, 100), 500, 0.01, rhat)


def described(prior, guide, **known):
    """What advice knows of a guide of this prior, without a fit."""
    model = bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), prior, label_ids=(3, 5))
    built = guide(model.prior)
    traces = [handlers.trace(handlers.seed(f, KEY)).get_trace() for f in (built, model.prior)]
    params = {n: s["value"] for t in traces for n, s in t.items() if s["type"] == "param"}
    fit = SimpleNamespace(model=model, guide=built, params=params)
    return subject(SimpleNamespace(fit=fit, **({"has_prior": True, "has_density": True} | known)))


@pytest.mark.slow
def test_advice_knows_what_the_fit_is():
    def of(family):
        return lambda prior: bl.guides.Guide(prior, family)

    gp = bl.priors.sparse_gp(rows=2, cols=2)
    assert described(gp, lambda p: bl.guides.SiteFlow(p, hidden=4, blocks=1, lam_max=0.03)).lam_max == 0.03
    assert described(gp, lambda p: bl.guides.SiteFlow(p, hidden=4, blocks=1)).lam_max == 1
    normal, learned = bl.priors.normal(), bl.priors.normal(scale=bl.priors.learned(1.0))
    assert described(normal, AutoNormal) == Subject()
    assert described(normal, of(bl.guides.full(over="all"))).richer == ("spline()",)
    assert described(normal, of(bl.guides.mean_field())).richer == Subject().richer
    assert [described(p, of(bl.guides.mean_field())).learns_scale for p in (normal, learned)] == [False, True]
    points = described(normal, of({r".*\.a": bl.guides.delta(), ".*": bl.guides.full()}), has_density=False)
    assert (points.points, points.collapsed) == (("lm_head.a",), False)
    assert points.no_density == "the guide sets lm_head.a to a point"
    collapsed = described(normal, of(bl.guides.mean_field()), has_density=False)
    assert (collapsed.collapsed, collapsed.no_density) == (
        True,
        "some latent number is the same in every draw",
    )
    plain = described(bl.priors.point(), of(bl.guides.full()), has_prior=False, has_density=False)
    assert (plain.random, plain.collapsed) == (False, False)
    assert plain.no_density.startswith("the prior has no latent site")


@pytest.mark.parametrize(
    ("about", "state", "advice"),
    [
        (
            {"lam_max": 0.03},
            (True, False),
            ": widen the variational family (lam_max=0.03 restricts it, 1 would",
        ),
        (
            {},
            (True, False),
            ": give the guide a richer family, such as full() or low_rank(over='all') or spline()",
        ),
        (
            {"richer": ()},
            (True, False),
            "gain in fit: change the prior's scale, and do not compare evidences.",
        ),
        ({}, (True, True), "gain in fit: change the prior's scale, and do not compare evidences."),
        ({}, (False, True), "gain in fit: fit until it converges, change the prior's scale, and do not"),
        (
            {"random": False},
            (False, True),
            "fit until it converges or check labels, template",
        ),
        ({"random": False}, (True, True), "equal probabilities: check labels, template"),
    ],
)
def test_against_guessing_advises_what_the_fit_can_do(about, state, advice):
    converged, weighable = state
    options = {"converged": converged, "weighable": weighable}
    found = guessing(bound_of(-100.0), 100, 2, Subject(**about), **options)
    assert found.status == "problem"
    assert advice in found.remedy
    if "lam_max" not in about:
        assert "lam_max" not in found.remedy
    assert ("log-likelihood" in found.sentence) == (not about.get("random", True))
    good = guessing(bound_of(-60.0), 100, 2, Subject(**about), **options)
    assert (good.status, good.remedy) == ("fine", "")


def test_a_point_is_not_held_against_guessing():
    about = Subject(points=("w", "x", "y", "z"))
    found = guessing(bound_of(-100.0), 100, 2, about, converged=True, weighable=True)
    assert (found.status, found.sentence) == (
        "not asked",
        "the guide sets w, x, y and 1 more to a point, so there is no bound",
    )


def test_a_richer_family_is_one_that_the_guide_has_not():
    failed = KHats(KHat(0.9, 400), {}, {"whole": 10})
    said = {r: judge_weights(failed, Subject(richer=r), converged=True).remedy for r in ((), ("full()",))}
    assert "a richer family, such as full(), and compare" in said["full()",]
    assert "a richer family and compare" in said[()]
    nothing = judge_weights(KHats(None, {}, {"whole": 0}), Subject(random=False), converged=True)
    assert (nothing.status, "no latent site" in nothing.sentence) == ("not asked", True)
    some = KHats(KHat(0.1, 400), {"q": KHat(0.2, 400), "v": None}, {"whole": 9, "q": 4, "v": 5})
    assert "not computed for v, which the guide ties to others" in judge_families(some).sentence


def test_convergence_names_the_rate_of_scales_only_where_these_move():
    rising = convergence(bound_of(-50, -40, -30, -20, -10, rhat=np.nan), 500)
    longer = "Fit for more steps, or with a higher rate that decays"
    assert (rising.status, rising.remedy) == ("problem", f"{longer}.")
    assert "R-hat" not in rising.sentence
    growing = convergence(bound_of(-50.0, kl=(1.0, 2.0, 3.0, 4.0, 9.0)), 500)
    assert growing.remedy.endswith("(of scales too: scale_optimizer).")


def restarted(rhat, bounds=(-10.0, -11.0), errors=(0.1, 0.1), names=("norm", "margin[0]")):
    rhat, bounds, errors = map(np.array, (rhat, bounds, errors))
    return Restarts(names[: len(rhat)], np.zeros((len(bounds), 8, len(rhat))), rhat, bounds, errors, 1.0)


def test_restarts_say_which_bound_is_higher_only_where_it_is():
    told = agreement(restarted([1.0, 1.2]))
    assert told.status == "problem"
    assert "take number 1, whose bound is the highest, or fit longer" in told.remedy
    noisy = agreement(restarted([1.0, 1.2], errors=(0.1, 0.7)))
    assert "their bounds do not differ by more than the noise; fit longer" in noisy.remedy
    three = agreement(restarted([1.0, 1.2], bounds=(-10.0, -11.0, -10.1), errors=(0.1, 0.1, 0.1)))
    assert "do not differ" in three.remedy
    assert agreement(restarted([1.0, 1.04])).status == "fine"
    points = agreement(restarted([1.0, 1.2e16]))
    assert "nested R-hat above 100 in margin[0]" in points.sentence
    broken = agreement(restarted([np.nan, 1.0]))
    assert (broken.status, "norm has no nested R-hat" in broken.sentence) == ("problem", True)
    assert "different posteriors" not in broken.remedy
    assert agreement(restarted([])).status == "not asked"


def test_power_scaling_leaves_out_margins_without_a_number():
    def found(prior, likelihood):
        names = ("margin[0]", "margin[1]")
        made = Sensitivity(names, np.array(prior), np.array(likelihood), 0.1, 0.1, 400)
        return power_scaling(made)

    assert found([0.01, np.nan], [0.3, np.nan]).sentence.startswith("of 1 margins 0 depend")
    assert found([0.2, np.nan], [0.3, np.nan]).status == "caution"
    assert found([np.nan] * 2, [np.nan] * 2).status == "not asked"


def test_a_prior_is_not_blamed_for_a_base_that_is_sure():
    """The verdict and the finding agree."""
    signs = np.where(np.arange(100) % 2, 1.0, -1.0)[:, None] * [9.0, 9.0]
    logits = np.stack([0 * signs, signs], -1)
    for base, verdict, status in ((9.0, "sure as the base", "fine"), (0.5, "confident nonsense", "caution")):
        made = PriorPredictive(logits, np.array([[0.0, base], [0.0, -base]]))
        (finding,) = made.findings
        assert made.verdict.startswith(verdict)
        assert finding.status == status
        assert ("no scale changes that" in finding.sentence) == (status == "fine")


def test_kl_of_points_is_not_zero_nats():
    def total(*values):
        sites = (SiteDivergence((f"s{i}",), "f", "a", None, None, x, 0.0) for i, x in enumerate(values))
        return Shrinkage((), tuple(sites)).total_words

    assert total(1.0, 2.0) == "KL 3.0 nats"
    assert total(1.0, np.nan) == "KL 1.0 nats without 1 of 2 sites, which are points"
    assert total(np.nan, np.nan) == "no KL, because every site is a point"


def test_the_furthest_count_is_outside_of_its_band_where_one_is():
    """A band that is cut at zero is narrow below: a count inside of it must not come before one outside."""
    expected, observed = np.array([[0.2, 10.0]]), np.array([[3.0, 17.0]])
    low, high = np.array([[0.0, 4.0]]), np.array([[3.2, 16.0]])
    found = ClassCounts(observed, expected, low, high, np.full((1, 2), 20), 0.004, 0.99)
    assert found.worst == (0, 1)
    assert "bin 2 of 2, 17 seen" in counted(found, of_training=False).sentence


@pytest.mark.parametrize(
    ("stated", "true", "said"),
    [
        ((0.5, 0.5), (0.2, 0.8), "the last classes are more frequent than predicted"),
        ((0.5, 0.5), (0.8, 0.2), "the first classes are more frequent than predicted"),
        ((0.99, 0.01), None, "they are too confident"),
        ((0.6, 0.4), None, "they are too cautious"),
    ],
)
def test_transforms_say_how_predictions_are_wrong(stated, true, said):
    """Of 2,000 rows; `None`: half of the rows with the classes swapped, and 80 % of the likelier class."""
    random = np.random.default_rng(0)
    probs = np.broadcast_to(stated, (2000, 2)).copy()
    truth = np.broadcast_to(true or (0.8, 0.2), (2000, 2)).copy()
    if true is None:
        probs[::2], truth[::2] = probs[::2, ::-1], truth[::2, ::-1]
    labels = (random.random(2000) > truth[:, 0]).astype(int)
    found = transforms(randomised_pit(jax.random.key(0), probs, labels, level=0.99), reliable=True)
    assert found.status == "caution"
    assert said in found.remedy
