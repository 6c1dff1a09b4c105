"""Errors for models without a tangent model, and for misuse of a tangent posterior: one sentence each."""

import jax
import numpy as np
import pytest
from builders.linearised import BASE, KEY, NEW, ROWS, frames, network_of, tangent_of
from builders.unfitted import unfitted
from numpyro import handlers

import bnlora as bl
from bnlora.testing import tiny_base

HEAD = frames("lm_head")


def leaving(sites):
    adapters = bl.priors.core(HEAD)(sites)
    moved = jax.tree.map(lambda x: x + 0.05, adapters["lm_head"])
    return {"lm_head": moved}


leaving.frames = HEAD


def built(prior, *, base=BASE, sites=HEAD.sites, label_ids=(3, 5)):
    return bl.Tangent(bl.Classifier(base, sites, prior, label_ids=label_ids))


REFUSED = {
    "no frames": (
        lambda: built(bl.priors.normal()),
        r"needs a prior with frames for every family, such as priors.core\(frames\); got normal",
    ),
    "frames of some families": (
        lambda: built(
            bl.priors.by_family({"lm_head": bl.priors.core(HEAD), "q_proj": bl.priors.normal()}),
            sites=frames("q_proj", "lm_head").sites,
        ),
        "needs a prior with frames for every family",
    ),
    "updates outside": (lambda: built(leaving), "the prior's updates of 'lm_head' are not inside the frames"),
    "another base": (
        lambda: built(bl.priors.core(HEAD), base=tiny_base(jax.random.key(9), num_layers=2)),
        "the frames belong to another base",
    ),
    "other label ids": (
        lambda: built(bl.priors.core(HEAD), label_ids=(3, 6)),
        r"the frames belong to Words\(label_ids=\(3, 5\)\); got Words\(label_ids=\(3, 6\)\)",
    ),
    "other sites": (
        lambda: built(bl.priors.core(HEAD), sites=bl.select(BASE, ["q_proj"], rank=2)),
        "the frames are for lm_head; the sites also have 'q_proj'",
    ),
    "another rank": (
        lambda: built(bl.priors.core(HEAD), sites=bl.select(BASE, ["lm_head"], rank=1)),
        "belong to other sites: their rank is 2, that of these sites is 1; use frames.sites",
    ),
    "other layers": (
        lambda: built(
            bl.priors.core(frames("v_proj")), sites=bl.select(BASE, ["v_proj"], rank=2, layers=[0])
        ),
        r"their layers is \(1,\), that of these sites is \(0,\)",
    ),
    "the whole head": (
        lambda: handlers.seed(bl.priors.core(HEAD), KEY)(HEAD.sites),
        "the left frame of 'lm_head' has 2 rows, one for each label token; the sites have 40 outputs",
    ),
    "one factor": (
        lambda: built(bl.priors.per_factor(a=bl.priors.core(HEAD), b=bl.priors.core(HEAD))),
        "needs a prior with frames",
    ),
    "a core for one factor": (
        lambda: handlers.seed(network_of(HEAD).prior.program, KEY)(
            network_of(HEAD).sites.only(factors=["a"])
        ),
        "fills both factors of 'lm_head' from one matrix; it cannot fill only 'a'",
    ),
    "a scale of no family": (
        lambda: bl.priors.core(HEAD, scale={"q_proj": 1.0}),
        "one for each family lm_head; got q_proj",
    ),
    "a scale that is not positive": (
        lambda: bl.priors.core(HEAD, scale=0.0),
        "scale of 'lm_head' must be a positive number",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_tangent_model_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def at_start(model) -> bl.Fit:
    """A fit of no steps of the mean-field guide."""
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=0.5))
    trace = handlers.trace(handlers.seed(guide, KEY)).get_trace()
    params = {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
    return unfitted(model, guide, ROWS, params)


def test_a_tangent_posterior_is_no_set_of_adapters(tmp_path):
    tangent = tangent_of(frames("v_proj"))
    for posterior in (bl.laplace(tangent, ROWS), at_start(tangent)):
        with pytest.raises(
            ValueError, match="a tangent posterior is not a set of adapters.*the network is far"
        ):
            bl.save_peft(posterior, tmp_path / "peft", sites=tangent.sites, base=BASE)
    with pytest.raises(ValueError, match="one adapter; got a Fit: give one draw of its draw_adapters"):
        bl.save_peft(at_start(tangent.network), tmp_path / "peft", sites=tangent.sites, base=BASE)
    assert not (tmp_path / "peft").exists()
    # A stored fit records the kind of its model and the frames.
    fit, network = at_start(tangent), at_start(tangent.network)
    bl.save_fit(fit, tmp_path / "fit")
    again = bl.load_fit(tmp_path / "fit", tangent_of(frames("v_proj")), fit.guide)
    np.testing.assert_array_equal(
        again.draw_adapters(KEY, 3)["v_proj"]["b"], fit.draw_adapters(KEY, 3)["v_proj"]["b"]
    )
    with pytest.raises(ValueError, match="is one of a tangent model; got a network model"):
        bl.load_fit(tmp_path / "fit", tangent.network, fit.guide)
    bl.save_fit(network, tmp_path / "network")
    with pytest.raises(ValueError, match="is one of a network model; got a tangent model"):
        bl.load_fit(tmp_path / "network", tangent, network.guide)
    others = bl.frames(KEY, BASE, ["v_proj"], NEW, label_ids=(3, 5), size=2, layers=[1], source="random")
    with pytest.raises(ValueError, match="made with other frames than those of this prior"):
        bl.load_fit(tmp_path / "fit", tangent_of(others), fit.guide)
