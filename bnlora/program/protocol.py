"""The members that base models and classifiers must have, for type checkers."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, Self, runtime_checkable

from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from bnlora._util.typing import Adapters
from bnlora.adapters.sites import Sites
from bnlora.data.batch import Batch
from bnlora.priors import Prior
from bnlora.program.likelihoods import Likelihood
from bnlora.program.trunk import Trunk


@runtime_checkable
class LanguageModel(Protocol):
    """A base model: frozen weights and a module to bind them to."""

    @property
    def weights(self) -> Any:
        """The frozen weights, a pytree."""
        ...

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of devices that the weights are on, or None if they are on one device."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the embedding has a row for."""
        ...

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """`{module: (d_in, d_out)}` of the modules of one layer and the head."""
        ...

    def bind(self, weights: Any) -> Any:
        """The module with these weights: `embed`, `blocks` (all positions, or some), `inputs` and `head`."""
        ...


@runtime_checkable
class Program(Protocol):
    """A NumPyro model whose prior is a separate program."""

    @property
    def prior(self) -> Callable[..., Any]:
        """The prior, which samples every latent site."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        ...


@runtime_checkable
class BoundPrior(Protocol):
    """A prior program with its sites."""

    @property
    def program(self) -> Prior:
        """The program, a function of the sites."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Adapters:
        """Run the prior."""
        ...


@runtime_checkable
class Model(Program, Protocol):
    """A classifier: `bl.Classifier`, `bl.Tangent`, or your own class with the same members."""

    @property
    def prior(self) -> BoundPrior:
        """The prior over the adapters of the sites."""
        ...

    @property
    def base(self) -> LanguageModel:
        """The base model."""
        ...

    @property
    def sites(self) -> Sites:
        """The sites of the adapters."""
        ...

    @property
    def likelihood(self) -> Likelihood:
        """How the logits of the classes are read."""
        ...

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token id of each class's label word, if the classes are words."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the outcome of a row is not a class."""
        ...

    @property
    def kind(self) -> Literal["network", "tangent"]:
        """Whether draws of the adapters run through the network or its tangent."""
        ...

    @property
    def trunk(self) -> Trunk:
        """The part of the model that no draw changes."""
        ...

    @property
    def first_layer(self) -> int:
        """The lowest layer that a draw changes."""
        ...

    @property
    def moving(self) -> tuple[str, ...]:
        """Families whose adapters differ from draw to draw."""
        ...

    @property
    def fixed(self) -> Mapping[str, Array]:
        """Value of every fixed site, by name."""
        ...

    def check_tokens(self, batch: Batch) -> None:
        """Raise `ValueError` if a token of the rows is outside the base's vocabulary."""
        ...

    def check_outcomes(self, name: str, batch: Batch) -> None:
        """Raise `ValueError` unless every row has an outcome of the likelihood."""
        ...

    def is_prepared(self, batch: Batch) -> bool:
        """Whether the batch has the activations that no draw changes."""
        ...

    def cache_bytes(self, batch: Batch) -> int:
        """Bytes that `prepare` adds to a batch."""
        ...

    def with_prior(self, prior: Prior) -> Self:
        """The same classifier with another prior."""
        ...

    def above(self, trunk: Trunk) -> Self:
        """The same classifier with another trunk."""
        ...

    def prepared(self, weights: Any, batch: Batch) -> Batch:
        """`prepare` with the weights as an argument, for compiled programs."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """The batch with the activations that no draw changes."""
        ...

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Approximate size of the largest array in a program for `shape` = (rows, positions)."""
        ...

    def logits(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n k"]:
        """Logits of each row for one set of adapters."""
        ...

    def outputs(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n m"]:
        """What a prediction keeps of one draw, such as log-probabilities of the classes."""
        ...

    def log_likelihood(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, " n"]:
        """Log-probability of each row's outcome, in nats."""
        ...

    def outputs_by_draw(
        self, weights: Any, adapters: Adapters, batch: Batch, together: int = 1
    ) -> Float[Array, "s n m"]:
        """`outputs` of each draw of the adapters."""
        ...

    def compiled_outputs(self, adapters: Any, count: int, batch: Batch, together: int = 1) -> Array:
        """`outputs_by_draw` of the first `count` draws, by a compiled program that all callers share."""
        ...
