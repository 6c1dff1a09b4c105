"""Settings of every test: JAX on the CPU, programs compiled once for all tests, pictures without a screen."""

from pathlib import Path

import jax
import matplotlib as mpl

jax.config.update("jax_platforms", "cpu")
# Many tests build the same small program anew; a cache on disk serves all of them and all workers.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
mpl.use("agg")
