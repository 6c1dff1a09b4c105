"""The frozen model: a Flax module split into its graph and its weights.

The weights are a pytree. Pass them to jitted functions as an argument; a closure would make them constants of
the compiled program.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

import jax
from flax import nnx
from jax.sharding import Mesh

from bnlora._util.checks import check_key, check_option, check_positive
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora.data.batch import unknown_token
from bnlora.models.decoder import Decoder
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.decoder_storage import abstract, converted, num_bytes, num_weights, storage_of
from bnlora.models.encoder import Encoder
from bnlora.models.encoder_config import EncoderConfig, Pooling
from bnlora.models.execution import DEFAULT, Execution
from bnlora.models.families import build, family_of
from bnlora.models.loading import read_checkpoint
from bnlora.models.random_weights import random_decoder, random_encoder
from bnlora.models.sharding import Split, mesh_of, placed
from bnlora.models.storage import Storage


@dataclass(frozen=True, repr=False, eq=False)
class Base(Shown):
    """A pretrained model with frozen weights.

    Attributes:
        name: Name of the model, for reports.
        family: Key of `FAMILIES` or `ENCODERS` in `bnlora.models.families`.
        config: Sizes and constants.
        graph: Structure of the Flax module.
        weights: Frozen weights; always pass them as an argument of jitted functions.
        tokenizer: A transformers tokenizer, or None.

    Example:
        >>> base.num_layers, list(base.modules)[:2]
        (2, ['q_proj', 'k_proj'])
    """

    name: str
    family: str
    config: DecoderConfig | EncoderConfig
    graph: nnx.GraphDef
    weights: nnx.State
    tokenizer: Any = None

    @classmethod
    def from_module(
        cls, module: Decoder | Encoder, *, name: str, family: str = "llama", tokenizer: Any = None
    ) -> Self:
        """Split a Flax module into graph and weights."""
        graph, weights = nnx.split(module)
        return cls(name, family, module.config, graph, weights, tokenizer)

    @classmethod
    def random(cls, key: jax.Array, config: DecoderConfig | EncoderConfig, *, tokenizer: Any = None) -> Self:
        """Make a model with random weights, for tests and dry runs.

        Args:
            key: Random key.
            config: Sizes and constants of a decoder (Llama) or of an encoder (BERT).
            tokenizer: A transformers tokenizer, or None.

        Returns:
            A base whose activations have a scale of order one for every width.
        """
        key = check_key(key)
        if isinstance(config, EncoderConfig):
            encoder = random_encoder(key, config)
            return cls.from_module(encoder, name="random", family="bert", tokenizer=tokenizer)
        return cls.from_module(random_decoder(key, config), name="random", tokenizer=tokenizer)

    @classmethod
    def abstract(cls, config: DecoderConfig, *, weights: Storage = "float32") -> Self:
        """Make a model without numbers, for `bnlora.select` and `bnlora.estimate`: it takes no memory.

        Args:
            config: Sizes and constants.
            weights: Type of the frozen weights, as in `bnlora.load`.

        Returns:
            A base whose weights are shapes; it cannot run.

        Raises:
            ValueError: If the type of the weights is unknown.
        """
        check_option("weights", weights, get_args(Storage))
        return cls.from_module(abstract(config, weights), name="abstract")

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # frozen: a copy of a fit must not double the memory of the weights

    @property
    def module(self) -> Decoder | Encoder:
        """The Flax module with the frozen weights."""
        return self.bind(self.weights)

    def bind(self, weights: nnx.State) -> Decoder | Encoder:
        """Return the Flax module with these weights, for use inside a jitted function."""
        # New variables around the same arrays: changes of the module do not affect the base.
        return nnx.merge(self.graph, weights, copy=True)

    @property
    def execution(self) -> Execution:
        """How the model runs."""
        return self.module.execution

    def running(self, **changes: Any) -> Self:
        """The same model with the same arrays and other execution options.

        Args:
            **changes: Fields of `bnlora.models.execution.Execution`: `implementation` (of the adapted
                product, None for the default), `activations` ("float32" or "bfloat16") and `remat` (what the
                backward pass recomputes: "none", "elementwise", "attention" or "layers"). Other fields are
                unchanged.

        Returns:
            The base with these options.

        Raises:
            ValueError: If a choice is unknown.
        """
        module = self.module
        module.execution = replace(module.execution, **changes)
        return replace(self, graph=nnx.split(module)[0])

    def stored(self, weights: Storage) -> Self:
        """The same model with its frozen weights in another type; what is in memory twice is the caller's.

        Args:
            weights: Type of kernels, embedding and output layer, as in `bnlora.load`, which takes less
                memory than loading first and converting then.

        Returns:
            The base with these weights, rounded where the type is shorter.

        Raises:
            ValueError: If the type is unknown, or the weights are quantised already.
        """
        check_option("weights", weights, get_args(Storage))
        graph, arrays = nnx.split(converted(self.module, weights))
        return replace(self, graph=graph, weights=arrays)

    def on(self, mesh: Mesh, *, split: Split = "tensor") -> Self:
        """The same model with its weights on the devices of a mesh; what is in memory twice is the caller's.

        Models over this base run on all of its devices: rows of a batch along "data", layers along "model",
        draws of a prediction and chains along "draw" (`bnlora.models.sharding`). The shapes of an abstract
        base receive their place, so that programs of large models can be compiled without their weights.

        Args:
            mesh: Mesh of devices, from `bnlora.mesh`.
            split: "tensor" splits weights over the axis "model" only, so that rows along "data" need no
                exchange of weights; "fully" splits them over "data" too, and every layer is gathered when it
                runs.

        Returns:
            The base on these devices.

        Raises:
            ValueError: If `split` is unknown.

        Example:
            >>> base.on(bl.mesh(data=1)).num_layers
            2
        """
        return replace(self, weights=placed(self.weights, mesh, split))

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of devices that the weights are on, or None if they are on one device."""
        return mesh_of(self.weights)

    @property
    def storage(self) -> Storage:
        """Type of the frozen weights in memory, as in `bnlora.load`."""
        return storage_of(self.module)

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """(d_in, d_out) of every adaptable module, including "lm_head"."""
        return MappingProxyType(self.config.modules)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.config.num_layers

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the embedding has a row for."""
        return self.config.vocab_size

    @property
    def is_encoder(self) -> bool:
        """Whether it is an encoder with a classification head, and not a language model."""
        return isinstance(self.config, EncoderConfig)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Sizes, execution options, and adaptable modules."""
        count, size = num_weights(self.weights), num_bytes(self.weights)
        running = ", ".join(f"{name}={value!r}" for name, value in sorted(self._changes.items()))
        tokenizer = "none" if self.tokenizer is None else f"{len(self.tokenizer):,} tokens"
        sizes = {
            "family": self.family,
            "layers": str(self.num_layers),
            "width": str(self.config.d_model),
            "vocabulary": f"{self.config.vocab_size:,}",
            **({"head": _head(self.config)} if isinstance(self.config, EncoderConfig) else {}),
            "tokenizer": tokenizer,
            "parameters": f"{count:,}",
            "weights": f"{self.storage}, {size / count:.3f} bytes per weight",
            "memory": f"{size / 2**20:,.1f} MiB",
            "execution": running or "default",
        }
        rows = tuple((name, str(i), str(o)) for name, (i, o) in self.modules.items())
        return (
            facts(f"Base {self.name}", sizes),
            Table("Modules that can be adapted", ("module", "inputs", "outputs"), rows),
        )

    @property
    def _changes(self) -> dict[str, Any]:
        """Execution options that differ from the default."""
        return dict(asdict(self.execution).items() - asdict(DEFAULT).items())

    def __repr__(self) -> str:
        """One line: name, family, sizes, type of the weights and execution options other than the default."""
        count = num_weights(self.weights)
        running = self._changes if self.storage == "float32" else self._changes | {"weights": self.storage}
        return (
            f"Base({self.name!r}, family={self.family!r}, num_layers={self.num_layers}, "
            f"d_model={self.config.d_model}, vocab_size={self.config.vocab_size}, parameters={count:,}"
            + "".join(f", {name}={value!r}" for name, value in sorted(running.items()))
            + ")"
        )


