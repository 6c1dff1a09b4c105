"""The demonstration's methods over several seeds: metrics, differences with intervals, seconds.

    run      compute the predictions of the seeds that are not finished
    report   tables from the predictions of this machine and, for other seeds, from `results/seeds.npz`
    store    write the predictions of the finished seeds to this file
    picture  draw the reliability diagrams of the README from the predictions of all seeds
    time     seconds of whole fits, compiling included; leave the machine idle meanwhile

A seed determines 560 labelled movie sentences and 2,000 test sentences of each domain, start values, order of
rows and posterior draws. Seeds 0 to 2 were used to choose placement, sizes and the scale prior of
`bnlora.infer.core.fit`; they are for development and are in no table. Every finished seed is stored in a
file, so that a stopped run continues.

Methods, all on the same 560 labelled rows: the base without adapters; LoRA by a published recipe after 3 and
after 20 epochs; careful LoRA, which fits 320 rows and uses the other 240 to choose its step and a
temperature; Bayesian-LoRA.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.data import LABELLED, Pool, drawn, pool
from benchmarks.report import RESULTS, Report
from benchmarks.timing import clock
from bnlora._util.caching import cache_folder
from bnlora.app.experiment import BASE, BAYES, CAREFUL, LORA, fit_lora, temperature_of, untouched
from bnlora.data.assets import DOMAINS
from bnlora.infer.approximate.temperature import tempered
from bnlora.infer.core.fit import fit_core

HELD_OUT, TEST, DRAWS = 240, 2000, 64
SHORT = "LoRA, 3 epochs"
METHODS = (BASE, SHORT, LORA, CAREFUL, BAYES)
SHOWN = {BASE: "untouched base", LORA: "LoRA, 20 epochs"} | {m: m for m in (SHORT, CAREFUL, BAYES)}
QUIET = Console(quiet=True)


def fitted(
    seed: int, pooled: Pool, train: bl.Batch, methods: Sequence[str]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Fits by method on the labelled rows of a seed, and their seconds, compiling included."""
    keys = jax.random.split(jax.random.key(seed), 5)
    base, options = pooled.base, {"label_ids": pooled.label_ids, "console": QUIET}
    first, held_out = train[: LABELLED - HELD_OUT], train[LABELLED - HELD_OUT :]
    makers = {
        SHORT: lambda: fit_lora(keys[0], base, train, epochs=3, **options),
        LORA: lambda: fit_lora(keys[1], base, train, epochs=20, **options),
        CAREFUL: lambda: fit_lora(keys[2], base, first, validation=held_out, **options),
        BAYES: lambda: fit_core(keys[3], base, train, **options),
    }
    fits, seconds = {}, {}
    for method in methods:
        with clock() as took:
            fits[method] = makers[method]()
        seconds[method] = took.wall
    return fits, seconds


def run_seed(seed: int, pooled: Pool) -> dict:
    """Log-probabilities by method and domain, labels, and seconds of one seed."""
    train, test = drawn(pooled, seed, test=TEST)
    keys = jax.random.split(jax.random.key(seed), 5)
    held_out, found = train[LABELLED - HELD_OUT :], {}
    fits, seconds = fitted(seed, pooled, train, METHODS[1:])
    short, long, careful, core = fits.values()
    temperature = temperature_of(keys[4], careful, held_out, console=QUIET)
    for domain, batch in test.items():
        features = bl.cache_prefix(core.model, batch, console=QUIET)
        predicted = {
            BASE: untouched(features),
            SHORT: bl.predict(keys[4], short, batch, num_draws=1, console=QUIET),
            LORA: bl.predict(keys[4], long, batch, num_draws=1, console=QUIET),
            CAREFUL: tempered(bl.predict(keys[4], careful, batch, num_draws=1, console=QUIET), temperature),
            BAYES: bl.predict(keys[4], core, features, num_draws=DRAWS, console=QUIET),
        }
        found[domain] = {m: p.log_probs[:, 1].tolist() for m, p in predicted.items()}
        found[domain]["labels"] = np.asarray(batch.labels).tolist()
    about = {"scales": core.scales.by_name, "log_evidence": core.gaussian.log_evidence,
             "bound": float(core.fit.history["elbo"][-20:].mean()), "temperature": temperature}  # fmt: skip
    return {"seed": seed, "rows": found, "seconds": seconds, "core": core.seconds, "about": about}


