"""Errors of guides and their families, each in one sentence."""

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

from bnlora import guides, priors


def coin():
    numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))


def scalar():
    numpyro.sample("tau", dist.HalfNormal(1.0))


GP = partial(priors.sparse_gp_matrices, "w", (2, 3, 4), sigma=0.8, plate="layer", rows=2, cols=3)
NARROW = {
    f"{getattr(make, '__name__', 'SiteFlow')} {name}": (
        partial(make, **{name: value}),
        f"{name} must be a positive number; got {value}",
    )
    for make, name, value in [
        (guides.mean_field, "init_scale", -0.1),
        (guides.blob, "epsilon", -0.1),
        (guides.matrix_normal, "init_scale", 0.0),
        (guides.full, "init_scale", -0.1),
        (guides.low_rank, "init_scale", float("inf")),
        (guides.row_shared, "init_scale", -0.1),
        (guides.iaf, "init_scale", -0.1),
        (guides.spline, "init_scale", float("nan")),
        (guides.block_neural, "init_scale", 0),
        (guides.ensemble, "init_scale", -0.1),
        (partial(guides.SiteFlow, GP), "init_scale", -0.1),
        (guides.noise, "lam_init", -0.1),
    ]
}
REFUSED = NARROW | {
    "discrete site": (lambda: guides.SiteFlow(coin), "'k' is CategoricalProbs"),
    "cap": (lambda: guides.noise(lam_max=1.5), "0 < lam_init < lam_max <= 1"),
    "cap in words": (lambda: guides.noise(lam_max="one"), "lam_max must be a positive number; got 'one'"),
    "flow": (lambda: guides.SiteFlow(GP, flow="splines"), "flow must be one of .* nearest is 'spline'"),
    "blocks": (lambda: guides.SiteFlow(GP, flow="spline", blocks=2), "'spline' has no residual blocks"),
    "no family": (
        lambda: guides.Guide(GP, {r"w\.U": guides.full()}),
        r"no family for the site 'w.V'; the patterns are \['w",
    ),
    "no site": (
        lambda: guides.Guide(GP, {r"w\.U": guides.full(), ".*": guides.full()}),
        "matches no site; nearest is 'w.V'",
    ),
    "hidden pattern": (
        lambda: guides.Guide(GP, {".*": guides.full(), r"w\.V": guides.full()}),
        r"gets no site; the earlier pattern '\.\*' matches 'w.V'",
    ),
    "noise by pattern": (
        lambda: guides.Guide(GP, {r"w\.E": guides.noise(), ".*": guides.full()}),
        r"matches only conditional noise, such as 'w.E'; pass its family as noise=\.\.\.",
    ),
    "no pattern": (lambda: guides.Guide(GP, {"(": guides.full()}), r"'\(' is not a valid pattern"),
    "no call": (
        lambda: guides.Guide(GP, guides.full),
        r"'every site', .*; got the function full; call it: full",
    ),
    "no call by name": (lambda: guides.Guide(GP, {".*": guides.blob}), r"for '\.\*', .* call it: blob\(\)"),
    "no noise": (lambda: guides.Guide(GP, guides.full(), noise=0.1), "for 'noise', such as full.*; got 0.1"),
    "over": (lambda: guides.full(over="layers"), "over must be one of .*; got 'layers', nearest is 'layer'"),
    "rank": (lambda: guides.low_rank(rank=0), "rank must be a whole number of at least 1; got 0"),
    "half a rank": (lambda: guides.low_rank(rank=1.5), "rank must be a whole number of at least 1; got 1.5"),
    "ensemble": (lambda: guides.ensemble(size=0), "size of an ensemble must be a whole number .*; got 0"),
    "hidden": (lambda: guides.iaf(hidden=1.5), "hidden must be a whole number of at least 1; got 1.5"),
    "bins": (lambda: guides.spline(bins=0), "bins must be a whole number of at least 1; got 0"),
    "dropout rate": (
        lambda: guides.dropout(rate=1.0),
        "rate must be a number strictly between 0 and 1; got 1.0",
    ),
    "dropout of a scalar": (
        lambda: guides.Guide(scalar, guides.dropout()),
        "unconstrained matrices; 'tau' is not one",
    ),
    "too full": (
        # Two layers of 2 x 3 numbers: 6 locations and 6 * 7 / 2 of a triangle each.
        lambda: guides.Guide(GP, guides.full(max_parameters=2 * 27 - 1)),
        r"6 dimensions of 'w.V' for each of 2 layers has 54 .* more than max_parameters=53; low_rank",
    ),
    "matrix normal too large": (
        # Two layers of 2 x 3 numbers: 6 locations and triangles of 3 and 6.
        lambda: guides.Guide(GP, guides.matrix_normal(max_parameters=2 * 15 - 1)),
        "2 x 3 matrices of 'w.V' has 30 parameters, more than max_parameters=29; low_rank",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_gets_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_guide_of_just_the_allowed_size_is_built():
    for family, size in ((guides.full, 54), (guides.matrix_normal, 30)):
        assert guides.Guide(GP, family(max_parameters=size)).counts["w.V"] == size
