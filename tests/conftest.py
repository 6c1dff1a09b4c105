"""Settings of every test: JAX on the CPU, and no silent broadcasting between ranks."""

import jax
import matplotlib as mpl

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
mpl.use("agg")
