r"""The certificate of a reference: five checks of chains, on identifiable functions.

    R-hat, rank-normalised and split        below 1.01
    effective sample size, bulk and tail    above 400, all chains together
    divergent transitions                   none
    E-BFMI of every chain                   above 0.3
    for SMC: correlation with ancestors     below 0.7, after the last moves

Draws of a chain are autocorrelated. The library accounts for this by the effective sample size; for example,
`bnlora.compare` thins to half of it. So autocorrelation by itself fails no run, and the certificate states
which draws to keep if you want nearly independent ones. `Thresholds(autocorrelation=0.05)` requires such
draws, as posteriordb does; the lag-1 autocorrelation, averaged over chains, has a standard error of about
1 / sqrt(draws). Kernels without an energy have no E-BFMI, which the certificate reports as not checked.
Kernels without an accept step are always refused, because no diagnostic of the draws shows their bias.

References: Vehtari et al. (2021), arXiv 1903.08008 (R-hat, effective sample sizes); Betancourt (2016), arXiv
1604.00695 (E-BFMI); Magnusson et al. (2024), posteriordb, arXiv 2407.04967 (criteria of a reference).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from bnlora._util.display import Showable, Shown, Table
from bnlora._util.finding import Finding, Findings, Judged, count_words
from bnlora.infer.mcmc.checks import accepts, draw_more, limited, moved, worst
from bnlora.metrics.monte_carlo import bulk_ess, rank_rhat, tail_ess

_NEARLY = 0.05
"""Autocorrelation up to which draws are called nearly independent."""

Bias = Literal["none", "step"]
"""The bias of a kernel's draws: "none", or "step" if its step size decides what they converge to."""


@dataclass(frozen=True)
class Thresholds:
    """The limits that draws must satisfy. If you set laxer ones, report them with the result.

    Attributes:
        rhat: Largest R-hat.
        ess: Smallest effective sample size of bulk and of tail.
        divergences: Largest number of divergent transitions.
        bfmi: Smallest E-BFMI of a chain.
        autocorrelation: Largest lag-1 autocorrelation of the kept draws; not checked when None.
        ancestry: Largest correlation of SMC particles with their ancestors after the last moves.

    Example:
        >>> bl.Thresholds(ess=1000.0)
        Thresholds(rhat=1.01, ess=1000.0, divergences=0, bfmi=0.3, autocorrelation=None, ancestry=0.7)
    """

    rhat: float = 1.01
    ess: float = 400.0
    divergences: int = 0
    bfmi: float = 0.3
    autocorrelation: float | None = None
    ancestry: float = 0.7


