"""BERT, and MiniLM, which is a small one: the pooling layer of the body stands before the classifier."""

from collections.abc import Mapping
from typing import Any

from bnlora.models.encoder_checkpoint import encoder_keys
from bnlora.models.encoder_config import EncoderConfig, read_encoder
from bnlora.models.tensors import KeyMap

ARCHITECTURE = "BertForSequenceClassification"
BODIES = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction")
PREFIX = "bert."


def read_config(config: Mapping[str, Any], num_labels: int | None = None) -> EncoderConfig:
    """Read a config.json.

    Args:
        config: The parsed config.json.
        num_labels: Outputs of the head, if the checkpoint has none.

    Raises:
        ValueError: If keys are missing or wrong, the model needs an unsupported feature, or `num_labels` does
            not fit the checkpoint.
    """
    return read_encoder(config, "BERT", classifier=ARCHITECTURE, num_labels=num_labels)


def keys(config: EncoderConfig) -> KeyMap:
    """The key map of names without "bert." in front."""
    return encoder_keys(config, pooler="pooler.dense", head="classifier", heads=r"cls\..*")
