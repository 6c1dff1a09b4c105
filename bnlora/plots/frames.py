"""The energies behind frames: how much of the gradients' second moment each direction has."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora.adapters.frames import Frames
from bnlora.plots.base import BLUE, ORANGE, make_axes

FRAME_CAPTION = (
    "Share of the energy outside the leading directions of each side, all layers together; the dots are the "
    "sizes of the frames. Blue: outputs, orange: inputs."
)


def frame_energies(frames: Frames, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Energy that frames of each size would leave out, by family and side.

    Args:
        frames: Frames with energies.
        ax: Axes to draw on, one for each family that has energies; a figure of its own when omitted.

    Returns:
        The figure.

    Raises:
        ValueError: When no family has energies, as with random or given frames.
    """
    known = {name: frame for name, frame in frames.items() if frame.energies}
    if not known:
        raise ValueError(
            f"expected frames with energies, from gradients or weights; got frames from {frames.source}"
        )
    if ax is None:
        figure = Figure(figsize=(2.9 * len(known), 2.6), layout="constrained")
        panels = figure.subplots(1, len(known), squeeze=False)[0]
    else:
        panels, figure, _ = make_axes(ax, len(known))
    for panel, (name, frame) in zip(panels, known.items(), strict=True):
        sizes = frame.left.shape[2], frame.right.shape[2]
        for values, size, colour in zip(frame.energies, sizes, (BLUE, ORANGE), strict=True):
            share = np.cumsum(values.sum(0)) / max(values.sum(), 1e-30)
            left_out = np.maximum(1 - share, 1e-6)
            panel.plot(np.arange(1, len(share) + 1), left_out, color=colour, lw=1.2)
            panel.plot(size, left_out[size - 1], "o", color=colour, ms=4)
        panel.set(xscale="log", yscale="log", title=name, xlabel="directions")
    panels[0].set_ylabel("energy left out")
    return figure
