"""RoBERTa: BERT with other positions, and with the dense layer before the classifier in its head."""

from collections.abc import Mapping
from typing import Any

from bnlora._util.checks import check_size
from bnlora.models.encoder_checkpoint import encoder_keys
from bnlora.models.encoder_config import EncoderConfig, read_encoder
from bnlora.models.tensors import KeyMap

ARCHITECTURE = "RobertaForSequenceClassification"
BODIES = ("RobertaModel", "RobertaForMaskedLM")
PREFIX = "roberta."


def read_config(config: Mapping[str, Any], num_labels: int | None = None) -> EncoderConfig:
    """Read a config.json.

    Args:
        config: The parsed config.json.
        num_labels: Outputs of the head, if the checkpoint has none.

    Raises:
        ValueError: If keys are missing or wrong, the model needs an unsupported feature, or `num_labels` does
            not fit the checkpoint.
    """
    padding = config.get("pad_token_id")
    padding = 1 if padding is None else padding
    check_size({"pad_token_id in the model configuration": padding}, least=0)
    # The table of positions begins with rows up to that of the padding token, which no real token has.
    return read_encoder(config, "RoBERTa", classifier=ARCHITECTURE, num_labels=num_labels, offset=padding + 1)


def keys(config: EncoderConfig) -> KeyMap:
    """The key map of names without "roberta." in front."""
    if config.new_head:
        return encoder_keys(config, pooler="pooler.dense", head="", heads=r"lm_head\..*")
    # The pooling layer of the body is not read by the classifier, which has its own.
    return encoder_keys(
        config, pooler="classifier.dense", head="classifier.out_proj", heads=r"pooler\.dense\..*"
    )