def folder() -> Path:
    """Folder of the finished seeds."""
    path = cache_folder() / "seeds"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run_seeds(given: argparse.Namespace, report: Report) -> None:
    """Run the seeds that are not finished."""
    pooled = pool(console=Console(stderr=True))
    for seed in given.seeds:
        file = folder() / f"seed-{seed}.json"
        if not file.is_file():
            file.write_text(json.dumps(run_seed(seed, pooled)))
            report.progress(f"seed {seed} done")
    tables(given, report)


STORED = RESULTS / "seeds.npz"
PICTURE = RESULTS.parents[1] / "docs" / "pictures" / "reliability.png"


def finished() -> list[dict]:
    """The finished seeds of the tables, from this machine or from the stored file."""
    found = stored() if STORED.is_file() else {}
    for file in folder().glob("seed-*.json"):
        one = json.loads(file.read_text())
        found[one["seed"]] = one
    return [found[seed] for seed in sorted(found) if seed > 2]


def store(given: argparse.Namespace, report: Report) -> None:
    """Write the finished seeds to one file: log-odds, labels, and everything else as JSON."""
    arrays, about = {}, []
    for one in finished():
        about.append({name: value for name, value in one.items() if name != "rows"})
        for domain, rows in one["rows"].items():
            for name, values in rows.items():
                x = np.asarray(values)
                if name != "labels":  # log-odds keep their precision if a probability is near one
                    x = (x - np.log(-np.expm1(x))).astype(np.float32)
                arrays[f"{one['seed']}/{domain}/{name}"] = x
    np.savez_compressed(STORED, about=json.dumps(about), **arrays)
    tables(given, report)


def stored() -> dict[int, dict]:
    """The seeds of the stored file."""
    with np.load(STORED) as arrays:
        found = {
            one["seed"]: one | {"rows": {d: {} for d in DOMAINS}} for one in json.loads(str(arrays["about"]))
        }
        for path in arrays.files:
            if path != "about":
                seed, domain, name = path.split("/")
                values = arrays[path]
                log_probs = -np.logaddexp(0, -values.astype(np.float64))
                found[int(seed)]["rows"][domain][name] = (values if name == "labels" else log_probs).tolist()
    return found


def seconds(given: argparse.Namespace, report: Report) -> None:
    """Seconds of whole fits, compiling included; without predictions."""
    pooled, methods = pool(console=QUIET), (LORA, SHORT, BAYES)
    table = report.table("Seconds of whole fits", ("seed", *(SHOWN[m] for m in methods)))
    for seed in given.seeds:
        _, spent = fitted(seed, pooled, drawn(pooled, seed)[0], methods)
        table.row(seed, *(f"{spent[m]:.1f}" for m in methods))


def of_positive(log_probs: Sequence[float]) -> np.ndarray:
    """Log-probabilities of both classes from those of the second."""
    second = np.asarray(log_probs)
    return np.stack([np.log1p(-np.minimum(np.exp(second), 1 - 1e-12)), second], axis=1)


METRICS = {"ACC": bl.metrics.accuracy, "NLL": bl.metrics.nll, "ECE": bl.metrics.ece,
           "null": lambda p, y: bl.metrics.null_ece(p, redraws=50)}  # fmt: skip


def bootstrap(found: list[dict], metric, draws: int = 200) -> dict[str, np.ndarray]:
    """Metric by method, shape (draw, domain): seeds and rows are resampled, equally for all methods."""
    random = np.random.default_rng(0)
    made = {m: np.zeros((draws, len(DOMAINS))) for m in METHODS}
    for draw in range(draws):
        for seed in random.integers(0, len(found), len(found)):
            for d, domain in enumerate(DOMAINS):
                rows = found[seed]["rows"][domain]
                labels = np.asarray(rows["labels"])
                index = random.integers(0, len(labels), len(labels))
                for m in METHODS:
                    made[m][draw, d] += metric(of_positive(rows[m])[index], labels[index]) / len(found)
    return made


