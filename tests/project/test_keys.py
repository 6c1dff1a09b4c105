"""Every public function that takes a random key says so when it gets something else."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlora as bl
from bnlora._util.checks import check_key

NAMES = (
    "",
    ".assess.comparison",
    ".assess.diagnostics",
    ".assess.monitor",
    ".assess.sbc",
    ".guides",
    ".guides.flows",
    ".infer.approximate",
    ".infer.mcmc",
    ".prediction.conformal",
    ".prediction.decisions",
    ".prediction.selective",
    ".priors",
    ".testing",
)
MODULES = [importlib.import_module(f"bnlora{name}") for name in NAMES]


def is_ours(item) -> bool:
    is_python = inspect.isfunction(item) or inspect.ismethod(item)
    return is_python and item.__module__.startswith("bnlora")


def takers() -> dict[str, tuple]:
    """Functions and methods with an argument `key`, by name: those of the library's own modules."""
    found = {}
    for module in MODULES:
        for item in [getattr(module, name) for name in dir(module)]:
            if not getattr(item, "__module__", "").startswith("bnlora") or inspect.ismodule(item):
                continue
            if getattr(item, "__name__", "").startswith("_"):
                continue
            members = inspect.getmembers(item, is_ours) if inspect.isclass(item) else [("", item)]
            for name, function in members:
                if name.startswith("_") or not callable(function) or getattr(item, "_is_protocol", False):
                    continue
                if "key" in inspect.signature(function).parameters:
                    found[f"{function.__module__}.{function.__qualname__}"] = item, function
    return found


# Run inside compiled programs, by functions that have checked the key.
INSIDE = {
    "bnlora.infer.svi.maximise.maximise",
    "bnlora.program.draws.draw_adapters",
    "bnlora.infer.svi.elbo.elbo_terms",
    "bnlora.guides.automatic.prepare",
}
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
TAKERS = {name: pair for name, pair in takers().items() if name not in INSIDE}


def test_the_list_is_that_of_the_library():
    assert len(TAKERS) > 35
    for name in (
        "bnlora.infer.svi.fit.fit",
        "bnlora.prediction.predict.predict",
        "bnlora.infer.svi.result.Fit.draw_adapters",
        "bnlora.infer.mcmc.smc.sample_smc",
        "bnlora.assess.sbc.simulation.run",
        "bnlora.assess.diagnostics.tree.to_arviz",
    ):
        assert name in TAKERS


@pytest.mark.parametrize("name", TAKERS)
def test_an_integer_for_a_key_is_refused_before_anything_else(name):
    owner, function = TAKERS[name]
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name: None for p in parameters if p.default is p.empty and p.kind not in VARIABLE}
    if inspect.isclass(owner) and "self" in needed:
        needed["self"] = object.__new__(owner)
    if "num_draws" in [p.name for p in parameters]:
        needed["num_draws"] = 40
    if "fit" in needed and name.startswith("bnlora.assess.diagnostics"):
        needed["fit"] = object.__new__(bl.Fit)
    with pytest.raises(ValueError, match=r"key must be a random key, such as jax.random.key\(0\); got 7"):
        function(**{**needed, "key": 7})


@pytest.mark.parametrize(
    ("key", "got"),
    [
        (7, "got 7$"),
        (np.int64(7), r"got np.int64\(7\)$"),
        (None, "got None$"),
        ("0", "got '0'$"),
        (jnp.asarray(7), r"got an array of int32 of shape \(\)$"),
        (np.zeros(3, np.uint32), r"got an array of uint32 of shape \(3,\)$"),
        (jax.random.split(jax.random.key(0), 3), r"got an array of keys of shape \(3,\), take one of them$"),
        (object(), "got an object of type object$"),
    ],
)
def test_what_is_no_key_is_named(key, got):
    with pytest.raises(ValueError, match=got):
        check_key(key)


def test_keys_of_the_old_kind_are_those_of_the_new():
    for old in (jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))):
        assert check_key(old) == jax.random.key(3)
    assert check_key(jax.random.key(3)) == jax.random.key(3)
    rows = bl.testing.tiny_rows(jax.random.PRNGKey(4), 5)
    np.testing.assert_array_equal(rows.tokens, bl.testing.tiny_rows(jax.random.key(4), 5).tokens)
    # Inside a compiled program, and under a map over keys.
    drawn = jax.jit(jax.vmap(lambda k: jax.random.normal(check_key(k))))(
        jax.random.split(jax.random.key(5), 2)
    )
    assert drawn.shape == (2,)
