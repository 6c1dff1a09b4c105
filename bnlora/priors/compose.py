"""Composition: a prior for each factor, a prior for each family.

    per_factor(a=normal(scale=1.0), b=horseshoe())
    by_family({"lm_head": normal(scale=0.1), ".*_proj": sparse_gp(rows=9, cols=9)})

Each part is given the sites that it shall fill, and nothing else, and its names carry family and factor:
parts do not know of each other.
"""

import difflib
import re
from collections.abc import Mapping

from bnlora._util.typing import Adapters
from bnlora.adapters.frames import joined
from bnlora.adapters.sites import Sites
from bnlora.priors.base import Prior


def per_factor(*, a: Prior, b: Prior) -> Prior:
    """The factors `a` under one prior and the factors `b` under another, independent of each other.

    Args:
        a: Prior of the factors `a`, which the input passes first.
        b: Prior of the factors `b`.

    Returns:
        A prior of both.
    """
    parts = {"a": a, "b": b}

    def prior(sites: Sites) -> Adapters:
        filled: dict[str, dict] = {name: {} for name in sites}
        for factor, part in parts.items():
            wanted = {name for name, site in sites.items() if factor in site.factors}
            if wanted:
                asked = sites.only(factors=[factor], families=wanted)
                for name, pair in _filled(part, asked, f"factor {factor!r}").items():
                    filled[name] |= pair
        return filled

    return prior


def by_family(priors: Mapping[str, Prior]) -> Prior:
    """Families under priors chosen by name.

    Args:
        priors: Prior by regular expression, which must match the whole name of a family; the first match
            wins.

    Returns:
        The prior. Run on its sites, it raises `ValueError` when a family has no prior or a pattern no family.

    Raises:
        ValueError: When a pattern is not a regular expression.
    """
    for pattern in priors:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid pattern: {error}") from error

    def taker(name: str) -> str | None:
        return next((pattern for pattern in priors if re.fullmatch(pattern, name)), None)

    def prior(sites: Sites) -> Adapters:
        chosen = {name: taker(name) for name in sites}
        for pattern in priors:
            if pattern not in chosen.values():
                near = difflib.get_close_matches(pattern, list(sites), n=1, cutoff=0.0)
                raise ValueError(f"{pattern!r} takes no family; nearest is {near[0]!r} of {sorted(sites)}")
        orphans = [name for name, pattern in chosen.items() if pattern is None]
        if orphans:
            raise ValueError(f"no pattern of {list(priors)} matches the families {orphans}")
        filled: dict[str, Mapping] = {}
        for pattern, part in priors.items():
            asked = sites.only(families=[name for name in sites if chosen[name] == pattern])
            filled |= _filled(part, asked, f"the families of {pattern!r}")
        return filled

    known = {pattern: part.frames for pattern, part in priors.items() if hasattr(part, "frames")}
    if len(known) == len(priors):
        takers = {name: taker(name) for frames in known.values() for name in frames}
        of_family = {name: known[p] for name, p in takers.items() if p is not None and name in known[p]}
        if of_family:
            prior.frames = joined(of_family)  # type: ignore[attr-defined]
    return prior


def _filled(part: Prior, asked: Sites, what: str) -> Adapters:
    adapters = part(asked)
    try:
        asked.check(adapters)
    except ValueError as error:
        needed = "must fill the factors that its sites ask for (`site.shapes`) and no more"
        raise ValueError(f"the prior of {what} {needed}: {error}") from error
    return adapters
