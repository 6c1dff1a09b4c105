"""Sizes and constants of decoder-only language models, and the keys of config.json that they all share.

A layer has num_heads query heads of width head_dim. Groups of num_heads / num_kv_heads query heads share a
key and a value head. The defaults are those of Llama; other families change a few of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bnlora._util.checks import brief, check_option, check_positive, check_size
from bnlora.models.rotary import Scaling, rotary_settings

Activation = Literal["silu", "gelu", "gelu_tanh"]
Norm = Literal["rms", "layer"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Names of the activations in config.json."""

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LONGEST_CYCLE = 1000
"""Largest number of layers after which a pattern of local layers repeats."""

SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Window:
    """Local attention: queries of some layers attend to near keys only.

    Attributes:
        length: Number of positions that a query attends to, itself included.
        cycle: Whether each layer is local; repeated over the layers.
        rope_theta: Rotary base of the local layers, or None if it is that of the others.
    """

    length: int
    cycle: tuple[bool, ...] = (True,)
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for impossible numbers."""
        check_size({"the length of the window": self.length, "the cycle of the window": len(self.cycle)})
        if self.rope_theta is not None:
            check_positive({"rope_theta of the window": self.rope_theta})

    def is_local(self, num_layers: int) -> tuple[bool, ...]:
        """Whether each layer is local."""
        return tuple(self.cycle[i % len(self.cycle)] for i in range(num_layers))


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder-only language model.

    Attributes:
        vocab_size: Rows of the embedding.
        d_model: Width of the residual stream.
        d_ff: Width inside the feed-forward part.
        num_layers: Number of layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides num_heads.
        head_dim: Width of one head.
        rope_theta: Base of the rotary frequencies; None for learned positions.
        norm_eps: Added to the mean square (or variance) in every norm.
        tied: Whether the output layer is the embedding.
        max_length: Longest sequence the model was trained for; with learned positions, their number.
        rope_scaling: Stretching of the rotary angles, or None.
        activation: Activation of the feed-forward part.
        gated: Whether the feed-forward part has a gate.
        norm: "rms" divides by the root mean square; "layer" also subtracts the mean and adds a bias.
        biased: Dense modules with a bias.
        qk_norm: Whether queries and keys are normalised, by head.
        post_norms: Whether the outputs of attention and feed-forward part are normalised too.
        embed_scale: Factor of the embedding.
        query_scale: Factor of the attention scores; None for head_dim^(-1/2).
        attention_cap: Soft cap of the attention scores, or None.
        logit_cap: Soft cap of the logits, or None.
        window: Layers with local attention, or None.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None = 10000.0
    norm_eps: float = 1e-6
    tied: bool = False
    max_length: int = 2048
    rope_scaling: Scaling | None = None
    activation: Activation = "silu"
    gated: bool = True
    norm: Norm = "rms"
    biased: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for impossible numbers, and for heads that cannot be grouped or rotated."""
        sizes = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_size({name: getattr(self, name) for name in (*sizes, "max_length")})
        check_positive({"norm_eps": self.norm_eps, "embed_scale": self.embed_scale})
        given = ("rope_theta", "query_scale", "attention_cap", "logit_cap")
        check_positive({n: getattr(self, n) for n in given if getattr(self, n) is not None})
        check_option("activation", self.activation, get_args(Activation))
        check_option("norm", self.norm, get_args(Norm))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding; got {self.head_dim}")

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of every adaptable module: the dense ones of a layer, then "lm_head"."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        gate = {"gate_proj": (self.d_model, self.d_ff)} if self.gated else {}
        return {
            "q_proj": (self.d_model, query),
            "k_proj": (self.d_model, key),
            "v_proj": (self.d_model, key),
            "o_proj": (query, self.d_model),
            **gate,
            "up_proj": (self.d_model, self.d_ff),
            "down_proj": (self.d_ff, self.d_model),
            "lm_head": (self.d_model, self.vocab_size),
        }

    @property
    def layer_modules(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the dense modules of a layer."""
        return {name: shape for name, shape in self.modules.items() if name != "lm_head"}

    @property
    def vectors(self) -> dict[str, int]:
        """Length of every vector of a layer: gains of norms, then biases."""
        norms = ["attention_norm", "mlp_norm"]
        norms += ["attention_post_norm", "mlp_post_norm"] if self.post_norms else []
        gains = dict.fromkeys(norms, self.d_model)
        gains |= dict.fromkeys(("q_norm", "k_norm"), self.head_dim) if self.qk_norm else {}
        shifts = {f"{name}_bias": size for name, size in gains.items()} if self.norm == "layer" else {}
        return gains | shifts | {f"{name}_bias": self.modules[name][1] for name in self.biased}


def read_sizes(config: Mapping[str, Any], *, activations: Sequence[str] = ("silu",)) -> dict[str, Any]:
    """Read the keys of a config.json that most families share.

    Args:
        config: The parsed config.json; absent optional keys get the defaults of transformers.
        activations: The supported activations, in the names of config.json; the first is the default.

    Returns:
        Arguments of `DecoderConfig`.

    Raises:
        ValueError: If required keys are missing (all are named), a value has the wrong type or is impossible,
            or the model needs an unsupported feature (another activation, another kind of rotary scaling,
            quantised weights).
    """
    known = known_keys(config, REQUIRED)
    stated = known.get("hidden_act", known.get("hidden_activation", activations[0]))
    if not isinstance(stated, str) or stated not in activations:
        raise ValueError(f"the activation {brief(stated)} is not supported here; supported: {[*activations]}")
    check_size({f"{key} in the model configuration": known[key] for key in SIZES if key in known})
    eps, heads = known.get("rms_norm_eps", 1e-6), known["num_attention_heads"]
    check_positive({"rms_norm_eps in the model configuration": eps})
    rope_theta, rope_scaling = rotary_settings(known)
    return {
        "vocab_size": known["vocab_size"],
        "d_model": known["hidden_size"],
        "d_ff": known["intermediate_size"],
        "num_layers": known["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": known.get("num_key_value_heads", heads),
        "head_dim": known.get("head_dim", known["hidden_size"] // heads),
        "rope_theta": rope_theta,
        "norm_eps": float(eps),
        "tied": flag(known, "tie_word_embeddings"),
        "max_length": known.get("max_position_embeddings", 2048),
        "rope_scaling": rope_scaling,
        "activation": ACTIVATIONS[stated],
    }


def known_keys(config: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """The keys that have a value, checked for missing ones and for quantised weights."""
    known = {key: value for key, value in config.items() if value is not None}
    missing = [key for key in required if key not in known]
    if missing:
        raise ValueError(f"the model configuration lacks the keys {missing}")
    quantised = [key for key in ("quantization_config", "compression_config") if known.get(key)]
    if quantised:
        # The numbers of quantised tensors have another meaning, even if they are stored as floats.
        raise ValueError(
            f"quantised weights are not supported here, and the configuration has {quantised[0]!r}; use the "
            "original model, or a GGUF file"
        )
    return known


def flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """A key of config.json that is true or false."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key} in the model configuration must be true or false; got {brief(value)}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    """A key of config.json that is a positive number; `default` where it is absent, None where it is null."""
    value = config.get(key, default)
    if value is not None:
        check_positive({f"{key} in the model configuration": value})
    return None if value is None else float(value)


def refuse(config: Mapping[str, Any], keys: Sequence[str], family: str) -> None:
    """Raise `ValueError` if one of these keys is set, because this library does not support it."""
    stated = [key for key in keys if config.get(key)]
    if stated:
        raise ValueError(
            f"{family} models with {stated[0]!r} are not supported; the configuration sets {stated}"
        )


def local_cycle(config: Mapping[str, Any], default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers are local: from `layer_types` if the configuration has it, else the default."""
    kinds, names = config.get("layer_types"), ("full_attention", "sliding_attention")
    if kinds is None:
        return default
    count = config["num_hidden_layers"]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in names for kind in kinds):
        raise ValueError(
            f"layer_types in the model configuration must be {count} of {list(names)}; got {brief(kinds)}"
        )
    return tuple(kind == names[1] for kind in kinds)


def upper_window(config: Mapping[str, Any]) -> Window | None:
    """The window of Qwen: in the layers from `max_window_layers` on, where `use_sliding_window` is true."""
    length, count = config.get("sliding_window", 4096), config["num_hidden_layers"]
    if not flag(config, "use_sliding_window") or length is None:
        return None
    full = config.get("max_window_layers", 28)
    check_size({"max_window_layers in the model configuration": full}, least=0)
    if min(full, count) > LONGEST_CYCLE:
        raise ValueError(f"max_window_layers must be at most {LONGEST_CYCLE}; got {full}")
    below = min(full, count)
    return Window(length, local_cycle(config, (False,) * below + (True,) * min(count - below, LONGEST_CYCLE)))
