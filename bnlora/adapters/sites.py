"""The sites of adapters: families of equal layers, chosen by name, pattern, rank and layer range.

All layers with the same module name and rank form one *family*. Its factors are stacked along a leading layer
axis, so the number of random variables and the compile time do not grow with depth.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax.numpy as jnp
from jax import Array

from bnlora._util.checks import check_at_least, check_positive, is_integer
from bnlora._util.display import Shown, Table, ranges
from bnlora._util.typing import FACTORS, Adapters

HEAD = "lm_head"
"""The only adaptable module outside of the layers."""


class Adaptable(Protocol):
    """The part of a base model that `select` uses."""

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """`{module: (d_in, d_out)}`, the modules of one layer and the head."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        ...


@dataclass(frozen=True)
class Site:
    """One family of adapted layers.

    Attributes:
        name: Name of the family, unique among the sites.
        module: Name of the adapted module, such as `"q_proj"`.
        layers: Indices of the adapted layers, increasing; `(num_layers,)` for the head.
        d_in: Width of the input.
        d_out: Width of the output.
        rank: Rank of the update.
        alpha: LoRA's alpha; the update is `alpha / rank * b @ a`.
        factors: The factors that a prior must fill: both, unless `Sites.only` left one out.

    Example:
        >>> site = sites["lm_head"]
        >>> site.d_in, site.rank, site.d_out
        (16, 1, 40)
    """

    name: str
    module: str
    layers: tuple[int, ...]
    d_in: int
    d_out: int
    rank: int
    alpha: float
    factors: tuple[str, ...] = FACTORS

    @property
    def depth(self) -> int:
        """Number of adapted layers, the length of the layer axis."""
        return len(self.layers)

    @property
    def scale(self) -> float:
        """The factor `alpha / rank` in front of the update."""
        return self.alpha / self.rank

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of the stacked factors by name, layer axis first."""
        both = {"a": (self.depth, self.rank, self.d_in), "b": (self.depth, self.d_out, self.rank)}
        return {factor: both[factor] for factor in self.factors}

    @property
    def num_parameters(self) -> int:
        """Number of weights in the factors."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def where(self) -> str:
        """The adapted layers in words."""
        return "head" if self.module == HEAD else f"layers {ranges(self.layers)}"


