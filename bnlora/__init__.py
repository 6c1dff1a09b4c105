"""Bayesian low-rank adapters for language models, as NumPyro programs.

Data flows one way: load a base, select sites, write a prior, build a guide on it, fit, predict,
measure, diagnose.

    base = bl.load("model.gguf")
    data = bl.text_classification(dataset, base.tokenizer, text=..., label=..., words=[...])
    core = bl.fit_core(key, base, data.train, label_ids=data.label_ids, size={"v_proj": 32})
    pred = bl.predict(key, core, data.test)
    bl.metrics.summary(pred, data.test.labels)
    bl.diagnose(core.fit, data.test)
    tree = bl.to_arviz(core.fit, data.test)

    chains = bl.sample_nuts(key, core.model, core.fit.train, mass=core.gaussian)
    chains.certificate
    bl.compare(key, core.fit, chains, data.test)

Or with a prior and a guide of one's own, on the network itself:

    sites = bl.select(base, ["q_proj", "k_proj", "lm_head"], rank=8)
    model = bl.Classifier(base, sites, my_prior, label_ids=data.label_ids)
    guide = bl.guides.Guide(model.prior, bl.guides.low_rank(over="all"))
    fit   = bl.fit(key, model, guide, data.train, optax.adam(1e-2), num_steps=300, batch_size=16)
"""

import difflib as _difflib
import importlib as _importlib
from importlib import metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING

from bnlora import guides as guides
from bnlora import metrics as metrics
from bnlora import priors as priors
from bnlora.cache import cache_prefix as cache_prefix
from bnlora.conditional import condition as condition
from bnlora.data import Batch as Batch
from bnlora.fits import Fit as Fit
from bnlora.fits import FitDiverged as FitDiverged
from bnlora.frame import Frames as Frames
from bnlora.model import Classifier as Classifier
from bnlora.plateau import Plateau as Plateau
from bnlora.predict import Posterior as Posterior
from bnlora.predict import Prediction as Prediction
from bnlora.predict import predict as predict
from bnlora.prior_predictive import PriorPredictive as PriorPredictive
from bnlora.prior_predictive import prior_predictive as prior_predictive
from bnlora.prior_predictive import scale_for_spread as scale_for_spread
from bnlora.reading import Reading as Reading
from bnlora.reading import read_along as read_along
from bnlora.sites import Site as Site
from bnlora.sites import Sites as Sites
from bnlora.sites import select as select
from bnlora.text import TextData as TextData
from bnlora.text import text_classification as text_classification
from bnlora.validation import EarlyStopping as EarlyStopping

if _TYPE_CHECKING:  # what type checkers and editors see of the names in `_LATER`
    from bnlora import diagnostics as diagnostics
    from bnlora import inference as inference
    from bnlora import plots as plots
    from bnlora import sbc as sbc
    from bnlora.base import Base as Base
    from bnlora.base import load as load
    from bnlora.checkpoint import load_fit as load_fit
    from bnlora.checkpoint import save_fit as save_fit
    from bnlora.comparison import Comparison as Comparison
    from bnlora.comparison import compare as compare
    from bnlora.comparison import load_reference as load_reference
    from bnlora.comparison import save_reference as save_reference
    from bnlora.comparison import store_reference as store_reference
    from bnlora.diagnostics import diagnose as diagnose
    from bnlora.diagnostics import to_arviz as to_arviz
    from bnlora.mcmc import Certificate as Certificate
    from bnlora.mcmc import Chains as Chains
    from bnlora.mcmc import Thresholds as Thresholds
    from bnlora.mcmc import log_evidence as log_evidence
    from bnlora.mcmc import sample_elliptical as sample_elliptical
    from bnlora.mcmc import sample_hmc as sample_hmc
    from bnlora.mcmc import sample_mclmc as sample_mclmc
    from bnlora.mcmc import sample_nuts as sample_nuts
    from bnlora.mcmc import sample_smc as sample_smc
    from bnlora.peft import load_peft as load_peft
    from bnlora.peft import save_peft as save_peft
    from bnlora.svi import fit as fit
    from bnlora.tangent.fit import CoreFit as CoreFit
    from bnlora.tangent.fit import fit_core as fit_core
    from bnlora.tangent.frames import frames as frames
    from bnlora.tangent.gaussian import Gaussian as Gaussian
    from bnlora.tangent.gaussian import laplace as laplace
    from bnlora.tangent.model import Tangent as Tangent
    from bnlora.tangent.scales import Scales as Scales
    from bnlora.tangent.scales import choose_scales as choose_scales
    from bnlora.tangent.start import start_at as start_at
    from bnlora.tangent.stored import load_core as load_core
    from bnlora.tangent.stored import load_frames as load_frames
    from bnlora.tangent.stored import save_core as save_core

_LATER = {
    "bnlora.base": "Base load",
    "bnlora.checkpoint": "load_fit save_fit",
    "bnlora.comparison": "Comparison compare load_reference save_reference store_reference",
    "bnlora.diagnostics": "diagnose to_arviz",
    "bnlora.inference": "",
    "bnlora.mcmc": "Certificate Chains Thresholds log_evidence sample_elliptical sample_hmc sample_mclmc "
    "sample_nuts sample_smc",
    "bnlora.peft": "load_peft save_peft",
    "bnlora.plots": "",
    "bnlora.sbc": "",
    "bnlora.svi": "fit",
    "bnlora.tangent.fit": "CoreFit fit_core",
    "bnlora.tangent.frames": "frames",
    "bnlora.tangent.gaussian": "Gaussian laplace",
    "bnlora.tangent.model": "Tangent",
    "bnlora.tangent.scales": "Scales choose_scales",
    "bnlora.tangent.start": "start_at",
    "bnlora.tangent.stored": "load_core load_frames save_core",
}
"""Modules that are imported when one of them, or one of these names out of them, is first used: Flax, Optax,
matplotlib and their like would make `import bnlora` take several times as long. A name of a module that is a
function here as well (`predict`) cannot stand in this table, for importing the module would shadow it."""
_HOME = {name: module for module, names in _LATER.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """A name of `_LATER`, or the version of the installed package."""
    if name == "__version__":
        return _metadata.version("bnlora")
    if name in _HOME:
        value = getattr(_importlib.import_module(_HOME[name]), name)
    elif f"bnlora.{name}" in _LATER:
        value = _importlib.import_module(f"bnlora.{name}")
    else:
        near = _difflib.get_close_matches(name, __dir__(), n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise AttributeError(f"module 'bnlora' has no attribute {name!r}{hint}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    modules = (module.removeprefix("bnlora.") for module in _LATER if module.count(".") == 1)
    return sorted({*globals(), *_HOME, *modules, "__version__"})
