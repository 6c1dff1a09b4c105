"""The sites that a prior program declares: names, shapes, plates and laws.

A prior is a program, so it must run to show its sites. Here it runs on shapes only: nothing is compiled or
computed. A site whose law cannot be sampled (`ImproperUniform`) gets a value inside its support. Such a prior
then runs like any other if only its density is needed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.infer.inspect import get_dependencies
from numpyro.primitives import Messenger

from bnlora._util.typing import NOISE

OWNED = {"y": "the labels that the model observes", "data": "the model's plate over the rows"}
"""Names that a prior must not use, and the part of the model that uses each."""


@dataclass(frozen=True)
class Variable:
    """A sample site of a prior.

    Attributes:
        name: Name of the site.
        law: Name of its distribution.
        shape: Shape of its value.
        free: Shape of the unconstrained value; None if the site is discrete.
        event_dim: Number of trailing axes that do not belong to plates.
        plates: Axis of every enclosing plate, by the plate's name.
        infer: The marks that the prior set.
        observed: Whether the program fixes the value, as `obs=` and `numpyro.factor` do.
        improper: Whether the law cannot be sampled.
    """

    name: str
    law: str
    shape: tuple[int, ...]
    free: tuple[int, ...] | None
    event_dim: int
    plates: Mapping[str, int]
    infer: Mapping[str, Any]
    observed: bool
    improper: bool

    @property
    def is_noise(self) -> bool:
        """Whether the site is noise that only completes a conditional law."""
        return bool(self.infer.get(NOISE))


@dataclass(frozen=True)
class Program:
    """The names that a prior declares, in program order.

    Attributes:
        latent: The sites that the prior samples.
        observed: The sites whose values it fixes. Their densities multiply the density of the latent sites.
        params: Names of its NumPyro parameters.
        names: All names, including plates and deterministic values.
    """

    latent: Mapping[str, Variable]
    observed: Mapping[str, Variable]
    params: tuple[str, ...]
    names: tuple[str, ...]

    def check_names(self) -> None:
        """Raise `ValueError` if the model or a guide uses one of the names."""
        check_names(self.names, self.latent)

    def check(self) -> None:
        """Raise `ValueError` if the model or a guide uses a name, or if a latent site is discrete."""
        self.check_names()
        for name, site in self.latent.items():
            if site.free is None:
                raise discrete(name, site.law)


def declared(prior: Callable[..., Any]) -> Program:
    """The names that a prior program declares, with their shapes.

    Args:
        prior: The program, `model.prior`.

    Returns:
        Its sample sites, parameters and other names.
    """
    variables: dict[str, Variable] = {}
    params: list[str] = []
    names: list[str] = []

    def look(key: Array) -> None:
        trace = handlers.trace(handlers.seed(runnable(prior), key)).get_trace()
        names.extend(trace)
        params.extend(name for name, site in trace.items() if site["type"] == "param")
        variables.update({n: _variable(s) for n, s in trace.items() if s["type"] == "sample"})

    jax.eval_shape(look, jax.random.key(0))
    observed = {name: site for name, site in variables.items() if site.observed}
    latent = {name: site for name, site in variables.items() if not site.observed}
    return Program(latent, observed, tuple(params), tuple(names))


def discrete(name: str, law: str) -> ValueError:
    """The error for a discrete latent site; no guide or sampler of this library supports one."""
    return ValueError(
        f"latent sites must be continuous; {name!r} is {law}: sum it out in the prior, as "
        "dist.MixtureSameFamily and priors.spike_and_slab do, or fix its value with obs="
    )


def check_names(names: Iterable[str], latent: Iterable[str]) -> None:
    """Raise `ValueError` if a name belongs to a part of the model or to a parameter of a `Guide`.

    Args:
        names: Names in the prior.
        latent: Names of its latent sites. Guides have parameters `<site>.q.<name>` for these.
    """
    known = set(latent)
    for name in names:
        if not name:
            raise ValueError("every site of the prior needs a name; got ''")
        site, mark, _ = name.partition(".q.")
        owner = OWNED.get(name, f"a guide's parameter of {site!r}" if mark and site in known else "")
        if owner:
            raise ValueError(
                f"the prior must not use the name {name!r}, which belongs to {owner}; choose another, "
                f"such as 'prior_{name}'"
            )


def require_proper(prior: Callable[..., Any]) -> None:
    """Raise `ValueError` if a law of the prior is improper and cannot be sampled."""
    _refuse_improper(declared(prior))


def _refuse_improper(program: Program) -> None:
    for name, site in program.latent.items():
        if site.improper:
            raise ValueError(
                f"the prior cannot be sampled: the site {name!r} has an improper law, {site.law}; use a "
                "proper law, or a method that needs only a density, such as bl.fit and bl.sample_nuts"
            )


def require_drawable(prior: Callable[..., Any]) -> None:
    """Raise `ValueError` unless running the prior forwards samples from it.

    This fails if a law is improper. It also fails if the program weights its draws by `numpyro.factor` or
    `obs=`: a forward run would ignore that part of the prior.
    """
    program = declared(prior)
    _refuse_improper(program)
    for name, latent in (weighed(prior) if program.observed else {}).items():
        kind = "numpyro.factor" if program.observed[name].law == "Unit" else "observed site"
        raise ValueError(
            f"the prior cannot be sampled by a forward run, because that ignores its {kind} {name!r}, which "
            f"depends on {', '.join(map(repr, latent))}; write that part as the law of a sample site, or "
            "use a method that needs only a density, such as bl.fit, bl.sample_nuts and bl.sample_smc"
        )


def weighed(prior: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """The latent sites on which each observed site of a prior depends, if there are any."""
    program = declared(prior)
    if not program.observed:
        return {}
    upstream = get_dependencies(prior)["prior_dependencies"]
    parents = {name: tuple(n for n in program.latent if n in upstream[name]) for name in program.observed}
    return {name: latent for name, latent in parents.items() if latent}


def runnable(prior: Callable[..., Any]) -> Callable[..., Any]:
    """The same program; sites whose law cannot be sampled get a value inside their support."""
    return _Feasible(prior)


def is_improper(law: dist.Distribution) -> bool:
    """Whether a distribution has a density but cannot be sampled."""
    return type(innermost(law)).sample is dist.Distribution.sample


def innermost(law: Any) -> Any:
    """The distribution inside expansions, masks, event axes and transforms."""
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law


class _Feasible(Messenger):
    def process_message(self, msg: dict[str, Any]) -> None:
        """Set a feasible value; handlers around the program can replace it."""
        if msg["type"] == "sample" and msg["value"] is None and is_improper(msg["fn"]):
            to_support = biject_to(msg["fn"].support)
            msg["value"] = to_support(jnp.zeros(to_support.inverse_shape(msg["fn"].shape())))


def _variable(site: Mapping[str, Any]) -> Variable:
    fn = site["fn"]
    shape = jnp.shape(site["value"])
    is_discrete = fn.support is not None and fn.support.is_discrete
    plates = {frame.name: len(shape) - fn.event_dim + frame.dim for frame in site["cond_indep_stack"]}
    return Variable(
        name=site["name"],
        law=type(unwrapped(fn)).__name__,
        shape=shape,
        free=None if is_discrete or site["is_observed"] else biject_to(fn.support).inverse_shape(fn.shape()),
        event_dim=fn.event_dim,
        plates=plates,
        infer=site["infer"],
        observed=site["is_observed"],
        improper=not site["is_observed"] and is_improper(fn),
    )


def unwrapped(law: Any) -> Any:
    """The distribution as the prior wrote it, without expansions, masks and event axes."""
    while isinstance(law, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        law = law.base_dist
    return law
