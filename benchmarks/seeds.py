"""The demonstration over several seeds: python benchmarks/seeds.py --seeds 3.

A seed draws other sentences, start values, order of rows and posterior draws. Test sentences overlap between
seeds, because the data set is small, so the spread over seeds is mostly that of training.
"""

import argparse

import numpy as np
from rich.console import Console

from bnlora import metrics
from bnlora.demo import SIZES, run_demo
from bnlora.display import Table
from bnlora.experiment import BAYES, EARLY, LORA, SHOWN, Comparison


def scores(comparison: Comparison) -> dict[tuple[str, str], list[float]]:
    """Every shown metric by set of rows and method."""
    return {
        (rows, method): [
            metrics.METRICS[name](comparison.predictions[method][rows].log_probs, labels)
            for name in SHOWN.values()
        ]
        for rows, labels in comparison.labels.items()
        for method in (LORA, EARLY, BAYES)
    }


def main() -> None:
    """Run the seeds and print the mean of each metric, and its least and greatest value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.seeds):
        comparison = run_demo(**SIZES, seed=seed, console=Console(stderr=True))
        found.append(scores(comparison))
        for table in (comparison.scores, comparison.differences, comparison.costs):
            Console(width=110).print(table)
    cells = {}
    for key in found[0]:
        values = np.array([by[key] for by in found])
        columns = zip(values.mean(0), values.min(0), values.max(0), strict=True)
        cells[key] = [f"{mean:.3f} ({low:.3f}-{high:.3f})" for mean, low, high in columns]
    rows = [(name if method == LORA else "", method, *cells[name, method]) for name, method in cells]
    title = f"Mean (least-greatest) over {arguments.seeds} seeds; {SIZES}"
    Console(width=140).print(Table(title, ("rows", "method", *SHOWN), tuple(rows)))


if __name__ == "__main__":
    main()
