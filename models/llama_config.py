"""Sizes and constants of the Llama family, from a Hugging Face configuration.

A layer has num_heads query heads of width head_dim. Groups of num_heads / num_kv_heads query heads share a
key and a value head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from bnlora._util.checks import brief, check_positive, check_size
from bnlora.models import layers

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama model.

    Attributes:
        vocab_size: Rows of the embedding.
        d_model: Width of the residual stream.
        d_ff: Width inside the feed-forward part.
        num_layers: Number of layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides num_heads.
        head_dim: Width of one head.
        rope_theta: Base of the rotary frequencies.
        rms_eps: Added to the mean square in every RMSNorm.
        tied: Whether the output layer is the embedding.
        max_length: Longest sequence the model was trained for.
        rope_scaling: Llama 3 stretching of the rotary angles, or None.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6
    tied: bool = False
    max_length: int = 2048
    rope_scaling: layers.Llama3Scaling | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for impossible numbers, and for heads that cannot be grouped or rotated."""
        sizes = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_size({name: getattr(self, name) for name in (*sizes, "max_length")})
        check_positive({"rope_theta": self.rope_theta, "rms_eps": self.rms_eps})
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding; got {self.head_dim}")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a Hugging Face config.json.

        Args:
            config: The parsed config.json; absent optional keys get the defaults of transformers.

        Returns:
            The configuration.

        Raises:
            ValueError: If required keys are missing (all are named), a value has the wrong type or is
                impossible, or the model needs an unsupported feature (biases, another activation, another
                kind of rotary scaling, quantised weights).
        """
        known = {key: value for key, value in config.items() if value is not None}
        missing = [key for key in _REQUIRED if key not in known]
        if missing:
            raise ValueError(f"the model configuration lacks the keys {missing}")
        _check_supported(known)
        check_size({f"{key} in the model configuration": known[key] for key in _SIZES if key in known})
        eps, tied = known.get("rms_norm_eps", 1e-6), known.get("tie_word_embeddings", False)
        check_positive({"rms_norm_eps in the model configuration": eps})
        if not isinstance(tied, bool):
            raise ValueError(
                f"tie_word_embeddings in the model configuration must be true or false; got {brief(tied)}"
            )
        heads = known["num_attention_heads"]
        rope_theta, rope_scaling = layers.rotary_settings(known)
        return cls(
            vocab_size=known["vocab_size"],
            d_model=known["hidden_size"],
            d_ff=known["intermediate_size"],
            num_layers=known["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=known.get("num_key_value_heads", heads),
            head_dim=known.get("head_dim", known["hidden_size"] // heads),
            rope_theta=rope_theta,
            rms_eps=float(eps),
            tied=tied,
            max_length=known.get("max_position_embeddings", 2048),
            rope_scaling=rope_scaling,
        )


def _check_supported(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"the activation {brief(config['hidden_act'])} is not supported in Llama models, only 'silu'"
        )
    biased = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if biased:
        raise ValueError(f"Llama models with biases are not supported; the configuration sets {biased}")
    quantised = [key for key in ("quantization_config", "compression_config") if config.get(key)]
    if quantised:
        # The numbers of quantised tensors have another meaning, even if they are stored as floats.
        raise ValueError(
            f"quantised weights are not supported here, and the configuration has {quantised[0]!r}; use the "
            "original model, or a GGUF file"
        )
