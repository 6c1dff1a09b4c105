"""Make the committed reference logits with transformers' torch models, as a program.

Tiny random models of every family, SmolLM2-135M-Instruct and Gemma-3-270m; for encoders activations, those of
all-MiniLM-L6-v2 among them. The weights of the tiny models come from a seeded generator, so only what they
compute is stored.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SENTENCE = (
    "The film was slow at first, but its last half hour is among the best of 1994; I would see it again."
)
POSITIONS = (0, 7, 15, -1)
COLUMNS = tuple(range(17, 49152, 499))
SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "grouped": SIZES | {"rope_theta": 1000.0, "tie_word_embeddings": False},
    "llama3": SIZES
    | {"rope_theta": 50.0, "tie_word_embeddings": True, "rope_scaling": SCALING, "head_dim": 16},
}


def _named(model_type: str, architecture: str, *dropped: str, **changes: object) -> dict:
    sizes = {key: value for key, value in SIZES.items() if key not in dropped}
    return sizes | {"model_type": model_type, "architectures": [architecture], "rope_theta": 1000.0} | changes


_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
}
FAMILIES = {
    "mistral": _named("mistral", "MistralForCausalLM", sliding_window=5, tie_word_embeddings=False),
    "qwen2": _named(
        "qwen2", "Qwen2ForCausalLM", "head_dim",
        use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True,
    ),
    "qwen3": _named("qwen3", "Qwen3ForCausalLM", head_dim=16, tie_word_embeddings=False),
    "qwen3-biased": _named(
        "qwen3", "Qwen3ForCausalLM", attention_bias=True, use_sliding_window=False, tie_word_embeddings=True
    ),
    # Caps so low that they matter.
    "gemma2": _named(
        "gemma2", "Gemma2ForCausalLM", **_GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0
    ),
    "gemma3": _named(
        "gemma3_text", "Gemma3ForCausalLM", **_GEMMA, sliding_window_pattern=2, rope_local_base_freq=20.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
    "phi3": _named("phi3", "Phi3ForCausalLM", "head_dim", pad_token_id=0, tie_word_embeddings=False),
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 61, "n_embd": 32,
        "n_layer": 3, "n_head": 4, "n_positions": 48,
    },
}  # fmt: skip
"""Tiny configurations of the other families, each with what makes it differ from Llama."""
ALL = CONFIGS | FAMILIES
_ENCODER = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "id2label": {0: "bad", 1: "fair", 2: "good"},
}  # fmt: skip
ENCODERS = {
    "bert": _ENCODER | {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"],
        "max_position_embeddings": 48,
    },
    "roberta": _ENCODER | {
        "model_type": "roberta", "architectures": ["RobertaForSequenceClassification"],
        "max_position_embeddings": 50, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
    },
}  # fmt: skip
"""Tiny encoders with classification heads."""


def family_tensors(config: dict) -> dict[str, np.ndarray]:
    """Random weights of any family of decoders under Hugging Face names."""
    from bnlora.models.families import FAMILIES as READERS
    from bnlora.models.families import family_of

    family = READERS[family_of(config)]
    shapes = _shapes(family.keys(family.read_config(config)))
    if config.get("tie_word_embeddings", True):
        del shapes["lm_head.weight"]
    return _drawn(shapes, config)


def encoder_tensors(config: dict) -> dict[str, np.ndarray]:
    """Random weights of an encoder under Hugging Face names."""
    from bnlora.models.families import ENCODERS as READERS

    family = READERS[config["model_type"]]
    drawn = _drawn(_shapes(family.keys(family.read_config(config))), config)
    return {name if name.startswith("classifier") else family.PREFIX + name: x for name, x in drawn.items()}


def _shapes(keys) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a key map."""
    shapes = {part.name: part.shape for part in keys.outer.values()}
    for layer in range(keys.num_layers):
        shapes |= {keys.prefix.format(layer) + part.name: part.shape for part in keys.layers.values()}
    return shapes


