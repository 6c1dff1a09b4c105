"""Each measure against a closed form for Gaussians, and its null against the chance it promises."""

import numpy as np
import pytest
from scipy.stats import fisher_exact, genpareto, norm

from bnlora.assess.comparison import classifier
from bnlora.assess.comparison.classifier import classifier_test
from bnlora.assess.comparison.coverage import coverage
from bnlora.assess.comparison.draws import Draws
from bnlora.assess.comparison.kernel import kernel_test
from bnlora.assess.comparison.pairs import Pairs, pairs
from bnlora.assess.comparison.predictive import predictive_agreement
from bnlora.assess.comparison.transport import transport
from bnlora.metrics.khat import khat
from bnlora.prediction.predict import Prediction

pytestmark = pytest.mark.slow  # one measure after the other over many repetitions
RANDOM = np.random.default_rng


def gaussians(random, size, width, *, shift=0.0, scale=1.0):
    """Pairs of standard normals as reference, shifted and scaled ones as approximation."""
    posterior, reference = random.normal(size=(2, 2, size, width))
    return Pairs(shift + scale * posterior, reference)


def independent(values):
    return Draws(("f",), values.reshape(1, -1, 1), "independent")


def below(p_values, level):
    """At most `level` of the p-values are below it, up to 3.5 binomial standard errors."""
    return np.mean(np.array(p_values) <= level) <= level + 3.5 * (level * (1 - level) / len(p_values)) ** 0.5


def test_transport_between_shifted_gaussians():
    """W_1 is the shift, and sliced W_2^2 the mean of (t . m)^2 over directions: |m|^2 / k."""
    shift = np.array([2.0, 0.0, -1.0])
    found = transport(RANDOM(0), gaussians(RANDOM(1), 4000, 3, shift=shift), num_slices=2000)
    np.testing.assert_allclose(found.marginal[[0, 2]], [2.0, 1.0], atol=4 * (2 / 8000) ** 0.5)
    assert found.sliced == pytest.approx((5 / 3) ** 0.5, rel=0.03)
    assert found.marginal[1] < 0.06
    assert found.marginal_null.max() < 0.06
    assert found.sliced_null < 0.06


def test_transport_between_gaussians_of_other_spread():
    """W_1 = |1 - s| E|z| with E|z| = sqrt(2 / pi), and every slice has W_2 = |1 - s|."""
    found = transport(RANDOM(0), gaussians(RANDOM(2), 8000, 2, scale=0.6), num_slices=50)
    np.testing.assert_allclose(found.marginal, 0.4 * (2 / np.pi) ** 0.5, atol=0.02)
    assert found.sliced == pytest.approx(0.4, abs=0.02)


def test_null_levels_of_transport_are_those_of_equal_laws():
    """Over 100 repetitions without a difference, value and null level have one mean."""
    random = RANDOM(3)
    made = [transport(random, gaussians(random, 60, 2), num_slices=20) for _ in range(100)]
    for value, null in (("marginal", "marginal_null"), ("sliced", "sliced_null")):
        gap = np.array([np.mean(getattr(m, value)) - np.mean(getattr(m, null)) for m in made])
        assert abs(gap.mean()) < 3.5 * gap.std(ddof=1) / 100**0.5


def test_kernel_discrepancy_in_closed_form():
    """Two normals m apart with kernel width h: 2 (h^2 / (h^2 + 2))^(k/2) (1 - exp(-m^2 / (2 (h^2 + 2))))."""
    h, shift, width = 1.3, np.array([0.8, 0.0]), 2
    expected = 2 * (h**2 / (h**2 + 2)) ** (width / 2) * (1 - np.exp(-(shift @ shift) / (2 * (h**2 + 2))))
    found = [
        kernel_test(RANDOM(s), gaussians(RANDOM(s), 150, 2, shift=shift), bandwidth=h, num_permutations=1)
        for s in range(30)
    ]
    values = np.array([f.squared for f in found])
    assert abs(values.mean() - expected) < 3.5 * values.std(ddof=1) / 30**0.5
    nulls = np.array([f.null for f in found])
    assert abs(nulls.mean()) < 3.5 * nulls.std(ddof=1) / 30**0.5  # unbiased: zero for equal laws


