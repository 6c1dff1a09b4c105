"""Draw every public plot of the library, and results that have an HTML form, from small seeded examples.

    python docs/gallery.py build/gallery

writes a picture for each entry of `PICTURES`, and `pictures.json`, from which docs/hooks.py makes the page. A
figure is saved as SVG; a result without a figure is kept as HTML.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
import optax
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bnlora as bl
from bnlora._util.caching import programs_folder
from bnlora.adapters.frames import Frames
from bnlora.testing import tiny_base, tiny_rows

SILENT = Console(quiet=True)
SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(programs_folder()),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_disable_most_optimizations": True,  # compilation takes most of the time
}


WORDS = """the a an it of is bad was good but and not in film plot cast scene music long short slow first half
dull funny then ending came all one made had for with on so too much never loved""".split()
"""A word for each token of the tiny model; the classes are tokens 6 and 8."""

REVIEW = "the first half was slow and the plot too long but the ending was funny and the music so good"


class Picture(NamedTuple):
    """A plot: its title, how to read it, a function that draws it, and the module of the public function."""

    title: str
    caption: str
    draw: Callable[[], Any]
    home: str = "bnlora.plots"


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that splits a text into words; unknown words become the first word."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=WORDS[0], model_max_length=64)


@cache
def problem() -> tuple[bl.Classifier, Mapping[str, bl.Batch]]:
    """Adapters on the head of a tiny random model, and rows labelled by one draw of the prior."""
    base = replace(tiny_base(jax.random.key(0), num_layers=1), tokenizer=tokenizer())
    sites = bl.select(base, ["lm_head"], rank=1)
    prior = bl.priors.normal(scale={"a": 1.0, "b": 3.0})
    model = bl.Classifier(base, sites, prior, label_ids=(WORDS.index("bad"), WORDS.index("good")))
    simulated = bl.sbc.simulate(jax.random.key(1), model, base.weights, tiny_rows(jax.random.key(2), 256), {})
    rows = bl.cache_prefix(model, simulated.batch, console=SILENT)
    return model, {"training rows": rows[:48], "new rows": rows[48:]}


@cache
def fitted() -> bl.Fit:
    """A mean-field fit that is validated on the new rows."""
    model, rows = problem()
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    steps = {"num_steps": 400, "batch_size": 16, "optimisation": bl.Optimisation(scale_optimizer=adam)}
    given = {"validation": rows["new rows"], "console": SILENT}
    return bl.fit(jax.random.key(3), model, guide, rows["training rows"], adam, **steps, **given)


@cache
def predicted() -> Mapping[str, bl.Prediction]:
    """Predictions of the fit by name of the rows."""
    _, rows = problem()
    return {
        name: bl.predict(jax.random.key(4), fitted(), batch, num_draws=64, console=SILENT)
        for name, batch in rows.items()
    }


@cache
def framed() -> Frames:
    """Frames of the value projections and the head of a random model."""
    model, rows = problem()
    return bl.frames(
        jax.random.key(13),
        model.base,
        ["v_proj", "lm_head"],
        rows["new rows"].plain,
        label_ids=model.label_ids,
        size={"v_proj": 8, "lm_head": 4},
        console=SILENT,
    )


@cache
def compared() -> bl.Comparison:
    """The fit compared with NUTS chains, long enough for a picture but too short for a certificate."""
    model, rows = problem()
    few = {"num_warmup": 300, "num_draws": 300, "console": SILENT}
    chains = bl.sample_nuts(jax.random.key(5), model, rows["training rows"], given=fitted(), **few)
    return bl.compare(
        jax.random.key(6), fitted(), chains, rows["new rows"][:32], against="anything", console=SILENT
    )


@cache
def calibrated() -> Any:
    """Sixty simulations of a mean-field fit that stops too early."""
    model, rows = problem()
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    inference = bl.sbc.svi_inference(
        jax.random.key(7), model, guide, optax.adam(0.05), num_steps=200, num_draws=31
    )
    return bl.sbc.run(jax.random.key(8), model, inference, rows["training rows"][:8], num_simulations=60)


def believed() -> Any:
    """The prior predictive distribution at forty rows."""
    model, rows = problem()
    return bl.prior_predictive(jax.random.key(9), model, rows["new rows"][:40], num_draws=200, console=SILENT)


@cache
def narrowed() -> Any:
    """Posterior spread relative to prior spread, for several layers."""
    base = tiny_base(jax.random.key(0), num_layers=4)
    sites = bl.select(base, ["q_proj", "v_proj", "lm_head"], rank=1, layers=[2, 3])
    model = bl.Classifier(base, sites, bl.priors.normal(scale=2.0), label_ids=(6, 8))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(
        jax.random.key(10),
        model,
        guide,
        bl.cache_prefix(model, tiny_rows(jax.random.key(11), 256), console=SILENT),
        optax.adam(0.02),
        num_steps=400,
        batch_size=32,
        console=SILENT,
    )
    return bl.diagnostics.shrinkage(fit)


def labels() -> Mapping[str, np.ndarray]:
    """Labels by name of the rows."""
    _, rows = problem()
    return {name: np.asarray(batch.labels) for name, batch in rows.items()}


def reliable() -> Any:
    """Reliability of the fit, one panel for each set of rows."""
    return bl.plots.reliability({"mean field": dict(predicted())}, labels())


def covered() -> Any:
    """Risk against coverage of the fit, one panel for each set of rows."""
    return bl.plots.risk_coverage(jax.random.key(14), {"mean field": dict(predicted())}, labels())


def monitored() -> Any:
    """A classifier that becomes too confident after 600 rows."""
    random = np.random.default_rng(0)

    def rows(count: int, temperature: float = 1.0) -> tuple[bl.Prediction, np.ndarray]:
        logits = 2 * random.normal(size=(count, 2)) + 0.5 * random.normal(size=(8, count, 2))
        prediction = bl.Prediction(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        labels = (random.random(count) < prediction.probs[:, 1]).astype(int)
        return bl.approximate.tempered(prediction, temperature), labels

    monitor = bl.monitor.Monitor.start(jax.random.key(0), *rows(500))
    for step in range(60):
        monitor = monitor.update(*rows(20, 1.0 if step < 30 else 0.4))
    return bl.plots.monitoring(monitor)


def diagnosed() -> bl.diagnostics.Diagnosis:
    """The diagnosis of the fit on rows that were not fitted."""
    _, rows = problem()
    return bl.diagnose(jax.random.key(15), fitted(), rows["new rows"], console=SILENT)


def read() -> bl.Reading:
    """Predictions after every word of a sentence."""
    return bl.read_along(jax.random.key(12), fitted(), REVIEW, template="{text}", console=SILENT)


def explored() -> bl.Explored:
    """What follows from scales by evidence, on a tangent model of the same rows."""
    model, rows = problem()
    prior = bl.priors.core(framed())
    network = bl.Classifier(model.base, framed().sites, prior, label_ids=model.label_ids)
    train, new = rows["training rows"].plain, rows["new rows"].plain
    return bl.explore(bl.Tangent(network), train, new, console=SILENT).at(law="half-normal")


PICTURES: Mapping[str, Picture] = MappingProxyType(
    {
        "elbo": Picture(
            "The bound and its terms",
            bl.plots.ELBO_CAPTION,
            lambda: bl.plots.elbo({"mean field": fitted()}),
        ),
        "reliability": Picture("Reliability diagram", bl.plots.RELIABILITY_CAPTION, reliable),
        "risk_coverage": Picture(
            "Risk against coverage",
            "the error rate among the answered rows, if the least certain rows are refused. If the "
            "uncertainty is informative, the curve rises to the right. If it stays on the dotted line, "
            "refusing rows gains nothing.",
            covered,
        ),
        "domains": Picture(
            "Uncertainty by domain",
            "uncertainty of the rows of each domain. The area under the curve is the probability that a row "
            "of another domain is more uncertain than a row of the training domain. Here both sets come from "
            "one domain, so it should be about one half.",
            lambda: bl.plots.domains(predicted()),
        ),
        "monitoring": Picture(
            "A classifier over time",
            "running accuracy and the evidence of each test of [`bl.monitor`](guides/monitor.md). From row "
            "600 on the confidence is too high: entropy, mutual information and calibration raise alarms. "
            "The accuracy does not change, and its test stays below its alarm level.",
            monitored,
        ),
        "read_along": Picture(
            "Prediction after every word",
            "the prediction after every word of a text, as if the text ended there. The shade is the mutual "
            "information: the part of the uncertainty that more training rows could remove. It does not "
            "attribute the prediction to words. The model here is random and the sentence stands for tokens.",
            read,
            home="bnlora",
        ),
        "diagnose": Picture(
            "Diagnosis of a fit",
            "every diagnostic of a fit on one page: problems first, each with a remedy. [Diagnose "
            "a fit](guides/diagnose.md) explains each line.",
            diagnosed,
            home="bnlora",
        ),
        "explore": Picture(
            "What follows from a prior",
            "evidence, prior predictive, posterior spread, reliability and the most uncertain rows of one "
            "prior on the tangent model. In Jupyter they stand below controls that move the prior: [Explore "
            "a prior](guides/explore.md).",
            explored,
            home="bnlora",
        ),
        "posterior_spread": Picture(
            "Posterior spread by layer",
            "the standard deviation of each layer's update under the posterior, divided by its standard "
            "deviation under the prior (`diagnostics.shrinkage`). A layer near one has learned nothing.",
            lambda: bl.plots.posterior_spread(narrowed().table),
        ),
        "prior_predictive": Picture(
            "Prior predictive distribution",
            "class probabilities before any label is seen, beside those of the base model. If the prior is "
            "too wide, every draw is certain about every row. If it is too narrow, the draws stay at the "
            "base.",
            lambda: bl.plots.prior_predictive(believed()),
        ),
        "frame_energies": Picture(
            "Energy left out by a frame",
            "the share of the gradients' energy outside the leading directions of each side, from "
            "`bl.frames`. Blue: outputs. Orange: inputs. The dots are the chosen sizes.",
            lambda: bl.plots.frame_energies(framed()),
        ),
        "forest": Picture(
            "Two posteriors, function by function",
            "the fit and the chains, in units of the chains. These chains are too short for a "
            "certificate, so the plot calls them the other posterior and not a reference.",
            lambda: bl.plots.forest(compared()),
        ),
        "worst_pairs": Picture(
            "Function pairs that differ most",
            "draws of both posteriors in the plane of two functions, for the pairs that differ most. "
            "Correlation that a factorised guide cannot represent appears here first.",
            lambda: bl.plots.worst_pairs(compared()),
        ),
        "predictive_scatter": Picture(
            "Predictions of two posteriors",
            "row by row: the probability of a class, and the uncertainty that is due to the adapters.",
            lambda: bl.plots.predictive_scatter(compared()),
        ),
        "rank_difference": Picture(
            "Ranks of one posterior within the other",
            "a curve outside its band shows a difference beyond chance; the shape of the curve shows which "
            "kind of difference.",
            lambda: bl.plots.rank_difference(compared()),
        ),
        "sbc": Picture(
            "Simulation-based calibration",
            "is the inference calibrated on average over data from the prior? Curves of exact inference stay "
            "inside the grey band.",
            lambda: bl.plots.sbc(calibrated()),
        ),
        "vsbc": Picture(
            "Bias of a variational posterior",
            "a weaker check than full calibration: is the true value above the draws as often as below them?",
            lambda: bl.plots.vsbc(calibrated()),
        ),
    }
)
"""Every public plot by name, and results that have an HTML form. A test fails if a public plot is missing."""


def main(folder: Path) -> None:
    """Draw every picture into a folder."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "bnlora"
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, picture in PICTURES.items():
        began = time.perf_counter()
        result = picture.draw()
        entry = {"name": name, "function": f"{picture.home}.{name}", "file": "", "html": ""}
        entry |= {"title": picture.title, "caption": picture.caption}
        if hasattr(result, "savefig"):
            entry["file"] = f"{name}.svg"
            result.savefig(folder / entry["file"], metadata={"Date": None}, facecolor="white")
        else:
            entry["html"] = result if isinstance(result, str) else result._repr_html_()
        entries.append(entry)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    (folder / "pictures.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
