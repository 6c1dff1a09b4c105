r"""Draws of Markov chains: a posterior for `predict`, and the reference that others are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_at_least, check_key, listed
from bnlora._util.compilation import program
from bnlora._util.display import Showable, Shown, facts
from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.certificate import Certificate, Evidence, Thresholds, certify
from bnlora.infer.mcmc.samplers import Tuning
from bnlora.infer.mcmc.target import Target
from bnlora.prediction.functions import PROBES, Functions, evaluate, identifiable
from bnlora.program.model import kind_of


@dataclass(frozen=True, repr=False)
class Chains(Shown):
    """Draws of several chains of one sampler, or of one chain by stochastic gradients.

    Attributes:
        target: What was sampled, and the values of the fixed sites.
        vectors: Unconstrained draws, shape (chain, draw, p).
        stats: `divergent`, `energy`, `acceptance`, `num_gradients` of each transition, shape (chain,
            transition).
        tuning: Results of the warm-up of each chain; leaves have a leading chain axis.
        record: Sampler, options, seed, seconds, command and versions.
        thinning: Transitions from one kept draw to the next.

    Example:
        >>> chains.num_chains, chains.vectors.shape  # chains, draws, coordinates
        (4, (4, 100, 18))
    """

    target: Target
    vectors: Float[np.ndarray, "c s p"]
    stats: Mapping[str, np.ndarray]
    tuning: Tuning
    record: Mapping[str, Any]
    thinning: int = 1

    @property
    def model(self) -> Any:
        """The classifier, conditional on the fixed sites."""
        return self.target.model

    @property
    def kind(self) -> str:
        """The kind of model: a "network", or its "tangent" at the base."""
        return kind_of(self.model)

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return len(self.vectors)

    @property
    def _count(self) -> str:
        return "1 chain" if self.num_chains == 1 else f"{self.num_chains} chains"

    @property
    def num_draws(self) -> int:
        """Kept draws of each chain."""
        return self.vectors.shape[1]

    @property
    def num_gradients(self) -> dict[str, int]:
        """Gradients of the log-density in the warm-up and after it, all chains together."""
        warm = int(np.sum(self.tuning.num_gradients))
        return {"warm-up": warm, "sampling": int(self.stats["num_gradients"].sum())}

    @property
    def _rows(self) -> Float[np.ndarray, "n p"]:
        """Every kept draw, chain after chain."""
        return self.vectors.reshape(-1, self.vectors.shape[-1])

    def _adapters(self, vectors: Float[np.ndarray, "n p"]) -> Adapters:
        return program(self, _adapters_at)(vectors)

    def stored_adapters(self) -> Adapters:
        """Adapters of every kept draw, chain after chain, with a leading draw axis."""
        return self._adapters(self._rows)

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """Adapters of different kept draws, chosen at random, with a leading draw axis.

        Raises:
            ValueError: If `num_draws` is below 1, or above the number of kept draws.
        """
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        total = len(self._rows)
        if num_draws > total:
            raise ValueError(
                f"the chains keep {total} draws; num_draws must be at most that, got {num_draws}"
            )
        chosen = np.asarray(jax.random.choice(key, total, (num_draws,), replace=False))
        return self._adapters(self._rows[chosen])

    def sites(self) -> dict[str, np.ndarray]:
        """Every kept draw of every sampled site, constrained, with leading axes (chain, draw)."""
        values = program(self, _sites_at)(self._rows)
        lead = self.vectors.shape[:2]
        return {name: np.asarray(x).reshape(*lead, *x.shape[1:]) for name, x in values.items()}

    def values(
        self, functions: Functions | None = None
    ) -> tuple[tuple[str, ...], Float[np.ndarray, "c s k"]]:
        """Names and values of identifiable functions at every kept draw."""
        if functions is None:
            return self._default_values
        # A caller's functions may read another model, which needs more than the last position of each row.
        return self._evaluated(functions, self.target.rows)

    @cached_property
    def _default_values(self) -> tuple[tuple[str, ...], Float[np.ndarray, "c s k"]]:
        train = self.target.train
        return self._evaluated(identifiable(self.model, train[:PROBES]), train)

    def _evaluated(
        self, functions: Functions, rows: Batch
    ) -> tuple[tuple[str, ...], Float[np.ndarray, "c s k"]]:
        names, values = evaluate(functions, self.model, self.stored_adapters(), rows)
        return names, values.reshape(*self.vectors.shape[:2], -1)

    @cached_property
    def certificate(self) -> Certificate:
        """The certificate at the default thresholds, on the default functions."""
        return self.certify()

    def certify(
        self, *, functions: Functions | None = None, thresholds: Thresholds | None = None
    ) -> Certificate:
        """Check the draws.

        Args:
            functions: Functions to check; `bnlora.prediction.functions.identifiable` at eight rows when
                omitted.
            thresholds: Their limits; the defaults of `Thresholds` when omitted.

        Returns:
            The certificate. It leaves out functions that the sampled sites cannot change, and names them.

        Raises:
            ValueError: If no function is left, there are fewer than two chains or four draws, or a value is
                not finite; always for a chain of `sgld` or `sghmc`.
        """
        self._require_comparable()
        names, values = self.values(functions)
        constant = self._unmoved(functions, names, values)
        kept = [k for k, name in enumerate(names) if name not in constant]
        if not kept:
            raise ValueError(
                "expected a function that the sampled sites change; these do not depend on them: "
                f"{listed(constant)}"
            )
        evidence = Evidence(
            tuple(names[k] for k in kept),
            values[:, :, kept],
            self.stats["divergent"],
            self.stats["energy"],
            self.record["bias"],
            constant,
            tuple(self.record.get("correlation", ())),
            max((moves[-1] for moves in self.record.get("moves", ())), default=0),
        )
        return certify(evidence, Thresholds() if thresholds is None else thresholds)

    def _require_comparable(self) -> None:
        """Raise `ValueError` for a single chain without an accept step; more draws would not help."""
        if self.num_chains == 1 and self.record["bias"] == "step":
            raise ValueError(
                f"a single chain of {self.record['sampler']} cannot be certified: the sampler has no accept "
                "step, so its draws have a bias that depends on its step size, and there is no second chain "
                "to compare with; use bl.sample_nuts or bl.sample_hmc"
            )

    def _unmoved(
        self, functions: Functions | None, names: tuple[str, ...], values: Float[np.ndarray, "c s k"]
    ) -> tuple[str, ...]:
        """Names of the functions that the sampled sites do not change anywhere."""
        still = np.ptp(values, axis=(0, 1)) == 0
        if functions is None or not still.any():
            return ()
        # A stuck chain also gives equal values. Functions that it could have changed differ at other vectors.
        places = np.random.default_rng(0).normal(size=(2, self.vectors.shape[-1])).astype(self.vectors.dtype)
        elsewhere = evaluate(functions, self.model, self._adapters(places), self.target.rows)[1]
        equal = np.isclose(elsewhere, values[0, 0], rtol=1e-5, atol=0.0).all(0)
        return tuple(name for name, s, e in zip(names, still, equal, strict=True) if s and e)

    def thin(self, step: int) -> "Chains":
        """Every `step`-th draw of each chain; the last draw is always kept.

        Raises:
            ValueError: If `step` is below 1, or fewer than four draws of a chain would be left.
        """
        if step < 1 or self.num_draws // step < 4:
            raise ValueError(
                f"the step must be at least 1 and leave four of {self.num_draws} draws; got {step}"
            )
        kept = slice(self.num_draws - 1 - step * (self.num_draws // step - 1), None, step)
        # The reports are not thinned, because divergences between kept draws count too.
        return replace(self, vectors=self.vectors[:, kept], thinning=self.thinning * step)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """How the draws were made, and the certificate if it was computed before."""
        gradients, plan = self.num_gradients, self.record.get("plan", {})
        acceptance = np.asarray(self.stats["acceptance"])
        cut = f", {plan.get('num_draws')} requested" if self.record["stopped"] != "done" else ""
        about = {
            "model": self.kind,
            "sampler": str(self.record["sampler"]),
            "chains": str(self.num_chains),
            "draws of each": f"{self.num_draws:,}, every {self.thinning}{cut}",
            "coordinates": f"{self.vectors.shape[-1]:,}",
            "held": self.target.held or "nothing",
            "gradients": f"{gradients['warm-up']:,} in the warm-up, {gradients['sampling']:,} after it",
            "mean acceptance": f"{acceptance.mean():.3f}" if acceptance.size else "none",
            "divergences": f"{int(self.stats['divergent'].sum()):,}",
            "time": f"{self.record['seconds']:,.0f} s",
        }
        # The certificate runs the model at all draws, so displaying the chains must not compute it.
        judged = self.__dict__.get("certificate")
        unknown = ("The draws have not been checked yet; `.certificate` does this.",)
        return (facts("Chains", about), *(unknown if judged is None else judged.overview))

    def __repr__(self) -> str:
        gradients = self.num_gradients
        total = sum(gradients.values())
        kind = f", {self.kind}" if self.kind == "tangent" else ""
        lines = [
            f"Chains({self.record['sampler']}: {self._count} of {self.num_draws} draws, every "
            f"{self.thinning}, {self.vectors.shape[-1]:,} coordinates{kind})",
            f"  {total:,} gradients, {gradients['warm-up'] / max(total, 1):.0%} of them in the warm-up; "
            f"{int(self.stats['divergent'].sum())} divergences; {self.record['seconds']:.0f} s",
        ]
        if self.record["stopped"] != "done":
            requested = self.record["plan"]["num_draws"]
            lines.append(f"  {self.record['stopped']}: {requested} draws of each chain were requested")
        if self.target.held:
            lines.append(f"  {self.target.held}")
        return "\n".join(lines)


def _adapters_at(chains: Chains, vectors: Array) -> Adapters:
    return jax.lax.map(chains.target.view.adapters, vectors)


def _sites_at(chains: Chains, vectors: Array) -> dict[str, Array]:
    return jax.lax.map(chains.target.view.sites, vectors)