def test_kernel_estimate_is_its_definition():
    samples = gaussians(RANDOM(4), 6, 2, shift=0.5)
    found = kernel_test(RANDOM(0), samples, bandwidth=0.9)
    a, r = samples.posterior.reshape(-1, 2), samples.reference.reshape(-1, 2)

    def mean(x, y, own):
        values = [
            np.exp(-((p - q) ** 2).sum() / (2 * 0.9**2))
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (own and i == j)
        ]
        return np.mean(values)

    def estimate(x, y):
        return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)

    assert found.squared == pytest.approx(estimate(a, r), abs=1e-12)
    assert found.null == pytest.approx(estimate(*samples.reference), abs=1e-12)


def test_permutation_p_values_are_uniform_under_the_null():
    random = RANDOM(5)
    p_values = [
        kernel_test(random, gaussians(random, 20, 3), num_permutations=99).p_value for _ in range(300)
    ]
    for level in (0.05, 0.2, 0.5, 0.8):
        assert below(p_values, level)
        assert below(1.01 - np.array(p_values), 1 - level + 0.01)


def test_kernel_finds_a_difference_of_shape():
    """Signs against normals: equal means and deviations."""
    random = RANDOM(6)
    reference = random.normal(size=(2, 200, 1))
    found = kernel_test(random, Pairs(random.choice([-1.0, 1.0], size=(2, 200, 1)), reference))
    assert found.p_value == 0.001


def test_classifier_is_as_accurate_as_the_best_one():
    """Normals m apart are told with probability Phi(m / 2), and the area is Phi(m / sqrt 2)."""
    found = classifier_test(RANDOM(0), gaussians(RANDOM(7), 2000, 1, shift=1.0))
    assert found.accuracy == pytest.approx(norm.cdf(0.5), abs=3.5 * (0.25 / 8000) ** 0.5 + 0.005)
    assert found.area == pytest.approx(norm.cdf(2**-0.5), abs=0.02)
    assert found.p_value < 1e-6
    assert abs(found.null - 0.5) < 3.5 * found.null_standard_error


def test_classifier_sees_spread():
    """Of two normals with deviations 1 and s the best rule looks at |x| alone."""
    s = 0.5
    edge = (2 * np.log(1 / s) / (1 / s**2 - 1)) ** 0.5
    best = 0.5 * ((2 * norm.cdf(edge / s) - 1) + 2 * norm.sf(edge))
    found = classifier_test(RANDOM(0), gaussians(RANDOM(8), 2000, 1, scale=s))
    assert found.accuracy == pytest.approx(best, abs=3.5 * (0.25 / 8000) ** 0.5 + 0.005)


@pytest.mark.slow
def test_classifier_rejects_as_often_as_it_says():
    """And the accuracy scatters no more than its bound; a binomial of all draws would be exceeded."""
    random = RANDOM(9)
    made = [classifier_test(random, gaussians(random, 40, 2)) for _ in range(150)]
    for level in (0.05, 0.2, 0.5):
        assert below([m.p_value for m in made], level)
    accuracy = np.array([m.accuracy for m in made])
    assert abs(accuracy.mean() - 0.5) < 3.5 * accuracy.std(ddof=1) / 150**0.5
    assert accuracy.std(ddof=1) < made[0].standard_error


def test_p_value_of_a_fold_is_fishers():
    labels, called = np.repeat([0, 1], 6), np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1])
    counts = [[((labels == i) & (called == j)).sum() for j in (0, 1)] for i in (0, 1)]
    expected = fisher_exact(counts, alternative="greater").pvalue
    assert classifier._exact(classifier._Fold(labels, called, called)) == pytest.approx(expected)


