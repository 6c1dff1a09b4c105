"""The checks of a certificate: from a number and its limit to a finding."""

from collections.abc import Callable

import numpy as np

from bnlora._util.finding import Finding


def limited(name: str, sentence: str, number: float, limit: float, side: Callable, remedy: str) -> Finding:
    """A problem where a number is above (`max`) or below (`min`) its limit, or is not a number."""
    if number <= limit if side is max else number >= limit:  # so that NaN fails
        return Finding(name, "fine", sentence, number, limit)
    return Finding(name, "problem", sentence, number, limit, remedy)


def worst(
    what: str, names: tuple[str, ...], values: tuple[float, ...], side: Callable, limit: float, remedy: str
) -> Finding:
    """The finding of the function with the largest (`max`) or the smallest (`min`) value."""
    if not all(np.isfinite(values)):
        at = int(np.argmin(np.isfinite(values)))
        sentence = f"{what} of {names[at]} is not finite: the draws of it are constant"
        return Finding(what, "problem", sentence, values[at], limit, remedy)
    at = side(range(len(values)), key=lambda k: values[k])
    number = f"{values[at]:.3f}" if side is max else f"{values[at]:.0f}"
    sentence = (
        f"{what} of {names[at]} is {number}, must be {'at most' if side is max else 'at least'} {limit:g}"
    )
    return limited(what, sentence, values[at], limit, side, remedy)


def draw_more(ess: tuple[float, ...], limit: float) -> str:
    """How many times as many draws would have an effective sample size above the limit."""
    least = min((value for value in ess if value > 0), default=np.nan)
    if not np.isfinite(least) or least >= limit:
        return "draw more"
    # A tenth more than in proportion, because the estimate of the effective number has an error of its own.
    return f"draw more, about {np.ceil(11 * limit / least) / 10:g} times as many"


def moved(ancestry: tuple[float, ...], moves: int, limit: float) -> tuple[Finding, ...]:
    """Whether SMC has moved its particles away from their ancestors; nothing for other samplers."""
    if not ancestry:
        return ()
    left = max(ancestry)
    # The correlation after n moves is about c^n, with c from these moves.
    enough = np.ceil(moves * np.log(0.5) / np.log(np.clip(left, 1e-4, 0.9999)))
    sentence = (
        f"particles have a correlation of {left:.2f} with their ancestors after {moves} moves, at most "
        f"{limit:g} may be left"
    )
    remedy = f"raise max_moves, to about {enough:,.0f}, or use sample_nuts"
    return (limited("ancestry", sentence, left, limit, max, remedy),)


def accepts(bias: str) -> Finding:
    """Whether the draws have the target as their law, which needs an accept step."""
    if bias == "none":
        return Finding("accept step", "fine", "the sampler has an accept step, so its target is exact")
    sentence = (
        "the sampler has no accept step, so its draws are off by an amount that its step decides and no "
        "diagnostic shows"
    )
    return Finding("accept step", "problem", sentence, remedy="use sample_nuts or sample_hmc")
