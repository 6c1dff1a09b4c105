"""Draw every public plot of the library, and results that show themselves, from small examples with seeds.

    python docs/gallery.py build/gallery

writes a picture for each entry of `PICTURES`, and `pictures.json`, from which the page is made. A plot that
gives a figure becomes an SVG, one that gives HTML stays HTML.
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
from bnlora.adapters.frames import Frames
from bnlora.testing import tiny_base, tiny_rows

SILENT = Console(quiet=True)
SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR")
    or str(Path(__file__).parents[1] / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_disable_most_optimizations": True,  # most of the time goes into compiling programs that are tiny
}


WORDS = """the a an it of is bad was good but and not in film plot cast scene music long short slow first half
dull funny then ending came all one made had for with on so too much never loved""".split()
"""A word for each token of the tiny model; the classes are tokens 6 and 8."""

REVIEW = "the first half was slow and the plot too long but the ending was funny and the music so good"


class Picture(NamedTuple):
    """A plot with a title, what one reads off it, how it is drawn here, and where its function is."""

    title: str
    caption: str
    draw: Callable[[], Any]
    home: str = "bnlora.plots"


def tokenizer() -> PreTrainedTokenizerFast:
    """Cuts a text into words; those that it does not know become the first of them."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=WORDS[0], model_max_length=64)


@cache
def problem() -> tuple[bl.Classifier, Mapping[str, bl.Batch]]:
    """A head of a tiny random model, and rows whose labels one draw of the prior has made."""
    base = replace(tiny_base(jax.random.key(0), num_layers=1), tokenizer=tokenizer())
    sites = bl.select(base, ["lm_head"], rank=1)
    prior = bl.priors.normal(scale={"a": 1.0, "b": 3.0})
    model = bl.Classifier(base, sites, prior, label_ids=(WORDS.index("bad"), WORDS.index("good")))
    simulated = bl.sbc.simulate(jax.random.key(1), model, base.weights, tiny_rows(jax.random.key(2), 256), {})
    rows = bl.cache_prefix(model, simulated.batch, console=SILENT)
    return model, {"training rows": rows[:48], "new rows": rows[48:]}


@cache
def fitted() -> bl.Fit:
    """A mean-field fit with looks at rows that it has not seen."""
    model, rows = problem()
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    return bl.fit(
        jax.random.key(3),
        model,
        guide,
        rows["training rows"],
        adam,
        scale_optimizer=adam,
        num_steps=400,
        batch_size=16,
        validation=rows["new rows"],
        console=SILENT,
    )


@cache
def predicted() -> Mapping[str, bl.Prediction]:
    """Predictions of the fit by name of the rows."""
    _, rows = problem()
    return {
        name: bl.predict(jax.random.key(4), fitted(), some, num_draws=64, console=SILENT)
        for name, some in rows.items()
    }


@cache
def framed() -> Frames:
    """Frames of the value projections and the head of a random model."""
    model, rows = problem()
    targets, key = ["v_proj", "lm_head"], jax.random.key(13)
    some = rows["new rows"].plain
    return bl.frames(
        key,
        model.base,
        targets,
        some,
        label_ids=model.label_ids,
        size={"v_proj": 8, "lm_head": 4},
        console=SILENT,
    )


@cache
def compared() -> bl.Comparison:
    """The fit against chains that are long enough for a picture, and too short for a certificate."""
    model, rows = problem()
    chains = bl.sample_nuts(
        jax.random.key(5),
        model,
        rows["training rows"],
        given=fitted(),
        num_warmup=300,
        num_draws=300,
        console=SILENT,
    )
    return bl.compare(
        jax.random.key(6), fitted(), chains, rows["new rows"][:32], against="anything", console=SILENT
    )


@cache
def calibrated() -> Any:
    """Sixty simulations of a mean-field fit of too few steps."""
    model, rows = problem()
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    inference = bl.sbc.svi_inference(
        jax.random.key(7), model, guide, optax.adam(0.05), num_steps=200, num_draws=31
    )
    return bl.sbc.run(jax.random.key(8), model, inference, rows["training rows"][:8], num_simulations=60)


def believed() -> Any:
    """Draws of the prior at rows without labels."""
    model, rows = problem()
    return bl.prior_predictive(jax.random.key(9), model, rows["new rows"][:40], num_draws=200, console=SILENT)


@cache
def narrowed() -> Any:
    """Spread of the posterior against the prior's, where several layers are adapted."""
    base = tiny_base(jax.random.key(0), num_layers=4)
    sites = bl.select(base, ["q_proj", "v_proj", "lm_head"], rank=1, layers=[2, 3])
    model = bl.Classifier(base, sites, bl.priors.normal(scale=2.0), label_ids=(6, 8))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    made = bl.fit(
        jax.random.key(10),
        model,
        guide,
        bl.cache_prefix(model, tiny_rows(jax.random.key(11), 256), console=SILENT),
        optax.adam(0.02),
        num_steps=400,
        batch_size=32,
        console=SILENT,
    )
    return bl.diagnostics.shrinkage(made)


