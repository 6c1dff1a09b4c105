"""Bayesian low-rank adapters for language models, as NumPyro programs.

Data flows one way: load a base, select sites, write a prior, build a guide on it, fit, predict,
measure, diagnose.

    base = bl.load("model.gguf")
    data = bl.text_classification(dataset, base.tokenizer, text=..., label=..., words=[...])
    core = bl.fit_core(key, base, data.train, label_ids=data.label_ids, size={"v_proj": 32})
    pred = bl.predict(key, core, data.test)
    bl.metrics.summary(key, pred, data.test.labels)
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
from bnlora.adapters.frames import Frames as Frames
from bnlora.adapters.sites import Site as Site
from bnlora.adapters.sites import Sites as Sites
from bnlora.adapters.sites import select as select
from bnlora.assess.prior_predictive import PriorPredictive as PriorPredictive
from bnlora.assess.prior_predictive import prior_predictive as prior_predictive
from bnlora.assess.prior_predictive import scale_for_spread as scale_for_spread
from bnlora.data.batch import Batch as Batch
from bnlora.data.choices import ChoiceData as ChoiceData
from bnlora.data.choices import multiple_choice as multiple_choice
from bnlora.data.joined import join as join
from bnlora.data.letters import letter_choices as letter_choices
from bnlora.data.outcomes import language_modelling as language_modelling
from bnlora.data.outcomes import text_outcomes as text_outcomes
from bnlora.data.text import TextData as TextData
from bnlora.data.text import text_classification as text_classification
from bnlora.infer.svi.plateau import Plateau as Plateau
from bnlora.infer.svi.result import Fit as Fit
from bnlora.infer.svi.result import FitDiverged as FitDiverged
from bnlora.infer.svi.result import FitOutOfMemory as FitOutOfMemory
from bnlora.infer.svi.validation import EarlyStopping as EarlyStopping
from bnlora.prediction.exported import Export as Export
from bnlora.prediction.exported import export_peft as export_peft
from bnlora.prediction.outcomes import TextPrediction as TextPrediction
from bnlora.prediction.outcomes import ValuePrediction as ValuePrediction
from bnlora.prediction.outcomes import predict_texts as predict_texts
from bnlora.prediction.outcomes import predict_values as predict_values
from bnlora.prediction.posterior import PointPosterior as PointPosterior
from bnlora.prediction.posterior import Posterior as Posterior
from bnlora.prediction.predict import Prediction as Prediction
from bnlora.prediction.predict import predict as predict
from bnlora.prediction.reading import Reading as Reading
from bnlora.prediction.reading import read_along as read_along
from bnlora.program import likelihoods as likelihoods
from bnlora.program.cache import cache_prefix as cache_prefix
from bnlora.program.conditional import condition as condition
from bnlora.program.model import Classifier as Classifier

if _TYPE_CHECKING:  # what type checkers and editors see of the names in `_LATER`
    from bnlora import plots as plots
    from bnlora.adapters.peft import load_peft as load_peft
    from bnlora.adapters.peft import peft_sites as peft_sites
    from bnlora.adapters.peft import save_peft as save_peft
    from bnlora.assess import comparison as comparison
    from bnlora.assess import diagnostics as diagnostics
    from bnlora.assess import monitor as monitor
    from bnlora.assess import sbc as sbc
    from bnlora.assess.comparison import Comparison as Comparison
    from bnlora.assess.comparison import compare as compare
    from bnlora.assess.comparison import load_reference as load_reference
    from bnlora.assess.comparison import save_reference as save_reference
    from bnlora.assess.comparison import store_reference as store_reference
    from bnlora.assess.diagnostics import diagnose as diagnose
    from bnlora.assess.diagnostics import to_arviz as to_arviz
    from bnlora.assess.explore import Explored as Explored
    from bnlora.assess.explore import Explorer as Explorer
    from bnlora.assess.explore import explore as explore
    from bnlora.base import Base as Base
    from bnlora.base import load as load
    from bnlora.infer import approximate as approximate
    from bnlora.infer import mcmc as mcmc
    from bnlora.infer.core.fit import CoreFit as CoreFit
    from bnlora.infer.core.fit import fit_core as fit_core
    from bnlora.infer.core.gaussian import Gaussian as Gaussian
    from bnlora.infer.core.gaussian import laplace as laplace
    from bnlora.infer.core.refit import refit as refit
    from bnlora.infer.core.scales import Scales as Scales
    from bnlora.infer.core.scales import choose_scales as choose_scales
    from bnlora.infer.core.start import start_at as start_at
    from bnlora.infer.core.stored import load_core as load_core
    from bnlora.infer.core.stored import load_frames as load_frames
    from bnlora.infer.core.stored import save_core as save_core
    from bnlora.infer.mcmc import Certificate as Certificate
    from bnlora.infer.mcmc import Chains as Chains
    from bnlora.infer.mcmc import Thresholds as Thresholds
    from bnlora.infer.mcmc import log_evidence as log_evidence
    from bnlora.infer.mcmc import sample_elliptical as sample_elliptical
    from bnlora.infer.mcmc import sample_hmc as sample_hmc
    from bnlora.infer.mcmc import sample_mclmc as sample_mclmc
    from bnlora.infer.mcmc import sample_nuts as sample_nuts
    from bnlora.infer.mcmc import sample_smc as sample_smc
    from bnlora.infer.svi.checkpoint import load_fit as load_fit
    from bnlora.infer.svi.checkpoint import save_fit as save_fit
    from bnlora.infer.svi.estimate import Estimate as Estimate
    from bnlora.infer.svi.estimate import estimate as estimate
    from bnlora.infer.svi.fit import fit as fit
    from bnlora.infer.svi.options import Memory as Memory
    from bnlora.infer.svi.options import Optimisation as Optimisation
    from bnlora.infer.svi.resume import Checkpoints as Checkpoints
    from bnlora.infer.svi.step import svi_step as svi_step
    from bnlora.models.hosts import HostLost as HostLost
    from bnlora.models.hosts import hosts as hosts
    from bnlora.models.sharding import mesh as mesh
    from bnlora.prediction import conformal as conformal
    from bnlora.prediction import decisions as decisions
    from bnlora.prediction import risk_control as risk_control
    from bnlora.prediction import selective as selective
    from bnlora.prediction.generated import Generation as Generation
    from bnlora.prediction.generation import generate as generate
    from bnlora.prediction.imported import load_peft_posterior as load_peft_posterior
    from bnlora.program.tangent.frames import frames as frames
    from bnlora.program.tangent.model import Tangent as Tangent

_LATER = {
    "bnlora.adapters.peft": "load_peft peft_sites save_peft",
    "bnlora.assess.comparison": "Comparison compare load_reference save_reference store_reference",
    "bnlora.assess.diagnostics": "diagnose to_arviz",
    "bnlora.assess.explore": "Explored Explorer explore",
    "bnlora.base": "Base load",
    "bnlora.infer.core.fit": "CoreFit fit_core",
    "bnlora.infer.core.gaussian": "Gaussian laplace",
    "bnlora.infer.core.refit": "refit",
    "bnlora.infer.core.scales": "Scales choose_scales",
    "bnlora.infer.core.start": "start_at",
    "bnlora.infer.core.stored": "load_core load_frames save_core",
    "bnlora.infer.mcmc": "Certificate Chains Thresholds log_evidence sample_elliptical sample_hmc "
    "sample_mclmc sample_nuts sample_smc",
    "bnlora.infer.svi.checkpoint": "load_fit save_fit",
    "bnlora.infer.svi.estimate": "Estimate estimate",
    "bnlora.infer.svi.fit": "fit",
    "bnlora.infer.svi.options": "Memory Optimisation",
    "bnlora.infer.svi.resume": "Checkpoints",
    "bnlora.infer.svi.step": "svi_step",
    "bnlora.models.hosts": "HostLost hosts",
    "bnlora.models.sharding": "mesh",
    "bnlora.prediction.generated": "Generation",
    "bnlora.prediction.generation": "generate",
    "bnlora.prediction.imported": "load_peft_posterior",
    "bnlora.program.tangent.frames": "frames",
    "bnlora.program.tangent.model": "Tangent",
}
"""Names that are imported when they are first used, by the module that has them: Flax, Optax, matplotlib and
their like would make `import bnlora` take several times as long."""
_HOME = {name: module for module, names in _LATER.items() for name in names.split()}
_PACKAGES = {
    "approximate": "bnlora.infer.approximate",
    "comparison": "bnlora.assess.comparison",
    "conformal": "bnlora.prediction.conformal",
    "decisions": "bnlora.prediction.decisions",
    "diagnostics": "bnlora.assess.diagnostics",
    "mcmc": "bnlora.infer.mcmc",
    "monitor": "bnlora.assess.monitor",
    "plots": "bnlora.plots",
    "risk_control": "bnlora.prediction.risk_control",
    "sbc": "bnlora.assess.sbc",
    "selective": "bnlora.prediction.selective",
}
"""Packages and modules that are an attribute of this one, imported in the same way."""


def __getattr__(name: str) -> object:
    """A name of `_LATER` or `_PACKAGES`, or the version of the installed package."""
    if name == "__version__":
        return _metadata.version("bnlora")
    if name in _HOME:
        value = getattr(_importlib.import_module(_HOME[name]), name)
    elif name in _PACKAGES:
        value = _importlib.import_module(_PACKAGES[name])
    else:
        near = _difflib.get_close_matches(name, __dir__(), n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise AttributeError(f"module 'bnlora' has no attribute {name!r}{hint}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_PACKAGES, "__version__"})
