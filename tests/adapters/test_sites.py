"""Selecting modules, grouping them into families, and placing stacked adapters over the layers."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.adapters.sites import select

BASE = SimpleNamespace(
    modules={"q_proj": (16, 16), "k_proj": (16, 8), "up_proj": (16, 40), "lm_head": (16, 100)}, num_layers=6
)


def ones(sites):
    return {n: {f: jnp.ones(shape) for f, shape in s.shapes.items()} for n, s in sites.items()}


def test_names_select_every_layer_and_the_head_once():
    sites = select(BASE, ["q_proj", "lm_head"], rank=2, alpha=4)
    assert sites["q_proj"].shapes == {"a": (6, 2, 16), "b": (6, 16, 2)}
    assert sites["lm_head"].shapes == {"a": (1, 2, 16), "b": (1, 100, 2)}
    assert sites["q_proj"].scale == 2.0
    assert sites.num_parameters == 6 * 2 * 32 + 2 * 116


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(slice(-2, None), (4, 5)), ([0, -1], (0, 5)), (range(1, 4), (1, 2, 3)), (None, tuple(range(6)))],
)
def test_layer_ranges(layers, expected):
    assert select(BASE, ["q_proj"], rank=2, layers=layers)["q_proj"].layers == expected


def test_patterns_carry_their_rank_and_the_first_match_wins():
    sites = select(BASE, {r"layers\.[45]\.q_proj": 3, "q_proj|k_proj": 2})
    assert {n: s.layers for n, s in sites.items()} == {
        "q_proj_rank2": (0, 1, 2, 3),
        "q_proj_rank3": (4, 5),
        "k_proj": (0, 1, 2, 3, 4, 5),
    }


def test_start_is_the_lowest_adapted_layer_and_the_depth_for_a_head_alone():
    assert select(BASE, ["k_proj"], rank=1, layers=[3, 5]).first_layer == 3
    assert select(BASE, ["lm_head"], rank=1).first_layer == 6


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["q_prj"], {"rank": 2}, "'q_prj' matches no module; nearest names: .*q_proj"),
        (["lm_heads"], {"rank": 2}, "matches no module; nearest names: lm_head"),
        ({".*_proj": 2, "q_proj": 3}, {}, "'q_proj' matches only modules of earlier targets"),
        (["q_proj"], {"rank": 0}, "rank of 'q_proj' must be at least 1; got 0"),
        (["k_proj"], {"rank": 9}, "rank of 'k_proj' must be at most 8"),
        (["q_proj"], {}, "`rank` is required"),
        ({"q_proj": 2}, {"rank": 2}, "not with both"),
        ("q_proj", {"rank": 2}, "must be a list of names"),
        ([], {"rank": 2}, "`targets` is empty"),
        (["q_proj("], {"rank": 2}, "not a valid pattern"),
        (["q_proj"], {"rank": 2, "layers": [6]}, r"layers 0 to 5; got \[6\]"),
        (["q_proj"], {"rank": 2, "layers": slice(9, None)}, "selects no layer"),
        (["q_proj"], {"rank": 2, "layers": [0, 1.5, True]}, r"layers 0 to 5; got \[1.5, True\]"),
        (["q_proj"], {"rank": 2, "layers": 3}, "layers must be a slice or a list of indices; got 3"),
        (["q_proj"], {"rank": 2.0}, "rank of 'q_proj' must be an integer of at least 1; got 2.0"),
        ({"q_proj": "2"}, {}, "rank of 'q_proj' must be an integer of at least 1; got '2'"),
        (["q_proj"], {"rank": 2, "alpha": float("nan")}, "alpha must be a positive number; got nan"),
        (["q_proj"], {"rank": 2, "alpha": 0}, "alpha must be a positive number; got 0"),
    ],
)
def test_bad_targets_get_one_clear_sentence(targets, options, message):
    with pytest.raises(ValueError, match=message):
        select(BASE, targets, **options)


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(KeyError, match="no family 'v_proj'; the sites are q_proj"):
        select(BASE, ["q_proj"], rank=2)["v_proj"]


def test_placing_fills_gaps_with_zero_folds_the_scale_and_joins_ranks():
    sites = select(BASE, {r"layers\.[35]\.q_proj": 1, r"layers\.4\.q_proj": 2, "lm_head": 2}, alpha=4)
    placed = sites.place(ones(sites))
    q = placed["q_proj"]
    assert q["a"].shape == (3, 3, 16)
    assert q["b"].shape == (3, 16, 3)
    update = np.einsum("lor,lri->loi", q["b"], q["a"])
    # alpha / rank * rank * 1 * 1 in each adapted layer, for every rank.
    np.testing.assert_allclose(update, 4.0)
    assert placed["lm_head"]["b"].shape == (100, 2)


def test_a_layer_between_the_adapted_ones_gets_a_zero_update():
    sites = select(BASE, ["q_proj"], rank=2, layers=[2, 5])
    placed = sites.place(ones(sites))["q_proj"]
    norms = np.abs(np.einsum("lor,lri->loi", placed["b"], placed["a"])).sum((1, 2))
    assert list(norms > 0) == [True, False, False, True]


def test_head_rows_shrink_the_head_only():
    sites = select(BASE, ["q_proj", "lm_head"], rank=2).with_head_rows(3)
    assert sites["lm_head"].shapes["b"] == (1, 3, 2)
    assert sites["q_proj"].shapes["b"] == (6, 16, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("q_proj"), "one adapter for each family"),
        (lambda x: x["q_proj"].pop("b"), "needs the factors .a. and .b.; got .*"),
        (lambda x: x["q_proj"].update(a=jnp.ones((6, 16, 2))), r"needs shape \(6, 2, 16\)"),
    ],
)
def test_adapters_of_the_wrong_form_are_named(change, message):
    sites = select(BASE, ["q_proj", "lm_head"], rank=2)
    adapters = ones(sites)
    change(adapters)
    with pytest.raises(ValueError, match=message):
        sites.check(adapters)