def by_labels(plot: Callable[..., Any]) -> Any:
    """A plot of predictions against labels, one panel for each set of rows."""
    _, rows = problem()
    labels = {name: np.asarray(some.labels) for name, some in rows.items()}
    return plot({"mean field": dict(predicted())}, labels)


def diagnosed() -> bl.diagnostics.Diagnosis:
    """The page of the fit, by rows that it has not seen."""
    _, rows = problem()
    return bl.diagnose(fitted(), rows["new rows"], console=SILENT)


def read() -> bl.Reading:
    """A sentence read word by word."""
    return bl.read_along(jax.random.key(12), fitted(), REVIEW, template="{text}", console=SILENT)


PICTURES: Mapping[str, Picture] = MappingProxyType(
    {
        "elbo": Picture(
            "The bound of a fit and its terms",
            bl.plots.ELBO_CAPTION,
            lambda: bl.plots.elbo({"mean field": fitted()}),
        ),
        "reliability": Picture(
            "Reliability", bl.plots.RELIABILITY_CAPTION, lambda: by_labels(bl.plots.reliability)
        ),
        "risk_coverage": Picture(
            "Leaving doubtful rows to others",
            "the error rate among the rows that are answered when the least certain are refused. A doubt "
            "worth having makes the curve rise to the right; where it stays on the dotted line, "
            "refusing gains nothing.",
            lambda: by_labels(bl.plots.risk_coverage),
        ),
        "domains": Picture(
            "Doubt by domain",
            "does the posterior know that rows are of another kind? The area under the curve says how often "
            "one of them is more uncertain than a row of the domain that was trained on. Here both sets are "
            "of one kind, so that it should be about one half.",
            lambda: bl.plots.domains(predicted()),
        ),
        "read_along": Picture(
            "Reading along",
            "the prediction after every word of a text, as if it had ended there: shaded by what more "
            "training rows could remove from the doubt. Nothing is attributed to a word. The model is "
            "random, and the sentence stands for tokens.",
            read,
            home="bnlora",
        ),
        "diagnose": Picture(
            "A diagnosis",
            "every diagnostic of a fit on one page, what is wrong first, with what to do about it. [Diagnose "
            "a fit](guides/diagnose.md) explains each line.",
            diagnosed,
            home="bnlora",
        ),
        "posterior_spread": Picture(
            "Where the data narrowed the prior",
            "the spread of each layer's update under the posterior as a share of its spread under the prior, "
            "from `diagnostics.shrinkage`. Layers near one have learned nothing.",
            lambda: bl.plots.posterior_spread(narrowed().table),
        ),
        "prior_predictive": Picture(
            "What a prior believes",
            "before any label is seen, beside the base model. A prior too wide decides every row in every "
            "draw; one too narrow leaves the base as it is.",
            lambda: bl.plots.prior_predictive(believed()),
        ),
        "frame_energies": Picture(
            "How many directions a frame needs",
            "the share of the gradients' energy outside the leading directions of each side, from "
            "`bl.frames`. Blue: outputs, orange: inputs; the dots are the chosen sizes.",
            lambda: bl.plots.frame_energies(framed()),
        ),
        "forest": Picture(
            "Two posteriors by function",
            "the fit against chains, in units of the chains. Here the chains are too short for a "
            "certificate, so that they are called the other posterior and no reference.",
            lambda: bl.plots.forest(compared()),
        ),
        "worst_pairs": Picture(
            "Where two posteriors differ most",
            "draws of both in the plane of each two functions: correlation that a factorised guide cannot "
            "have shows here first.",
            lambda: bl.plots.worst_pairs(compared()),
        ),
        "predictive_scatter": Picture(
            "Predictions of two posteriors",
            "row by row: the probability of a class, and how much of the doubt is about the adapters.",
            lambda: bl.plots.predictive_scatter(compared()),
        ),
        "rank_difference": Picture(
            "Ranks of one posterior within the other",
            "a curve that leaves its band is a difference that chance does not explain; its shape says "
            "which.",
            lambda: bl.plots.rank_difference(compared()),
        ),
        "sbc": Picture(
            "Simulation-based calibration",
            "is the inference right on average over data that the prior made? Curves of exact inference stay "
            "inside the grey band.",
            lambda: bl.plots.sbc(calibrated()),
        ),
        "vsbc": Picture(
            "Is a variational posterior biased?",
            "the weaker question: whether the truth lies above and below the draws equally often.",
            lambda: bl.plots.vsbc(calibrated()),
        ),
    }
)
"""Every public plot by name, and what shows itself; a test refuses a plot that is missing here."""


def main(folder: Path) -> None:
    """Draw every picture into a folder."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "bnlora"
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, picture in PICTURES.items():
        began = time.perf_counter()
        made = picture.draw()
        entry = {"name": name, "function": f"{picture.home}.{name}", "file": "", "html": ""}
        entry |= {"title": picture.title, "caption": picture.caption}
        if hasattr(made, "savefig"):
            entry["file"] = f"{name}.svg"
            made.savefig(folder / entry["file"], metadata={"Date": None}, facecolor="white")
        else:
            entry["html"] = made if isinstance(made, str) else made._repr_html_()
        found.append(entry)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    (folder / "pictures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