@dataclass(frozen=True)
class Sites(Shown, Mapping[str, Site]):
    """The adapted families by name, in the order of their modules in the forward pass.

    Attributes:
        families: The families.
        num_layers: Number of layers of the base, adapted or not.

    Example:
        >>> two = bl.select(base, ["q_proj", "lm_head"], rank=2)
        >>> list(two), two.num_parameters
        (['q_proj', 'lm_head'], 240)
    """

    families: tuple[Site, ...]
    num_layers: int

    def __getitem__(self, name: str) -> Site:
        for site in self.families:
            if site.name == name:
                return site
        raise KeyError(f"no family {name!r}; the sites are {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return (site.name for site in self.families)

    def __len__(self) -> int:
        return len(self.families)

    @property
    def overview(self) -> tuple[Table]:
        """One row for each family."""
        rows = tuple(
            (name, site.where, *map(str, (site.d_in, site.rank, site.d_out)), f"{site.alpha:g}",
             f"{site.num_parameters:,}")
            for name, site in self.items()
        )  # fmt: skip
        title = f"Adapters: {self.num_parameters:,} weights, {self.num_layers} layers in the model"
        header = ("family", "where", "inputs", "rank", "outputs", "alpha", "weights")
        return (Table(title, header, rows, texts=frozenset({1})),)

    def __repr__(self) -> str:
        lines = [f"Sites({self.num_parameters:,} adapter weights)"]
        for site in self.families:
            shape = f"{site.d_in} -> {site.rank} -> {site.d_out}"
            lines.append(f"  {site.name}: {shape}, alpha {site.alpha:g}, {site.where}")
        return "\n".join(lines)

    @property
    def first_layer(self) -> int:
        """The lowest adapted layer; `num_layers` if only the head is adapted."""
        return min(site.layers[0] for site in self.families)

    @property
    def num_parameters(self) -> int:
        """Number of weights in all factors."""
        return sum(site.num_parameters for site in self.families)

    def only(self, *, factors: Iterable[str] = FACTORS, families: Iterable[str] | None = None) -> "Sites":
        """A part of the sites. A prior fills it like any other sites; use it to compose priors.

        Args:
            factors: Factors to keep, out of `"a"` and `"b"`.
            families: Names of families to keep; all if omitted.
        """
        wanted = set(self if families is None else families)
        kept = set(factors)
        chosen = [s for s in self.families if s.name in wanted]
        parts = (replace(s, factors=tuple(f for f in s.factors if f in kept)) for s in chosen)
        return replace(self, families=tuple(parts))

    def with_head_rows(self, rows: int) -> "Sites":
        """The same sites with `rows` output rows in the head.

        If a likelihood uses only some rows of the head, the others follow their prior conditional on these.
        Leaving them out changes no other marginal if the law of the used rows is independent of their number.
        This is so under every prior of this library, except the sparse GP with `lam` below one: its law is
        defined on the kept rows, because they depend on each other through a frame of that length.
        """
        families = (replace(s, d_out=rows) if s.module == HEAD else s for s in self.families)
        return replace(self, families=tuple(families))

    def check(self, adapters: Adapters) -> None:
        """Raise `ValueError` unless `adapters` has exactly the families and shapes of the sites."""
        if set(adapters) != set(self):
            raise ValueError(
                f"the prior must return one adapter for each family {sorted(self)}; got {sorted(adapters)}"
            )
        for name, site in self.items():
            if set(adapters[name]) != set(site.factors):
                needed = " and ".join(map(repr, site.factors))
                raise ValueError(
                    f"the adapter of {name!r} needs the factors {needed}; got {sorted(adapters[name])}"
                )
            for factor, expected in site.shapes.items():
                got = jnp.shape(adapters[name][factor])
                if got != expected:
                    raise ValueError(
                        f"factor {factor!r} of {name!r} needs shape {expected}, layer axis first; got {got}"
                    )

    def place(self, adapters: Adapters, *, first_layer: int | None = None) -> dict[str, dict[str, Array]]:
        """Arrange adapters for the model: by module, over all layers from `first_layer` upwards.

        `b` is multiplied by `alpha / rank`. A layer without an adapter gets a zero adapter. Families of the
        same module are concatenated along the rank. The factors of the head have no layer axis.

        Args:
            adapters: The factors by family.
            first_layer: First layer of the result; by default the lowest adapted one. Lower ones are dropped.
        """
        first_layer = self.first_layer if first_layer is None else first_layer
        placed: dict[str, dict[str, Array]] = {}
        for name, site in self.items():
            a, b = adapters[name]["a"], adapters[name]["b"] * site.scale
            if site.module == HEAD:
                pair = {"a": a[0], "b": b[0]}
            else:
                pair = {"a": self._spread(site, a, first_layer), "b": self._spread(site, b, first_layer)}
            if site.module in placed:
                before = placed[site.module]
                pair = {
                    "a": jnp.concatenate([before["a"], pair["a"]], axis=-2),
                    "b": jnp.concatenate([before["b"], pair["b"]], axis=-1),
                }
            placed[site.module] = pair
        return placed

    def _spread(self, site: Site, factor: Array, first_layer: int) -> Array:
        kept = [i for i, layer in enumerate(site.layers) if layer >= first_layer]
        factor = factor[len(site.layers) - len(kept) :]  # layers increase, so the kept ones are the last
        depth = self.num_layers - first_layer
        if len(kept) == depth:
            return factor
        index = jnp.asarray([site.layers[i] - first_layer for i in kept], int)
        return jnp.zeros((depth, *factor.shape[1:]), factor.dtype).at[index].set(factor)


def select(
    base: Adaptable,
    targets: Sequence[str] | Mapping[str, int],
    *,
    rank: int | None = None,
    alpha: float | None = None,
    layers: slice | Iterable[int] | None = None,
) -> Sites:
    """Choose the modules of a base model that get adapters.

    Args:
        base: A base model (any object with `modules` and `num_layers`).
        targets: Module names, as `["q_proj", "lm_head"]`, or a mapping from pattern to rank. A pattern is a
            regular expression that must match the whole module name or the whole path
            `layers.<index>.<module>`. If several patterns match, the first is used.
        rank: Rank of every update, if `targets` is a list.
        alpha: LoRA's alpha: the update is `alpha / rank * b @ a`. Defaults to the rank (scale 1).
        layers: Layers to adapt, as a slice or as indices (negative ones count from the top); all layers by
            default. It does not apply to `lm_head`.

    Returns:
        The sites, by family, in the order of the base.

    Raises:
        ValueError: If a target matches nothing (the message names near matches), a rank is below one or above
            the smaller side (the inputs of the head), `alpha` is not positive, or a layer does not exist.

    Example:
        >>> from types import SimpleNamespace
        >>> tiny = SimpleNamespace(modules={"q_proj": (16, 16), "lm_head": (16, 50)}, num_layers=4)
        >>> select(tiny, ["q_proj", "lm_head"], rank=2, layers=slice(-2, None))
        Sites(260 adapter weights)
          q_proj: 16 -> 2 -> 16, alpha 2, layers 2-3
          lm_head: 16 -> 2 -> 50, alpha 2, head
    """
    rules = _rules(targets, rank)
    check_positive({} if alpha is None else {"alpha": alpha})
    chosen = _layer_indices(layers, base.num_layers)
    families: dict[tuple[str, int], list[int]] = {}  # layers by module and rank
    used: set[str] = set()
    for module in base.modules:
        for index in [base.num_layers] if module == HEAD else chosen:
            path = module if module == HEAD else f"layers.{index}.{module}"
            rule = next((r for r in rules if re.fullmatch(r, module) or re.fullmatch(r, path)), None)
            if rule is not None:
                used.add(rule)
                families.setdefault((module, rules[rule]), []).append(index)
    _require_all_used(rules, used, base, chosen)
    return Sites(tuple(_site(base, key, families, alpha) for key in families), base.num_layers)


def _rules(targets: Sequence[str] | Mapping[str, int], rank: int | None) -> dict[str, int]:
    if isinstance(targets, str):
        raise ValueError(
            f"targets must be a list of names or a mapping from pattern to rank; got {targets!r}"
        )
    if isinstance(targets, Mapping):
        if rank is not None:
            raise ValueError("set the rank either with `rank` or in the mapping `targets`, not with both")
        rules = dict(targets)
    elif rank is None:
        raise ValueError("`rank` is required when `targets` is a list of names")
    else:
        rules = dict.fromkeys(targets, rank)
    if not rules:
        raise ValueError("`targets` is empty; name at least one module to adapt")
    for rule, value in rules.items():
        try:
            re.compile(rule)
        except re.error as error:
            raise ValueError(f"target {rule!r} is not a valid pattern: {error}") from error
        check_at_least({f"the rank of {rule!r}": value}, 1)
    return rules


def _layer_indices(layers: slice | Iterable[int] | None, num_layers: int) -> list[int]:
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, slice):
        chosen = list(range(num_layers))[layers]
        if not chosen:
            raise ValueError(f"{layers} selects no layer; the model has layers 0 to {num_layers - 1}")
        return sorted(chosen)
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers must be a slice or a list of indices; got {layers!r}")
    wanted = list(layers)
    outside = [i for i in wanted if not is_integer(i) or not -num_layers <= i < num_layers]
    if outside or not wanted:
        raise ValueError(f"the model has layers 0 to {num_layers - 1}; got {outside or 'no layer'}")
    return sorted({i % num_layers for i in wanted})


