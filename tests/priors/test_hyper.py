"""Hyper-parameters of a prior: their sites, their axes, and their names in ArviZ and on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from builders.own_prior import hierarchy
from builders.unfitted import unfitted

import bnlora as bl
from bnlora import priors
from bnlora.assess.diagnostics.hyper import named_draws, no_weights
from bnlora.infer.svi.elbo import initial_parameters
from bnlora.priors.declared import declared
from bnlora.program.density import density
from bnlora.program.draws import adapters_at, draw_sites
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=3)
ROWS = tiny_rows(jax.random.key(2), 8)
SITES = bl.select(BASE, ["q_proj", "lm_head"], rank=2, layers=[0, 2])


def classifier(prior, sites=SITES):
    return bl.Classifier(BASE, sites, prior, label_ids=(3, 5))


def dims_of(prior, sites=SITES):
    """Dimensions of every hyper-parameter; checks that its draws exist and are in order."""
    model = classifier(prior, sites)
    shapes = {name: site.shape for name, site in declared(model.prior).latent.items()}
    draws = {name: np.random.default_rng(0).normal(size=(3, *shape)) for name, shape in shapes.items()}
    found = named_draws(model, draws)
    for name, array in found.values.items():
        assert array.ndim == 1 + len(found.dims[name])
        np.testing.assert_array_equal(array.ravel(), draws[found.sites[name]].ravel())
    return found.dims


RANDOM = dist.HalfNormal(1.0)
LAYER_RANK = {"q_proj.b": ("layer", "rank"), "lm_head.b": ("rank_lm_head",)}
LIBRARY = {
    "normal": (priors.normal(scale={"a": 1.0, "b": RANDOM}), {"q_proj.b.scale": (), "lm_head.b.scale": ()}),
    "horseshoe": (
        priors.horseshoe(),
        {f"{name}.tau": () for name in LAYER_RANK} | {f"{n}.local": d for n, d in LAYER_RANK.items()},
    ),
    "regularized horseshoe": (
        priors.regularized_horseshoe(),
        {f"{name}.{x}": () for name in LAYER_RANK for x in ("tau", "slab")}
        | {f"{n}.local": d for n, d in LAYER_RANK.items()},
    ),
    "ard": (priors.ard(gain=RANDOM), {f"{n}.gain": d for n, d in LAYER_RANK.items()}),
    "pooled scales": (
        priors.pooled_scales(priors.normal(), spread=RANDOM),
        {f"{n}.pool": d[:-1] for n, d in LAYER_RANK.items()} | {f"{n}.pool.spread": () for n in LAYER_RANK},
    ),
    "subspace": (priors.subspace(), {f"{n}.core": d for n, d in LAYER_RANK.items()}),
    "sparse GP": (
        priors.sparse_gp(lam=dist.Uniform(), scale=2.0),
        {f"{f}.{x}.lam": () for f in SITES for x in "ab"},
    ),
    "sparse GP on weights": (priors.sparse_gp(form="weights"), {}),
    "sparse GP on bases": (priors.sparse_gp(form="unwhitened", inducing="bases"), {}),
    "pooled sparse GP": (
        priors.pooled_sparse_gp(rho=dist.Uniform()),
        {f"{f}.{x}.rho": () for f in SITES for x in "ab"},
    ),
    "matrix normal": (
        priors.per_factor(a=priors.normal(), b=priors.matrix_normal(rows=RANDOM, cols=RANDOM)),
        {"q_proj.b.row_scale": ("layer", "output"), "lm_head.b.row_scale": ("output_2",)}
        | {f"{n}.column_scale": d for n, d in LAYER_RANK.items()},
    ),
    "laplace": (priors.laplace(), {}),
    "spike and slab": (priors.spike_and_slab(), {}),
    "hierarchy of one's own": (
        hierarchy,
        {"tau": (), "s": (), "q_proj.layer_scale": ("layer",), "q_proj.local": ("layer", "rank")}
        | {"lm_head.layer_scale": (), "lm_head.local": ("rank_lm_head",)},
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_every_site_that_is_no_weight_is_there_with_its_dimensions(name):
    prior, expected = LIBRARY[name]
    assert dims_of(prior) == expected


def test_families_of_other_shapes_have_dimensions_of_their_own():
    sites = bl.select(BASE, {"q_proj": 1, "k_proj": 2}, layers=[0, 1, 2])
    dims = dims_of(priors.horseshoe(), sites)
    assert dims["q_proj.b.local"] == ("layer_q_proj", "rank_q_proj")
    assert dims["k_proj.b.local"] == ("layer_k_proj", "rank_k_proj")


def by_hand(sites):
    """Weights named as in the notation, an axis without a name, and plates with dimensions."""
    layer, rank = numpyro.plate("layer", 2, dim=-2), numpyro.plate("rank", 2, dim=-1)
    with layer:
        numpyro.sample("by_layer", dist.Normal(0.0, 1.0))
        with rank:
            numpyro.sample("by_rank", dist.Normal(0.0, 1.0))
    with numpyro.plate("module", 3):
        numpyro.sample("by_module", dist.Normal(0.0, 1.0))
    numpyro.sample("q_proj.b.free", dist.Dirichlet(jnp.ones(4)))
    adapters = {}
    for name, site in sites.items():
        adapters[name] = {
            "a": numpyro.sample(f"{name}.a", dist.Normal(0.0, 1.0).expand(site.shapes["a"]).to_event(3)),
            "b": numpyro.sample(f"{name}.b.z", dist.Normal(0.0, 1.0).expand(site.shapes["b"]).to_event(3)),
        }
    return adapters


def test_plates_name_axes_and_others_have_numbers():
    assert dims_of(by_hand) == {
        "by_layer": ("layer",),  # its second axis has length one, and is that of no plate
        "by_rank": ("layer", "rank"),
        "by_module": ("module_2",),  # the tree's own has one module
        "q_proj.b.free": ("q_proj.b.free_dim_0",),
    }


ODD = (
    "global/tau",
    "global.tau",
    "a b",
    " a",
    "..",
    ".",
    "/",
    "τ",
    "x[0]",
    "layer",
    "draw",
    "update_norm",
    "lm_head",
)


def odd(sites):
    """Names that a file cannot store or that the tree already has, and a prior within a scope."""
    for name in ODD:
        numpyro.sample(name, dist.HalfNormal(1.0), infer={"init": "median"})
    with numpyro.plate("over/there", 2):
        numpyro.sample("row", dist.Normal(0.0, 1.0))
    with numpyro.handlers.scope(prefix="mine"):
        return hierarchy(sites)


@pytest.fixture(scope="module")
def fit():
    model = classifier(odd)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.1))
    start, constrain = initial_parameters(KEY, model, guide)
    return unfitted(model, guide, ROWS, constrain(start))


@pytest.fixture(scope="module")
def tree(fit):
    return bl.to_arviz(fit.draw_key, fit, ROWS, num_draws=8)


@pytest.mark.slow
def test_names_that_a_file_cannot_hold_are_replaced_and_said(fit, tree):
    posterior = tree["posterior"].to_dataset()
    by_site = {x.attrs["site"]: name for name, x in posterior.items() if "site" in x.attrs}
    assert set(by_site) == set(no_weights(SITES, declared(fit.model.prior).latent))
    assert set(by_site) >= {
        *ODD,
        "row",
        "mine/tau",
        "mine/s",
        "mine/q_proj.local",
        "mine/lm_head.layer_scale",
    }
    assert by_site["global/tau"] == "global.tau"
    assert by_site["global.tau"] == "global.tau_2"
    assert by_site["a b"], by_site["τ"] == ("a b", "τ")
    assert {by_site[n] for n in ("layer", "draw", "update_norm", "lm_head")} == {
        "layer_2", "draw_2", "update_norm_2", "lm_head_2",
    }  # fmt: skip
    assert len({by_site[n] for n in (".", "/")}) == 2
    assert posterior["mine.q_proj.local"].dims == ("chain", "draw", "layer", "rank")
    assert posterior["row_2"].dims == ("chain", "draw", "over.there")
    draw = draw_sites(jax.random.split(fit.draw_key, 8)[5], fit.model, fit.guide, fit.params)
    for site, name in by_site.items():
        wanted = np.squeeze(draw.sites[site], 0) if "/lm_head." in site else draw.sites[site]
        got = posterior[name].stack(sample=("chain", "draw")).isel(sample=5).values
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_log_priors_have_the_same_names_and_add_up(fit, tree):
    groups = tree["log_prior"].to_dataset()
    names = {n for n, x in tree["posterior"].to_dataset().items() if "site" in x.attrs}
    assert set(groups) == names | {"q_proj", "lm_head"}
    keys = jax.random.split(fit.draw_key, 8)
    expected = [draw_sites(k, fit.model, fit.guide, fit.params).log_prior for k in keys]
    total = sum(groups[name].values.ravel() for name in groups)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    page = bl.diagnostics.sensitivity(bl.diagnostics.sample(fit.draw_key, fit, num_draws=40), ROWS)
    assert np.isfinite(page.prior).all()


def test_the_file_gives_back_the_tree(tree, tmp_path):
    tree.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    back = xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf")
    assert set(back.children) == set(tree.children)
    for name in tree.children:
        xarray.testing.assert_identical(back[name].to_dataset(), tree[name].to_dataset())
    back.close()


def test_adapters_are_those_of_the_formula():
    model = classifier(hierarchy)
    view = density(model, {})
    sites = view.sites(jnp.linspace(-1, 1, view.size))
    adapters = adapters_at(model, {}, sites)["q_proj"]
    gain = sites["tau"] * np.exp(sites["s"] * sites["q_proj.layer_scale"])[:, None] * sites["q_proj.local"]
    np.testing.assert_allclose(adapters["b"], gain[:, None] * sites["q_proj.b"], rtol=1e-5)