random_base = Base.random


def _head(config: EncoderConfig) -> str:
    """The classification head, in words."""
    names = f": {', '.join(config.label_names)}" if config.label_names else ""
    new = " (new, zero)" if config.new_head else ""
    return f"{config.num_labels} labels{names}{new}, pooling {config.pooling!r}"


def load(
    source: str | Path,
    *,
    weights: Storage = "float32",
    num_labels: int | None = None,
    pooling: Pooling | None = None,
) -> Base:
    """Load a pretrained language model or encoder with its tokenizer.

    Tensors are read in parts, straight into the arrays of the base, so that loading takes little more memory
    than the base.

    Args:
        source: A `.gguf` file (any part, if it was split), a Hugging Face folder (config.json and
            safetensors), or a hub name "owner/name".
        weights: Type of the frozen kernels, the embedding and the output layer in memory: "float32",
            "bfloat16", "int8" or "4bit" (`bnlora.models.storage`). Norms, biases, adapters and all statistics
            are float32, and a quantised layer becomes float32 while it runs.
        num_labels: Number of classes of a new classification head, for an encoder whose checkpoint has none.
            The head is zero: all classes have the same probability until it is adapted.
        pooling: What that head reads: "pooler" (the checkpoint's dense layer with tanh of the first token),
            "first" (the first token itself) or "mean" (the mean of all tokens, for sentence encoders). By
            default the pooler if the checkpoint has one, else the first token.

    Returns:
        The frozen base.

    Raises:
        FileNotFoundError: If `source` does not exist, or a file of the model is missing.
        ValueError: If the architecture or the type of the weights is not supported, the files are corrupt or
            inconsistent, the embedding has no row for a token of the tokenizer, an encoder has no
            classification head and `num_labels` is missing, or `num_labels` or `pooling` does not fit the
            checkpoint.
        OSError: If the hub cannot be reached.

    Example:
        >>> bl.load(model_folder).num_layers
        3
    """
    check_option("weights", weights, get_args(Storage))
    checkpoint = read_checkpoint(source, accept=family_of)
    family = family_of(checkpoint.config)
    module = build(checkpoint, weights, num_labels=num_labels, pooling=pooling)
    local = Path(source).expanduser()
    name = (local.stem if local.is_file() else local.resolve().name) if local.exists() else str(source)
    name = re.sub(r"-\d{5}-of-\d{5}$", "", name)  # for a split file, the name without the part number
    tokenizer = checkpoint.tokenizer
    _check_vocabulary(tokenizer, module.config.vocab_size)
    check_positive({"model_max_length of the tokenizer": tokenizer.model_max_length})
    # Many tokenizers have no limit; use the length for which the model was trained.
    tokenizer.model_max_length = min(tokenizer.model_max_length, module.config.max_length)
    return Base.from_module(module, name=name, family=family, tokenizer=tokenizer)


def _check_vocabulary(tokenizer: Any, size: int) -> None:
    """Raise `ValueError` if the embedding has no row for a token of the tokenizer.

    The padding token is exempt, because its row is never used: many fine-tuned models add it only to the
    tokenizer.
    """
    ids = set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}
    beyond = [index for index in ids if index >= size]
    if beyond:
        raise ValueError(
            f"the tokenizer has {unknown_token(min(beyond), size, tokenizer)}; resize the embedding, or "
            "load the model with its own tokenizer"
        )