def _require_all_used(rules: Mapping[str, int], used: set[str], base: Adaptable, chosen: list[int]) -> None:
    for rule in rules:
        if rule in used:
            continue
        names = list(base.modules) + [f"layers.{chosen[-1]}.{m}" for m in base.modules if m != HEAD]
        near = difflib.get_close_matches(rule, names, n=3, cutoff=0.4) or list(base.modules)
        shadowed = any(re.fullmatch(rule, name) for name in names)
        reason = "matches only modules of earlier targets" if shadowed else "matches no module"
        raise ValueError(f"target {rule!r} {reason}; nearest names: {', '.join(near)}")


def _site(
    base: Adaptable, key: tuple[str, int], families: Mapping[tuple[str, int], list[int]], alpha: float | None
) -> Site:
    module, rank = key
    d_in, d_out = base.modules[module]
    most = d_in if module == HEAD else min(d_in, d_out)  # the classes of a head may be fewer than its rank
    if rank > most:
        raise ValueError(
            f"the rank of {module!r} must be at most {most} for its {d_in} -> {d_out} map; got {rank}"
        )
    is_only = sum(m == module for m, _ in families) == 1
    name = module if is_only else f"{module}_rank{rank}"
    return Site(
        name, module, tuple(families[key]), d_in, d_out, rank, float(rank if alpha is None else alpha)
    )
