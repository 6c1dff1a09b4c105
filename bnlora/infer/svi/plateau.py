"""A rule that stops a fit if the bound, which is noisy, does not grow any more."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import check_at_least, check_positive


@dataclass(frozen=True)
class Plateau:
    """Stop when the mean bound of the last steps is not higher than that of the steps before.

    The means are those of the last `window` steps and of the `window` before them. Growth counts as none if
    it is below `tolerance` nats and twice its standard error is below `tolerance` too. While the noise is
    larger, the fit continues, and the windows grow with the number of steps.

    Attributes:
        window: Smallest number of steps in each mean.
        tolerance: Growth in nats over the window that counts as none.

    Example:
        >>> rule = bl.Plateau(window=10, tolerance=0.5)
        >>> rule.reached(np.linspace(0.0, 100.0, 40)), rule.reached(np.full(40, 3.0))
        (False, True)
    """

    window: int = 25
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        check_at_least({"window": self.window}, 2)
        check_positive({"tolerance": self.tolerance})

    def reached(self, bound: Float[np.ndarray, " s"]) -> bool:
        """Whether a fit with this bound after each step should stop.

        Args:
            bound: The bound of every step so far, in nats.
        """
        # A window is at least a quarter of all steps, so the means become less noisy as the fit goes on.
        half = max(self.window, len(bound) // 4)
        last, before = np.asarray(bound[-half:], float), np.asarray(bound[-2 * half : -half], float)
        if len(before) < self.window or not np.isfinite([*last, *before]).all():
            return False
        stderr = np.sqrt(last.var(ddof=1) / len(last) + before.var(ddof=1) / len(before))
        growth = last.mean() - before.mean()
        return bool(growth < self.tolerance and 2 * stderr < self.tolerance)
