"""Composition of priors: one prior for each factor, or one for each family.

    per_factor(a=normal(scale=1.0), b=horseshoe())
    by_family({"lm_head": normal(scale=0.1), ".*_proj": sparse_gp(rows=9, cols=9)})

Each part receives only the sites that it fills, and its names include family and factor. So the parts are
independent of each other.
"""

import difflib
import re
from collections.abc import Mapping

from bnlora._util.typing import Adapters
from bnlora.adapters.frames import joined
from bnlora.adapters.sites import Sites
from bnlora.priors.base import Prior


def per_factor(*, a: Prior, b: Prior) -> Prior:
    """One prior for the factors `a` and another for the factors `b`, independent of each other.

    Args:
        a: Prior of the factors `a`, which act on the input.
        b: Prior of the factors `b`.

    Returns:
        A prior of both factors.
    """
    parts = {"a": a, "b": b}

    def prior(sites: Sites) -> Adapters:
        filled: dict[str, dict] = {name: {} for name in sites}
        for factor, part in parts.items():
            wanted = {name for name, site in sites.items() if factor in site.factors}
            if wanted:
                chosen = sites.only(factors=[factor], families=wanted)
                for name, pair in _filled(part, chosen, f"factor {factor!r}").items():
                    filled[name] |= pair
        return filled

    return prior


def by_family(priors: Mapping[str, Prior]) -> Prior:
    """Choose the prior of each family by its name.

    Args:
        priors: Priors by regular expression. An expression must match the whole name of a family; the first
            match is used.

    Returns:
        The prior. It raises `ValueError` if a family has no prior or a pattern matches no family.

    Raises:
        ValueError: If a pattern is not a regular expression.
    """
    for pattern in priors:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid pattern: {error}") from error

    def pattern_of(name: str) -> str | None:
        return next((pattern for pattern in priors if re.fullmatch(pattern, name)), None)

    def prior(sites: Sites) -> Adapters:
        patterns = {name: pattern_of(name) for name in sites}
        for pattern in priors:
            if pattern not in patterns.values():
                near = difflib.get_close_matches(pattern, list(sites), n=1, cutoff=0.0)
                raise ValueError(f"{pattern!r} matches no family; nearest is {near[0]!r} of {sorted(sites)}")
        orphans = [name for name, pattern in patterns.items() if pattern is None]
        if orphans:
            raise ValueError(f"no pattern of {list(priors)} matches the families {orphans}")
        filled: dict[str, Mapping] = {}
        for pattern, part in priors.items():
            chosen = sites.only(families=[name for name in sites if patterns[name] == pattern])
            filled |= _filled(part, chosen, f"the families of {pattern!r}")
        return filled

    known = {pattern: part.frames for pattern, part in priors.items() if hasattr(part, "frames")}
    if len(known) == len(priors):  # every part has frames, so the composed prior has frames too
        used = {name: pattern_of(name) for frames in known.values() for name in frames}
        of_family = {name: known[p] for name, p in used.items() if p is not None and name in known[p]}
        if of_family:
            prior.frames = joined(of_family)  # type: ignore[attr-defined]
    return prior


def _filled(part: Prior, sites: Sites, what: str) -> Adapters:
    adapters = part(sites)
    try:
        sites.check(adapters)
    except ValueError as error:
        needed = "must fill exactly the factors that its sites request (`site.shapes`)"
        raise ValueError(f"the prior of {what} {needed}: {error}") from error
    return adapters
