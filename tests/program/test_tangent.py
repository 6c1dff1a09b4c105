"""The tangent model compared with its network and with NumPy, and its errors."""

import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from builders.linearised import (
    BASE,
    KEY,
    NEW,
    ROWS,
    contrasts,
    exact,
    frames,
    in_double,
    network_of,
    tangent_of,
    widened,
)
from numpyro import handlers
from numpyro.infer.util import log_density

import bnlora as bl
from bnlora.app.demo import RECIPE
from bnlora.data.assets import vader_splits
from bnlora.infer.svi.elbo import elbo_terms
from bnlora.infer.svi.parts import InParts
from bnlora.program.density import density

HEAD, MANY = frames("lm_head"), frames("q_proj", "v_proj", "down_proj", "lm_head", layers=2)
THREE = frames("o_proj", "lm_head", label_ids=(3, 5, 9))


def adapters_at(model, vector) -> dict:
    """Adapters at a vector of the core prior's sites."""
    return density(model, {}).adapters(jnp.asarray(vector, jnp.float32))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def slope(tangent, base, adapters, rows, exponents) -> float:
    """Slope of log |network - tangent| in log size of the update, in float64."""
    with in_double():
        params, adapters = widened(base.weights), widened(adapters)

        @jax.jit
        def gap(size, params, adapters, rows):
            scaled = {n: {"a": pair["a"], "b": size * pair["b"]} for n, pair in adapters.items()}
            both = [model.logits(params, scaled, rows) for model in (tangent.network, tangent)]
            assert {x.dtype for x in both} == {np.dtype("float64")}
            return jnp.linalg.norm((both[0] - both[1])[:, 1:] - (both[0] - both[1])[:, :1])

        sizes = 2.0**exponents
        gaps = [float(gap(size, params, adapters, rows)) for size in sizes]
    return float(np.polyfit(np.log(sizes), np.log(gaps), 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("made", [MANY, THREE], ids=["all kinds of modules", "three classes"])
def test_the_distance_to_the_network_falls_with_the_square_of_the_update(made):
    tangent = tangent_of(made)
    adapters = adapters_at(tangent, normal(made.num_coordinates))
    assert slope(tangent, BASE, adapters, ROWS, -np.arange(4.0, 11.0)) == pytest.approx(2, abs=0.1)


@pytest.mark.thorough
def test_the_same_on_the_two_upper_layers_of_smollm2():
    base = RECIPE.load_base()
    splits = vader_splits(seed=0, train=8, validation=1, test=1)
    data = RECIPE.read(splits, base, text="text", label="label")
    options = {"label_ids": data.label_ids, "size": 4, "layers": slice(-2, None)}
    made = bl.frames(KEY, base, ["v_proj", "o_proj", "lm_head"], data.train, **options)
    tangent = bl.Tangent(bl.Classifier(base, made.sites, bl.priors.core(made), label_ids=data.label_ids))
    rows = tangent.network.prepare(data.train)
    adapters = adapters_at(tangent, normal(made.num_coordinates))
    assert slope(tangent, base, adapters, rows, -np.arange(4.0, 9.0)) == pytest.approx(2, abs=0.1)


def test_a_head_by_itself_is_linear_already():
    tangent = tangent_of(HEAD, scale=2.0)
    adapters = adapters_at(tangent, normal(HEAD.num_coordinates))
    network, linear = (
        contrasts(jax.jit(model.logits)(BASE.weights, adapters, ROWS)) for model in (tangent.network, tangent)
    )
    assert np.abs(network - contrasts(tangent.prepare(ROWS).features.offset)).max() > 0.3
    np.testing.assert_allclose(linear, network, atol=1e-5)


@pytest.mark.parametrize("together", [1, 4])
def test_draws_in_one_program_are_those_of_a_loop(together):
    tangent = tangent_of(THREE, scale={"o_proj": 0.5, "lm_head": 2.0})
    vectors = normal(8, THREE.num_coordinates)
    view, rows = density(tangent, {}), tangent.prepare(ROWS)
    linear = exact(tangent, ROWS, {"o_proj": 0.5, "lm_head": 2.0})
    eta = linear.offset + np.einsum("nkd,sd->snk", linear.design, vectors)
    draws = jax.jit(jax.vmap(view.adapters))(jnp.asarray(vectors, jnp.float32))
    found = tangent.compiled_outputs(draws, 8, rows, together)
    np.testing.assert_allclose(contrasts(found), eta, atol=1e-4)
    by_draw = jax.jit(tangent.outputs_by_draw, static_argnums=3)(BASE.weights, draws, rows, together)
    np.testing.assert_allclose(by_draw, found, atol=1e-5)


@pytest.mark.slow
def test_predictions_do_not_depend_on_batches_or_on_what_is_cached():
    tangent = tangent_of(frames("o_proj", "lm_head"))
    gaussian = bl.laplace(tangent, ROWS)
    own, of_network = bl.cache_prefix(tangent, NEW), bl.cache_prefix(tangent.network, NEW)
    of_other = bl.cache_prefix(tangent_of(HEAD), bl.cache_prefix(network_of(HEAD), NEW))
    assert own.frames == tangent.checksum != of_other.frames
    found = [
        bl.predict(KEY, gaussian, rows, num_draws=5, batch_size=size).draw_log_probs
        for rows, size in [(NEW, 32), (NEW, 4), (own, 4), (of_network, 4), (of_other, 4)]
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-5)


def test_features_of_other_frames_are_not_taken():
    tangent, other = tangent_of(HEAD), tangent_of(frames("lm_head", size=3))
    mine, theirs = tangent.prepare(ROWS), other.prepare(ROWS)
    assert tangent.is_prepared(mine)
    assert not tangent.is_prepared(theirs)
    again = tangent.prepare(theirs)
    np.testing.assert_array_equal(again.features.phi, mine.features.phi)
    assert again.frames == mine.frames == tangent.checksum
    # The same tokens with wrong features: they are used if the checksum fits, and recomputed if not.
    false = replace(mine, features=jax.tree.map(jnp.zeros_like, mine.features))
    adapters = adapters_at(tangent, normal(HEAD.num_coordinates))
    assert not np.any(tangent.logits(BASE.weights, adapters, false))
    wrong = replace(false, frames=other.checksum)
    np.testing.assert_allclose(
        tangent.logits(BASE.weights, adapters, wrong), tangent.logits(BASE.weights, adapters, mine), atol=1e-5
    )


@pytest.mark.parametrize("n_total", [None, 240])
def test_the_joint_density_is_that_of_the_classifier_where_both_are_linear(n_total):
    tangent = tangent_of(HEAD, scale=dist.HalfNormal(2.0))
    values = {"lm_head.U": jnp.asarray(normal(*HEAD["lm_head"].size), jnp.float32), "lm_head.scale": 1.7}
    arguments = BASE.weights, ROWS, n_total
    mine, theirs = (
        float(jax.jit(lambda values, model=model: log_density(model, arguments, {}, values)[0])(values))
        for model in (handlers.seed(tangent, KEY), handlers.seed(tangent.network, KEY))
    )
    assert mine == pytest.approx(theirs, rel=1e-6)
    linear = exact(tangent, ROWS, {"lm_head": 1.7})
    log_prior = dist.HalfNormal(2.0).log_prob(1.7) + dist.Normal().log_prob(values["lm_head.U"]).sum()
    data = (n_total or len(ROWS)) / len(ROWS) * linear.log_likelihood(normal(HEAD.num_coordinates))
    assert mine == pytest.approx(float(log_prior) + data, rel=1e-5)


def within(made: bl.Frames):
    """A custom prior whose updates are inside the frames, without sites for the cores."""

    def prior(sites):
        adapters = {}
        for name, site in sites.items():
            U = numpyro.sample(f"{name}.mine", dist.StudentT(4.0).expand(made[name].size).to_event(3))
            b = jnp.asarray(made[name].left) @ U / site.scale
            adapters[name] = {"a": jnp.swapaxes(jnp.asarray(made[name].right), 1, 2), "b": b}
        return adapters

    prior.frames = made
    return prior


def test_cores_and_adapters_give_the_same_logits():
    scales = {"o_proj": 0.5, "lm_head": 3.0}
    trebled = replace(
        THREE.sites, families=tuple(replace(s, alpha=3 * s.alpha) for s in THREE.sites.families)
    )
    rows = tangent_of(THREE).prepare(ROWS)
    cases = {
        "cores": (bl.priors.core(THREE, scale=scales), THREE.sites, "U", scales),
        "another alpha": (bl.priors.core(THREE, scale=scales), trebled, "U", scales),
        "adapters alone": (within(THREE), trebled, "mine", {name: made.unit for name, made in THREE.items()}),
    }
    for prior, sites, site, of in cases.values():
        tangent = bl.Tangent(bl.Classifier(BASE, sites, prior, label_ids=THREE.label_ids))

        @jax.jit
        def run(key, rows, tangent=tangent):
            trace = handlers.trace(handlers.seed(tangent, key)).get_trace(BASE.weights, rows)
            adapters = handlers.seed(tangent.prior, key)()
            values = {name: s["value"] for name, s in trace.items() if s["type"] == "sample"}
            return values, trace["y"]["fn"].logits, tangent.logits(BASE.weights, adapters, rows)

        values, of_cores, of_adapters = run(KEY, rows)
        linear = exact(tangent, rows, of)
        u = np.concatenate([np.ravel(values[f"{name}.{site}"]) for name in THREE])
        for logits in (of_cores, of_adapters):
            np.testing.assert_allclose(contrasts(logits), linear.offset + linear.design @ u, atol=1e-4)


def test_a_bound_in_parts_or_without_a_cache_is_the_same():
    tangent = tangent_of(THREE)
    guide = bl.guides.Guide(tangent.prior, bl.guides.mean_field(init_scale=0.5))
    trace = handlers.trace(handlers.seed(guide, KEY)).get_trace()
    params = {name: site["value"] + 0.1 for name, site in trace.items() if site["type"] == "param"}
    rows = tangent.prepare(ROWS)

    def bound(model, batch):
        run = jax.jit(lambda batch: elbo_terms(KEY, params, model, guide, BASE.weights, batch, 96)["elbo"])
        return run(batch)

    cases = [(tangent, rows), (tangent, ROWS), (InParts(tangent, 4), rows)]
    found = [bound(model, batch) for model, batch in cases]
    np.testing.assert_allclose(found[1:], found[0], rtol=1e-5)


@pytest.mark.slow
def test_held_sites_are_those_of_a_tangent_model():
    tangent = tangent_of(frames("v_proj", "lm_head"), scale=dist.HalfNormal(1.0))
    held = {"lm_head.scale": jnp.asarray(0.7), "v_proj.scale": jnp.asarray(1.3)}
    part = bl.condition(tangent, held)
    assert isinstance(part, bl.Tangent)
    assert type(part) is bl.Tangent
    assert part.kind == "tangent"
    assert set(part.fixed) == set(held)
    assert "2 sites fixed: lm_head.scale, v_proj.scale" in repr(part)
    rows = tangent.prepare(ROWS)
    assert part.is_prepared(rows)
    # Given its scales the posterior is that of the prior with these scales.
    fixed = tangent_of(tangent.frames, scale={"lm_head": 0.7, "v_proj": 1.3})
    mine, theirs = (bl.laplace(model, rows) for model in (part, fixed))
    np.testing.assert_allclose(mine.loc, theirs.loc, atol=1e-6)
    np.testing.assert_allclose(mine.covariance(), theirs.covariance(), atol=1e-6)
    # It is the same after conditioning twice, and after pickling.
    twice = tangent
    for name, value in held.items():
        twice = bl.condition(twice, {name: value})
    copied = pickle.loads(pickle.dumps(twice))  # noqa: S301
    for model in (twice, copied):
        assert set(model.fixed) == set(held)
        np.testing.assert_allclose(bl.laplace(model, rows).loc, theirs.loc, atol=1e-6)
    one_family = bl.condition(tangent, {**held, "v_proj.U": jnp.zeros(tangent.frames["v_proj"].size)})
    assert one_family.moving == ("lm_head",)
