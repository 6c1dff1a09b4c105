"""Markov chain Monte Carlo on adapters: chains, the certificate of a reference, and the samplers."""

from bnlora.infer.mcmc.bridge import LogEvidence as LogEvidence
from bnlora.infer.mcmc.bridge import log_evidence as log_evidence
from bnlora.infer.mcmc.certificate import Certificate as Certificate
from bnlora.infer.mcmc.certificate import Thresholds as Thresholds
from bnlora.infer.mcmc.chains import Chains as Chains
from bnlora.infer.mcmc.elliptical import sample_elliptical as sample_elliptical
from bnlora.infer.mcmc.hamiltonian import sample_hmc as sample_hmc
from bnlora.infer.mcmc.hamiltonian import sample_nuts as sample_nuts
from bnlora.infer.mcmc.mclmc import sample_mclmc as sample_mclmc
from bnlora.infer.mcmc.smc import sample_smc as sample_smc
