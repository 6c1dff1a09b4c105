"""Cost and gain of XLA's levels of optimisation on CPUs, for a step: python benchmarks/compiler.py.

Each step, of a small and of a wide model, is compiled once at every level without a cache. The compiled steps
then run in turn (`rounds.py`). `bnlora/_util/compilation.py` chooses the level by these numbers.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rounds import in_turn, show

import bnlora as bl
from bnlora._util.compilation import SMALL, options
from bnlora.base import random_base
from bnlora.infer.svi.fit import _Loop, _prepare
from bnlora.models.llama import LlamaConfig
from bnlora.testing import tiny_base, tiny_rows

WIDE = {"d_model": 576, "d_ff": 1536, "num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
LEVELS = {"default": None, "least": options(), "none": options(SMALL)}


def step_of(base: bl.Base, *, length: int, rank: int) -> tuple[_Loop, tuple[Any, ...]]:
    """The step of a Bayesian fit with 16 rows, and its arguments."""
    rows = tiny_rows(jax.random.key(0), 16, length=length, vocabulary=base.config.vocab_size)
    sites = bl.select(base, ["q_proj", "k_proj", "lm_head"], rank=rank)
    model = bl.Classifier(base, sites, bl.priors.sparse_gp(), label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior, lam_max=0.03)
    adam = optax.adam(1e-2)
    loop, state = _prepare(jax.random.key(1), model, guide, rows, adam, scale_optimizer=adam)
    return loop, (state, jax.random.key(2), base.weights, rows, jnp.arange(16))


def compare(title: str, loop: _Loop, arguments: tuple[Any, ...], rounds: int) -> None:
    """Compile the step at each level, then time the compiled steps in turn."""
    compiled = {}
    for level, chosen in LEVELS.items():
        lowered = jax.jit(loop._traced_step, compiler_options=chosen).lower(*arguments)
        cpu = time.process_time()
        compiled[level] = lowered.compile()
        print(f"{title}: compiling, level {level}, took {time.process_time() - cpu:.1f} s of CPU", flush=True)
    print(f"{title}: {len(lowered.as_text().splitlines()):,} lines of StableHLO")
    steps = {level: lambda _, run=run: run(*arguments) for level, run in compiled.items()}
    show(title, in_turn(steps, rounds), unit="step")


def main() -> None:
    """Compare the levels for both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    compare("width 16", *step_of(tiny_base(jax.random.key(3)), length=16, rank=2), rounds)
    wide = random_base(jax.random.key(3), LlamaConfig(vocab_size=49_152, tied=True, **WIDE))
    compare("width 576", *step_of(wide, length=32, rank=8), rounds)


if __name__ == "__main__":
    main()
