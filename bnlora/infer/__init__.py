"""Posteriors: how they are found and what they are worth.

| package       | what it has                                                         |
|---------------|---------------------------------------------------------------------|
| `svi`         | `fit`: stochastic variational inference, and fits on disk           |
| `mcmc`        | chains, their certificate, evidence by bridge sampling              |
| `core`        | `fit_core`: the tangent model with scales by evidence               |
| `approximate` | Laplace, SWAG, ensembles, stochastic-gradient chains, temperature   |
"""
