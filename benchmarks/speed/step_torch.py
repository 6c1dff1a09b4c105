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

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import bnlora as bl
from benchmarks.report import Report
from benchmarks.speed.step import LABEL_IDS, RATE, layers_text, step_of
from benchmarks.timing import in_turn, show
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


def parameters_of(model: torch.nn.Module) -> dict[str, jax.Array]:
    """Adapters of peft as parameters of `bl.priors.point`: {"<family>.<factor>": (layer, out, in)}."""
    factors: dict[str, list[np.ndarray]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:  # "...<family>.lora_<factor>.default.weight", layer after layer
            family, factor = name.split(".")[-4], name.split(".")[-3].removeprefix("lora_").lower()
            factors.setdefault(f"{family}.{factor}", []).append(value.detach().numpy().copy())
    return {name: jnp.asarray(np.stack(values)) for name, values in factors.items()}


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes of a step."""
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--top-layers", type=int, help="default: all")


def run(given: argparse.Namespace, report: Report) -> None:
    """Check that both compute the same losses, then time both steps in turn."""
    torch.manual_seed(0)
    size = given.batch_size
    train = tiny_rows(jax.random.key(0), 4 * size, length=given.length, vocabulary=49_152)
    # The label words are read at the last position, so padding must be on the left.
    train = replace(train, tokens=train.tokens[:, ::-1], mask=train.mask[:, ::-1])
    model = peft_model(given.top_layers)
    theirs = peft_step(model, train)
    about = {"top_layers": given.top_layers, "batch_size": size, "init_params": parameters_of(model)}
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
    times = in_turn(programs, given.rounds)
    first, second = (np.array(values) for values in losses.values())
    np.testing.assert_allclose(first[:5], second[:5], rtol=1e-4)  # Adam amplifies differences of rounding
    title = f"Plain step over torch and peft, {layers_text(given.top_layers)}"
    show(report, title, times, unit="step")
    report.text(
        title,
        f"{size} rows of {given.length} tokens, {torch.get_num_threads()} threads. Losses of the first three "
        f"steps: {first[:3]} (torch) and {second[:3]} (bnlora).",
    )
