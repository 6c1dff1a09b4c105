"""A step of plain LoRA against torch and peft, on SmolLM2-135M.

Both train the same adapters (q_proj, k_proj, and the label words' rows of the output layer) on the same rows
by Adam. The loss is the mean cross-entropy of the label words after the last token of each row, in float32,
with as many threads as the machine has cores. torch is configured for speed: `sdpa` attention, the output
layer only at the last position and only for the label words, no gradients of frozen weights. Its adapters are
copied at the start, and the losses of the first five steps must agree, so that both compute the same loss.

With `--top-layers`, bnlora starts from cached activations below the adapters; peft has no such cache.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import bnlora as bl
from benchmarks.report import Report
from benchmarks.speed.step import LABEL_IDS, RATE, layers_text, step_of
from benchmarks.steps import Started
from benchmarks.timing import Times, in_turn, show
from bnlora.app.demo import RECIPE
from bnlora.data.assets import fetch_smollm2
from bnlora.testing import tiny_rows


def peft_model(top_layers: int | None) -> torch.nn.Module:
    """SmolLM2 with adapters by peft, and an output layer with only the rows of the label words."""
    path = fetch_smollm2()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    head = torch.nn.Linear(model.config.hidden_size, len(LABEL_IDS), bias=False)
    head.weight = torch.nn.Parameter(model.lm_head.weight[torch.tensor(LABEL_IDS)].detach().clone())
    model.lm_head = head
    depth = model.config.num_hidden_layers
    layers = "|".join(map(str, range(0 if top_layers is None else depth - top_layers, depth)))
    targets = rf"model\.layers\.({layers})\.self_attn\.(q_proj|k_proj)|lm_head"
    config = LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.rank, lora_dropout=0.0, target_modules=targets)
    return get_peft_model(model, config).train()


def peft_step(model: torch.nn.Module, train: bl.Batch) -> Callable[[np.ndarray], float]:
    """A step of torch: takes rows, updates the adapters, returns the loss."""
    tokens, mask, labels = (
        torch.tensor(np.asarray(x)).long() for x in (train.tokens, train.mask, train.labels)
    )
    moving = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(moving, lr=RATE)

    def step(rows: np.ndarray) -> float:
        given = {"input_ids": tokens[rows], "attention_mask": mask[rows]}
        logits = model(**given, logits_to_keep=1, use_cache=False).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, labels[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.item()

    return step


def place(name: str) -> tuple[str, str]:
    """Family and factor of a parameter of peft, named "...<family>.lora_<factor>.default.weight"."""
    *_, family, factor, _, _ = name.split(".")
    return family, factor.removeprefix("lora_").lower()


def parameters_of(model: torch.nn.Module) -> dict[str, jax.Array]:
    """Adapters of peft as parameters of `bl.priors.point`: {"<family>.<factor>": (layer, out, in)}."""
    factors: dict[str, list[np.ndarray]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:  # layer after layer
            factors.setdefault(".".join(place(name)), []).append(value.detach().numpy().copy())
    return {name: jnp.asarray(np.stack(values)) for name, values in factors.items()}


class Both(NamedTuple):
    """The steps of both, after their rounds.

    Attributes:
        times: Times of "torch + peft" and "bnlora".
        losses: Losses of both in all rounds, each of which adds a step.
        model: The model of torch.
        own: The step of bnlora.
        train: The rows, padded on the left.
    """

    times: dict[str, Times]
    losses: dict[str, np.ndarray]
    model: torch.nn.Module
    own: Started
    train: bl.Batch


def both(rounds: int, size: int, length: int, top_layers: int | None) -> Both:
    """Time both steps in turn; raise `AssertionError` unless they compute the same losses."""
    train = tiny_rows(jax.random.key(0), 4 * size, length=length, vocabulary=49_152)
    # The label words are read at the last position, so padding must be on the left.
    train = replace(train, tokens=train.tokens[:, ::-1], mask=train.mask[:, ::-1])
    model = peft_model(top_layers)
    theirs = peft_step(model, train)
    about = {"top_layers": top_layers, "batch_size": size, "init_params": parameters_of(model)}
    own = step_of(RECIPE.load_base(), train, "none", **about)
    states, losses = [own.state], {"torch + peft": [], "bnlora": []}

    def rows_of(number: int) -> np.ndarray:
        return (np.arange(size) + number) % len(train)

    def ours(number: int) -> None:
        states[0] = own.run(states[0], jax.random.key(number), rows_of(number))
        losses["bnlora"].append(-own.bound / len(train))

    programs = {
        "torch + peft": lambda number: losses["torch + peft"].append(theirs(rows_of(number))),
        "bnlora": ours,
    }
    times = in_turn(programs, rounds)
    found = {name: np.array(values) for name, values in losses.items()}
    # Adam amplifies differences of rounding, so only the first losses count.
    np.testing.assert_allclose(found["torch + peft"][:5], found["bnlora"][:5], rtol=1e-4)
    return Both(times, found, model, own, train)


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes of a step."""
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--top-layers", type=int, help="default: all")


def run(given: argparse.Namespace, report: Report) -> None:
    """Check that both compute the same losses, and show the times of their steps."""
    torch.manual_seed(0)
    size = given.batch_size
    found = both(given.rounds, size, given.length, given.top_layers)
    first, second = found.losses.values()
    title = f"Plain step over torch and peft, {layers_text(given.top_layers)}"
    show(report, title, found.times, unit="step")
    report.text(
        title,
        f"{size} rows of {given.length} tokens, {torch.get_num_threads()} threads. Losses of the first three "
        f"steps: {first[:3]} (torch) and {second[:3]} (bnlora).",
    )
