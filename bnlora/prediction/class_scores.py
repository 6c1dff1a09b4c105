r"""Scores of classes for conformal prediction sets: how badly each class of a row fits.

    "probability"  s = 1 - p(y | x)                                  the smallest sets on average
    "adaptive"     s = sum_{j before y} p(j | x) + u p(y | x)        larger sets for rows that are hard

where j runs over the classes that are more probable than y. With a key, u is uniform in [0, 1) for each row;
without one it is 1, and the adaptive sets are larger than necessary.

References: Sadinle, Lei and Wasserman (2019), JASA 114; Romano, Sesia and Candes (2020), arXiv 2006.02544.
"""

from typing import Literal

import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import numpy_generator

Score = Literal["probability", "adaptive"]


def class_scores(
    log_probs: Float[np.ndarray, "n c"], score: Score, places: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n c"]:
    """Score of every class of every row; `places` are the u of the adaptive score."""
    probs = np.exp(log_probs)
    if score == "probability":
        return 1 - probs
    order = np.argsort(-probs, axis=1, kind="stable")  # of equally probable classes the first comes first
    ordered = np.take_along_axis(probs, order, 1)
    before = np.cumsum(np.pad(ordered[:, :-1], ((0, 0), (1, 0))), axis=1)
    scores = np.empty_like(probs)
    np.put_along_axis(scores, order, before + places[:, None] * ordered, 1)
    return scores


def places(key: Array | None, num_rows: int, part: Literal["calibration", "new"]) -> Float[np.ndarray, " n"]:
    """The u of each row: random with a key, in a different stream for each part; one without a key."""
    if key is None:
        return np.ones(num_rows)
    calibration, new = numpy_generator(key).spawn(2)
    return (calibration if part == "calibration" else new).random(num_rows)
