r"""The NumPyro model: a prior over adapters and a likelihood read off a frozen language model.

    adapters ~ prior(sites),      y_i | adapters ~ Categorical(softmax(logits_i[label tokens]))

The softmax runs over the label tokens alone, so the likelihood is normalised over the classes, and
it is the same for every prior, guide and number of draws. Base weights enter as an argument: never
a parameter, never a closure. Minibatches are scaled by N / B through the one plate, `"data"`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float, Int

from bnlora._util.checks import brief, check_indices
from bnlora._util.compilation import first_entries, program
from bnlora._util.copying import state
from bnlora._util.display import Showable, Shown, facts
from bnlora._util.typing import Adapters
from bnlora.adapters.sites import HEAD, Sites
from bnlora.data.batch import Batch, CachedActivations, check_labels, check_tokens, unknown_token
from bnlora.priors import Prior
from bnlora.program.protocol import LanguageModel
from bnlora.program.trunk import Trunk


@dataclass(frozen=True)
class AdapterPrior:
    """A prior program bound to its sites, callable with the model's arguments (it ignores them).

    Guides are built on this object, so that building one never traces the language model.
    """

    sites: Sites
    program: Prior

    def __call__(self, *args, **kwargs) -> Adapters:
        """Run the prior and return adapters whose families and shapes are checked."""
        adapters = self.program(self.sites)
        if not isinstance(adapters, Mapping):
            raise ValueError(f"a prior must return adapters by family; got {type(adapters).__name__}")
        self.sites.check(adapters)
        return adapters

    def __getstate__(self) -> dict[str, Any]:
        return state(self, "program")


@dataclass(frozen=True)
class Classifier(Shown):
    """A classifier whose classes are label words, as a plain NumPyro model `model(weights, batch)`.

    If the head is adapted, only its label rows enter `sites` and the prior, because the likelihood reads no
    other row. Under a prior that is consistent under leaving rows out, the other rows would stay exactly at
    their prior and change nothing. Under any other prior, such as the sparse GP with `lam` below one, the law
    of the head is defined on the label rows (`Sites.with_head_rows`).

    Args:
        base: The loaded base model.
        sites: Where the adapters are, from `bnlora.select`.
        prior: NumPyro program from sites to adapters.
        label_ids: Token id of each class's word, shape `(class,)`, e.g. `data.label_ids`.

    Attributes:
        trunk: The part of the network that no draw of the adapters changes.

    Raises:
        ValueError: If there are fewer than two label ids, two are equal, the base has no row for one, or the
            sites are those of another base.

    Example:
        >>> model = bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model.prior, key)).get_trace()
        >>> [name for name, site in trace.items() if site["type"] == "sample"]
        ['lm_head.a', 'lm_head.b']
    """

    base: LanguageModel
    sites: Sites
    prior: AdapterPrior
    label_ids: tuple[int, ...]
    trunk: Trunk = field(compare=False)  # the prior decides it

    def __init__(self, base: LanguageModel, sites: Sites, prior: Prior, *, label_ids: Int[Any, " c"]):
        ids = _label_ids(base, label_ids)
        _check_sites(base, sites)
        read = sites.with_head_rows(len(ids))
        for name, value in {
            "base": base,
            "sites": read,
            "prior": AdapterPrior(read, prior),
            "label_ids": ids,
            "trunk": Trunk(read, read.first_layer),
        }.items():
            object.__setattr__(self, name, value)

    def over(self, base: LanguageModel) -> Self:
        """The same classifier over a base of the same weights that runs in another way (`Base.running`)."""
        return self._changed(base=base)

    def under(self, prior: Prior) -> Self:
        """The same classifier under another prior, unchecked: for programs in which its scales are traced."""
        return self._changed(prior=AdapterPrior(self.sites, prior))

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
        return Classifier(self.base, self.sites, prior, label_ids=self.label_ids)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the base has a row for; its tokenizer may have fewer."""
        return self.base.modules[HEAD][1]

    def check_tokens(self, batch: Batch) -> None:
        """Raise `ValueError` where the rows have a token that the base has no row for."""
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
        tokenizer = getattr(self.base, "tokenizer", None)
        named = {} if tokenizer is None else {i: f" {tokenizer.decode([i])!r}" for i in self.label_ids}
        about = {
            "label tokens": ", ".join(f"{i}{named.get(i, '')}" for i in self.label_ids),
            "base": repr(self.base),
            "prior": _name(self.prior.program),
            "layers below the adapters": str(self.first_layer),
        }
        held = (repr(self.trunk),) if self.fixed else ()
        return (facts(f"Classifier of {len(self.label_ids)} classes", about), *self.sites.overview, *held)

    def __repr__(self) -> str:
        held = f"\n  {self.trunk!r}" if self.fixed else ""
        return f"Classifier({len(self.label_ids)} classes, {self.base!r})\n{self.sites!r}{held}"

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
        self._observe(self.logits(weights, self.prior(), batch), batch, n_total)

    def _observe(self, logits: Float[Array, "n c"], batch: Batch, n_total: int | None) -> None:
        if not isinstance(batch.labels, jax.core.Tracer):
            check_labels("given", batch, len(self.label_ids))
        rows = len(batch)
        size = rows if n_total is None else n_total
        if rows > size:
            raise ValueError(f"n_total must be at least the {rows} rows of the batch; got {size}")
        with numpyro.plate("data", size, subsample_size=rows if rows < size else None):
            numpyro.sample("y", dist.Categorical(logits=logits), obs=batch.labels)

    def hidden(self, weights: Any, batch: Batch) -> Float[Array, "n t d"]:
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
        return self.trunk.activations(self.base.bind(weights), batch)

    def prepared(self, weights: Any, batch: Batch) -> Batch:
        """The batch with its activations below the lowest adapted layer, which no draw changes."""
        return self._with_cached(batch, self.hidden(weights, batch))

    def _with_cached(self, batch: Batch, hidden: Float[Array, "n t d"]) -> Batch:
        return replace(batch, cached=CachedActivations(hidden, self.first_layer, self.trunk.checksum))

    def logits(self, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, "n c"]:
        """Logits of the label tokens after the last real token of each row.

        The last layer runs at that token alone, beside the keys and values of the others.
        """
        placed = self.sites.place(adapters, first_layer=self.first_layer)
        head = placed.pop(HEAD, None)
        module = self.base.bind(weights)
        final = module.blocks(
            self.hidden(weights, batch),
            batch.mask,
            first_layer=self.first_layer,
            stop=self.base.num_layers,
            adapters=placed,
            at=batch.last[:, None],
        )
        return module.head(final[:, 0], rows=jnp.asarray(self.label_ids), adapter=head)

    def log_probs_by_draw(
        self, weights: Any, adapters: Adapters, batch: Batch, together: int = 1
    ) -> Float[Array, "s n c"]:
        """Log-probabilities of the classes under each draw of the adapters, which have a leading draw axis.

        The part below the adapters runs once for all draws; `together` of them at a time run in one program,
        whose adapted products read a kernel once for all of them.
        """
        prepared = self.prepared(weights, batch)

        def one(draw: Adapters) -> Array:
            return jax.nn.log_softmax(self.logits(weights, draw, prepared))

        return jax.lax.map(one, adapters, batch_size=together if together > 1 else None)

    def compiled_log_probs(self, adapters: Any, count: int, batch: Batch, together: int = 1) -> Array:
        """`log_probs_by_draw` of the first `count` of some draws, in a program for all callers.

        Activations that no draw changes must be in the batch already: see `prepare`.
        """
        run = program(self, _log_probs_of_piece, static=(4,))
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
        run = program(self, type(self).hidden)
        return self._with_cached(batch, run(self.base.weights, batch.plain))

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Approximate size of the largest array of a program for so many rows and positions."""
        widest = max(max(site.d_in, site.d_out) for site in self.sites.values())
        return max(math.prod(shape) * widest, self.sites.num_parameters)


def kind_of(model: Any) -> str:
    """What draws of the adapters go through, "network" or "tangent"; the former for other programs."""
    return getattr(model, "kind", "network")


def _log_probs_of_piece(
    model: Classifier, weights: Any, adapters: Adapters, count: Array, batch: Batch, together: int
) -> Array:
    def one(draw: Adapters, weights: Any, batch: Batch) -> Array:
        return jax.nn.log_softmax(model.logits(weights, draw, batch))

    return first_entries(one, adapters, count, weights, batch, together=together)


def _label_ids(base: LanguageModel, label_ids: Any) -> tuple[int, ...]:
    """Token ids as integers, at least two different ones that the base has rows for."""
    given = np.asarray(label_ids)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"label_ids must be a list of integers; got {brief(label_ids)}")
    ids = tuple(map(int, given))
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise ValueError(f"label_ids must be at least two different token ids; got {ids}")
    size = base.modules[HEAD][1]
    unknown = [i for i in ids if not 0 <= i < size]
    if unknown:
        raise ValueError(
            f"label_ids have {unknown_token(unknown[0], size, getattr(base, 'tokenizer', None))}"
        )
    return ids


def _check_sites(base: LanguageModel, sites: Sites) -> None:
    """Raise `ValueError` unless the base has the modules and layers of the sites."""
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