def test_another_classifier_may_be_given():
    from sklearn.neighbors import KNeighborsClassifier

    random = RANDOM(10)
    samples = Pairs(random.choice([-1.0, 1.0], size=(2, 200, 1)), random.normal(size=(2, 200, 1)))
    found = classifier_test(random, samples, classifier=KNeighborsClassifier(5))
    assert found.accuracy > 0.9


def test_coverage_of_a_narrow_approximation_in_closed_form():
    """The reference lies within z s of its mean with probability 2 Phi(z s) - 1."""
    random = RANDOM(11)
    found = coverage(independent(0.6 * random.normal(size=5000)), independent(random.normal(size=5000)))
    z = norm.isf((1 - np.array(found.levels)) / 2)
    expected = 2 * norm.cdf(0.6 * z) - 1
    assert (np.abs(found.share[:, 0] - expected) < 3.5 * found.mcse[:, 0]).all()
    assert (np.abs(found.null[:, 0] - found.levels) < 3.5 * found.null_mcse[:, 0]).all()


def test_coverage_keeps_its_promise_at_few_draws():
    """Over 600 repetitions of 40 draws: no bias, and the standard error is that of the repetitions."""
    random = RANDOM(12)
    made = [
        coverage(independent(random.normal(size=40)), independent(random.normal(size=40)), levels=[0.8])
        for _ in range(600)
    ]
    shares = np.array([m.share[0, 0] for m in made])
    assert abs(shares.mean() - 0.8) < 3.5 * shares.std(ddof=1) / 600**0.5
    assert np.mean([m.mcse[0, 0] for m in made]) == pytest.approx(shares.std(ddof=1), rel=0.12)


def test_khat_is_the_shape_of_the_weights():
    """Weights that are generalised Pareto of shape k."""
    for shape in (0.2, 0.5, 1.0):
        weights = genpareto.rvs(shape, size=20_000, random_state=RANDOM(13))
        found = khat(np.log(weights), np.zeros(20_000))
        assert found.value == pytest.approx(shape, abs=0.12)
        assert found.passed == (shape < 0.7)


def test_khat_of_equal_densities_passes_and_of_a_narrow_guide_fails():
    """N(0, 1) under q = N(0, s^2), s < 1: weights of shape 1 - s^2 above."""
    draws = RANDOM(14).normal(size=4000)
    assert khat(norm.logpdf(draws), norm.logpdf(draws, scale=1.05)).passed
    narrow = 0.3 * draws
    assert khat(norm.logpdf(narrow), norm.logpdf(narrow, scale=0.3)).value > 0.7


def test_khat_of_weights_that_vanish_is_large():
    """Spreads of the log-weights beyond what double precision holds, as in many dimensions."""
    draws = RANDOM(16).normal(size=1000)
    for width in (5.0, 30.0, 100.0, 200.0, 300.0, 400.0, 1e3, 1e5):
        assert khat(width * draws, np.zeros(1000)).value > 1
    assert khat(np.zeros(1000), np.zeros(1000)).value == -np.inf


def test_khat_threshold_follows_the_number_of_draws():
    draws = RANDOM(15).normal(size=100)
    assert khat(draws, draws + 0.1 * draws**2).threshold == pytest.approx(0.5)
    many = RANDOM(15).normal(size=4000)
    assert khat(many, many + 0.1 * many**2).threshold == pytest.approx(0.7)


