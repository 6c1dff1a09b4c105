r"""Deep ensembles: the equal mixture of several fits with different random keys.

    q(adapters) = 1/M sum_m q_m(adapters)

Members may be points, as in the paper, or posteriors of any kind. They differ in start and order of rows;
their spread is not derived from a posterior.

Reference: Lakshminarayanan et al. (2017), Simple and scalable predictive uncertainty estimation using deep
ensembles, arXiv 1612.01474.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bnlora._util.checks import check_at_least, check_key
from bnlora._util.copying import error_parts
from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.infer.svi.fit import fit
from bnlora.infer.svi.result import Fit, FitDiverged
from bnlora.prediction.posterior import Posterior
from bnlora.program.protocol import Model


@dataclass(frozen=True)
class Ensemble:
    """An equal mixture of posteriors of one classifier; a posterior for `predict`.

    Attributes:
        members: The posteriors. Priors and guides may differ; base, sites and classes may not.
        stopped: Why there are no more members: "size" (all fitted) or "interrupted".
        unfinished: The fit that an interrupt ended, with its parameters so far; not part of the mixture.

    Raises:
        ValueError: If there are no members, or their base, sites or label ids differ.
    """

    members: tuple[Posterior, ...]
    stopped: str = "size"
    unfinished: Posterior | None = None

    def __post_init__(self):
        check_at_least({"the number of members": len(self.members)}, 1)
        first = self.members[0].model
        for number, member in enumerate(self.members[1:], start=2):
            model = member.model
            same = {
                "base": model.base is first.base,
                "sites": model.sites == first.sites,
                "likelihood": model.likelihood == first.likelihood,
            }
            differing = [name for name, equal in same.items() if not equal]
            if differing:
                raise ValueError(
                    "all members of an ensemble must have the base, sites and classes of the first; member "
                    f"{number} has other {' and '.join(differing)}"
                )

    @property
    def model(self) -> Model:
        """The classifier of the first member."""
        return self.members[0].model

    def draw_adapters(self, key: Array, num_draws: int) -> Adapters:
        """The same number of draws of every member, one member after the other, with a leading draw axis.

        Raises:
            ValueError: If the number of members does not divide `num_draws`.
        """
        key = check_key(key)
        check_at_least({"num_draws": num_draws}, 1)
        share, rest = divmod(num_draws, len(self.members))
        if rest:
            raise ValueError(
                f"num_draws must be a multiple of the {len(self.members)} members; got {num_draws}, "
                f"nearest is {max(round(num_draws / len(self.members)), 1) * len(self.members)}"
            )
        keys = jax.random.split(key, len(self.members))
        draws = [m.draw_adapters(k, share) for m, k in zip(self.members, keys, strict=True)]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *draws)

    def __repr__(self) -> str:
        early = "" if self.stopped == "size" else f", {self.stopped} before the next was finished"
        return f"Ensemble({len(self.members)} members of {', '.join(_kinds(self.members))}{early})"


class NoMemberFinished(ValueError):
    """An interrupt came before the first member was finished. `fit` is this member, unfinished."""

    def __init__(self, fit: Fit):
        super().__init__(
            f"interrupted after {len(fit.step_seconds)} steps of the first member; expected at least one "
            "finished member (the unfinished one is in this error's `fit`)"
        )
        self.fit = fit

    def __reduce__(self) -> tuple[Any, ...]:
        return error_parts(self)


class EnsembleDiverged(FitDiverged):
    """A member diverged. `fit` is this member, unfinished; `members` are those finished before it."""

    def __init__(self, diverged: FitDiverged, members: tuple[Posterior, ...], size: int):
        ValueError.__init__(
            self,
            f"member {len(members) + 1} of {size}: {diverged} (those finished before it are in `members`)",
        )
        self.fit, self.members = diverged.fit, members


def fit_ensemble(
    key: Array,
    model: Model,
    guide: Callable[[Any], Callable],
    train: Batch,
    optimizer: optax.GradientTransformation,
    *,
    size: int,
    **options: Any,
) -> Ensemble:
    """Fit the same model several times, each time with another key.

    Args:
        key: Random key, split over the members.
        model: A `Classifier`.
        guide: A function from a prior to a guide, such as the class `guides.SiteFlow`. It is called once for
            each member, because NumPyro's autoguides keep the start of their first fit.
        train: Rows to fit.
        optimizer: optax optimiser.
        size: Number of members.
        **options: Options of `fit`: `num_steps`, `batch_size` and so on.

    Returns:
        The ensemble. An interrupt (Ctrl-C, or the stop button of a notebook) ends it with the finished
        members; the repr reports this, and `unfinished` is the member that was not finished.

    Raises:
        ValueError: If `size` is below one, and as `fit`.
        NoMemberFinished: If an interrupt comes before the first member is finished.
        EnsembleDiverged: If a member diverges; a `FitDiverged` with the finished members.
    """
    key = check_key(key)
    check_at_least({"size": size}, 1)
    members: list[Fit] = []
    for k in jax.random.split(key, size):
        try:
            member = fit(k, model, guide(model.prior), train, optimizer, **options)
        except FitDiverged as error:
            raise EnsembleDiverged(error, tuple(members), size) from error
        except KeyboardInterrupt:  # before the first step, as while its activations were cached
            if not members:
                raise
            return Ensemble(tuple(members), "interrupted")
        if member.stopped == "interrupted":
            if not members:
                raise NoMemberFinished(member)
            return Ensemble(tuple(members), "interrupted", member)
        members.append(member)
    return Ensemble(tuple(members))


def _kinds(members: tuple[Posterior, ...]) -> list[str]:
    return sorted({type(member).__name__ for member in members})
