r"""Seconds of the main operations over those of torch and peft, laplace-torch, and NumPyro, in one run.

| operation  | problem                                                              | against               |
|------------|----------------------------------------------------------------------|-----------------------|
| step       | plain LoRA on SmolLM2-135M, as `step_torch` has it                   | torch + peft          |
| prediction | a mixture of 16 draws of those adapters                              | torch + peft          |
| Laplace    | mode, evidence and Gaussian of the output layer's rows of two words  | laplace-torch 0.3     |
| NUTS       | the output layer by an update of rank 1, 578 numbers, as `nuts` has it | NumPyro             |

Both sides compute the same thing: losses, probabilities and evidences are compared before any time counts.
That both kinds of NUTS have one posterior is what `tests/infer/test_mcmc.py` tests.

laplace-torch also has Kronecker factors, which approximate what the others compute exactly; its evidence is
reported and not compared. Its mode is found by torch's L-BFGS. Only the times of NUTS include compiling.

    pip install -e ".[bench]" && pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 \
        backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 einops einconv linear_operator \
        unfoldNd torchmetrics lightning-utilities opt_einsum
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

import bnlora as bl
from benchmarks.calibration.family import features, label_rows
from benchmarks.cells.tasks import QUIET
from benchmarks.heads import HEADS, REVIEW, smollm2
from benchmarks.posterior.nuts import in_rounds
from benchmarks.report import Report
from benchmarks.speed.step_torch import Both, both, place
from benchmarks.timing import Times, in_turn, spread
from bnlora.data.assets import vader_splits
from bnlora.prediction.predict import predict_with_draws

Compared = tuple[dict[str, Times], str]
"""Times of the library and of the other side, in this order, and what was compared."""

DRAWS = 16
SCALE = 1.0
"""Prior standard deviation of a logit contrast, in nats."""


def lora(given: argparse.Namespace) -> dict[str, Compared]:
    """A step, and a prediction of many draws of the same adapters."""
    size = given.batch_size
    found = both(given.rounds, size, given.length, None)
    first, second = (values[:5] for values in found.losses.values())
    apart = np.abs(first / second - 1).max()
    times = {name: found.times[name] for name in ("bnlora", "torch + peft")}
    return {
        f"a step, {size} rows of {given.length} tokens": (times, f"losses within {apart:.0e}"),
        f"a prediction, {size} rows, {DRAWS} draws": _prediction(given, found),
    }


def _prediction(given: argparse.Namespace, steps: Both) -> Compared:
    """One mixture over draws of adapters, which torch makes in one pass for each draw."""
    random, rows, theirs = np.random.default_rng(0), steps.train[: given.batch_size], steps.model
    factors = {name: param for name, param in theirs.named_parameters() if param.requires_grad}
    drawn = {
        name: (0.02 * random.normal(size=(DRAWS, *param.shape))).astype(np.float32)
        for name, param in factors.items()
    }
    stacks: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, values in drawn.items():
        family, factor = place(name)
        stacks.setdefault(family, {}).setdefault(factor, []).append(values)
    adapters = jax.tree.map(
        lambda values: np.stack(values, 1), stacks, is_leaf=lambda value: isinstance(value, list)
    )
    inputs = {
        "input_ids": torch.tensor(np.asarray(rows.tokens)).long(),
        "attention_mask": torch.tensor(np.asarray(rows.mask)).long(),
    }
    found: dict[str, np.ndarray] = {}

    def own(_: int) -> None:
        prediction = predict_with_draws(steps.own.step.model, adapters, rows, batch_size=len(rows))
        found["bnlora"] = np.exp(prediction.log_probs)

    @torch.no_grad()
    def other(_: int) -> None:
        total = 0.0
        for draw in range(DRAWS):
            for name, param in factors.items():
                param.copy_(torch.from_numpy(drawn[name][draw]))
            logits = theirs(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
            total = total + torch.softmax(logits, -1)
        found["torch + peft"] = (total / DRAWS).numpy()

    theirs.eval()
    times = in_turn({"bnlora": own, "torch + peft": other}, max(given.rounds // 3, 1))
    apart = np.abs(found["bnlora"] - found["torch + peft"]).max()
    assert apart < 1e-4
    return times, f"probabilities within {apart:.0e}"


def _structures() -> dict[str, Callable[..., Any]]:
    """Laplace's approximations of laplace-torch by name; only this part needs the package."""
    try:
        from laplace.baselaplace import FullLaplace, KronLaplace
    except ModuleNotFoundError as error:
        raise SystemExit(f"side_by_side needs {error.name}; --help says how to install it") from error
    return {"full": FullLaplace, "Kronecker": KronLaplace}