def predictions(random, draws, rows, *, shift=0.0, scale=1.0):
    """Two classes with margins shift + scale z around a margin of each row's own."""
    margin = np.linspace(-2, 2, rows) + shift + scale * random.normal(size=(draws, rows))
    return Prediction(-np.logaddexp(0, np.stack([-margin, margin], -1)))


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def exact(margins, scale):
    """Probabilities of the mixture and mutual information, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    value = 1 / (1 + np.exp(-(margins[:, None] + scale * nodes)))
    p = value @ weights / weights.sum()
    return np.stack([p, 1 - p], -1), entropy(p) - entropy(value) @ weights / weights.sum()


def test_total_variation_and_divergence_by_quadrature():
    random = RANDOM(16)
    found = predictive_agreement(
        random, predictions(random, 20_000, 7, shift=0.7), predictions(random, 20_000, 7), num_permutations=9
    )
    center = np.linspace(-2, 2, 7)
    (p, known), (q, other) = exact(center, 1.0), exact(center + 0.7, 1.0)
    np.testing.assert_allclose(found.total_variation, 0.5 * np.abs(p - q).sum(1), atol=0.01)
    np.testing.assert_allclose(found.divergence, (p * np.log(p / q)).sum(1), atol=0.005)
    assert found.total_variation_p == 0.1
    assert found.total_variation_null.max() < 0.02
    np.testing.assert_allclose(found.mutual_information_gap, np.abs(known - other), atol=0.004)
    assert found.correlation == pytest.approx(np.corrcoef(known, other)[0, 1], abs=0.05)


def test_mutual_information_is_told_apart():
    random = RANDOM(17)
    found = predictive_agreement(
        random, predictions(random, 400, 30, scale=0.2), predictions(random, 400, 30, scale=1.5)
    )
    assert found.mutual_information_p == 0.001
    assert found.mutual_information_gap.mean() > 5 * found.mutual_information_gap_null.mean()


def test_predictive_p_values_are_uniform_under_the_null():
    random = RANDOM(18)
    made = [
        predictive_agreement(
            random, predictions(random, 20, 5), predictions(random, 20, 5), num_permutations=99
        )
        for _ in range(300)
    ]
    for name in ("total_variation_p", "mutual_information_p"):
        p_values = np.array([getattr(m, name) for m in made])
        for level in (0.05, 0.2, 0.5, 0.8):
            assert below(p_values, level)
            assert below(1.01 - p_values, 1 - level + 0.01)
    gap = np.array([m.total_variation.mean() - m.total_variation_null.mean() for m in made])
    assert abs(gap.mean()) < 3.5 * gap.std(ddof=1) / 300**0.5


def test_classes_of_probability_zero():
    sure = np.full((4, 1, 2), -np.inf)
    sure[..., 0] = 0.0
    even = np.full((4, 1, 2), np.log(0.5))
    found = predictive_agreement(RANDOM(0), Prediction(even), Prediction(sure), num_permutations=9)
    assert found.divergence == pytest.approx(np.log(2))
    assert np.isnan(found.correlation)
    assert (
        predictive_agreement(RANDOM(0), Prediction(sure), Prediction(even), num_permutations=9).divergence
        > 1e6
    )


def test_bad_options_are_refused():
    samples = gaussians(RANDOM(0), 20, 1)
    with pytest.raises(ValueError, match="num_slices must be at least 1; got 0"):
        transport(RANDOM(0), samples, num_slices=0)
    with pytest.raises(ValueError, match="positive bandwidth and at least one permutation; got bandwidth=-1"):
        kernel_test(RANDOM(0), samples, bandwidth=-1.0)
    with pytest.raises(ValueError, match="num_folds must be at least 2; got 1"):
        classifier_test(RANDOM(0), samples, num_folds=1)
    draws = independent(RANDOM(0).normal(size=50))
    with pytest.raises(ValueError, match=r"levels in \(0, 1\)"):
        coverage(draws, draws, levels=[1.0])
    with pytest.raises(ValueError, match="at least 25 draws; got shapes"):
        khat(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="must be finite at every draw"):
        khat(np.full(30, np.nan), np.zeros(30))
    with pytest.raises(ValueError, match="predictions of one shape"):
        predictive_agreement(RANDOM(0), predictions(RANDOM(0), 8, 3), predictions(RANDOM(0), 8, 4))
    with pytest.raises(ValueError, match="at least 20 draws"):
        pairs(independent(np.arange(10.0)), draws)
