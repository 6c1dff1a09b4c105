"""The trial of the kernels: good ones pass, and what a device may do to a kernel leaves XLA in its place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlora.kernels import api, reference, trial
from bnlora.kernels.derivatives import Implementation, operation

KINDS = {"float32": {}, "bfloat16": {}, "float32, eight bits": {"eight_bits": True}}


def kernels(change=lambda x: x) -> trial.Apply:
    """The interpreted kernels, with a fault in the product."""
    good = api._interpreted()
    return operation(good._replace(product=lambda *a, **o: change(good.product(*a, **o))), trial.SCALE)


def raising(*args, **options):
    raise RuntimeError("Mosaic failed to compile\nfor many reasons")


@pytest.mark.parametrize("name", KINDS)
def test_the_kernels_pass(name):
    dtype = name.partition(",")[0]
    problem = trial.problem(dtype, eight_bits=KINDS[name].get("eight_bits", False))
    assert trial.failure(kernels(), *problem) is None


FAULTS = {
    "an error of the compiler": (raising, r"RuntimeError: Mosaic failed to compile$"),
    "not a number": (lambda x: x * jnp.nan, r"the product differs from the reference by nan"),
    "a wrong scale": (lambda x: 1.1 * x, r"the product differs from the reference by 0\.1 "),
    "one wrong row": (lambda x: x.at[:, 0].set(0.0), r"the product differs from the reference by "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    change, message = FAULTS[name]
    found = trial.failure(kernels(change), *trial.problem("float32", eight_bits=False))
    assert found is not None
    assert re.search(message, found)


def test_a_wrong_gradient_is_found():
    good = api._interpreted()
    twice = Implementation(good.product, lambda *a, **o: [2 * x for x in good.factor_gradients(*a, **o)])
    found = trial.failure(operation(twice, trial.SCALE), *trial.problem("float32", eight_bits=False))
    assert "the gradient of a differs from the reference by 1 " in found


# The choice on a device ---------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """A CPU that says it is a TPU; `use` sets its kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.delenv(trial.SWITCH, raising=False)

    def use(change=lambda x: x):
        good = api._interpreted()
        faulty = good._replace(product=lambda *a, **o: change(good.product(*a, **o)))
        monkeypatch.setattr(api, "_compiled", lambda: faulty)
        api._for_trial.cache_clear()
        trial.passes.cache_clear()

    yield use
    monkeypatch.undo()
    api._for_trial.cache_clear()
    trial.passes.cache_clear()


def arrays():
    generator = np.random.default_rng(1)
    shapes = (4, 16), (16, 8), (2, 16), (8, 2)
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def calls_a_kernel() -> bool:
    """Whether the product, traced anew, is one of the kernels."""
    return "pallas_call" in str(jax.make_jaxpr(lambda *a: api.lora_matmul(*a))(*arrays()))


def test_kernels_that_pass_are_used_and_tried_once(device, monkeypatch):
    device()
    tried, failure = [], trial.failure
    monkeypatch.setattr(trial, "failure", lambda *a: tried.append(1) or failure(*a))
    assert calls_a_kernel()
    assert calls_a_kernel()
    assert len(tried) == 1


@pytest.mark.parametrize("change", [raising, lambda x: 2 * x])
def test_kernels_that_fail_are_replaced_with_one_warning(device, change):
    device(change)
    with pytest.warns(UserWarning, match="Pallas kernels for float32 failed their trial on .*XLA's"):
        got = jax.jit(lambda *a: api.lora_matmul(*a))(*arrays())  # the trial runs while this is traced
    assert not calls_a_kernel()  # and no second warning, which would be an error here
    np.testing.assert_allclose(got, reference.lora_matmul(*arrays()), rtol=1e-6)


def test_the_environment_chooses(device, monkeypatch):
    device(lambda x: 2 * x)
    monkeypatch.setenv(trial.SWITCH, "xla")
    assert not calls_a_kernel()
    monkeypatch.setenv(trial.SWITCH, "pallas")
    assert calls_a_kernel()
    monkeypatch.setenv(trial.SWITCH, "palas")
    with pytest.raises(
        ValueError, match=r"must be one of \['xla', 'pallas'\]; got 'palas', nearest is 'pallas'"
    ):
        calls_a_kernel()
