"""Logits against transformers' torch model: stored numbers always, the live model where torch is installed.

Tolerance: `rounding` is the largest error of torch's own float32 logits against the same model in float64.
Two float32 programs that sum in different orders differ by a few times that; ten times is the limit. It must
itself be below 1e-3 of the largest logit, which is what the project asks for; for SmolLM2 it is 1.4e-5 of it.
"""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.families import REFERENCES, reference
from builders.thorough import sample_of
from transformers import AutoConfig

from bnlora.base import Base, load
from bnlora.data.assets import fetch_gemma3, fetch_smollm2
from bnlora.models import families
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.loading import Checkpoint, read_checkpoint


def tiny_base(name: str) -> Base:
    checkpoint = Checkpoint(reference.ALL[name], tensors_of(name), None)
    return Base.from_module(families.build(checkpoint), name=name)


def tensors_of(name: str) -> dict[str, np.ndarray]:
    config = reference.ALL[name]
    return reference.tiny_tensors(config) if name in reference.CONFIGS else reference.family_tensors(config)


def logits(base: Base, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    function = jax.jit(lambda params, tokens, mask: base.bind(params)(tokens, mask))
    return np.asarray(function(base.weights, jnp.asarray(tokens), jnp.asarray(mask)))


def assert_parity(got: np.ndarray, expected: np.ndarray, rounding: float) -> None:
    assert 10 * rounding < 1e-3 * np.abs(expected).max()
    assert np.abs(got - expected).max() <= 10 * rounding


def stored(name: str) -> tuple[np.ndarray, float, list[int] | None]:
    content = json.loads((REFERENCES / f"{name}.json").read_text(encoding="utf-8"))
    return np.array(content["logits"], np.float32), content["rounding"], content.get("tokens")


REAL = {"smollm2": fetch_smollm2, "gemma3-270m": fetch_gemma3}
# Gemma is 238 MB to download and takes several GB of memory beside torch's copy.
every_real = pytest.mark.parametrize("name", sample_of(REAL, ["smollm2"]))


@cache
def real_base(name: str) -> Base:
    return load(REAL[name]())


every_model = pytest.mark.parametrize("name", sorted(reference.ALL))


@every_model
def test_tiny_models_give_the_stored_logits(name):
    expected, rounding, _ = stored(name)
    got = logits(tiny_base(name), reference.tiny_tokens(reference.ALL[name]))
    assert_parity(got[:, ::4], expected, rounding)


@every_model
def test_tiny_models_give_the_logits_of_torch(name):
    """Rows with padding on the right and on the left."""
    pytest.importorskip("torch")
    config = reference.ALL[name]
    tokens = reference.tiny_tokens(config)
    mask = np.ones(tokens.shape, bool)
    mask[0, :5] = mask[1, 18:] = False
    model = reference.torch_model(config, tensors_of(name))
    expected = reference.torch_logits(model, tokens, mask)
    rounding = reference.torch_rounding(model, tokens, reference.torch_logits(model, tokens))
    assert_parity(logits(tiny_base(name), tokens, mask)[mask], expected[mask], rounding)


@every_model
def test_a_configuration_that_transformers_wrote_is_the_same(name):
    """Newer versions of transformers write other keys for the same model."""
    config = reference.ALL[name]
    written = AutoConfig.for_model(**config).to_dict() | {"architectures": config["architectures"]}
    ours, theirs = (read(given) for given in (config, json.loads(json.dumps(written))))
    assert ours == theirs


def read(config: dict) -> DecoderConfig:
    """The configuration, with the local layers one by one."""
    read = families.FAMILIES[families.family_of(config)].read_config(config)
    local = read.window and replace(read.window, cycle=read.window.is_local(read.num_layers))
    return replace(read, window=local)


@pytest.mark.slow
@every_real
def test_real_models_give_the_stored_logits(name):
    expected, rounding, expected_tokens = stored(name)
    base = real_base(name)
    tokens = base.tokenizer(reference.SENTENCE).input_ids
    assert tokens == expected_tokens
    assert_parity(reference.pick(logits(base, np.array([tokens]))), expected, rounding)


@pytest.mark.slow
@every_real
def test_real_models_give_the_logits_of_torch(name):
    pytest.importorskip("torch")
    checkpoint, base = read_checkpoint(REAL[name]()), real_base(name)
    model = reference.torch_model(checkpoint.config, dict(checkpoint.tensors))
    tokens = np.array([base.tokenizer(reference.SENTENCE).input_ids])
    expected = reference.torch_logits(model, tokens)
    assert_parity(logits(base, tokens), expected, reference.torch_rounding(model, tokens, expected))


@pytest.mark.slow
@every_real
def test_real_weights_are_those_of_transformers_own_gguf_loader(name):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    path = REAL[name]()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state, tensors = model.state_dict(), read_checkpoint(path).tensors
    assert set(state) - set(tensors) == {"lm_head.weight"}
    assert all(np.array_equal(tensors[name], state[name].numpy()) for name in tensors)
