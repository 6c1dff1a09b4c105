"""The frozen language model: a Flax module split into its graph and its weights.

The weights are a pytree. Pass them to jitted functions as an argument; a closure would make them constants of
the compiled program.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from bnlora._util.checks import brief, check_key, check_positive
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora.data.batch import unknown_token
from bnlora.models import llama
from bnlora.models.execution import DEFAULT, Execution
from bnlora.models.loading import read_checkpoint

# One module per family; each has `ARCHITECTURE`, `build(checkpoint)` and `modules(config)`.
FAMILIES = MappingProxyType({"llama": llama})


@dataclass(frozen=True, repr=False, eq=False)
class Base(Shown):
    """A pretrained model with frozen weights.

    Attributes:
        name: Name of the model, for reports.
        family: Key of `FAMILIES`.
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
    config: llama.LlamaConfig
    graph: nnx.GraphDef
    weights: nnx.State
    tokenizer: Any = None

    @classmethod
    def from_module(
        cls, module: llama.Llama, *, name: str, family: str = "llama", tokenizer: Any = None
    ) -> Self:
        """Split a Flax module into graph and weights."""
        graph, weights = nnx.split(module)
        return cls(name, family, module.config, graph, weights, tokenizer)

    @classmethod
    def random(cls, key: jax.Array, config: llama.LlamaConfig, *, tokenizer: Any = None) -> Self:
        """Make a model with random weights, for tests and dry runs.

        Args:
            key: Random key.
            config: Sizes and constants.
            tokenizer: A transformers tokenizer, or None.

        Returns:
            A base whose activations have a scale of order one for every width.
        """
        key = check_key(key)
        module = llama.Llama(config, **_random_weights(key, config))
        return cls.from_module(module, name="random", tokenizer=tokenizer)

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # frozen: a copy of a fit must not double the memory of the weights

    @property
    def module(self) -> llama.Llama:
        """The Flax module with the frozen weights."""
        return self.bind(self.weights)

    def bind(self, weights: nnx.State) -> llama.Llama:
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

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """(d_in, d_out) of every adaptable module, including "lm_head"."""
        return MappingProxyType(FAMILIES[self.family].modules(self.config))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.config.num_layers

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Sizes, execution options, and adaptable modules."""
        leaves = jax.tree.leaves(self.weights)
        running = ", ".join(f"{name}={value!r}" for name, value in sorted(self._changes.items()))
        tokenizer = "none" if self.tokenizer is None else f"{len(self.tokenizer):,} tokens"
        sizes = {
            "family": self.family,
            "layers": str(self.num_layers),
            "width": str(self.config.d_model),
            "vocabulary": f"{self.config.vocab_size:,}",
            "tokenizer": tokenizer,
            "parameters": f"{sum(leaf.size for leaf in leaves):,}",
            "memory": f"{sum(leaf.nbytes for leaf in leaves) / 2**20:,.1f} MiB",
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
        """One line: name, family, sizes, and execution options that differ from the default."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.weights))
        running = self._changes
        return (
            f"Base({self.name!r}, family={self.family!r}, num_layers={self.num_layers}, "
            f"d_model={self.config.d_model}, vocab_size={self.config.vocab_size}, parameters={count:,}"
            + "".join(f", {name}={value!r}" for name, value in sorted(running.items()))
            + ")"
        )


random_base = Base.random


@partial(jax.jit, static_argnums=1)
def _random_weights(key: jax.Array, config: llama.LlamaConfig) -> dict[str, Any]:
    shapes = llama.modules(config)
    keys = dict(zip([*shapes, "embedding"], jax.random.split(key, len(shapes) + 1), strict=True))
    width, vocab = shapes.pop("lm_head")

    def normal(name: str, *shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(keys[name], shape) * fan_in**-0.5

    dense = {name: normal(name, config.num_layers, i, o, fan_in=i) for name, (i, o) in shapes.items()}
    norms = {name: jnp.ones((config.num_layers, width)) for name in ("attention_norm", "mlp_norm")}
    return {
        "embedding": normal("embedding", vocab, width, fan_in=width),
        "layer_weights": dense | norms,
        "final_norm": jnp.ones(width),
        "lm_head": None if config.tied else normal("lm_head", vocab, width, fan_in=width),
    }


def load(source: str | Path) -> Base:
    """Load a pretrained language model with its tokenizer.

    Args:
        source: A `.gguf` file (any part, if it was split), a Hugging Face folder (config.json and
            safetensors), or a hub name "owner/name".

    Returns:
        The frozen base, in float32.

    Raises:
        FileNotFoundError: If `source` does not exist, or a file of the model is missing.
        ValueError: If the architecture is not supported, the files are corrupt or inconsistent, or the
            embedding has no row for a token of the tokenizer.
        OSError: If the hub cannot be reached.

    Example:
        >>> bl.load(model_folder).num_layers
        3
    """
    checkpoint = read_checkpoint(source, accept=_family)
    family = _family(checkpoint.config)
    module = FAMILIES[family].build(checkpoint)
    local = Path(source).expanduser()
    name = (local.stem if local.is_file() else local.resolve().name) if local.exists() else str(source)
    name = re.sub(r"-\d{5}-of-\d{5}$", "", name)  # for a split file, the name without the part number
    tokenizer = checkpoint.tokenizer
    _check_vocabulary(tokenizer, module.config.vocab_size)
    check_positive({"model_max_length of the tokenizer": tokenizer.model_max_length})
    # Many tokenizers have no limit; use the length for which the model was trained.
    tokenizer.model_max_length = min(tokenizer.model_max_length, module.config.max_length)
    return Base.from_module(module, name=name, family=family, tokenizer=tokenizer)


def _family(config: Mapping[str, Any]) -> str:
    # Fine-tuned classifiers keep the model type of their language model, so use the class name first.
    stated = config.get("architectures")
    stated = [config.get("model_type")] if stated is None else stated
    if not isinstance(stated, list) or not stated:
        raise ValueError(
            f"architectures in the model configuration must be a non-empty list; got {brief(stated)}"
        )
    for name, family in FAMILIES.items():
        if family.ARCHITECTURE in stated or stated == [name]:
            return name
    supported = [family.ARCHITECTURE for family in FAMILIES.values()]
    raise ValueError(f"the architecture {brief(stated)} is not supported; supported: {supported}")


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
