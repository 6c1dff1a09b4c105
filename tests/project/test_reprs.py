"""What objects show of themselves: whole, escaped, on page and terminal, without a run of the model."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from builders.html_page import Page
from rich.console import Console

import bnlora as bl
from bnlora._util.display import Shown, Table, percent
from bnlora._util.finding import Findings
from bnlora.assess.comparison import Draws, compare_draws
from bnlora.assess.prior_predictive import PriorPredictive
from bnlora.data.text import TextData
from bnlora.infer.mcmc.certificate import Evidence, certify
from bnlora.infer.mcmc.chains import Chains
from bnlora.models.decoder import Decoder
from bnlora.prediction.predict import Prediction
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
HOSTILE = "<script>alert('x')</script>"


def chains():
    random = np.random.default_rng(0)
    stats = {
        "divergent": random.random((2, 50)) < 0.1,
        "energy": random.normal(size=(2, 50)),
        "acceptance": np.full((2, 50), 0.875),
        "num_gradients": np.full((2, 50), 7),
    }
    record = {"sampler": "NUTS", "seconds": 12.0, "stopped": "interrupted", "plan": {"num_draws": 80}}
    target = SimpleNamespace(held="q_proj.a held at zero", model=None)
    tuning = SimpleNamespace(num_gradients=np.array([100, 200]))
    return Chains(target, random.normal(size=(2, 50, 9)), stats, tuning, record)


@pytest.fixture(scope="module")
def objects():
    base, rows = tiny_base(jax.random.key(1)), tiny_rows(jax.random.key(2), 12)
    base = replace(base, name=HOSTILE)
    sites = bl.select(base, ["q_proj", "lm_head"], rank=2, layers=[1, 3])
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, {r".*\.a": bl.guides.full(), ".*": bl.guides.mean_field()})
    fit = bl.fit(KEY, model, guide, rows, optax.adam(1e-2), num_steps=2, batch_size=4, validation=rows[:4])
    random = np.random.default_rng(0)
    prediction = Prediction(np.log(random.dirichlet([1, 1], (5, 12))))
    draws = random.normal(size=(2, 60, 2))
    names = (HOSTILE, "norm")
    evidence = Evidence(names, draws, np.zeros((2, 60), bool), random.normal(size=(2, 60)))
    pair = [Draws(names, x[None], "independent") for x in draws]
    logits = random.normal(size=(7, 12, 2))
    frames = bl.frames(KEY, base, ["q_proj", "slope"], rows, label_ids=(3, 5), size=2, layers=[1, 3])
    scale = dist.HalfNormal(1.0)
    core = bl.Classifier(base, frames.sites, bl.priors.core(frames, scale=scale), label_ids=(3, 5))
    tangent = bl.Tangent(core)
    return {
        "base": base,
        "sites": sites,
        "model": model,
        "conditional": bl.condition(model, {"q_proj.a": np.ones((2, 2, 16), np.float32)}),
        "guide": guide,
        "fit": fit,
        "prediction": prediction,
        "summary": bl.metrics.summary(
            jax.random.key(0), prediction, np.asarray(rows.labels), num_resamples=5
        ),
        "monitor": bl.monitor.Monitor.start(KEY, floor=0.5).update(
            prediction, np.asarray(rows.labels), HOSTILE
        ),
        "comparison": compare_draws(jax.random.key(0), *pair),
        "certificate": certify(evidence, bl.Thresholds()),
        "chains": chains(),
        "prior predictive": PriorPredictive(logits, logits.mean(0)),
        "batch": rows,
        "frames": frames,
        "tangent": tangent,
        "conditional tangent": bl.condition(tangent, {"q_proj.U": np.ones((2, 2, 2), np.float32)}),
        "scales": bl.choose_scales(tangent, rows, prior=scale),
        "gaussian": bl.laplace(tangent, rows),
        "text": TextData({"train": rows, HOSTILE: rows[:3]}, (" bad", HOSTILE), np.array([3, 5])),
    }


NAMES = ["base", "sites", "model", "conditional", "guide", "fit", "prediction", "summary", "comparison",
         "certificate", "chains", "prior predictive", "batch", "frames", "tangent", "conditional tangent",
         "scales", "gaussian", "text", "monitor"]  # fmt: skip


def cells(overview):
    """Every piece of text of an overview."""
    for part in overview:
        if isinstance(part, Table):
            yield from part.title.split("\n")
            yield from (
                line for row in (part.header, *part.rows) for cell in row for line in cell.split("\n")
            )
        elif isinstance(part, Findings):
            yield part.title
            yield from (text for f in part.findings for text in (f.name, f.sentence, f.remedy))
        else:
            yield from [part] if isinstance(part, str) else part


@pytest.fixture
def no_model(monkeypatch):
    """Fail where any layer, the head or an embedding would run."""
    for name in ("embed", "blocks", "head"):
        monkeypatch.setattr(Decoder, name, lambda *_, **__: pytest.fail("the model was run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_shown_escaped_and_no_model_runs(objects, name, no_model):
    shown = objects[name]
    assert isinstance(shown, Shown)
    before = len(jax.live_arrays())
    page = Page.of(shown._repr_html_())
    console = Console(width=400, color_system=None)
    with console.capture() as terminal:
        console.print(shown)
    overview = shown.overview
    assert len(jax.live_arrays()) == before
    assert "script" not in page.tags
    pieces = [piece for piece in cells(overview) if piece]
    assert len(pieces) > 5
    for piece in pieces:
        assert piece in page.text
        assert piece in terminal.get()
    assert page.tags <= {"style", "div", "table", "caption", "span", "thead", "tbody", "tr", "th", "td", "br",
                         "ul", "li", "p"}  # fmt: skip
    assert repr(shown)[0] != "<"  # plain text, and not the default of Python


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_everything_survives_copy_and_pickle(objects, name):
    for again in (copy.deepcopy(objects[name]), pickle.loads(pickle.dumps(objects[name]))):
        assert type(again) is type(objects[name])
        assert repr(again) == repr(objects[name])
        assert again._repr_html_() == objects[name]._repr_html_()


def shown_facts(shown):
    """The first two columns of every table as a mapping."""
    tables = [part for part in shown.overview if isinstance(part, Table)]
    return {row[0]: row[1] for table in tables for row in table.rows}


@pytest.mark.slow
def test_numbers_are_those_of_the_objects(objects):
    base, fit, rows = objects["base"], objects["fit"], objects["batch"]
    count = sum(x.size for x in jax.tree.leaves(base.weights))
    assert shown_facts(base)["parameters"] == f"{count:,}"
    assert shown_facts(base.running(activations="bfloat16"))["execution"] == "activations='bfloat16'"
    assert shown_facts(objects["model"])["prior"] == "normal"
    assert shown_facts(fit)["elbo"] == f"{fit.history['elbo'].mean():,.1f}"
    assert shown_facts(fit)["ended"] == "all steps done"
    labels = np.asarray(rows.labels)
    lengths = np.asarray(rows.mask).sum(1)
    assert (
        shown_facts(rows)["rows of each class"] == f"class 0: {sum(labels == 0)}, class 1: {sum(labels == 1)}"
    )
    assert shown_facts(rows)["tokens in a row"].startswith(f"{lengths.min()} to {lengths.max()}")
    prediction = objects["prediction"]
    assert shown_facts(prediction)["entropy (nats)"] == f"{prediction.entropy.mean():.3g}"
    assert shown_facts(prediction)["1"] == str(sum(prediction.probs.argmax(1) == 1))
    (sites,) = objects["sites"].overview
    assert sum(int(row[-1]) for row in sites.rows) == objects["sites"].num_parameters
    (guide,) = objects["guide"].overview
    assert sum(int(row[-1].replace(",", "")) for row in guide.rows) == sum(objects["guide"].counts.values())


@pytest.mark.slow
def test_what_is_missing_is_said(objects):
    empty = objects["batch"][:0]
    assert shown_facts(empty)["rows of each class"] == shown_facts(empty)["tokens in a row"] == "none"
    unlabelled = replace(objects["batch"], labels=objects["batch"].labels * 0 - 1)
    assert shown_facts(unlabelled)["rows of each class"] == "unlabelled: 12"
    fit = objects["fit"]
    nothing = {name: np.zeros(0) for name in fit.history}
    stopped = replace(fit, history=nothing, step_seconds=np.zeros(0), stopped="interrupted",
                      validation={"step": np.zeros(0), "nll": np.zeros(0)})  # fmt: skip
    found = shown_facts(stopped)
    assert (found["elbo"], found["ended"], found["median step"]) == ("none", "interrupted", "none")
    assert found["lowest validation NLL"] == "no validation rows"


@pytest.mark.slow
def test_chains_are_judged_only_where_they_were(objects):
    drawn = chains()
    assert "not been checked yet" in drawn._repr_html_()
    assert shown_facts(drawn)["draws of each"] == "50, every 1, 80 requested"
    drawn.__dict__["certificate"] = objects["certificate"]  # as the cached property keeps it
    page = Page.of(drawn._repr_html_())
    assert "Not certified" in page.text
    assert objects["certificate"].problems
    for failure in objects["certificate"].problems:
        assert failure.sentence in page.text
        assert failure.remedy in page.text


def test_shares_in_percent_are_whole_and_never_certain_unless_they_are():
    assert [percent(x) for x in (0.0, 0.004, 0.25, 0.996, 1.0)] == ["0", "<1", "25", ">99", "100"]
