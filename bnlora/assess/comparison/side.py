"""The second side of a comparison: a posterior to evaluate now, or a stored reference.

`compare` uses both through the protocol `Side`.
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
"""Function that predicts the rows of a comparison with draws of adapters."""


@runtime_checkable
class Reference(Protocol):
    """A run of MCMC with a certificate."""

    @property
    def model(self) -> Model:
        """The classifier."""
        ...

    @property
    def num_chains(self) -> int:
        """Number of chains; all have the same length."""
        ...

    @property
    def certificate(self) -> Certificate | None:
        """Results of its convergence checks; None if they were not run."""
        ...

    def stored_adapters(self) -> Adapters:
        """Adapters of every stored draw, with one leading draw axis, chain after chain."""
        ...


class Evaluated(NamedTuple):
    """The second side, evaluated at the functions and rows of a comparison.

    Attributes:
        draws: Values of the functions.
        most: Largest number of draws available for predictions.
        predict: Function from a number of draws to their prediction; the draws are evenly spaced.
    """

    draws: Draws
    most: int
    predict: Callable[[int], Prediction]


@runtime_checkable
class Side(Protocol):
    """Interface of the second side of a comparison."""

    @property
    def fixed(self) -> Mapping[str, Array]:
        """Value of every fixed site, by name."""
        ...

    @property
    def unknown(self) -> str:
        """Description of the fixed sites whose values are unknown; "" if there are none."""
        ...

    def check(self, model: Model, data: Batch, functions: Functions | None) -> None:
        """Raise `ValueError` if sites, label words or rows differ."""
        ...

    def model_for(self, posterior: Posterior, holds: Sequence[str]) -> Model:
        """The model that evaluates both sides; `holds` are the sites that only this side fixes."""
        ...

    def functions(self, model: Model, data: Batch, given: Functions | None) -> Functions:
        """The functions of the comparison: `given`, or the default ones if None."""
        ...

    def evaluate(
        self, key: Array, model: Model, functions: Functions, data: Batch, num_draws: int, predict: Predict
    ) -> Evaluated:
        """Evaluate the functions and the predictions."""
        ...


def side_of(reference: Any) -> Side:
    """The `Side` of a stored reference or of a posterior."""
    return StoredSide(reference) if isinstance(reference, StoredReference) else LiveSide(reference)


@dataclass(frozen=True)
class StoredSide:
    """The side of a stored reference."""

    stored: StoredReference

    @property
    def fixed(self) -> Mapping[str, Array]:
        """See `Side`."""
        return {name: jnp.asarray(value) for name, value in self.stored.fixed.items()}

    @property
    def unknown(self) -> str:
        """See `Side`; folders of earlier versions do not contain the values of fixed sites."""
        return self.stored.record["held"] if self.stored.holds_unknown else ""

    def check(self, model: Model, data: Batch, functions: Functions | None) -> None:
        """See `Side`; the rows must be those of the stored reference."""
        if functions is not None:
            raise ValueError("a stored reference has only the default functions; leave `functions` out")
        require_same_problem(self.stored, model, data)

    def model_for(self, posterior: Posterior, holds: Sequence[str]) -> Model:
        """The approximation's model, conditioned on the sites that only the reference fixes."""
        learned = {name: jnp.asarray(value) for name, value in self.stored.params.items()}
        params = dict(getattr(posterior, "params", {})) | learned
        return condition(posterior.model, {name: self.fixed[name] for name in holds}, params)

    def functions(self, model: Model, data: Batch, given: Functions | None) -> Functions:
        """The default functions of the stored families."""
        return identifiable(model, data[:PROBES], families=self.stored.families)

    def evaluate(
        self, key: Array, model: Model, functions: Functions, data: Batch, num_draws: int, predict: Predict
    ) -> Evaluated:
        """The stored values and predictions."""
        most = len(self.stored.prediction.draw_log_probs)
        return Evaluated(self.stored.draws, most, self.stored.thinned_prediction)


@dataclass(frozen=True)
class LiveSide:
    """The side of a posterior: all stored draws of a run of MCMC, new draws of any other posterior."""

    posterior: Any

    @property
    def fixed(self) -> Mapping[str, Array]:
        """See `Side`."""
        return self.posterior.model.fixed

    @property
    def unknown(self) -> str:
        """Always empty: a model contains the values of its fixed sites."""
        return ""

    def check(self, model: Model, data: Batch, functions: Functions | None) -> None:
        """See `Side`; the models must have the same sites, label words and kind."""
        expected, other = describe(model), describe(self.posterior.model)
        if expected != other:
            raise ValueError(
                "expected two posteriors over the same sites and label words, both of the network, or both "
                f"of the tangent model in the same frames; got\n{expected}\nand\n{other}"
            )

    def model_for(self, posterior: Posterior, holds: Sequence[str]) -> Model:
        """The model of this side; it contains the values of `holds`."""
        return self.posterior.model

    def functions(self, model: Model, data: Batch, given: Functions | None) -> Functions:
        """See `Side`."""
        return identifiable(model, data[:PROBES]) if given is None else given

    def evaluate(
        self, key: Array, model: Model, functions: Functions, data: Batch, num_draws: int, predict: Predict
    ) -> Evaluated:
        """Evaluate the functions; predictions are computed when requested."""
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
    """Evaluate functions at adapters with a leading draw axis.

    Args:
        model: The classifier.
        functions: The functions.
        adapters: Draws, chain after chain.
        data: Rows that the functions read.
        chains: Number of chains; None for independent draws.

    Raises:
        ValueError: If the number of draws is not a multiple of `chains`.
    """
    total = len(jax.tree.leaves(adapters)[0])
    if total % (chains or 1):
        raise ValueError(f"expected {chains} chains of one length; got {total} draws in all")
    names, values = evaluate(functions, model, adapters, data)
    kind: Kind = "independent" if chains is None else "chains"
    return Draws(names, values.reshape(chains or 1, -1, len(names)), kind)


def thinned(adapters: Adapters, size: int) -> Adapters:
    """`size` evenly spaced draws."""
    indices = evenly(len(jax.tree.leaves(adapters)[0]), size)
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x)[indices], adapters))
