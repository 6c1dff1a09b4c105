"""Sizes and constants of encoders with a classification head, and the keys of config.json that they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bnlora._util.checks import brief, check_option, check_positive, check_size
from bnlora.models.decoder_config import ACTIVATIONS, REQUIRED, Activation, known_keys, refuse

Pooling = Literal["pooler", "first", "mean"]
"""What the output layer reads: a dense layer with tanh of the first token, that token, or the mean of all."""

_SIZES = (*REQUIRED, "max_position_embeddings", "type_vocab_size")


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of an encoder with a classification head.

    Attributes:
        vocab_size: Rows of the embedding.
        d_model: Width of the residual stream.
        d_ff: Width inside the feed-forward part.
        num_layers: Number of layers.
        num_heads: Attention heads; divides d_model.
        num_labels: Outputs of the classification head.
        norm_eps: Added to the variance in every norm.
        max_length: Number of learned positions, which is the longest row.
        activation: Activation of the feed-forward part.
        pooling: What the output layer reads.
        new_head: Whether the checkpoint has no output layer, so that it is new and zero.
        label_names: Names of the outputs, where the checkpoint states them.
        segments: Rows of the checkpoint's table of segments, of which the first is used.
        position_offset: Rows of the checkpoint's table of positions before that of the first token.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_labels: int
    norm_eps: float = 1e-12
    max_length: int = 512
    activation: Activation = "gelu"
    pooling: Pooling = "pooler"
    new_head: bool = False
    label_names: tuple[str, ...] = ()
    segments: int = 2
    position_offset: int = 0

    def __post_init__(self) -> None:
        """Raise `ValueError` for impossible numbers."""
        sizes = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_labels", "max_length")
        check_size({name: getattr(self, name) for name in (*sizes, "segments")})
        check_size({"position_offset": self.position_offset}, least=0)
        check_positive({"norm_eps": self.norm_eps})
        check_option("activation", self.activation, get_args(Activation))
        check_option("pooling", self.pooling, get_args(Pooling))
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads; got {self.d_model} and {self.num_heads}"
            )

    @property
    def pooled(self) -> bool:
        """Whether a dense layer with tanh stands before the output layer."""
        return self.pooling == "pooler"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of every adaptable module: the dense ones of a layer, then the output layer."""
        return {**self.layer_modules, "lm_head": (self.d_model, self.num_labels)}

    @property
    def layer_modules(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the dense modules of a layer."""
        square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (self.d_model, self.d_model))
        return {**square, "up_proj": (self.d_model, self.d_ff), "down_proj": (self.d_ff, self.d_model)}

    @property
    def vectors(self) -> dict[str, int]:
        """Length of every vector of a layer: gains and biases of norms, then biases of dense modules."""
        norms = ("attention_norm", "attention_norm_bias", "mlp_norm", "mlp_norm_bias")
        biases = {f"{name}_bias": shape[1] for name, shape in self.layer_modules.items()}
        return dict.fromkeys(norms, self.d_model) | biases


def read_encoder(
    config: Mapping[str, Any], name: str, *, classifier: str, num_labels: int | None, offset: int = 0
) -> EncoderConfig:
    """Read the keys of a config.json that all families of encoders have.

    Args:
        config: The parsed config.json; absent optional keys get the defaults of transformers.
        name: Name of the family, for messages.
        classifier: Its class with a classification head.
        num_labels: Outputs of the head, if the checkpoint has none.
        offset: Rows of the table of positions before that of the first token.

    Returns:
        The configuration, with a pooling layer.

    Raises:
        ValueError: If keys are missing or wrong, the model needs an unsupported feature, the checkpoint has
            no head and `num_labels` is None, or `num_labels` is not that of the head which it has.
    """
    refuse(config, ("is_decoder", "add_cross_attention", "pruned_heads"), name)
    known = known_keys(config, REQUIRED)
    positions = known.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(f"{name} models must have absolute positions; got {brief(positions)}")
    check_size({f"{key} in the model configuration": known[key] for key in _SIZES if key in known})
    stated, eps = known.get("hidden_act", "gelu"), known.get("layer_norm_eps", 1e-12)
    if not isinstance(stated, str) or stated not in ACTIVATIONS:
        raise ValueError(f"the activation {brief(stated)} is not supported here; supported: {[*ACTIVATIONS]}")
    check_positive({"layer_norm_eps in the model configuration": eps})
    length = known.get("max_position_embeddings", 512) - offset
    check_size({"max_position_embeddings without the rows before the first token": length})
    is_classifier = classifier in (known.get("architectures") or ())
    return EncoderConfig(
        vocab_size=known["vocab_size"],
        d_model=known["hidden_size"],
        d_ff=known["intermediate_size"],
        num_layers=known["num_hidden_layers"],
        num_heads=known["num_attention_heads"],
        num_labels=_num_labels(known, classifier, num_labels, is_classifier=is_classifier),
        norm_eps=float(eps),
        max_length=length,
        activation=ACTIVATIONS[stated],
        new_head=not is_classifier,
        label_names=_label_names(known) if is_classifier else (),
        segments=known.get("type_vocab_size", 2),
        position_offset=offset,
    )


def _num_labels(
    config: Mapping[str, Any], classifier: str, wanted: int | None, *, is_classifier: bool
) -> int:
    """Outputs of the head: those of the checkpoint's, or as requested for a new one."""
    if wanted is not None:
        check_size({"num_labels": wanted})
    if not is_classifier:
        if wanted is None:
            stated = config.get("architectures") or config.get("model_type")
            raise ValueError(
                f"the checkpoint {brief(stated)} has no classification head; give the "
                f"number of classes of a new one, as in bl.load(..., num_labels=2), or load a {classifier}"
            )
        return wanted
    names = config.get("id2label")
    own = len(names) if isinstance(names, Mapping) and names else config.get("num_labels", 2)
    if wanted is not None and wanted != own:
        raise ValueError(
            f"num_labels must be omitted or {own}, the outputs of the classification head that the "
            f"checkpoint has; got {wanted}"
        )
    return own


def _label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the outputs; empty if they are only numbered."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return ()
    by_number = {str(number): name for number, name in names.items()}
    ordered = tuple(str(by_number.get(str(i), "")) for i in range(len(names)))
    numbered = tuple(f"LABEL_{i}" for i in range(len(names)))
    return () if ordered == numbered or "" in ordered else ordered
