"""Tables of a benchmark's report."""

from benchmarks.report import Report


def section(report: Report, title: str) -> list[dict[str, str]]:
    """Rows of a table, by the names of its columns."""
    head, _, *rows = [x.strip("| ").split(" | ") for x in report.sections[title] if x.startswith("|")]
    return [dict(zip(head, [cell.strip() for cell in row], strict=False)) for row in rows]
