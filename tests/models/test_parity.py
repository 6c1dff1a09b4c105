"""Logits against transformers' torch model: stored numbers always, the live model where torch is installed.

Tolerance: `rounding` is the largest error of torch's own float32 logits against the same model in float64.
Two float32 programs that sum in different orders differ by a few times that; ten times is the limit. It must
itself be below 1e-3 of the largest logit, which is what the project asks for; for SmolLM2 it is 1.4e-5 of it.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.base import Base, load
from bnlora.data.assets import fetch_smollm2
from bnlora.models import llama
from bnlora.models.loading import Checkpoint, read_checkpoint

DATA = Path(__file__).parents[1] / "references"
reference = SimpleNamespace(**runpy.run_path(str(DATA / "make_reference.py")))


def tiny_base(name: str) -> Base:
    config = reference.CONFIGS[name]
    checkpoint = Checkpoint(config, reference.tiny_tensors(config), None)
    return Base.from_module(llama.build(checkpoint), name=name)


def logits(base: Base, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    function = jax.jit(lambda params, tokens, mask: base.bind(params)(tokens, mask))
    return np.asarray(function(base.weights, jnp.asarray(tokens), jnp.asarray(mask)))


def assert_parity(got: np.ndarray, expected: np.ndarray, rounding: float) -> None:
    assert 10 * rounding < 1e-3 * np.abs(expected).max()
    assert np.abs(got - expected).max() <= 10 * rounding


def stored(name: str) -> tuple[np.ndarray, float, list[int] | None]:
    content = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return np.array(content["logits"], np.float32), content["rounding"], content.get("tokens")


@pytest.fixture(scope="module")
def smollm2() -> Base:
    return load(fetch_smollm2())


@pytest.mark.parametrize("name", sorted(reference.CONFIGS))
def test_tiny_models_give_the_stored_logits(name):
    expected, rounding, _ = stored(name)
    got = logits(tiny_base(name), reference.tiny_tokens(reference.CONFIGS[name]))
    assert_parity(got[:, ::4], expected, rounding)


@pytest.mark.parametrize("name", sorted(reference.CONFIGS))
def test_tiny_models_give_the_logits_of_torch(name):
    pytest.importorskip("torch")
    config = reference.CONFIGS[name]
    tokens = reference.tiny_tokens(config)
    mask = np.ones(tokens.shape, bool)
    mask[1, 18:] = False
    model = reference.torch_model(config, reference.tiny_tensors(config))
    expected = reference.torch_logits(model, tokens, mask)
    rounding = reference.torch_rounding(model, tokens, reference.torch_logits(model, tokens))
    assert_parity(logits(tiny_base(name), tokens, mask)[mask], expected[mask], rounding)


@pytest.mark.slow
def test_smollm2_gives_the_stored_logits(smollm2):
    expected, rounding, expected_tokens = stored("smollm2")
    tokens = smollm2.tokenizer(reference.SENTENCE).input_ids
    assert tokens == expected_tokens
    assert_parity(reference.pick(logits(smollm2, np.array([tokens]))), expected, rounding)


@pytest.mark.slow
def test_smollm2_gives_the_logits_of_torch(smollm2):
    pytest.importorskip("torch")
    checkpoint = read_checkpoint(fetch_smollm2())
    model = reference.torch_model(checkpoint.config, dict(checkpoint.tensors))
    tokens = np.array([smollm2.tokenizer(reference.SENTENCE).input_ids])
    expected = reference.torch_logits(model, tokens)
    assert_parity(logits(smollm2, tokens), expected, reference.torch_rounding(model, tokens, expected))


@pytest.mark.slow
def test_smollm2_weights_are_those_of_transformers_own_gguf_loader():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    path = fetch_smollm2()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state, tensors = model.state_dict(), read_checkpoint(path).tensors
    assert set(state) - set(tensors) == {"lm_head.weight"}
    assert all(np.array_equal(tensors[name], state[name].numpy()) for name in tensors)
