"""Controls for Jupyter over `Explorer.at`, made of ipywidgets; the tab key reaches all of them."""

import asyncio
import time
from collections.abc import Callable
from html import escape
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from bnlora.assess.explore.explored import Explored
from bnlora.assess.explore.settings import LAWS, Settings, rounded
from bnlora.infer.core.scales import HIGHEST, LOWEST

PAUSE = 0.08
"""Seconds without a further change before a result is computed: a key that is held down asks only once."""

STEP = 0.05
"""Step of a slider, in powers of ten. The page moves a slider to the nearest step."""

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Shares of the training rows to choose from."""

LABEL = "7.5em"
"""Width of the labels."""

SLIDER = {"width": "auto", "flex": "1 1 17em", "max_width": "34em"}
"""Layout of a slider, which shares a line with others where there is room."""

WIDTH = "width (nats)"
"""Label of the slider of the width."""

HELP = (
    "<p style='margin:.2em 0;line-height:1.35'>Tab moves to the next control, the left and right arrows move "
    "a slider, space ticks a box or presses a button. A scale is the prior standard deviation of a logit "
    "contrast, in nats; you may also type it.</p>"
)


class Explores(Protocol):
    """What the controls need: an `Explorer`."""

    @property
    def start(self) -> Settings:
        """The settings at the start."""
        ...

    @property
    def train(self) -> Any:
        """The training rows."""
        ...

    @property
    def at(self) -> Callable[..., Explored]:
        """What follows from one prior."""
        ...


class Panel:
    """Controls, and what follows from their present state.

    Args:
        explorer: The explorer.

    Attributes:
        explorer: The explorer.
        widget: The controls with their output, to display.
        result: What the controls show; unchanged while they show an error.
    """

    def __init__(self, explorer: Explores):
        self.explorer, self._widgets = explorer, _ipywidgets()
        self._waiting: asyncio.TimerHandle | None = None
        self._following = False
        self.result: Explored | None = None
        self._shown: dict[str, Any] | None = None
        start = explorer.start
        # The page moves a slider to its nearest step, so exact values are kept beside the sliders.
        self._exact = {name: value or 1.0 for name, value in start.scales.items()} | {WIDTH: 5.0}
        self._fixed = dict(self._exact)
        self._scales = {name: self._scale(name, value) for name, value in start.scales.items()}
        self._boxes = {name: self._box(name, value=value > 0) for name, value in start.scales.items()}
        self._layers = {layer: self._box(f"layer {layer}", value=True) for layer in start.layers}
        self._law, self._width, self._rows = self._how(), self._scale(WIDTH, 5.0), self._count()
        self._out, self._code = self._widgets.HTML(), self._text()
        for control in self._controls():
            control.observe(self._changed, names="value")
        self.widget = self._arranged()
        self._show()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def _scale(self, name: str, value: float) -> Any:
        low, high = (float(np.log10(np.exp(x))) for x in (LOWEST, HIGHEST))
        return self._widgets.FloatLogSlider(
            value=float(np.clip(value or 1.0, np.exp(LOWEST), np.exp(HIGHEST))),
            min=low,
            max=high,
            step=STEP,
            description=name,
            readout_format=".3g",
            style={"description_width": LABEL},
            layout=SLIDER,
        )

    def _box(self, name: str, *, value: bool) -> Any:
        return self._widgets.Checkbox(
            value=value, description=name, indent=False, layout={"width": "auto", "min_width": "7em"}
        )

    def _how(self) -> Any:
        """Buttons, not a list: JupyterLab takes the up and down arrows of a list for its cells."""
        options = [("the sliders", "fixed"), ("evidence", "flat")]
        options += [(f"evidence, {law}", law) for law in LAWS]
        return self._widgets.ToggleButtons(
            options=options,
            value="fixed",
            description="scales from",
            style={"description_width": LABEL, "button_width": "auto"},
            layout={"width": "auto"},
        )

    def _count(self) -> Any:
        total = len(self.explorer.train)
        counts = sorted({max(round(share * total), 2) for share in SHARES})
        return self._widgets.SelectionSlider(
            options=[(f"{n:,} of {total:,}", n) for n in counts],
            value=total,
            description="rows in use",
            style={"description_width": LABEL},
            layout=SLIDER,
        )

    def _text(self) -> Any:
        return self._widgets.Textarea(
            description="code",
            rows=14,
            style={"description_width": "3em"},
            layout={"width": "auto", "max_width": "60em"},
        )

    def _controls(self) -> list[Any]:
        scales, boxes = self._scales.values(), self._boxes.values()
        return [*scales, *boxes, *self._layers.values(), self._law, self._width, self._rows]

    def _arranged(self) -> Any:
        """The controls above their output; lines wrap on a narrow page."""
        line = {"flex_flow": "row wrap", "align_items": "center", "width": "100%"}
        lines = [
            self._widgets.Box([self._boxes[name], self._scales[name]], layout=line) for name in self._scales
        ]
        if len(self._layers) > 1:
            lines.append(self._widgets.Box([*self._layers.values()], layout=line))
        lines.append(self._law)
        lines.append(self._widgets.Box([self._width, self._rows], layout=line))
        return self._widgets.VBox([self._widgets.HTML(HELP), *lines, self._out, self._code])

    def _changed(self, _: Any) -> None:
        """Compute a result after a short pause, in which further changes may come."""
        if self._following:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel that could wait
            self._show()
            return
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = loop.call_later(PAUSE, self._show)

    def _show(self) -> None:
        """Compute and show the result of the present state."""
        before, began = self.result, time.perf_counter()
        try:
            result = self._computed()
        except ValueError as error:
            self._out.value = f"<p role='alert'><b>Not possible:</b> {escape(str(error))}</p>"
            self._shown = None
            return
        if result is None:
            return
        page = result.html(before)
        self.result = result
        self._follow(result)
        self._out.value = f"{page}<p>{time.perf_counter() - began:.2f} s for this change.</p>"
        self._code.value = result.code

    def _computed(self) -> Explored | None:
        """The result of the present state; None if it is shown already."""
        now = {name: self._moved(name) for name in self._exact}
        if self._law.value == "fixed":
            self._fixed = now
        state: dict[str, Any] = {
            "scales": {name: self._fixed[name] * box.value for name, box in self._boxes.items()},
            "layers": [layer for layer, box in self._layers.items() if box.value],
            "law": self._law.value,
            "width": now[WIDTH],
            "rows": self._rows.value,
        }
        if state == self._shown:
            return None
        result = self.explorer.at(**state)
        self._shown = state
        return result

    def _moved(self, name: str) -> float:
        """The value of a slider: the exact one, unless somebody has moved it by more than the page does."""
        slider = self._width if name == WIDTH else self._scales[name]
        if abs(np.log10(slider.value / self._exact[name])) > 0.51 * STEP:
            self._exact[name] = rounded(slider.value)
        return self._exact[name]

    def _follow(self, result: Explored) -> None:
        """Show chosen scales on the sliders, and enable what has an effect."""
        self._following = True
        fixed = self._law.value == "fixed"
        for name, scale in self._scales.items():
            scale.disabled = not (fixed and self._boxes[name].value)
            highest = float(np.max(result.scale[name]))
            if not fixed and highest >= np.exp(LOWEST):
                scale.value = self._exact[name] = highest
        self._width.disabled = self._law.value not in LAWS
        self._following = False


def _ipywidgets() -> ModuleType:
    """The package, or one sentence about what to do without it."""
    try:
        import ipywidgets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the controls of bl.explore need ipywidgets: pip install ipywidgets; without it, "
            "bl.explore(...).at(scales=..., rows=...) is one setting"
        ) from error
    return ipywidgets
