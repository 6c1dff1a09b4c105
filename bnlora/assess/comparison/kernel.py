r"""Maximum mean discrepancy of all functions together, with a permutation test.

    MMD^2 = E k(a, a') + E k(r, r') - 2 E k(a, r),    k(x, y) = exp(-|x - y|^2 / (2 h^2))

h is the median distance in the pooled sample. The estimate is unbiased and can therefore be negative. MMD is
zero only for equal laws. The p-value is the share of random relabellings of the pooled sample, the observed
labelling included, with an estimate at least as large. It is exact for independent draws. Chains are thinned
until neighbouring draws are nearly independent (`bnlora.assess.comparison.draws`); the remaining dependence
makes the p-value slightly too small.

The estimate uses all draws of both sides, 2n against 2n. The null level uses n against n; the estimator is
unbiased, so the two are comparable, but the null level is about twice as noisy.

References: Gretton, Borgwardt, Rasch, Schoelkopf and Smola (2012), A kernel two-sample test; Phipson and
Smyth (2010), Permutation p-values should never be zero.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # whose parts are imported when they are first used
from jaxtyping import Float

from bnlora.assess.comparison.pairs import Pairs


@dataclass(frozen=True)
class KernelTest:
    """Squared maximum mean discrepancy.

    Attributes:
        squared: MMD^2 between approximation and reference.
        null: MMD^2 between halves of the reference, at the same bandwidth.
        p_value: Permutation p-value of equal laws.
        bandwidth: h, in standard deviations of the reference.
        num_permutations: Number of random relabellings.
    """

    squared: float
    null: float
    p_value: float
    bandwidth: float
    num_permutations: int


def kernel_test(
    random: np.random.Generator,
    samples: Pairs,
    *,
    bandwidth: float | None = None,
    num_permutations: int = 999,
) -> KernelTest:
    """MMD^2 with its null level and permutation p-value.

    Args:
        random: Generator of the relabellings.
        samples: Halves of both sides.
        bandwidth: h; the median distance of the pooled sample by default.
        num_permutations: Number of relabellings P; the p-value is a multiple of 1 / (P + 1).

    Raises:
        ValueError: If the bandwidth is not positive or `num_permutations` is below one.
    """
    if num_permutations < 1 or (bandwidth is not None and not bandwidth > 0):
        raise ValueError(
            "expected a positive bandwidth and at least one permutation; got "
            f"bandwidth={bandwidth}, num_permutations={num_permutations}"
        )
    width = samples.posterior.shape[2]
    posterior, reference = samples.posterior.reshape(-1, width), samples.reference.reshape(-1, width)
    squares = scipy.spatial.distance.pdist(np.concatenate([posterior, reference]), "sqeuclidean")
    h = float(np.sqrt(np.median(squares))) if bandwidth is None else bandwidth
    # Shape (4n, 4n). `squareform` sets the diagonal to zero, so no draw is paired with itself.
    kernel = scipy.spatial.distance.squareform(np.exp(-squares / (2 * h**2)))
    is_posterior = np.arange(len(kernel)) < len(posterior)
    observed = float(_squared(kernel, is_posterior[None])[0])
    shuffled = _squared(kernel, random.permuted(np.tile(is_posterior, (num_permutations, 1)), axis=1))
    # Equivalent relabellings may differ by rounding; the tolerance counts them as equal.
    as_large = (shuffled >= observed - 1e-12).sum()
    half = len(reference) // 2
    within_reference = kernel[len(posterior) :, len(posterior) :]
    null = float(_squared(within_reference, (np.arange(2 * half) < half)[None])[0])
    return KernelTest(observed, null, float((1 + as_large) / (1 + num_permutations)), h, num_permutations)


def _squared(kernel: Float[np.ndarray, "m m"], first: Float[np.ndarray, "p m"]) -> Float[np.ndarray, " p"]:
    """Unbiased MMD^2 for each labelling into equal groups; the kernel has a zero diagonal.

    Args:
        kernel: Kernel matrix of the pooled sample.
        first: Whether a draw is in the first group, one labelling per row.
    """
    labels = first.astype(np.float64)
    # For all labellings at once: sum of the kernel from every draw to the first group, shape (p, m).
    to_first = labels @ kernel
    within = (to_first * labels).sum(1)
    between = (to_first * (1 - labels)).sum(1)
    others = kernel.sum() - within - 2 * between
    n, m = labels[0].sum(), (1 - labels[0]).sum()
    return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * between / (n * m)
