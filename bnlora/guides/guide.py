r"""A guide composed of families, each for one site or for several sites jointly.

    guide = Guide(model.prior, {r"lm_head\..*": full(), ".*": flow()})

A *family* maps latent sites to their distributions. A family that treats sites separately is a function of
one `Latent` (`per_site`); a joint family is a function of all its sites. Parameters are called
`<site>.q.<name>`. Building a guide traces the prior, but never the language model.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to

from bnlora._util.display import Shown, Table
from bnlora.guides.family import Family
from bnlora.guides.latent import Latent, init_to_base, latents_of
from bnlora.guides.noise import noise as noise_family
from bnlora.priors.declared import check_names, discrete, runnable
from bnlora.priors.distributions import MatrixConditional


@dataclass(frozen=True)
class Guide(Shown):
    """A NumPyro guide whose sites follow families chosen by name.

    Args:
        prior: The prior program, `model.prior`. It is traced once for shapes; the language model is not.
        families: One family for every site, or families by regular expression. An expression must match a
            site's whole name; the first match is used.
        noise: Family of the sites that the prior marks as conditional noise (the `E` of the sparse GP). The
            patterns of `families` do not apply to these sites.
        init_loc_fn: NumPyro start strategy for locations, e.g. `numpyro.infer.init_to_value(values={...})`.
            The default uses the start that the prior marks.
        name: Name of the guide in its repr.

    Raises:
        ValueError: If a latent site is discrete, has no family or has a reserved name; if a pattern is not a
            regular expression or gets no site; or if a family is not a `Family` (such as the function that
            makes one). A family may raise it too, for example if it would have too many parameters.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from bnlora.guides import full, mean_field
        >>> def prior(*_):
        ...     tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        ...     return numpyro.sample("w", dist.Normal(0, tau).expand([3, 4]).to_event(2))
        >>> Guide(prior, {"tau": mean_field(), "w": full()})
        Guide(92 parameters)
          tau (): mean-field Gaussian, 2
          w (3, 4): full-covariance Gaussian over each layer, 90
    """

    prior: Callable[..., Any]
    families: Family | Mapping[str, Family]
    noise: Family = field(default_factory=noise_family)
    init_loc_fn: Callable[..., Any] = init_to_base
    name: str = "Guide"
    latent: Mapping[str, Latent] = field(init=False, compare=False)
    groups: Sequence[tuple[Family, tuple[str, ...]]] = field(init=False, compare=False)
    counts: Mapping[str, int] = field(init=False, compare=False)

    def __post_init__(self):
        _require_families(self.families, self.noise)
        latent = latents_of(self.prior, self.init_loc_fn)
        check_names(latent, latent)
        for name, site in latent.items():
            if site.support.is_discrete:
                raise discrete(name, type(site.site["fn"]).__name__)
        object.__setattr__(self, "latent", latent)
        object.__setattr__(self, "groups", self._assign())
        object.__setattr__(self, "counts", self._count())

    def __call__(self, *args, **kwargs) -> dict[str, Array]:
        """Run the guide and return the draws by site. Arguments (those of the model) are ignored."""
        laws: dict[str, dist.Distribution] = {}
        for family, names in self.groups:
            laws |= family.build([self.latent[name] for name in names])
        draws: dict[str, Array] = {}
        # One key for all traces of the prior: each trace declares its parameters, which may start at random.
        conditional = any(isinstance(law, MatrixConditional) for law in laws.values())
        key = numpyro.prng_key() if conditional else None
        # In the order of the prior: NumPyro's mean-field bound needs the same order in both programs.
        for name, site in self.latent.items():
            law = laws[name]
            if isinstance(law, MatrixConditional):
                conditional = self._prior_law(key, draws, name)
                law = conditional.scaled_to(law.lam * conditional.lam)  # lam is relative to the prior's
            draws[name] = _sample_inside(site.site["cond_indep_stack"], name, law)
        return draws

    @property
    def has_density(self) -> bool:
        """Whether every family has a density over its sites."""
        return all(family.has_density for family, _ in self.groups)

    @property
    def constants(self) -> list[Any]:
        """The fixed arrays of each family."""
        return [family.constants for family, _ in self.groups]

    @property
    def overview(self) -> tuple[Table]:
        """One row for each site with family and parameter count; a joint family counts at its first site."""
        family = {name: family for family, names in self.groups for name in names}
        rows = tuple(
            (
                name,
                " x ".join(map(str, site.site["fn"].shape())) or "scalar",
                family[name].label + (", over all its sites together" if family[name].joint else ""),
                f"{self.counts[name]:,}",
            )
            for name, site in self.latent.items()
        )
        title = f"{self.name}: {sum(self.counts.values()):,} parameters"
        return (Table(title, ("site", "shape", "family", "parameters"), rows, texts=frozenset({2})),)

    def __repr__(self) -> str:
        lines = [f"{self.name}({sum(self.counts.values()):,} parameters)"]
        for family, names in self.groups:
            if family.joint:
                count = sum(self.counts[name] for name in names)
                lines.append(f"  {', '.join(names)}: {family.label} over all of them, {count:,}")
                continue
            for name in names:
                shape = self.latent[name].site["fn"].shape()
                lines.append(f"  {name} {shape}: {family.label}, {self.counts[name]:,}")
        return "\n".join(lines)

    def _prior_law(self, key: Array | None, draws: Mapping[str, Array], name: str) -> Any:
        """The prior's law of a site, conditional on the draws of the sites before it."""
        program = handlers.seed(handlers.substitute(runnable(self.prior), data=dict(draws)), key)
        with handlers.block(hide_fn=lambda site: site["type"] != "param"):
            return handlers.trace(program).get_trace()[name]["fn"]

    def _assign(self) -> list[tuple[Family, tuple[str, ...]]]:
        """The families in use, each with the names of its sites."""
        rules = self.families if isinstance(self.families, Mapping) else {".*": self.families}
        matched: dict[str, list[str]] = {pattern: [] for pattern in rules}
        plain = [name for name, site in self.latent.items() if not site.is_noise]
        for name in plain:
            pattern = next((p for p in rules if re.fullmatch(p, name)), None)
            if pattern is None:
                raise ValueError(f"no family for the site {name!r}; the patterns are {list(rules)}")
            matched[pattern].append(name)
        for pattern, names in matched.items():
            if not names and plain and isinstance(self.families, Mapping):
                raise ValueError(self._unmatched(pattern, rules, plain))
        groups = [(rules[pattern], tuple(names)) for pattern, names in matched.items() if names]
        marked = tuple(name for name, site in self.latent.items() if site.is_noise)
        return groups + ([(self.noise, marked)] if marked else [])

    def _unmatched(self, pattern: str, rules: Mapping[str, Family], plain: Sequence[str]) -> str:
        """The error message for a pattern that gets no site."""
        matches = [name for name in self.latent if re.fullmatch(pattern, name)]
        taken = next((name for name in matches if name in plain), None)
        if taken is not None:
            before = next(p for p in rules if re.fullmatch(p, taken))
            return f"the pattern {pattern!r} gets no site; the earlier pattern {before!r} matches {taken!r}"
        if matches:
            return (
                f"the pattern {pattern!r} matches only conditional noise, such as {matches[0]!r}; "
                "pass its family as noise=..."
            )
        near = difflib.get_close_matches(pattern, plain, n=1, cutoff=0.0)
        return f"the pattern {pattern!r} matches no site; nearest is {near[0]!r}"

    def _count(self) -> dict[str, int]:
        """Number of parameters by site; the parameters of a joint family count with its first site."""
        sizes: dict[str, int] = {}

        def measure(key: Array) -> None:
            for name, site in handlers.trace(handlers.seed(self, key)).get_trace().items():
                if site["type"] == "param":
                    # Count the unconstrained values: a triangular root counts its triangle only.
                    free = biject_to(site["kwargs"].get("constraint", constraints.real)).inverse_shape
                    leaves = jax.tree.leaves(site["value"])
                    sizes[name] = sum(math.prod(free(leaf.shape)) for leaf in leaves)

        jax.eval_shape(measure, jax.random.key(0))
        return {
            site: sum(n for name, n in sizes.items() if name.startswith(f"{site}.q.")) for site in self.latent
        }


def _require_families(families: Any, noise: Any) -> None:
    """Raise `ValueError` unless every family is a `Family` and every pattern a regular expression."""
    by_pattern = dict(families) if isinstance(families, Mapping) else {"every site": families}
    for name, family in (by_pattern | {"noise": noise}).items():
        if not isinstance(family, Family):
            called = getattr(family, "__name__", None)
            hint = f"the function {called}; call it: {called}()" if called else repr(family)
            raise ValueError(f"a guide needs a family for {name!r}, such as full(); got {hint}")
    for pattern in families if isinstance(families, Mapping) else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid pattern: {error}") from error


def _sample_inside(frames: Sequence[Any], name: str, law: dist.Distribution) -> Array:
    if not frames:
        return numpyro.sample(name, law)
    with numpyro.plate(frames[0].name, frames[0].size, dim=frames[0].dim):
        return _sample_inside(frames[1:], name, law)
