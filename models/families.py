"""The supported families of language models: which one a configuration names, and how it is built."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

from bnlora._util.checks import brief
from bnlora.models import bert, gemma2, gemma3, gpt2, llama, mistral, phi3, qwen2, qwen3, roberta
from bnlora.models.decoder import Decoder
from bnlora.models.decoder_checkpoint import build_decoder
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.encoder import Encoder
from bnlora.models.encoder_checkpoint import EncoderFamily, build_encoder
from bnlora.models.encoder_config import Pooling
from bnlora.models.loading import Checkpoint
from bnlora.models.storage import Storage
from bnlora.models.tensors import KeyMap


class Family(Protocol):
    """What the module of a family of decoders has.

    Attributes:
        ARCHITECTURE: The class of transformers, as config.json names it.
    """

    ARCHITECTURE: str

    def read_config(self, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the keys of a config.json."""
        ...

    def keys(self, config: DecoderConfig) -> KeyMap:
        """Where the weights are in a checkpoint."""
        ...


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": cast(Family, llama),
        "mistral": cast(Family, mistral),
        "qwen2": cast(Family, qwen2),
        "qwen3": cast(Family, qwen3),
        "gemma2": cast(Family, gemma2),
        "gemma3_text": cast(Family, gemma3),
        "phi3": cast(Family, phi3),
        "gpt2": cast(Family, gpt2),
    }
)
"""Families of decoders by the `model_type` of config.json."""

ENCODERS: Mapping[str, EncoderFamily] = MappingProxyType(
    {"bert": cast(EncoderFamily, bert), "roberta": cast(EncoderFamily, roberta)}
)
"""Families of encoders by the `model_type` of config.json."""

_CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: (family.ARCHITECTURE,) for name, family in FAMILIES.items()}
    | {name: (family.ARCHITECTURE, *family.BODIES) for name, family in ENCODERS.items()}
)
"""Classes of transformers by family."""


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a configuration, a key of `FAMILIES` or `ENCODERS`.

    Raises:
        ValueError: If it is not supported.
    """
    # Fine-tuned classifiers keep the model type of their language model, so use the class name first.
    stated = config.get("architectures")
    stated = [config.get("model_type")] if stated is None else stated
    if not isinstance(stated, list) or not stated:
        raise ValueError(
            f"architectures in the model configuration must be a non-empty list; got {brief(stated)}"
        )
    for name, classes in _CLASSES.items():
        if set(classes) & set(map(str, stated)) or stated == [name]:
            return name
    supported = [name for classes in _CLASSES.values() for name in classes]
    raise ValueError(f"the architecture {brief(stated)} is not supported; supported: {supported}")


def build(
    checkpoint: Checkpoint,
    storage: Storage = "float32",
    *,
    num_labels: int | None = None,
    pooling: Pooling | None = None,
) -> Decoder | Encoder:
    """Build the model of a checkpoint.

    Args:
        checkpoint: Configuration and tensors.
        storage: Type of the kernels and tables in memory.
        num_labels: Outputs of a new classification head, for an encoder whose checkpoint has none.
        pooling: What that head reads.

    Raises:
        ValueError: If its family or a feature is not supported, its tensors do not fit its configuration, or
            `num_labels` or `pooling` does not fit the checkpoint.
    """
    name = family_of(checkpoint.config)
    if name in ENCODERS:
        if storage != "float32":
            raise ValueError(f"the weights of an encoder ({name}) must be float32; got {storage!r}")
        return build_encoder(checkpoint, ENCODERS[name], num_labels, pooling)
    for option, value in (("num_labels", num_labels), ("pooling", pooling)):
        if value is not None:
            raise ValueError(
                f"{option} is for encoders ({', '.join(ENCODERS)}); a {name} model has a language-model head "
                f"already: omit it; got {value!r}"
            )
    family = FAMILIES[name]
    config = family.read_config(checkpoint.config)
    return build_decoder(checkpoint, config, family.keys(config), storage)
