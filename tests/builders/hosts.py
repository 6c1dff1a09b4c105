"""A script for one of two processes that fit together, or for one process with two devices.

    python hosts.py FOLDER PORT PROCESS SPLIT VICTIM

PROCESS is 0, 1 or "alone"; its numbers go to FOLDER/PROCESS.json. At the end process VICTIM kills itself in
the middle of a fit, and what the other one then sees goes to FOLDER/lost.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

STEPS, STOP, DEAD = 8, 3, 5
"""Steps of a fit, after which of them one process is interrupted, and after which it is killed."""

TIMEOUT = 5


def built(base: bl.Base) -> tuple[bl.Classifier, bl.guides.Guide]:
    model = bl.Classifier(base, bl.select(base, sites_of(base), rank=2), bl.priors.normal(), label_ids=(3, 5))
    return model, bl.guides.Guide(model.prior, bl.guides.mean_field())


def fitted(
    base: bl.Base, folder: Path | None = None, seed: int = 2, *, looks: bool = True, **options
) -> bl.Fit:
    rows, others = tiny_rows(jax.random.key(seed), 24), tiny_rows(jax.random.key(3), 12)
    if looks:
        options |= {"validation": others, "early_stopping": bl.EarlyStopping(every=4, num_draws=2)}
    options |= {"checkpoints": None if folder is None else bl.Checkpoints(folder, every=2)}
    options |= {"num_steps": STEPS, "batch_size": 8}
    return bl.fit(jax.random.key(0), *built(base), rows, optax.adam(0.05), **options)


def sites_of(base: bl.Base) -> list[str]:
    """The head over one layer; a module of the layers too over more."""
    return ["lm_head"] if base.num_layers == 1 else ["q_proj", "lm_head"]


def at(step: int, process: int, number: signal.Signals) -> dict:
    """A hook that sends a signal to this process after a step, if it is the given one."""

    def hook(done: int, _: dict) -> None:
        if done == step and jax.process_index() == process:
            os.kill(os.getpid(), number)

    return {"on_step": hook}


def numbers(fit: bl.Fit) -> dict:
    return {
        "bound": fit.history["elbo"].tolist(),
        "nll": fit.validation["nll"].tolist(),
        "params": [np.asarray(x).tolist() for x in jax.tree.leaves(fit.params)],
        "stopped": fit.stopped,
        "traces": fit.num_traces,
    }


def refusal(run) -> str:
    """The sentence of an error."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def together(base: bl.Base, folder: Path) -> dict:
    """What two processes do before the whole fit: an interrupt and other rows in one of them, and chains."""
    fit = fitted(base, folder / "whole", **at(STOP, 1, signal.SIGINT))
    return {
        "interrupted": numbers(fit),
        "other rows": refusal(lambda: fitted(base, seed=2 + jax.process_index())),
        "chains": refusal(lambda: bl.sample_nuts(jax.random.key(0), fit.model, fit.train)),
    }


def main(folder: Path, port: str, process: str, split: str, victim: str) -> None:
    alone = process == "alone"
    if not alone:
        bl.hosts(f"localhost:{port}", num_processes=2, process_id=int(process), timeout=TIMEOUT)
    num_layers = 1 if split == "tensor" else 2
    base = tiny_base(jax.random.key(1), num_layers=num_layers).on(bl.mesh(data=2), split=split)
    found = {} if alone else together(base, folder)
    fit = fitted(base, folder / "whole")  # which goes on from where it was interrupted
    rows = tiny_rows(jax.random.key(4), 6)
    prediction = bl.predict(jax.random.key(0), fit, rows, num_draws=4)
    found |= {"fit": numbers(fit), "probabilities": prediction.probs.tolist()}
    bl.save_fit(fit, folder / "fit")
    (folder / f"{process}.json").write_text(json.dumps(found))
    if alone:
        return
    try:
        fitted(base, folder / "killed", looks=False, **at(DEAD, int(victim), signal.SIGKILL))
    except bl.HostLost as error:
        (folder / "lost.json").write_text(json.dumps(str(error)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
