"""Language models as Flax NNX modules, with frozen weights; each call takes low-rank adapters as arguments.

This package is independent of probability and priors.
"""