@dataclass(frozen=True)
class Evidence:
    """The data that a certificate is computed from.

    Attributes:
        names: Names of the functions.
        values: Their values, shape (chain, draw, function).
        divergent: Which transitions diverged, shape (chain, transition).
        energy: Energy of every transition, NaN if the kernel has none.
        bias: "step" if the kernel has no accept step, so that its draws do not follow the target.
        constant: Functions that were left out because no sampled site changes them.
        ancestry: For SMC, the correlation of particles with their ancestors after the last moves of each run.
        moves: Number of these moves.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "c s k"]
    divergent: Bool[np.ndarray, "c n"]
    energy: Float[np.ndarray, "c n"]
    bias: Bias = "none"
    constant: tuple[str, ...] = ()
    ancestry: tuple[float, ...] = ()
    moves: int = 0


@dataclass(frozen=True, repr=False)
class Certificate(Shown, Judged):
    """The diagnostics of some chains, and whether they pass.

    Attributes:
        names: Names of the functions.
        rhat: R-hat of each function.
        ess_bulk: Effective sample size of the bulk of each function.
        ess_tail: Smaller one of the effective sample sizes of its 5 % and 95 % quantiles.
        autocorrelation: Lag-1 autocorrelation of each function.
        divergences: Divergent transitions after the warm-up.
        bfmi: E-BFMI of each chain; empty if the kernel has no energy.
        thresholds: The limits.
        bias: "step" if the kernel has no accept step; such draws are never certified.
        constant: Functions that were left out because no sampled site changes them.
        keep_every: Step between draws whose autocorrelation is at most 0.05 (or the threshold) in every
            function; 0 if the chains are too short to have one.
        num_draws: Draws of each chain; 0 if it was not recorded.
        ancestry: For SMC, the correlation of particles with their ancestors after the last moves of each run.
        moves: Number of these moves.

    Example:
        >>> about = {"rhat": (1.001,), "ess_bulk": (900.0,), "ess_tail": (750.0,), "autocorrelation": (0.01,)}
        >>> limits = bl.Thresholds()
        >>> bl.Certificate(("norm",), **about, divergences=0, bfmi=(0.9, 1.1), thresholds=limits).passed
        True
    """

    names: tuple[str, ...]
    rhat: tuple[float, ...]
    ess_bulk: tuple[float, ...]
    ess_tail: tuple[float, ...]
    autocorrelation: tuple[float, ...]
    divergences: int
    bfmi: tuple[float, ...]
    thresholds: Thresholds
    bias: Bias = "none"
    constant: tuple[str, ...] = ()
    keep_every: int = 1
    num_draws: int = 0
    ancestry: tuple[float, ...] = ()
    moves: int = 0

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.problems

    @cached_property
    def findings(self) -> tuple[Finding, ...]:  # type: ignore[override]
        """One finding for each check. A failed check is a problem: the draws cannot serve as a reference."""
        t, names = self.thresholds, self.names
        return (
            worst("R-hat", names, self.rhat, max, t.rhat, "run longer chains, or a longer warm-up"),
            worst("bulk ESS", names, self.ess_bulk, min, t.ess, draw_more(self.ess_bulk, t.ess)),
            worst("tail ESS", names, self.ess_tail, min, t.ess, draw_more(self.ess_tail, t.ess)),
            self._dependence,
            limited(
                "divergences",
                f"{self.divergences} transitions diverged, at most {t.divergences} may",
                self.divergences,
                t.divergences,
                max,
                "raise target_acceptance, or write the prior non-centred",
            ),
            self._energy,
            *moved(self.ancestry, self.moves, t.ancestry),
            accepts(self.bias),
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each check that failed: the number, its threshold, and what to change."""
        return tuple(finding.text for finding in self.problems)

    @property
    def _dependence(self) -> Finding:
        limit, name = self.thresholds.autocorrelation, "lag-1 autocorrelation"
        if limit is None:
            sentence = "not limited, because effective sample sizes account for it"
            return Finding(name, "not asked", sentence)
        return worst(name, self.names, self.autocorrelation, max, limit, self._thin)

    @property
    def _energy(self) -> Finding:
        if not self.bfmi:
            return Finding("E-BFMI", "not asked", "the sampler has no energy")
        least, limit = min(self.bfmi), self.thresholds.bfmi
        sentence = f"the least E-BFMI is {least:.2f}, must be at least {limit:g}"
        remedy = "a scale has heavy tails: write the prior non-centred, or use a lighter-tailed one"
        return limited("E-BFMI", sentence, least, limit, min, remedy)

    @property
    def _thin(self) -> str:
        if not self.keep_every:
            return "no step between draws makes them independent: run longer chains"
        left = f", which leaves {self.num_draws // self.keep_every:,} of {self.num_draws:,} in each chain"
        return f"keep every {ordinal(self.keep_every)} draw, `chains.thin({self.keep_every})`" + (
            left if self.num_draws else ""
        )

    @property
    def table(self) -> Table:
        """One row for each function."""
        columns = zip(self.names, self.rhat, self.ess_bulk, self.ess_tail, self.autocorrelation, strict=True)
        rows = tuple((n, f"{r:.4f}", f"{b:.0f}", f"{t:.0f}", f"{a:.3f}") for n, r, b, t, a in columns)
        return Table(self.verdict, ("function", "R-hat", "bulk ESS", "tail ESS", "lag-1"), rows)

    @property
    def verdict(self) -> str:
        """Certified or not, in one sentence."""
        energy = f"least E-BFMI {min(self.bfmi):.2f}" if self.bfmi else "no energy, so E-BFMI was not checked"
        if not self.passed:
            return "Not certified: " + "; ".join((*self.failures, *self._notes))
        counted = f"{len(self.names)} functions, {self.divergences} divergences, {energy}"
        return "; ".join((f"Certified: {counted}", *self._notes))

    @property
    def _notes(self) -> tuple[str, ...]:
        """Which draws to keep, and what was left out."""
        notes = []
        if self.passed and self.keep_every > 1:
            notes.append(f"every {ordinal(self.keep_every)} draw is nearly independent of the one before")
        if self.constant:
            notes.append(f"left out, because no sampled site changes them: {', '.join(self.constant)}")
        return tuple(notes)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The result of each check, and the table."""
        title = f"{'Certified' if self.passed else 'Not certified'}: {count_words(self.findings)}"
        return (Findings(title, self.findings), replace(self.table, title="Functions"), self._notes)

    def __repr__(self) -> str:
        return repr(self.table)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, lists and text."""
        return asdict(self) | {"passed": self.passed, "failures": list(self.failures)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Certificate":
        """The inverse of `to_json`; whether it passed is computed again."""
        names = ("names", "rhat", "ess_bulk", "ess_tail", "autocorrelation", "bfmi")
        parts = {name: tuple(stored[name]) for name in names}
        thresholds = Thresholds(**stored["thresholds"])
        divergences, bias = int(stored["divergences"]), stored["bias"]
        # Certificates of earlier versions lack the entries that have a default here.
        return cls(
            **parts,
            divergences=divergences,
            thresholds=thresholds,
            bias=bias,
            constant=tuple(stored.get("constant", ())),
            keep_every=int(stored.get("keep_every", 1)),
            num_draws=int(stored.get("num_draws", 0)),
            ancestry=tuple(stored.get("ancestry", ())),
            moves=int(stored.get("moves", 0)),
        )


def certify(evidence: Evidence, thresholds: Thresholds) -> Certificate:
    """Compute the numbers of a certificate.

    Raises:
        ValueError: If there are fewer than two chains or four draws, or a value is not finite.
    """
    values = np.asarray(evidence.values, np.float64)
    if values.shape[0] < 2 or values.shape[1] < 4:
        raise ValueError(
            "a certificate compares chains and needs at least two chains of four draws; got "
            f"{values.shape[0]} of {values.shape[1]}"
        )
    if not np.isfinite(values).all():
        bad = [
            n
            for n, v in zip(evidence.names, np.moveaxis(values, 2, 0), strict=True)
            if not np.isfinite(v).all()
        ]
        raise ValueError(f"the functions must be finite at every draw; these are not: {', '.join(bad)}")
    varies = np.ptp(values, axis=(0, 1)) > 0

    def each(measure: Callable[[np.ndarray], np.ndarray]) -> tuple[float, ...]:
        by_function = np.full(values.shape[2], np.nan)  # no diagnostic is defined if all draws are equal
        if varies.any():
            by_function[varies] = measure(values[:, :, varies])
        return tuple(map(float, by_function))

    bound = thresholds.autocorrelation
    has_energy = np.isfinite(evidence.energy).all()
    return Certificate(
        names=evidence.names,
        rhat=each(rank_rhat),
        ess_bulk=each(bulk_ess),
        ess_tail=each(tail_ess),
        autocorrelation=each(autocorrelation),
        divergences=int(evidence.divergent.sum()),
        bfmi=tuple(map(bfmi, evidence.energy)) if has_energy else (),
        thresholds=thresholds,
        bias=evidence.bias,
        constant=evidence.constant,
        keep_every=independent_step(values[:, :, varies], _NEARLY if bound is None else bound),
        num_draws=values.shape[1],
        ancestry=evidence.ancestry,
        moves=evidence.moves,
    )


def ordinal(number: int) -> str:
    """A number as in "every 8th"."""
    if number == 1:
        return ""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def independent_step(values: Float[np.ndarray, "c s k"], bound: float) -> int:
    """The smallest step between draws at which no function's autocorrelation exceeds the bound; 0 if none.

    It is at most a quarter of a chain, so that four draws of it are left.
    """
    for step in range(1, values.shape[1] // 4 + 1):
        if (autocorrelation(values, lag=step) <= bound).all():
            return step
    return 0


def autocorrelation(values: Float[np.ndarray, "c s k"], *, lag: int = 1) -> Float[np.ndarray, " k"]:
    """Autocorrelation, from covariances and variances about each chain's mean, averaged over chains."""
    centred = values - values.mean(1, keepdims=True)
    return (centred[:, lag:] * centred[:, :-lag]).mean((0, 1)) / (centred**2).mean((0, 1))


def bfmi(energy: Float[np.ndarray, " n"]) -> float:
    """Squared jumps of the energy over its variance: 2 for independent energies, near 0 for a slow walk."""
    energy = np.asarray(energy, np.float64)
    return float(np.mean(np.diff(energy) ** 2) / np.var(energy))