def _drawn(shapes: dict[str, tuple[int, ...]], config: dict) -> dict[str, np.ndarray]:
    """Random tensors of these shapes."""
    generator = np.random.RandomState(7)
    offset = 0 if config["model_type"].startswith("gemma") else 1

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 2:
            fan_in = shape[0] if config["model_type"] == "gpt2" and ".h." in name else shape[-1]
            return generator.standard_normal(shape) * (2 / fan_in**0.5)
        return offset * name.endswith("weight") + 0.3 * generator.standard_normal(shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def tiny_tensors(config: dict) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names; `RandomState` because NumPy keeps its stream for ever."""
    generator = np.random.RandomState(7)
    width, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    # Large enough that attention is far from uniform; gains differ from one so that a lost norm shows.
    return {
        name: (
            generator.standard_normal(shape) * (2 / shape[-1] ** 0.5)
            if len(shape) == 2
            else 1 + 0.3 * generator.standard_normal(shape)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def tiny_tokens(config: dict) -> np.ndarray:
    """Token ids, (2, 24)."""
    return np.random.RandomState(8).randint(0, config["vocab_size"], (2, 24))


def torch_model(config: dict, tensors: dict[str, np.ndarray]):
    """Return transformers' torch model of this configuration over these tensors, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    described = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(described, attn_implementation="eager").eval()
    state = {name: torch.tensor(np.array(value)) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.get("tie_word_embeddings", True) else []
    if missing not in ([], tied) or unexpected:
        raise ValueError(
            f"the tensors do not fill the torch model; missing {missing}, unexpected {unexpected}"
        )
    model.tie_weights()
    return model


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of a torch model, (b, t, vocab)."""
    import torch

    real = np.ones(tokens.shape, np.int64) if mask is None else mask.astype(np.int64)
    positions = torch.tensor(np.maximum(real.cumsum(1) - 1, 0))
    with torch.no_grad():
        attention = None if mask is None else torch.tensor(real)
        return model(torch.tensor(tokens), attention_mask=attention, position_ids=positions).logits.numpy()


def torch_rounding(model, tokens: np.ndarray, logits: np.ndarray) -> float:
    """Largest error of float32 logits against the same model in float64, which it is turned into."""
    return float(np.abs(torch_logits(model.double(), tokens) - logits).max())


def torch_encoder(config: dict, tensors: dict[str, np.ndarray]):
    """Return transformers' torch encoder of this configuration over these tensors, in float32."""
    import torch
    import transformers

    described = transformers.AutoConfig.for_model(**config)
    described._attn_implementation = "eager"
    model = getattr(transformers, config["architectures"][0])(described).eval()
    # Old files also have the positions 0, 1, 2, ...
    state = {n: torch.tensor(np.array(x)) for n, x in tensors.items() if not n.endswith("position_ids")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"the tensors do not fill the torch model; missing {missing}, unexpected {unexpected}"
        )
    return model


def torch_outputs(model, tokens: np.ndarray, mask: np.ndarray | None = None):
    """Activations after the last layer, (b, t, d), and logits, or what the pooling layer of a body gives.

    Both of these are read at the first column.

    Positions count real tokens, as the library counts them; transformers gives padding positions too.
    """
    import torch

    real = np.ones(tokens.shape, np.int64) if mask is None else mask.astype(np.int64)
    first = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    positions = torch.tensor(np.maximum(real.cumsum(1) - 1, 0) + first)
    with torch.no_grad():
        out = model(
            torch.tensor(tokens), attention_mask=torch.tensor(real), position_ids=positions,
            output_hidden_states=True,
        )  # fmt: skip
    read = out.logits if "logits" in out else out.pooler_output
    return out.hidden_states[-1].numpy(), read.numpy()


def pick(logits: np.ndarray) -> np.ndarray:
    """The entries of (1, t, vocab) logits that are stored for the large model, (positions, columns)."""
    return logits[0][np.ix_(np.arange(logits.shape[1])[list(POSITIONS)], COLUMNS)]


def write(name: str, **content) -> None:
    """Write one file of logits."""
    (FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_encoders(minilm) -> None:
    """Write the files of encoders, that of a checkpoint of MiniLM among them."""
    for name, config in ENCODERS.items():
        model, tokens = torch_encoder(config, encoder_tensors(config)), tiny_tokens(config)
        (hidden, logits), rounding = rounded(model, tokens)
        write(name, hidden=hidden[:, ::6].tolist(), logits=logits.tolist(), rounding=rounding)
    tokens = np.array([minilm.tokenizer(SENTENCE).input_ids])
    model = torch_encoder(minilm.config, dict(minilm.tensors))
    (hidden, pooled), rounding = rounded(model, tokens)
    few = hidden[0][list(POSITIONS)][:, ::4]
    write(
        "minilm", tokens=tokens[0].tolist(), hidden=few.tolist(), pooled=pooled[0].tolist(), rounding=rounding
    )


def rounded(model, tokens: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Outputs of a torch encoder, and their largest error against float64, into which it is turned."""
    outputs = torch_outputs(model, tokens)
    exact = torch_outputs(model.double(), tokens)
    return outputs, max(float(np.abs(a - b).max()) for a, b in zip(exact, outputs, strict=True))


def main() -> None:
    """Write the files of logits beside this one."""
    from bnlora.data.assets import fetch_gemma3, fetch_minilm, fetch_smollm2
    from bnlora.models.loading import read_checkpoint

    for name, config in ALL.items():
        tensors = tiny_tensors(config) if name in CONFIGS else family_tensors(config)
        model, tokens = torch_model(config, tensors), tiny_tokens(config)
        logits = torch_logits(model, tokens)
        write(name, logits=logits[:, ::4].tolist(), rounding=torch_rounding(model, tokens, logits))
    write_encoders(read_checkpoint(fetch_minilm()))
    for name, fetch in (("smollm2", fetch_smollm2), ("gemma3-270m", fetch_gemma3)):
        checkpoint = read_checkpoint(fetch())
        tokens = np.array([checkpoint.tokenizer(SENTENCE).input_ids])
        model = torch_model(checkpoint.config, dict(checkpoint.tensors))
        logits = torch_logits(model, tokens)
        rounding = torch_rounding(model, tokens, logits)
        write(name, tokens=tokens[0].tolist(), logits=pick(logits).tolist(), rounding=rounding)


if __name__ == "__main__":
    main()
