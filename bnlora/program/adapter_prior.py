"""A prior program bound to the sites of its adapters and to the parameters of the likelihood."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax import Array

from bnlora._util.copying import state
from bnlora._util.typing import Adapters
from bnlora.adapters.sites import Sites
from bnlora.priors import Prior
from bnlora.program.likelihoods import PARAMETERS


@dataclass(frozen=True)
class AdapterPrior:
    """A prior program bound to its sites, callable with the model's arguments (it ignores them).

    Guides are built on this object, so that building one never traces the language model.

    Attributes:
        sites: Where the adapters are.
        program: The prior of the adapters, and of the likelihood's parameters if it returns them.
        parameters: The program of the likelihood's parameters, if it has any.
    """

    sites: Sites
    program: Prior
    parameters: Callable[[], Mapping[str, Array]] = dict

    def __call__(self, *args, **kwargs) -> Adapters:
        """Run the prior and return adapters whose families and shapes are checked.

        The likelihood's parameters, if there are any, are beside them under the key "likelihood".
        """
        drawn = self.program(self.sites)
        if not isinstance(drawn, Mapping):
            raise ValueError(f"a prior must return adapters by family; got {type(drawn).__name__}")
        adapters = {name: pair for name, pair in drawn.items() if name != PARAMETERS}
        self.sites.check(adapters)
        params = drawn[PARAMETERS] if PARAMETERS in drawn else self.parameters()
        return {**adapters, PARAMETERS: params} if params else drawn

    def __getstate__(self) -> dict[str, Any]:
        return state(self, "program")


def parameters_of(adapters: Adapters) -> Mapping[str, Array]:
    """The likelihood's parameters of one draw; empty if it has none."""
    return adapters.get(PARAMETERS, {})
