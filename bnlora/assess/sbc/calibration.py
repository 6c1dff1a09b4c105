"""Tests of the ranks of a simulation-based calibration: two for each function, and one verdict.

    SBC   R ~ uniform on {0, ..., L}                       the draws are right on average over data
    VSBC  p = R / L has the same law as 1 - p              the draws are unbiased on average over data

Each test is corrected for the number of functions by Holm's rule. Tests and references:
`bnlora.metrics.ranks`.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from bnlora._util.display import Showable, Shown, Table
from bnlora._util.finding import Finding, Findings, Judged, Status, count_words
from bnlora.metrics.ranks import dispersion, holm, symmetry, uniformity


@dataclass(frozen=True, repr=False)
class Calibration(Shown, Judged):
    """Ranks of the truth among the draws of an inference, over simulations, with tests.

    Attributes:
        names: Names of the functions.
        ranks: Number of draws below the truth, shape (simulation, function), for the simulations whose draws
            are all finite.
        num_draws: Number of draws L; ranks run from 0 to L.
        failed: Whether a simulation gave a draw that is not finite, shape (simulation,), all simulations.
        level: Level of each test, over all functions together.
    """

    names: tuple[str, ...]
    ranks: Int[np.ndarray, "m k"]
    num_draws: int
    failed: Bool[np.ndarray, " m"]
    level: float = 0.05

    @cached_property
    def p_values(self) -> Float[np.ndarray, " k"]:
        """Exact p-values of uniform ranks (SBC), by function."""
        return np.array([uniformity(r, self.num_draws) for r in self.ranks.T])

    @cached_property
    def symmetry_p_values(self) -> Float[np.ndarray, " k"]:
        """Exact p-values of symmetry of p about one half (VSBC), by function."""
        return np.array([symmetry(r, self.num_draws)[1] for r in self.ranks.T])

    @property
    def adjusted(self) -> Float[np.ndarray, " k"]:
        """`p_values` adjusted by Holm's rule for the number of functions."""
        return holm(self.p_values)

    @property
    def symmetry_adjusted(self) -> Float[np.ndarray, " k"]:
        """`symmetry_p_values` adjusted by Holm's rule for the number of functions."""
        return holm(self.symmetry_p_values)

    @property
    def probabilities(self) -> Float[np.ndarray, "m k"]:
        """Estimates of Pr_q(f < f(truth)) in each simulation: (rank + 1/2) / (L + 1)."""
        return (self.ranks + 0.5) / (self.num_draws + 1)

    @property
    def passed(self) -> bool:
        """Whether uniform ranks are rejected for no function at `level` and no simulation failed."""
        return bool((self.adjusted >= self.level).all()) and not self.failed.any()

    @property
    def unbiased(self) -> bool:
        """Whether symmetry is rejected for no function at `level` and no simulation failed.

        This is a weaker property than `passed`.
        """
        return bool((self.symmetry_adjusted >= self.level).all()) and not self.failed.any()

    @property
    def directions(self) -> tuple[str, ...]:
        """Error of the draws of each function in words, "" if neither test rejects.

        Bias is reported if symmetry is rejected. Otherwise the width is reported if `dispersion` is two
        standard errors from its value for uniform ranks. Bias also increases the dispersion, so the width
        is not reported together with a bias.
        """
        return tuple(self._direction(k) for k in range(len(self.names)))

    def _direction(self, k: int) -> str:
        uneven, biased = self.adjusted[k] < self.level, self.symmetry_adjusted[k] < self.level
        if not (uneven or biased):
            return ""
        if biased:  # mean p above one half: most draws are below the truth
            return "too low" if self.probabilities[:, k].mean() > 0.5 else "too high"
        _, score = dispersion(self.ranks[:, k], self.num_draws)
        if abs(score) > 2:
            return "too narrow" if score > 0 else "too wide"
        return "wrong shape"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding for each test, and one for the failed simulations.

        Ranks that are not uniform are a problem. Asymmetry is a caution, because it is part of the SBC test.
        """
        lost, total = int(self.failed.sum()), len(self.failed)
        sentence = f"{lost} of {total} simulations were not finite"
        if lost:
            sentence += " and have no rank, so neither test passes"
        remedy = "find out why the inference fails in these simulations; `failed` marks them"
        fine = Finding("simulations", "fine", sentence, lost, 0)
        return (
            self._tested("SBC", "uniform ranks", self.adjusted),
            self._tested("VSBC", "symmetry", self.symmetry_adjusted),
            replace(fine, status="problem", remedy=remedy) if lost else fine,
        )

    def _tested(self, name: str, claim: str, adjusted: np.ndarray) -> Finding:
        """The finding of one test over all functions."""
        rejected = adjusted < self.level
        least = float(adjusted.min())
        functions = [f for f, bad in zip(self.names, rejected, strict=True) if bad]
        outcome = (
            f"rejects {claim} for {', '.join(functions)}" if functions else f"no function rejects {claim}"
        )
        sentence = f"{outcome} (least adjusted p {_p(least)}, level {self.level:g})"
        if not functions:
            return Finding(name, "fine", sentence, least, self.level)
        wrong = dict.fromkeys(d for d, bad in zip(self.directions, rejected, strict=True) if bad)
        remedy = f"the draws are {' or '.join(wrong)}: give the guide a richer family or fit longer"
        status: Status = "problem" if name == "SBC" else "caution"
        return Finding(name, status, sentence, least, self.level, remedy)

    @property
    def verdict(self) -> str:
        """Conclusions of both tests, and the number of failed simulations if there are any."""
        *tests, simulations = self.findings
        texts = [f"{test.name}: {test.sentence}" for test in tests]
        if simulations.status == "problem":
            texts.append(simulations.sentence)
        return "; ".join(texts)

    @property
    def table(self) -> Table:
        """One row for each function.

        "spread" is the second moment of the ranks about L / 2, divided by that of uniform ranks. Draws that
        are too narrow increase it, draws that are too wide decrease it, and bias increases it.
        """
        tests = (self.p_values, self.adjusted, self.symmetry_p_values, self.symmetry_adjusted)
        rows = []
        for k, name in enumerate(self.names):
            spread, _ = dispersion(self.ranks[:, k], self.num_draws)
            numbers = [f"{self.probabilities[:, k].mean():.3f}", f"{spread:.2f}", *(_p(t[k]) for t in tests)]
            rows.append((name, *numbers, self.directions[k]))
        header = ("function", "mean p", "spread", "SBC p", "adjusted", "VSBC p", "adjusted", "draws are")
        title = (
            f"Calibration: {len(self.failed)} simulations, {int(self.failed.sum())} failed, "
            f"{self.num_draws} draws each"
        )
        return Table(title, header, tuple(rows))

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The findings and the table."""
        return (Findings(f"Calibration: {count_words(self.findings)}", self.findings), self.table)

    def __repr__(self) -> str:
        return f"{self.table!r}\n{self.verdict}"


def _p(value: float) -> str:
    return "<1e-4" if value < 1e-4 else f"{value:.4f}"
