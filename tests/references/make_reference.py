"""Make the committed reference logits with transformers' torch models, as a program.

Two tiny random models (grouped heads with an untied head; Llama 3 rotary scaling with a tied head) and
SmolLM2-135M-Instruct. Weights of the tiny models come from a seeded generator, so only logits are stored.
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
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
    state = {name: torch.tensor(np.array(value)) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config["tie_word_embeddings"] else []
    if missing not in ([], tied) or unexpected:
        raise ValueError(
            f"the tensors do not fill the torch model; missing {missing}, unexpected {unexpected}"
        )
    model.tie_weights()
    return model


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of a torch model, (b, t, vocab)."""
    import torch

    with torch.no_grad():
        attention = None if mask is None else torch.tensor(mask.astype(np.int64))
        return model(torch.tensor(tokens), attention_mask=attention).logits.numpy()


def torch_rounding(model, tokens: np.ndarray, logits: np.ndarray) -> float:
    """Largest error of float32 logits against the same model in float64, which it is turned into."""
    return float(np.abs(torch_logits(model.double(), tokens) - logits).max())


def pick(logits: np.ndarray) -> np.ndarray:
    """The entries of (1, t, vocab) logits that are stored for the large model, (positions, columns)."""
    return logits[0][np.ix_(np.arange(logits.shape[1])[list(POSITIONS)], COLUMNS)]


def write(name: str, **content) -> None:
    """Write one file of logits."""
    (FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    """Write the three files of logits beside this one."""
    from bnlora.data.assets import fetch_smollm2
    from bnlora.models.loading import read_checkpoint

    for name, config in CONFIGS.items():
        model, tokens = torch_model(config, tiny_tensors(config)), tiny_tokens(config)
        logits = torch_logits(model, tokens)
        write(name, logits=logits[:, ::4].tolist(), rounding=torch_rounding(model, tokens, logits))
    checkpoint = read_checkpoint(fetch_smollm2())
    tokens = np.array([checkpoint.tokenizer(SENTENCE).input_ids])
    model = torch_model(checkpoint.config, dict(checkpoint.tensors))
    logits = torch_logits(model, tokens)
    rounding = torch_rounding(model, tokens, logits)
    write("smollm2", tokens=tokens[0].tolist(), logits=pick(logits).tolist(), rounding=rounding)


if __name__ == "__main__":
    main()
