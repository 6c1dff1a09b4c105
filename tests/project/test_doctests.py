"""Every example in a docstring prints what it says; those of the library's own names share one tiny fit."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from builders.thorough import sample_of

import bnlora as bl
from bnlora.testing import tiny_base, tiny_encoder, tiny_rows

MODULES = sorted(m.name for m in pkgutil.walk_packages(bl.__path__, "bnlora."))
SAMPLERS = ("bnlora.infer.mcmc", "bnlora.assess.comparison")
"""Packages whose examples run chains: their programs take a minute to compile."""
WITH_CHAINS = [name for name in MODULES if name.startswith(SAMPLERS)]
REPEATED = tuple(f"bnlora.infer.mcmc.{name}" for name in ("elliptical", "mclmc", "smc"))
"""Their examples count the chains of one more sampler, as that of `hamiltonian` does for two of them."""
PLAIN = [name for name in MODULES if name not in WITH_CHAINS]
LONG = ("bnlora.assess.sbc.core",)
"""Its examples compile whole inferences, which `test_sbc_core.py` runs."""
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def names(tmp_path_factory, tokenizer, tiny_folder) -> dict:
    """What the examples take as given: a base, rows, a model, a guide, and short fits."""
    base, rows = tiny_base(KEY, num_layers=2), tiny_rows(jax.random.key(1), 8)
    sites = bl.select(base, ["lm_head"], rank=1)
    model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, model, guide, rows, optax.adam(0.01), num_steps=4, batch_size=4)
    given = {"key": KEY, "base": base, "rows": rows, "sites": sites, "model": model, "guide": guide}
    given |= {"fit": fit, "folder": Path(tmp_path_factory.mktemp("examples"))}
    given |= {"tokenizer": tokenizer, "model_folder": tiny_folder, "encoder": tiny_encoder(KEY)}
    given |= {"text_fit": fit_of_texts(bl.load(tiny_folder), rows), **linear(base, rows)}
    given |= {"bl": bl, "jax": jax, "jnp": jnp, "np": np, "numpyro": numpyro, "dist": dist, "optax": optax}
    return given


def linear(base: bl.Base, rows: bl.Batch) -> dict:
    """Frames of a head, a tangent model under their core prior, a fit of it, and a fit of all of it."""
    frames = bl.frames(KEY, base, ["lm_head"], rows, label_ids=(3, 5), size=4)
    tangent = bl.Tangent(bl.Classifier(base, frames.sites, bl.priors.core(frames), label_ids=(3, 5)))
    guide = bl.guides.Guide(tangent.prior, bl.guides.mean_field())
    fit = bl.fit(KEY, tangent, guide, rows, optax.adam(0.01), num_steps=2, batch_size=4)
    sizes = {"size": {"lm_head": 2}, "num_steps": 4}
    core_fit = bl.fit_core(KEY, base, rows, label_ids=(3, 5), **sizes)
    return {"frames": frames, "tangent": tangent, "tangent_fit": fit, "core_fit": core_fit}


def fit_of_texts(base: bl.Base, rows: bl.Batch) -> bl.Fit:
    """A fit of two steps over a base that has a tokenizer."""
    model = bl.Classifier(base, bl.select(base, ["lm_head"], rank=1), bl.priors.point(), label_ids=(3, 5))
    return bl.fit(
        KEY, model, bl.guides.SiteFlow(model.prior), rows, optax.adam(0.01), num_steps=2, batch_size=4
    )


def ran(module: str, names: dict) -> doctest.TestResults:
    flags = doctest.NORMALIZE_WHITESPACE
    return doctest.testmod(importlib.import_module(module), optionflags=flags, extraglobs=names)


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(PLAIN, [name for name in PLAIN if name not in LONG]))
def test_examples(name, names):
    assert ran(name, names).failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(WITH_CHAINS, [n for n in WITH_CHAINS if n not in REPEATED]))
def test_examples_with_chains(name, names, chains):
    assert ran(name, names | {"chains": chains}).failed == 0


@pytest.fixture(scope="module")
def chains(names):
    return bl.sample_nuts(KEY, names["model"], names["rows"], num_warmup=20, num_draws=100)


def test_every_name_of_the_library_has_an_example():
    shown = [getattr(bl, name) for name in dir(bl) if not name.startswith("_")]
    without = [x.__name__ for x in shown if callable(x) and ">>>" not in (x.__doc__ or "")]
    assert without == []
