"""Energies of frames: the share of the second moment of the gradients in each direction."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora.adapters.frames import Frames
from bnlora.plots.base import BLUE, ORANGE, make_axes

FRAME_CAPTION = (
    "Share of the energy outside the leading directions of each side, summed over layers. Dots: sizes of the "
    "frames. Blue: outputs; orange: inputs."
)


def frame_energies(frames: Frames, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Plot the energy outside frames of each size, by family and side.

    Args:
        frames: Frames with energies.
        ax: Axes to draw on, one for each family with energies; a new figure by default.

    Returns:
        The figure.

    Raises:
        ValueError: If no family has energies, for example with random or user-supplied frames.
    """
    with_energies = {name: frame for name, frame in frames.items() if frame.energies}
    if not with_energies:
        raise ValueError(
            f"expected frames with energies, from gradients or weights; got frames from {frames.source}"
        )
    if ax is None:
        figure = Figure(figsize=(2.9 * len(with_energies), 2.6), layout="constrained")
        panels = figure.subplots(1, len(with_energies), squeeze=False)[0]
    else:
        panels, figure, _ = make_axes(ax, len(with_energies))
    for panel, (name, frame) in zip(panels, with_energies.items(), strict=True):
        sizes = frame.left.shape[2], frame.right.shape[2]
        for values, size, colour in zip(frame.energies, sizes, (BLUE, ORANGE), strict=True):
            share = np.cumsum(values.sum(0)) / max(values.sum(), 1e-30)  # values: (layer, direction)
            left_out = np.maximum(1 - share, 1e-6)  # the axis is logarithmic
            panel.plot(np.arange(1, len(share) + 1), left_out, color=colour, lw=1.2)
            panel.plot(size, left_out[size - 1], "o", color=colour, ms=4)
        panel.set(xscale="log", yscale="log", title=name, xlabel="directions")
    panels[0].set_ylabel("energy left out")
    return figure
