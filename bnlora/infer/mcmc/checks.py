"""The checks of a certificate: each compares a number with its limit and gives a finding."""

from collections.abc import Callable

import numpy as np

from bnlora._util.finding import Finding


def limited(name: str, sentence: str, number: float, limit: float, side: Callable, remedy: str) -> Finding:
    """A problem if a number is above (`max`) or below (`min`) its limit, or is NaN."""
    if number <= limit if side is max else number >= limit:  # written so that NaN fails
        return Finding(name, "fine", sentence, number, limit)
    return Finding(name, "problem", sentence, number, limit, remedy)


def worst(
    what: str, names: tuple[str, ...], values: tuple[float, ...], side: Callable, limit: float, remedy: str
) -> Finding:
    """The finding of the function with the largest (`max`) or the smallest (`min`) value."""
    if not all(np.isfinite(values)):
        at = int(np.argmin(np.isfinite(values)))
        sentence = f"{what} of {names[at]} is not finite, because all draws of it are equal"
        return Finding(what, "problem", sentence, values[at], limit, remedy)
    at = side(range(len(values)), key=lambda k: values[k])
    number = f"{values[at]:.3f}" if side is max else f"{values[at]:.0f}"
    sentence = (
        f"{what} of {names[at]} is {number}, must be {'at most' if side is max else 'at least'} {limit:g}"
    )
    return limited(what, sentence, values[at], limit, side, remedy)


def draw_more(ess: tuple[float, ...], limit: float) -> str:
    """The factor on the number of draws that raises the effective sample size above the limit."""
    least = min((value for value in ess if value > 0), default=np.nan)
    if not np.isfinite(least) or least >= limit:
        return "draw more"
    # A tenth more than proportional, because the estimated effective sample size has an error too.
    return f"draw more, about {np.ceil(11 * limit / least) / 10:g} times as many"


def moved(ancestry: tuple[float, ...], moves: int, limit: float) -> tuple[Finding, ...]:
    """Whether SMC moved its particles away from their ancestors; no finding for other samplers."""
    if not ancestry:
        return ()
    left = max(ancestry)
    # The correlation after n moves is about c^n, with c estimated from these moves; 0.5 is the aim of SMC.
    enough = np.ceil(moves * np.log(0.5) / np.log(np.clip(left, 1e-4, 0.9999)))
    sentence = (
        f"particles have a correlation of {left:.2f} with their ancestors after {moves} moves, at most "
        f"{limit:g} may be left"
    )
    remedy = f"raise max_moves, to about {enough:,.0f}, or use sample_nuts"
    return (limited("ancestry", sentence, left, limit, max, remedy),)


def accepts(bias: str) -> Finding:
    """Whether the draws follow the target, which needs an accept step."""
    if bias == "none":
        return Finding("accept step", "fine", "the sampler has an accept step, so its target is exact")
    sentence = (
        "the sampler has no accept step, so its draws have a bias that depends on its step size and that no "
        "diagnostic shows"
    )
    return Finding("accept step", "problem", sentence, remedy="use sample_nuts or sample_hmc")
