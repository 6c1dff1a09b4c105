"""The second side of a comparison: a posterior to evaluate now, or a reference that was evaluated before.

`compare` reads of either what `Side` states, so it does not depend on which of them it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.typing import Adapters
from bnlora.assess.comparison.draws import Draws, Kind, evenly
from bnlora.assess.comparison.stored import StoredReference, describe, require_same_problem
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.certificate import Certificate
from bnlora.prediction.functions import PROBES, Functions, evaluate, identifiable
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import Prediction
from bnlora.program.conditional import condition
from bnlora.program.protocol import Model

Predict = Callable[[Adapters], Prediction]
"""Predicts the rows of a comparison with draws of adapters."""


@runtime_checkable
class Reference(Protocol):
    """A run of MCMC with the verdict of its own checks."""

    @property
    def model(self) -> Model:
        """The classifier."""
        ...

    @property
    def num_chains(self) -> int:
        """Number of chains, all of one length."""
        ...

    @property
    def certificate(self) -> Certificate | None:
        """What its checks concluded; None where they were not run."""
        ...

    def stored_adapters(self) -> Adapters:
        """Adapters of every stored draw with one leading axis, chain after chain."""
        ...


class Evaluated(NamedTuple):
    """The second side at the functions and rows of a comparison.

    Attributes:
        draws: Values of the functions.
        most: Most draws that predictions can be made of.
        predict: Gives the prediction of so many of its draws, evenly spaced.
    """

    draws: Draws
    most: int
    predict: Callable[[int], Prediction]


class Side(Protocol):
    """What a comparison needs of its second side."""

    @property
    def fixed(self) -> Mapping[str, Array]:
        """Value of every site that it holds, by name."""
        ...

    @property
    def unknown(self) -> str:
        """What it holds at values that are not known, in words; "" for nothing."""
        ...

    def check(self, model: Model, data: Batch, functions: Functions | None) -> None:
        """Raise `ValueError` unless it is of the same sites, label words and rows."""
        ...

    def model_for(self, posterior: Posterior, holds: Sequence[str]) -> Model:
        """The model under which both sides are evaluated, with the sites that only this side holds."""
        ...

    def functions(self, model: Model, data: Batch, given: Functions | None) -> Functions:
        """The functions of the comparison: those that are given, or the default ones."""
        ...

    def evaluate(
        self, key: Array, model: Model, functions: Functions, data: Batch, num_draws: int, predict: Predict
    ) -> Evaluated:
        """Its values of the functions, and its predictions."""
        ...


def side_of(reference: Any) -> Side:
    """A stored reference, or a posterior that is evaluated now, as the second side of a comparison."""
    return Before(reference) if isinstance(reference, StoredReference) else Now(reference)


@dataclass(frozen=True)
class Before:
    """The side of a stored reference."""

    stored: StoredReference

    @property
    def fixed(self) -> Mapping[str, Array]:
        """As in `Side`, like what follows."""
        return {name: jnp.asarray(value) for name, value in self.stored.fixed.items()}

    @property
    def unknown(self) -> str:
        """What it holds, if folders of earlier versions did not store the values."""
        return self.stored.record["held"] if self.stored.holds_unknown else ""

    def check(self, model: Model, data: Batch, functions: Functions | None) -> None:
        """The rows must be those that it was stored with."""
        if functions is not None:
            raise ValueError("a stored reference has the default functions alone; leave `functions` out")
        require_same_problem(self.stored, model, data)

    def model_for(self, posterior: Posterior, holds: Sequence[str]) -> Model:
        """The approximation's model, conditioned on what the reference holds in addition."""
        learned = {name: jnp.asarray(value) for name, value in self.stored.params.items()}
        params = dict(getattr(posterior, "params", {})) | learned
        return condition(posterior.model, {name: self.fixed[name] for name in holds}, params)

    def functions(self, model: Model, data: Batch, given: Functions | None) -> Functions:
        """Those that were stored."""
        return identifiable(model, data[:PROBES], families=self.stored.families)

    def evaluate(
        self, key: Array, model: Model, functions: Functions, data: Batch, num_draws: int, predict: Predict
    ) -> Evaluated:
        """What was stored."""
        kept = len(self.stored.prediction.draw_log_probs)
        return Evaluated(self.stored.draws, kept, self.stored.thinned_prediction)


@dataclass(frozen=True)
class Now:
    """The side of a posterior: a run of MCMC with all its draws, or anything else with new ones."""

    posterior: Any

    @property
    def fixed(self) -> Mapping[str, Array]:
        """As in `Side`, like what follows."""
        return self.posterior.model.fixed

    @property
    def unknown(self) -> str:
        """A model knows the values of its sites."""
        return ""

    def check(self, model: Model, data: Batch, functions: Functions | None) -> None:
        """The models must be of the same sites, label words and kind."""
        own, other = describe(model), describe(self.posterior.model)
        if own != other:
            raise ValueError(
                "expected both posteriors over the same sites and label words, and both of the network or "
                f"both of the tangent model in the same frames; got\n{own}\nand\n{other}"
            )

    def model_for(self, posterior: Posterior, holds: Sequence[str]) -> Model:
        """Its own model, which holds them."""
        return self.posterior.model

    def functions(self, model: Model, data: Batch, given: Functions | None) -> Functions:
        """Those that are given, or the default ones."""
        return identifiable(model, data[:PROBES]) if given is None else given

    def evaluate(
        self, key: Array, model: Model, functions: Functions, data: Batch, num_draws: int, predict: Predict
    ) -> Evaluated:
        """Its values and predictions, computed here."""
        run = self.posterior
        if isinstance(run, Reference):
            adapters = run.stored_adapters()
            draws = draws_of(model, functions, adapters, data, chains=run.num_chains)
        else:
            adapters = run.draw_adapters(key, num_draws)
            draws = draws_of(model, functions, adapters, data)
        return Evaluated(draws, num_draws, lambda size: predict(thinned(adapters, size)))


def draws_of(
    model: Model, functions: Functions, adapters: Adapters, data: Batch, *, chains: int | None = None
) -> Draws:
    """The functions at adapters with a leading draw axis.

    Args:
        model: The classifier.
        functions: The functions.
        adapters: Draws, chain after chain.
        data: Rows that the functions read.
        chains: Number of chains; None for independent draws.
    """
    total = len(jax.tree.leaves(adapters)[0])
    if total % (chains or 1):
        raise ValueError(f"expected {chains} chains of one length; got {total} draws in all")
    names, values = evaluate(functions, model, adapters, data)
    kind: Kind = "independent" if chains is None else "chains"
    return Draws(names, values.reshape(chains or 1, -1, len(names)), kind)


def thinned(adapters: Adapters, size: int) -> Adapters:
    """`size` of the draws, evenly spaced."""
    chosen = evenly(len(jax.tree.leaves(adapters)[0]), size)
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x)[chosen], adapters))
