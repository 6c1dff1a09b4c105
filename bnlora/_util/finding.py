"""What a check concludes, in one form for all checks of the library, and how a list of them is shown.

A diagnosis, a certificate, a comparison, a calibration and a prior predictive each give `findings`. Each
finding has a status, the number that was compared with a threshold, a sentence with both, and a remedy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

Status = Literal["problem", "caution", "fine", "not asked"]

MARKS: dict[Status, str] = {"problem": "✗", "caution": "!", "fine": "✓", "not asked": "–"}
"""Sign of each status. Findings are shown in the order of this table."""

COLOURS: dict[Status, str] = {
    "problem": "red",
    "caution": "dark_orange",
    "fine": "green",
    "not asked": "grey50",
}
"""Colour of each status on a terminal."""

_HTML_COLOURS: dict[Status, str] = {
    "problem": "#d9443a",
    "caution": "#c07600",
    "fine": "#3a9a3f",
    "not asked": "#888888",
}

_PLURALS = {"problem": "problems", "caution": "cautions"}


@dataclass(frozen=True)
class Finding:
    """What one check concludes.

    Attributes:
        name: What was checked.
        status: "problem" (do not use the result as it is), "caution" (know this before you report numbers),
            "fine", or "not asked": the check was not run, is undefined here, or cannot be believed.
        sentence: The measurement in words, with its number, its error and the threshold.
        number: The number that was compared with the threshold; None where there is none.
        threshold: The threshold; None where there is none.
        remedy: What to do about it; empty where nothing has to be done.

    Example:
        >>> Finding("k-hat", "caution", "Pareto k-hat 0.81 (at most 0.62)", 0.81, 0.62, "Fit longer.").text
        'Pareto k-hat 0.81 (at most 0.62); Fit longer.'
    """

    name: str
    status: Status
    sentence: str
    number: float | None = None
    threshold: float | None = None
    remedy: str = ""

    @property
    def text(self) -> str:
        """The sentence and the remedy in one line."""
        return f"{self.sentence}; {self.remedy}" if self.remedy else self.sentence


class Judged:
    """What has `findings`: those of each status, and each by its name."""

    if TYPE_CHECKING:  # at run time it would become the default of a field of this name

        @property
        def findings(self) -> tuple[Finding, ...]:
            """What each check concludes, in the order of the checks."""
            ...

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings for which the result should not be used as it is."""
        return with_status(self.findings, "problem")

    @property
    def cautions(self) -> tuple[Finding, ...]:
        """Findings to know before numbers are reported."""
        return with_status(self.findings, "caution")

    @property
    def passed(self) -> bool:
        """Whether there is no problem and no caution."""
        return not (self.problems or self.cautions)

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name, such as "k-hat"."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no finding {name!r}; there are {', '.join(f.name for f in self.findings)}")


def with_status(findings: Sequence[Finding], status: Status) -> tuple[Finding, ...]:
    """The findings of a status, in their order."""
    return tuple(finding for finding in findings if finding.status == status)


def count_words(findings: Sequence[Finding]) -> str:
    """How many findings have each status: "1 problem, 12 fine"."""
    counts = {status: len(with_status(findings, status)) for status in MARKS}
    return ", ".join(f"{n} {s if n == 1 else _PLURALS.get(s, s)}" for s, n in counts.items() if n)


@dataclass(frozen=True)
class Findings:
    """A list of findings as a table, problems first, for a terminal, a notebook and a report.

    Attributes:
        title: What was checked, and how much was found.
        findings: The findings.
    """

    title: str
    findings: tuple[Finding, ...]

    @property
    def ordered(self) -> tuple[Finding, ...]:
        """The findings by status, the worst first."""
        return tuple(finding for status in MARKS for finding in with_status(self.findings, status))

    def html(self) -> str:
        """The table for a page."""
        caption = f"<caption><span class=title>{escape(self.title)}</span></caption>"
        return f"<table>{caption}<tbody>{''.join(map(_html_row, self.ordered))}</tbody></table>"

    def __rich__(self) -> Group:
        table = RichTable(box=None, show_header=False, pad_edge=False)
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column()
        for finding in self.ordered:
            colour, text = COLOURS[finding.status], Text(finding.sentence)
            if finding.remedy:
                text.append(f"\n→ {finding.remedy}", style="bold")
            table.add_row(Text(MARKS[finding.status], style=colour), Text(finding.name, style=colour), text)
        return Group(Text(self.title, "bold"), table)


def _html_row(finding: Finding) -> str:
    remedy = f"<br>→ {escape(finding.remedy)}" if finding.remedy else ""
    colour = f'style="color:{_HTML_COLOURS[finding.status]};white-space:nowrap"'
    return (
        f'<tr class="{finding.status.replace(" ", "-")}">'
        f"<td {colour}>{MARKS[finding.status]} {escape(finding.name)}</td>"
        f"<td class=text>{escape(finding.sentence)}{remedy}</td></tr>"
    )
