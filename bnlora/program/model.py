r"""The NumPyro model: a prior over adapters and a likelihood read off a frozen language model.

    adapters ~ prior(sites),      y_i | adapters ~ Categorical(softmax(logits_i))

What the logits of the classes are is in `bnlora.program.likelihoods`: those of label words, or the scores of
completions; other likelihoods have other outcomes. The softmax runs over the classes, so the likelihood is
normalised over them, and it is the same for every prior, guide and number of draws. Base weights enter as an
argument: never a parameter, never a closure. The one plate, `"data"`, scales minibatches by N / B.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, Self

import jax
import numpyro
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import check_indices
from bnlora._util.compilation import first_entries, level_for, program
from bnlora._util.display import Showable, Shown, facts
from bnlora._util.typing import Adapters
from bnlora.adapters.sites import HEAD, Sites
from bnlora.data.batch import Batch, CachedActivations, check_tokens
from bnlora.models.sharding import along
from bnlora.priors import Prior
from bnlora.program.adapter_prior import AdapterPrior, parameters_of
from bnlora.program.likelihoods import Likelihood, Upper, Words
from bnlora.program.likelihoods.labels import require_adapted_head
from bnlora.program.protocol import LanguageModel
from bnlora.program.trunk import Trunk


@dataclass(frozen=True)
class Classifier(Shown):
    """A classifier of texts, as a plain NumPyro model `model(weights, batch)`.

    If the head is adapted and the classes are label words, only its label rows enter `sites` and the prior,
    because the likelihood reads no other row. Under a prior that is consistent under leaving rows out, the
    other rows would stay exactly at their prior and change nothing. Under any other prior, such as the sparse
    GP with `lam` below one, the law of the head is defined on the label rows (`Sites.with_head_rows`).

    Args:
        base: The loaded base model.
        sites: Where the adapters are, from `bnlora.select`.
        prior: NumPyro program from sites to adapters.
        label_ids: Token id of each class's word, shape `(class,)`, e.g. `data.label_ids`.
        likelihood: Other classes than words, in place of `label_ids`: `bnlora.likelihoods.Completions` for
            rows of `bnlora.multiple_choice`, `bnlora.likelihoods.Labels` for encoders, or your own.

    Attributes:
        trunk: The part of the network that no draw of the adapters changes.

    Raises:
        ValueError: If there are fewer than two label ids, two are equal, the base has no row for one, the
            sites are those of another base, or not exactly one of `label_ids` and `likelihood` is given.

    Example:
        >>> model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model.prior, key)).get_trace()
        >>> [name for name, site in trace.items() if site["type"] == "sample"]
        ['lm_head.a', 'lm_head.b']
    """

    base: LanguageModel
    sites: Sites
    prior: AdapterPrior
    likelihood: Likelihood
    trunk: Trunk = field(compare=False)  # the prior decides it

    def __init__(
        self,
        base: LanguageModel,
        sites: Sites,
        prior: Prior,
        *,
        label_ids: Int[Any, " c"] | None = None,
        likelihood: Likelihood | None = None,
    ):
        likelihood = chosen_likelihood(label_ids, likelihood)
        likelihood.check(base)
        _check_sites(base, sites)
        read = likelihood.sites(sites)
        for name, value in {
            "base": base,
            "sites": read,
            "prior": AdapterPrior(read, prior, likelihood.parameters),
            "likelihood": likelihood,
            "trunk": Trunk(read, read.first_layer),
        }.items():
            object.__setattr__(self, name, value)

    def over(self, base: LanguageModel) -> Self:
        """The same classifier over a base of the same weights that runs in another way (`Base.running`)."""
        return self._changed(base=base)

    def under(self, prior: Prior) -> Self:
        """The same classifier under another prior, unchecked: for programs in which its scales are traced."""
        return self._changed(prior=AdapterPrior(self.sites, prior, self.likelihood.parameters))

    def above(self, trunk: Trunk) -> Self:
        """The same classifier with another trunk, for priors that hold sites: see `bnlora.condition`."""
        return self._changed(trunk=trunk)

    def _changed(self, **values: Any) -> Self:
        made = object.__new__(type(self))  # the fields of a classifier are not the arguments that make one
        for part in fields(self):
            object.__setattr__(made, part.name, values.get(part.name, getattr(self, part.name)))
        return made

    def with_prior(self, prior: Prior) -> "Classifier":
        """The same classifier under another prior."""
        return Classifier(self.base, self.sites, prior, likelihood=self.likelihood)

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token id of each class's word; empty if the classes are not words of one token."""
        return getattr(self.likelihood, "label_ids", ())

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the outcome of a row is not a class."""
        return self.likelihood.num_classes

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the base has a row for; its tokenizer may have fewer."""
        return self.base.vocab_size

    def check_outcomes(self, name: str, batch: Batch) -> None:
        """Raise `ValueError` unless every row has an outcome of the likelihood; `name` says which rows."""
        self.likelihood.check_outcomes(name, batch)

    def check_tokens(self, batch: Batch) -> None:
        """Raise `ValueError` where the base has no row for a token, or the rows have another form."""
        self.likelihood.check_rows(batch)
        check_tokens(batch.tokens, batch.mask, self.vocabulary, getattr(self.base, "tokenizer", None))

    @property
    def kind(self) -> Literal["network", "tangent"]:
        """What a draw of the adapters goes through: the network, or its tangent at the base."""
        return "network"

    @property
    def first_layer(self) -> int:
        """The lowest layer that a draw changes: that of the lowest adapter that is not fixed."""
        return self.trunk.stop

    @property
    def fixed(self) -> Mapping[str, Array]:
        """Value of every site that is held, by name (`bnlora.condition`)."""
        return self.trunk.fixed

    @property
    def moving(self) -> tuple[str, ...]:
        """Families whose adapters differ from draw to draw."""
        return self.trunk.moving

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Its classes, base and prior, and the adapters."""
        about = {
            **self.likelihood.facts(self.base),
            "base": repr(self.base),
            "prior": _name(self.prior.program),
            "layers below the adapters": str(self.first_layer),
        }
        held = (repr(self.trunk),) if self.fixed else ()
        return (facts(f"Classifier of {self._outcomes}", about), *self.sites.overview, *held)

    @property
    def _outcomes(self) -> str:
        return f"{self.num_classes} classes" if self.num_classes else f"{self.likelihood.outcome}s"

    def __repr__(self) -> str:
        held = f"\n  {self.trunk!r}" if self.fixed else ""
        return f"Classifier({self._outcomes}, {self.base!r})\n{self.sites!r}{held}"

    def __call__(self, weights: Any, batch: Batch, n_total: int | None = None) -> None:
        """Sample adapters and observe labels.

        Args:
            weights: The frozen base weights, `model.base.weights`.
            batch: Rows with labels.
            n_total: Size of the data set that `batch` is a random part of; the likelihood is scaled
                by `n_total / len(batch)`. Omitted, the batch is the whole data set.

        Raises:
            ValueError: When `n_total` is less than the rows; outside a compiled program also when a row has a
                label or a token that the model has not.
        """
        adapters = self.prior()
        self._observe(self.logits(weights, adapters, batch), adapters, batch, n_total)

    def _observe(
        self, logits: Float[Array, "n k"], adapters: Adapters, batch: Batch, n_total: int | None
    ) -> None:
        if not isinstance(batch.labels, jax.core.Tracer):
            self.check_outcomes("given", batch)
        rows = len(batch)
        size = rows if n_total is None else n_total
        if rows > size:
            raise ValueError(f"n_total must be at least the {rows} rows of the batch; got {size}")
        with numpyro.plate("data", size, subsample_size=rows if rows < size else None):
            outcome = self.likelihood.distribution(logits, parameters_of(adapters), batch)
            numpyro.sample("y", outcome, obs=self.likelihood.observed(batch))

    def hidden(self, weights: Any, batch: Batch) -> Float[Array, "n *c t d"]:
        """Activations below the lowest adapted layer: the batch's if cached for this trunk, or computed here.

        Raises:
            ValueError: When they must be computed and only the last position of each row was kept.
        """
        if batch.cached is not None and batch.caches(self.first_layer, self.trunk.checksum):
            return batch.cached.hidden
        self.check_tokens(batch)
        if not batch.whole:
            raise ValueError(
                "these rows keep only their last position, which is too little for this model; give the rows "
                "as they were read"
            )
        return self.trunk.activations(self.base.bind(weights), along(self.base.mesh, "data", batch))

    def prepared(self, weights: Any, batch: Batch) -> Batch:
        """The batch with its activations below the lowest adapted layer, which no draw changes."""
        return self._with_cached(batch, self.hidden(weights, batch))

    def _with_cached(self, batch: Batch, hidden: Float[Array, "n *c t d"]) -> Batch:
        return replace(batch, cached=CachedActivations(hidden, self.first_layer, self.trunk.checksum))

    def logits(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n k"]:
        """Logits of each row, as its likelihood reads them; the last layer runs only where they are read."""
        placed = self.sites.place(adapters, first_layer=self.first_layer)
        head = placed.pop(HEAD, None)
        hidden, mask = along(self.base.mesh, "data", (self.hidden(weights, batch), batch.mask))
        upper = Upper(
            self.base.bind(weights),
            hidden.reshape(-1, *hidden.shape[-2:]),
            mask.reshape(-1, mask.shape[-1]),
            self.base.num_layers,
            self.first_layer,
            placed,
            head,
        )
        return self.likelihood.logits(upper, batch)

    def outputs(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n m"]:
        """What a prediction keeps of one draw (`Likelihood.outputs`): log-probabilities of the classes."""
        return self.likelihood.outputs(self.logits(weights, adapters, batch), parameters_of(adapters))

    def log_likelihood(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, " n"]:
        """Log-probability of each row's outcome, in nats; NaN where a row has no label."""
        return self.likelihood.log_prob(self.outputs(weights, adapters, batch), batch)

    def outputs_by_draw(
        self, weights: Any, adapters: Adapters, batch: Batch, together: int = 1
    ) -> Float[Array, "s n m"]:
        """`outputs` of each draw of the adapters, which have a leading draw axis.

        The part below the adapters runs once for all draws; `together` of them at a time run in one program,
        whose adapted products read a kernel once for all of them.
        """
        prepared = self.prepared(weights, batch)

        def one(draw: Adapters) -> Array:
            return self.outputs(weights, draw, prepared)

        return jax.lax.map(one, adapters, batch_size=together if together > 1 else None)

    def compiled_outputs(self, adapters: Any, count: int, batch: Batch, together: int = 1) -> Array:
        """`outputs_by_draw` of the first `count` of some draws, in a program for all callers.

        Activations that no draw changes must be in the batch already: see `prepare`.
        """
        level = level_for(self.numbers(batch.tokens.shape))
        run = program(self, _outputs_of_piece, level=level, static=(4,))
        return run(self.base.weights, adapters, count, batch, together)

    def is_prepared(self, batch: Batch) -> bool:
        """Whether the batch has what no draw changes, or there is nothing of that kind."""
        return self.first_layer == 0 or batch.caches(self.first_layer, self.trunk.checksum)

    def cache_bytes(self, batch: Batch) -> int:
        """Memory that `prepare` adds to a batch (float32)."""
        return math.prod(batch.tokens.shape) * self.base.modules[HEAD][0] * 4

    def prepare(self, batch: Batch) -> Batch:
        """`prepared` with the model's weights, in one program for all callers; at depth 0 the given rows.

        Raises:
            ValueError: When a row has a token that the base has no row for.
        """
        self.check_tokens(batch)
        if self.is_prepared(batch):
            return batch if self.first_layer else batch.plain
        run = program(self, type(self).hidden, level=level_for(self.numbers(batch.tokens.shape)))
        return self._with_cached(batch, run(self.base.weights, batch.plain))

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Approximate size of the largest array of a program for so many rows and positions."""
        widest = max(max(site.d_in, site.d_out) for site in self.sites.values())
        return max(math.prod(shape) * widest, self.sites.num_parameters)


def kind_of(model: Any) -> str:
    """What draws of the adapters go through, "network" or "tangent"; the former for other programs."""
    return getattr(model, "kind", "network")


def _outputs_of_piece(
    model: Classifier, weights: Any, adapters: Adapters, count: Array, batch: Batch, together: int
) -> Array:
    def one(draw: Adapters, weights: Any, batch: Batch) -> Array:
        return model.outputs(weights, draw, batch)

    place = partial(along, model.base.mesh, "draw") if together > 1 else None
    return first_entries(one, adapters, count, weights, batch, together=together, place=place)


def chosen_likelihood(label_ids: Any, likelihood: Likelihood | None) -> Likelihood:
    """The likelihood of label words, or the given one; `ValueError` unless there is exactly one."""
    if (label_ids is None) == (likelihood is None):
        got = "neither" if likelihood is None else "both"
        raise ValueError(f"give either label_ids, the tokens of label words, or a likelihood; got {got}")
    return Words(label_ids) if likelihood is None else likelihood


def _check_sites(base: LanguageModel, sites: Sites) -> None:
    """Raise `ValueError` unless the base has the modules and layers of the sites."""
    require_adapted_head(base, sites)
    for name, site in sites.items():
        d_in, d_out = base.modules.get(site.module, (0, 0))
        # Sites may have some rows of the head already, as those of another classifier do.
        same = site.d_in == d_in and (site.d_out == d_out or site.module == HEAD)
        if not same or sites.num_layers != base.num_layers:
            raise ValueError(
                f"the sites are those of another base: {name!r} maps {site.d_in} -> {site.d_out} in a model "
                f"of {sites.num_layers} layers, but this base has {d_in} -> {d_out} and {base.num_layers} "
                "layers; select them from this base"
            )
        # A layer beyond the last would be left out in silence.
        check_indices(f"the layers of {name!r}", site.layers, base.num_layers + (site.module == HEAD))


def _name(program: Any) -> str:
    """What the caller wrote to make a prior: the function, or the one that returned it."""
    return getattr(program, "__qualname__", type(program).__name__).split(".<locals>")[0]
