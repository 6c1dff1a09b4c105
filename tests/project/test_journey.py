"""The whole way of the README for real combinations of prior, guide and inference.

Every other file tests one member at a time. Here one user walks from a folder and a table to a comparison:
load, select, fit, predict, summarise, ArviZ and netCDF, diagnose, save, load, sample, compare, draw.
Two families and the head are adapted; priors of one's own have scalar, per-layer and per-rank sites.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray
from builders.own_prior import hierarchy
from builders.thorough import sample_of
from datasets import Dataset
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal

import bnlora as bl
from bnlora.data.tables import read_table

FAMILIES, RANK = ["q_proj", "v_proj", "lm_head"], 2


def with_plates(sites: bl.Sites) -> dict[str, dict[str, jax.Array]]:
    """One global scale, a scale for each layer of the model, and a gain for each rank of a family."""
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("layer", sites.num_layers + 1):  # the head stands above the layers
        of_layer = numpyro.sample("s", dist.LogNormal(0.0, 0.3))
    adapters = bl.priors.normal(scale={"a": 1.0, "b": 1.0})(sites)
    for name, site in sites.items():
        with numpyro.plate(f"{name}.rank", site.rank):
            gain = numpyro.sample(f"{name}.gain", dist.HalfCauchy(1.0))
        spread = tau * of_layer[np.asarray(site.layers)][:, None, None] * gain
        adapters[name] = {"a": adapters[name]["a"], "b": spread * adapters[name]["b"]}
    return adapters


def many_families(prior: Callable) -> bl.guides.Guide:
    """Nine families in one guide: each compiles once, and all of them meet all of the way."""
    g = bl.guides
    return g.Guide(
        prior,
        {
            "tau": g.full(),
            "s": g.blob(),
            r"q_proj\.local": g.low_rank(rank=1),
            r"q_proj\.a": g.matrix_normal(),
            r"q_proj\.b": g.row_shared(hidden=8),
            r"v_proj\.a": g.iaf(),
            r"v_proj\.b": g.spline(hidden=4, bins=4),
            r"lm_head\.a": g.block_neural(hidden=2),
            ".*": g.mean_field(),
        },
    )


class Way(NamedTuple):
    """A prior, and what makes a guide of the program of that prior."""

    prior: Callable
    guide: Callable[[Callable], Callable]


def automatic(kind: type, **options: Any) -> Callable[[Callable], Callable]:
    return lambda prior: kind(prior, init_loc_fn=bl.guides.init_to_base, **options)


def of_one(family: bl.guides.Family) -> Callable[[Callable], Callable]:
    return lambda prior: bl.guides.Guide(prior, family)


small_flow = partial(bl.guides.SiteFlow, hidden=8, blocks=1)
WAYS = {
    "sparse GP, SiteFlow": Way(bl.priors.sparse_gp(rows=3, cols=3), small_flow),
    "own, SiteFlow": Way(hierarchy, small_flow),
    "own, mean field": Way(hierarchy, of_one(bl.guides.mean_field())),
    "own, nine families": Way(hierarchy, many_families),
    "own, ensemble": Way(hierarchy, of_one(bl.guides.ensemble(size=2))),
    "own, delta": Way(hierarchy, of_one(bl.guides.delta())),
    "own, dropout": Way(
        hierarchy,
        lambda prior: bl.guides.Guide(prior, {r".*\.[ab]": bl.guides.dropout(), ".*": bl.guides.delta()}),
    ),
    "with plates, AutoNormal": Way(with_plates, automatic(AutoNormal)),
    "with plates, AutoLowRank": Way(with_plates, automatic(AutoLowRankMultivariateNormal, rank=2)),
    "horseshoe, AutoNormal": Way(bl.priors.horseshoe(), automatic(AutoNormal)),
}


IN_SHORT = ("sparse GP, SiteFlow",)
"""The way of the paper; `make slow` walks all of them."""
TO_COMPARE = ("own, mean field", "own, SiteFlow", "sparse GP, SiteFlow")


@pytest.fixture(scope="module")
def base(tiny_folder) -> Any:
    return bl.load(tiny_folder)


@pytest.fixture(scope="module")
def data(base, tmp_path_factory) -> bl.TextData:
    """Twenty-four rows of a table on disk, as a user has them."""
    random = np.random.default_rng(0)
    subjects, verdicts = ("the plot is", "the film was", "Review:"), ("good", "bad")
    lines = ["id,text,label"]
    for row in range(24):
        label = verdicts[row % 2]
        text = f"{random.choice(subjects)} {label if row % 3 else random.choice(verdicts)}"
        lines.append(f"{row},{text},{label}")
    path = tmp_path_factory.mktemp("rows") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = read_table(path)
    splits = {"train": table.select(range(16)), "test": table.select(range(16, 24))}
    prompt = {"template": "{text} Sentiment:", "words": [" bad", " good"]}
    return bl.text_classification(splits, base.tokenizer, text="text", label="label", **prompt)


def built(
    way: Way, base: Any, data: bl.TextData, families: Sequence[str] = FAMILIES
) -> tuple[bl.Classifier, Callable]:
    sites = bl.select(base, families, rank=RANK, layers=slice(-2, None))
    model = bl.Classifier(base, sites, way.prior, label_ids=data.label_ids)
    return model, way.guide(model.prior)


def sites_of_the_prior(model: bl.Classifier) -> Mapping[str, tuple[int, ...]]:
    trace = numpyro.handlers.trace(numpyro.handlers.seed(model.prior, jax.random.key(0))).get_trace()
    return {n: s["value"].shape for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(WAYS, IN_SHORT))
def test_from_a_table_to_a_fit_on_disk(name, base, data, tmp_path):
    way = WAYS[name]
    k_fit, k_predict, k_diagnose = jax.random.split(jax.random.key(0), 3)
    model, guide = built(way, base, data)
    options = {
        "optimisation": bl.Optimisation(scale_optimizer=optax.adam(5e-2)),
        "num_steps": 12,
        "batch_size": 8,
    }
    fit = bl.fit(k_fit, model, guide, data.train, optax.adam(3e-2), **options)
    assert fit.skipped_steps == 0
    assert np.isfinite(fit.history["elbo"]).all()

    prediction = bl.predict(k_predict, fit, data.test, num_draws=8)
    np.testing.assert_allclose(prediction.probs.sum(1), 1.0, rtol=1e-5)
    summary = bl.metrics.summary(jax.random.key(0), prediction, data.test.labels)
    assert 0 <= summary["accuracy"].value <= 1

    tree = bl.to_arviz(fit.draw_key, fit, data.test, num_draws=8)
    _every_hyper_parameter_is_there(tree, model)
    tree.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    back = xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf")
    assert set(back.children) == set(tree.children)
    for name, values in tree["posterior"].data_vars.items():
        np.testing.assert_array_equal(back["posterior"][name].values, values.values)

    bl.save_fit(fit, tmp_path / "fit")
    again = bl.load_fit(tmp_path / "fit", *built(way, base, data))
    np.testing.assert_array_equal(
        bl.predict(k_predict, again, data.test, num_draws=8).probs, prediction.probs
    )
    labels = {"test": np.asarray(data.test.labels)}
    _plots(bl.plots.elbo({"fit": again}), bl.plots.reliability({"fit": {"test": prediction}}, labels))


def _every_hyper_parameter_is_there(tree: Any, model: bl.Classifier) -> None:
    """What is no factor of an adapter is in the posterior under its own name, with all its values."""
    posterior = tree["posterior"].data_vars
    for name, shape in sites_of_the_prior(model).items():
        family, _, symbol = name.partition(".")
        if family in model.sites and symbol.split(".")[0] in ("a", "b"):
            continue
        values = posterior[name]
        assert values.size == values.sizes["chain"] * values.sizes["draw"] * np.prod(shape), name
    assert {"update_norm", "update_norm_lm_head"} <= set(posterior)


def _plots(*figures: Any) -> None:
    for figure in figures:
        figure.canvas.draw()
        plt.close(figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(TO_COMPARE, TO_COMPARE[:1]))
def test_from_a_fit_to_a_comparison(name, base, data, tmp_path):
    """Page, reference on a part, a fit of that part, the comparison of all of them, and its pictures."""
    key = jax.random.key(1)
    # A family that the chains hold and one that they sample: a third would only be compiled.
    model, guide = built(WAYS[name], base, data, families=["q_proj", "lm_head"])
    adam = optax.adam(3e-2)
    fit = bl.fit(key, model, guide, data.train, adam, num_steps=12, batch_size=8)
    page = bl.diagnose(fit.draw_key, fit, data.test, num_draws=40)
    assert "convergence" in repr(page)

    short = {"num_warmup": 30, "num_draws": 60, "num_chains": 2}
    chains = bl.sample_nuts(key, model, data.train, sites=["lm_head"], given=fit, **short)
    assert chains.certificate.names
    found = bl.compare(key, fit, chains, data.test, num_draws=60, against="anything")
    assert "q_proj" in repr(found)  # what was held is said
    _plots(bl.plots.forest(found), bl.plots.rank_difference(found), bl.plots.predictive_scatter(found))

    part = bl.fit(
        key,
        chains.model,
        bl.guides.Guide(chains.model.prior, bl.guides.mean_field()),
        data.train,
        adam,
        num_steps=12,
        batch_size=8,
    )
    bl.compare(key, part, chains, data.test, num_draws=60, against="anything")
    stored = bl.store_reference(chains, data.test, num_draws=20)
    bl.save_reference(stored, tmp_path / "reference")
    kept = bl.load_reference(tmp_path / "reference")
    bl.compare(key, part, kept, data.test, num_draws=60, against="anything")

    options = {"num_runs": 2, "num_draws": 40, "num_integration_steps": 2}
    particles = bl.sample_smc(key, model, data.train, sites=["lm_head"], given=fit, **options)
    assert np.isfinite(particles.record["log_evidence"]).all()


def test_a_mistake_on_the_way_gets_one_sentence(base, data, tiny_folder, tmp_path):
    """A wrong path, a typo and an empty file, each at the place where a user makes it."""
    (tmp_path / "empty.csv").write_text("")
    table = Dataset.from_dict({"text": ["the plot is good", "the film was bad"], "label": ["good", "bad"]})
    columns = {"text": "text", "label": "label", "words": [" bad", " good"]}
    sites = bl.select(base, ["lm_head"], rank=1)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=data.label_ids)
    key = jax.random.key(0)
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: bl.load(tiny_folder.parent / "tinny"), "the nearest is '.*tiny'"),
        (lambda: read_table(tmp_path / "emty.csv"), "the nearest is '.*empty.csv'"),
        (lambda: read_table(tmp_path / "empty.csv"), "empty.csv' is empty"),
        (lambda: bl.text_classification(table, base, **columns | {"text": "txt"}), "nearest is 'text'"),
        (lambda: bl.text_classification(table, base, **columns | {"words": [" bad", " god"]}), "' god'"),
        (lambda: bl.select(base, ["q_prj"], rank=1), "nearest names: q_proj"),
        (lambda: bl.guides.Guide(model.prior, {r"lm_hed.*": bl.guides.full()}), "lm_hed"),
        (
            lambda: bl.sample_nuts(key, model, data.train, sites=["lm_hed"]),
            "nearest are lm_head",
        ),
        (lambda: bl.load_fit(tmp_path / "fit", model, bl.guides.SiteFlow(model.prior)), "holds no fit"),
        (lambda: bl.load_reference(tmp_path), "contains no reference"),
    ]
    for mistake, sentence in mistakes:
        with pytest.raises((ValueError, OSError), match=sentence) as error:
            mistake()
        assert "\n" not in str(error.value).strip()