def last_layer(given: argparse.Namespace) -> dict[str, Compared]:
    """Laplace's approximation of the output layer: from features to mode, evidence and Gaussian."""
    structures = _structures()
    tangent, train, arrays = _head(given.labelled)
    unit = tangent.frames["lm_head"].unit
    evidences: dict[str, float] = {}

    def ours(_: int) -> None:
        evidences["bnlora"] = bl.laplace(tangent, train, console=QUIET).log_evidence

    def theirs(name: str, _: int) -> None:
        precision = (unit / SCALE) ** 2
        evidences[name] = _by_torch(structures[name], *arrays, precision=precision)

    programs = {"bnlora": ours} | {name: partial(theirs, name) for name in structures}
    times = in_turn(programs, max(given.rounds // 3, 1))
    assert abs(evidences["bnlora"] - evidences["full"]) < 0.05
    values = ", ".join(f"{name} {evidences[name]:.2f}" for name in programs)
    return {
        f"Laplace, {given.labelled} rows, by laplace-torch {name}": (
            {"bnlora": times["bnlora"], name: times[name]},
            f"log evidence in nats: {values}",
        )
        for name in structures
    }


def _head(labelled: int) -> tuple[bl.Tangent, bl.Batch, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A core prior on every number of the output layer's two rows, and the same problem as arrays."""
    base = smollm2()
    rows = vader_splits(seed=0, train=labelled, validation=1, test=1)
    data = bl.text_classification(
        {"train": rows["train"]}, base.tokenizer, text="text", label="label", max_length=64, **REVIEW
    )
    size = base.config.d_model
    whole = {"lm_head": (np.eye(2)[None], np.eye(size)[None])}
    key = jax.random.key(0)
    frames = bl.frames(
        key, base, ["lm_head"], data.train, label_ids=data.label_ids, source=whole, size=size, console=QUIET
    )
    prior = bl.priors.core(frames, scale=SCALE)
    tangent = bl.Tangent(bl.Classifier(base, frames.sites, prior, label_ids=data.label_ids))
    train = bl.cache_prefix(tangent, data.train, console=QUIET)
    plain = bl.Classifier(
        base, bl.select(base, ["lm_head"], rank=1), bl.priors.point(), label_ids=data.label_ids
    )
    cached = bl.cache_prefix(plain, data.train, console=QUIET)
    inputs, _, labels = features(base, replace(data, splits={"train": cached}), "train")
    return tangent, train, (inputs, label_rows(base, data.label_ids), labels)


def _by_torch(
    structure: Callable[..., Any], inputs: np.ndarray, start: np.ndarray, labels: np.ndarray, precision: float
) -> float:
    """Laplace's log-evidence of a linear layer whose weights have independent normals around `start`."""
    layer = torch.nn.Linear(inputs.shape[1], len(start), bias=False)
    layer.weight.data = torch.tensor(start, dtype=torch.float32)
    mean = layer.weight.detach().clone()
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels).long()
    newton = torch.optim.LBFGS(
        layer.parameters(), max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        newton.zero_grad()
        away = ((layer.weight - mean) ** 2).sum()
        value = torch.nn.functional.cross_entropy(layer(x), y, reduction="sum") + 0.5 * precision * away
        value.backward()
        return value

    newton.step(loss)
    found = structure(layer, "classification", prior_precision=precision, prior_mean=mean.ravel())
    found.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x)))
    return float(found.log_marginal_likelihood())


def chains(given: argparse.Namespace) -> dict[str, Compared]:
    """A whole call of NUTS, divided by the smallest effective sample size."""
    model, train, _ = HEADS["two-words"].load(smollm2())
    train = bl.cache_prefix(model, train, console=QUIET)
    sizes = {"warmup": given.warmup, "draws": given.draws}
    found = list(in_rounds(model, train, given.chains, **sizes))
    times, least = {}, []
    for name in ("blackjax", "numpyro"):
        runs = [run for run in found if run.sampler == name]
        times[name] = Times(*np.array([(run.took.wall / run.ess, run.took.cpu / run.ess) for run in runs]).T)
        least.append(f"{np.median([run.ess for run in runs]):.0f}")
    about = ", ".join(least)
    title = f"an effective draw of NUTS, 4 x {given.draws:,} draws"
    return {title: (times, f"least effective sizes {about} (medians)")}


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=9, help="of a step; others take a third")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--labelled", type=int, default=320, help="rows of Laplace's approximation")
    parser.add_argument("--chains", type=int, default=2, help="runs of each sampler of four chains")
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=300)


def run(given: argparse.Namespace, report: Report) -> None:
    """Compare, then time in turn."""
    torch.manual_seed(0)
    header = ("operation", "bnlora, s", "theirs, s", "bnlora over theirs", "in CPU s", "compared")
    table = report.table("Seconds over those of others", header)
    for part in (last_layer, lora, chains):
        for name, (times, about) in part(given).items():
            own, other = times.values()
            walls = (f"{np.median(t.wall):.3f}" for t in (own, other))
            table.row(name, *walls, spread(own.wall / other.wall), spread(own.cpu / other.cpu), about)
    report.text("Seconds over those of others", "Medians; ratios within rounds, with the middle 80 %.")