def means_of(found: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Means over the seeds, by metric, method and domain."""

    def one(metric: Callable, rows: dict, method: str) -> float:
        return metric(of_positive(rows[method]), np.asarray(rows["labels"]))

    table = {
        name: {
            m: np.mean([[one(of, f["rows"][d], m) for d in DOMAINS] for f in found], axis=0) for m in METHODS
        }
        for name, of in METRICS.items()
    }
    table["debiased"] = {m: table["ECE"][m] - table["null"][m] for m in METHODS}
    return table


def tables(given: argparse.Namespace, report: Report) -> None:
    """Means over the finished seeds, paired intervals, ratios, and differences from the base by seed."""
    found = finished()
    means = means_of(found)
    compact(report, means)
    table = report.table("Metrics", ("metric", "method", *DOMAINS, "mean"))
    for name, by in means.items():
        for m, values in by.items():
            table.row(name, SHOWN[m], *(f"{x:.3f}" for x in (*values, values.mean())))
    differences(report, found, means)
    ratios(report, found, means["debiased"])
    table = report.table("NLL minus that of the untouched base", ("seed", *DOMAINS))
    for f in found:
        labels = {d: np.asarray(f["rows"][d]["labels"]) for d in DOMAINS}
        ours, base = (
            np.array([bl.metrics.nll(of_positive(f["rows"][d][m]), labels[d]) for d in DOMAINS])
            for m in (BAYES, BASE)
        )
        table.row(f["seed"], *(f"{x:+.3f}" for x in ours - base))
        spent = {k: round(v, 1) for k, v in f["seconds"].items()}
        report.progress(f"seed {f['seed']}: seconds {spent}, {f['about']}")


def compact(report: Report, means: dict[str, dict[str, np.ndarray]]) -> None:
    """NLL / debiased ECE / accuracy by method and domain: the table of the README."""
    table = report.table("Summary", ("NLL / debiased ECE / accuracy", *DOMAINS))
    for m in METHODS:
        triples = zip(*(means[name][m] for name in ("NLL", "debiased", "ACC")), strict=True)
        table.row(SHOWN[m], *(" / ".join(f"{x:.3f}" for x in triple) for triple in triples))


def differences(report: Report, found: list[dict], means: dict[str, dict[str, np.ndarray]]) -> None:
    """Differences of NLL and accuracy, with intervals by bootstrap over seeds and rows."""
    table = report.table("Differences", ("metric", "difference (95 % interval)", *DOMAINS, "mean"))
    for name in ("NLL", "ACC"):
        draws = bootstrap(found, METRICS[name])
        for m in METHODS[:-1]:
            gaps = draws[BAYES] - draws[m]
            gaps = np.concatenate([gaps, gaps.mean(1, keepdims=True)], axis=1)
            low, high = np.quantile(gaps, [0.025, 0.975], axis=0)
            centre = means[name][BAYES] - means[name][m]
            centre = np.append(centre, centre.mean())
            cells = [f"{c:+.3f} ({a:+.3f} to {b:+.3f})" for c, a, b in zip(centre, low, high, strict=True)]
            table.row(name, f"{BAYES} minus {SHOWN[m]}", *cells)


def ratios(report: Report, found: list[dict], debiased: dict[str, np.ndarray], draws: int = 200) -> None:
    """Ratio of mean debiased ECE, with a bootstrap interval over seeds and rows.

    Repeated rows increase the ECE, so the bootstrap draws are shifted to the mean of the estimate.
    """
    ece = bootstrap(found, bl.metrics.ece, draws)
    means = {m: x.mean(1) - x.mean() + debiased[m].mean() for m, x in ece.items()}
    table = report.table(
        "Ratios", ("mean debiased ECE of Bayesian-LoRA over that of", "ratio", "95 % interval")
    )
    for rival in (LORA, SHORT, CAREFUL, BASE):
        low, high = np.quantile(means[BAYES] / means[rival], [0.025, 0.975])
        point = debiased[BAYES].mean() / debiased[rival].mean()
        table.row(SHOWN[rival], f"{point:.2f}", f"{low:.2f} to {high:.2f}")


def picture(given: argparse.Namespace, report: Report) -> None:
    """Reliability diagrams of LoRA after 20 epochs and of Bayesian-LoRA, with the rows of all seeds."""
    found = finished()

    def joined(domain: str, name: str) -> np.ndarray:
        return np.concatenate([f["rows"][domain][name] for f in found])

    predictions = {
        SHOWN[m]: {d: bl.Prediction(of_positive(joined(d, m))[None]) for d in DOMAINS} for m in (LORA, BAYES)
    }
    figure = bl.plots.reliability(predictions, {d: joined(d, "labels") for d in DOMAINS})
    figure.savefig(PICTURE, dpi=90)
    report.progress(f"{PICTURE} has seeds {[f['seed'] for f in found]}")


JOBS = {"run": run_seeds, "report": tables, "store": store, "picture": picture, "time": seconds}


def options(parser: argparse.ArgumentParser) -> None:
    """The job, and its seeds."""
    parser.add_argument("what", choices=JOBS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[3, 4, 5, 6, 7], help="of `run` and `time`")


def run(given: argparse.Namespace, report: Report) -> None:
    """Run seeds, report the finished ones, or time fits."""
    JOBS[given.what](given, report)
