"""Language models as Flax NNX modules: frozen weights inside, low-rank adapters handed in with each call.

Nothing here knows about probability.
"""
