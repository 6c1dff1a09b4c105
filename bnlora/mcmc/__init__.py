"""Markov chain Monte Carlo on adapters: chains, the certificate of a reference, and the samplers."""

from bnlora.certificate import Certificate as Certificate
from bnlora.certificate import Thresholds as Thresholds
from bnlora.mcmc.bridge import LogEvidence as LogEvidence
from bnlora.mcmc.bridge import log_evidence as log_evidence
from bnlora.mcmc.chains import Chains as Chains
from bnlora.mcmc.elliptical import sample_elliptical as sample_elliptical
from bnlora.mcmc.hamiltonian import sample_hmc as sample_hmc
from bnlora.mcmc.hamiltonian import sample_nuts as sample_nuts
from bnlora.mcmc.mclmc import sample_mclmc as sample_mclmc
from bnlora.mcmc.smc import sample_smc as sample_smc
