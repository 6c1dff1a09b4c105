"""A random BERT on disk, with a tokenizer that adds [CLS] and [SEP], as sentence encoders are stored."""

import json
from pathlib import Path

import numpy as np
from builders.families import reference
from safetensors.numpy import save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WORDS = "[PAD] [UNK] [CLS] [SEP] the plot is good film was bad a very dull fine story".split()


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens between [CLS] and [SEP]; like that of MiniLM, it cuts and pads rows by itself."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    backend.enable_truncation(6)
    backend.enable_padding(length=6)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **names)


def write_encoder(folder: Path, architecture: str = "BertModel") -> Path:
    """Write the folder: a body with its pooling layer, or a classifier of "bad" and "good"."""
    config = reference.ENCODERS["bert"] | {"vocab_size": len(WORDS), "id2label": {"0": "bad", "1": "good"}}
    tensors = reference.encoder_tensors(config)
    if architecture == "BertModel":
        tensors = {n.removeprefix("bert."): x for n, x in tensors.items() if not n.startswith("classifier")}
        del config["id2label"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    encoder_tokenizer().save_pretrained(folder)
    return folder
