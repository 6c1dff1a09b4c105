r"""The hyper-parameters of a prior, with names of variables and axes for ArviZ.

A site is a *weight* if the prior marks it (`bnlora.priors` marks the factors, inducing matrices and noise
that it samples), if its name is that of a factor, `<family>.<factor>`, or if the name has one of the symbols
of the notation after it, as in `<family>.<factor>.z` (`U`, `V`, `W`, `E`). Weights are not identifiable;
ArviZ gets functions of the update instead. Every other site is a hyper-parameter.

Plates name the axes of a site. The mark `infer={"dims": ("rank",)}` names its last axes. The plate of
`priors.layers` and the name "rank" use the dimensions of the variables of the family. An axis of length one
without a plate is dropped, and so is the single layer of the head.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnlora._util.typing import WEIGHT
from bnlora.adapters.sites import Sites
from bnlora.assess.diagnostics.divergence import place
from bnlora.assess.diagnostics.updates import grids
from bnlora.priors.declared import Program, Variable, declared

SYMBOLS = ("z", "U", "V", "V_0", "W", "E")
"""Symbols of weights after `<family>.<factor>.`"""

DIMS = "dims"
"""Mark in the `infer` of a site: names of its event axes, after those of plates."""

TREE = ("chain", "draw", "row", "step")
"""Names of dimensions in every tree."""


class Named(NamedTuple):
    """Draws of the hyper-parameters by name in ArviZ, in the order of the prior, with dimensions."""

    values: dict[str, np.ndarray]
    dims: dict[str, tuple[str, ...]]
    coords: dict[str, list]
    sites: dict[str, str]


def is_weight(sites: Sites, site: Variable) -> bool:
    """Whether a site of the prior is a weight; in ArviZ, functions of the update replace it."""
    if site.infer.get(WEIGHT) or site.is_noise:
        return True
    _, factor = place(sites, site.name)
    symbols = site.name.rpartition("/")[2].split(".")[2:]
    return bool(factor) and (not symbols or (len(symbols) == 1 and symbols[0] in SYMBOLS))


def no_weights(sites: Sites, variables: Mapping[str, Variable]) -> dict[str, Variable]:
    """The sites that are not weights, in the same order."""
    return {name: site for name, site in variables.items() if not is_weight(sites, site)}


def names_in_tree(sites: Sites, program: Program) -> dict[str, str]:
    """Name in a tree of every site of the prior that is not a weight, observed sites included.

    "/" becomes a dot, because xarray uses it as the separator of groups. A name in use gets a number.
    """
    reserved = (name for grid in grids(sites) for name in (*grid.variables, *grid.coords))
    taken = {*TREE, *sites, *reserved}
    names: dict[str, str] = {}
    for name in (*no_weights(sites, program.latent), *no_weights(sites, program.observed)):
        names[name] = _free(clean(name), taken)
        taken.add(names[name])
    return names


def log_prior_groups(model: Any, log_prior_of: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Log prior of every draw, for the weights of each family, each hyper-parameter and each observed site.

    Args:
        model: The classifier.
        log_prior_of: Log prior of every site, by name, one number for each draw.
    """
    names = names_in_tree(model.sites, declared(model.prior))
    groups: dict[str, np.ndarray] = {}
    for name, value in log_prior_of.items():
        group = names.get(name) or place(model.sites, name)[0] or clean(name)
        groups[group] = groups.get(group, 0.0) + np.asarray(value, np.float64)
    return groups


def named_draws(model: Any, draws: Mapping[str, Any]) -> Named:
    """Draws of the hyper-parameters with the names of their axes.

    Args:
        model: The classifier.
        draws: Draws of the sites of its prior, by name, with a leading draw axis.
    """
    program = declared(model.prior)
    names = names_in_tree(model.sites, program)
    axes = _Axes(model.sites, tuple(names.values()))
    hyper = Named({}, {}, axes.coords, {})
    for name, site in no_weights(model.sites, program.latent).items():
        variable = names[name]
        kept, dims = axes.of(variable, site)
        values = np.asarray(draws[name])
        hyper.values[variable] = values.reshape(len(values), *(site.shape[axis] for axis in kept))
        hyper.dims[variable] = dims
        hyper.sites[variable] = name
    return hyper


class _Axes:
    """Names of the axes of sites. Axes of the tree take precedence; no axis has the name of a variable."""

    def __init__(self, sites: Sites, variables: tuple[str, ...]):
        self.sites, self.variables = sites, variables
        self.coords: dict[str, list] = {}
        self.own: dict[str, list] = {}
        self.families: dict[tuple[str, str], str | None] = {}
        for grid in grids(sites):
            self.own |= grid.coords
            for family in grid.families:
                self.families[family, "layer"] = grid.layer_name
                self.families[family, "rank"] = grid.rank_name

    def of(self, variable: str, site: Variable) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The axes to keep, with their names."""
        plates = {axis: name for name, axis in site.plates.items()}
        batch, family = len(site.shape) - site.event_dim, place(self.sites, site.name)[0]
        marked = tuple(site.infer.get(DIMS, ()))
        marked = marked if len(marked) == site.event_dim else ()
        kept, dims = [], []
        for axis, size in enumerate(site.shape):
            if axis in plates:
                name = self._plate(plates[axis], size)
            elif axis < batch:
                name = None if size == 1 else f"{variable}_dim_{axis}"
            else:
                name = self._mark(family, marked[axis - batch], size) if marked else f"{variable}_dim_{axis}"
            if name is not None:
                kept.append(axis)
                dims.append(name if name not in dims else f"{variable}_dim_{axis}")
        return tuple(kept), tuple(dims)

    def _plate(self, plate: str, size: int) -> str | None:
        """Name of the axis of a plate; that of the layers of a family for the plate of `priors.layers`."""
        family, _, kind = plate.rpartition("/")[2].rpartition(".")
        if family in self.sites and kind == "layer" and size == self.sites[family].depth:
            return self.families[family, "layer"]
        return self._sized(clean(plate), size)

    def _mark(self, family: str, name: str, size: int) -> str | None:
        """Name of a marked axis; that of the ranks of the family for "rank"."""
        if name == "rank" and family and size == self.sites[family].rank:
            return self.families[family, "rank"]
        return self._sized(clean(name), size)

    def _sized(self, wanted: str, size: int) -> str:
        """The name, with a number if a dimension of another length already uses it."""
        known = self.own | self.coords
        taken = {*TREE, *self.variables, *(name for name in known if len(known[name]) != size)}
        name = _free(wanted, taken)
        if name not in self.own:
            self.coords[name] = list(range(size))
        return name


def clean(name: str) -> str:
    """The name with characters replaced that xarray and netCDF do not allow."""
    cleaned = re.sub("[/\0]", ".", name)
    return "site" if cleaned == "." else cleaned


def _free(wanted: str, taken: Iterable[str]) -> str:
    """The wanted name, with the first number from 2 that makes it unused."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name
