"""The kernels inside the model: every adapted layer, a fit, predictions, and whole programs for a device."""

import jax
import numpy as np
import optax
import pytest
from builders.adapted import adapters_of, value_and_gradient
from builders.programs import kernel_calls
from builders.thorough import sample_of
from jax import export

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.testing import tiny_base, tiny_rows

KEY = jax.random.key(0)
BASE = tiny_base(KEY, num_layers=3)
ROWS = tiny_rows(jax.random.key(1), 8, length=6)
MODULES = [*[name for name in BASE.modules if name != HEAD], HEAD]
EPS = float(np.finfo(np.float32).eps)
# The program's longest path: forwards and back through three layers of 24 products at the widest.
ROUNDINGS = 2 * 3 * 24


def classifier(base: bl.Base, targets=tuple(MODULES), **options) -> bl.Classifier:
    sites = bl.select(base, list(targets), rank=2, **options)
    return bl.Classifier(base, sites, bl.priors.normal(), label_ids=(3, 5))


def kernels(function, *args) -> list[str]:
    """Names of all kernels in a program."""
    return [call["name"] for call in kernel_calls(function, *args)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat", sample_of(["elementwise", "attention", "layers"], ["elementwise", "layers"])
)
def test_value_and_gradient_are_those_of_the_reference(remat):
    plain = classifier(BASE)
    model = classifier(BASE.running(implementation="interpret", remat=remat))
    adapters = adapters_of(plain)
    expected = jax.jit(value_and_gradient, static_argnums=0)(plain, BASE.weights, adapters, ROWS)
    got = jax.jit(value_and_gradient, static_argnums=0)(model, BASE.weights, adapters, ROWS)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= ROUNDINGS * EPS * np.abs(y).max()


def test_every_adapted_product_is_the_kernel():
    model = classifier(BASE.running(implementation="interpret"))
    # Seven modules in the loop and in the last layer, and the head.
    names = kernels(model.logits, BASE.weights, adapters_of(model), ROWS)
    assert names == ["lora_matmul"] * 15


def test_predictions_of_draws_share_products_over_the_same_inputs():
    model = classifier(
        BASE.running(implementation="interpret"), targets=("q_proj", "v_proj"), layers=slice(-1, None)
    )
    adapters = adapters_of(model, draws=5)
    names = kernels(lambda a: model.outputs_by_draw(BASE.weights, a, ROWS, 4), adapters)
    # What enters the lowest adapted layer is one for all draws; four at a time, and one that is left over.
    assert names.count("lora_matmul_draws") == 2
    got = jax.jit(model.outputs_by_draw, static_argnums=3)(BASE.weights, adapters, ROWS, 4)
    expected = classifier(BASE, targets=("q_proj", "v_proj"), layers=slice(-1, None))
    want = jax.jit(expected.outputs_by_draw)(BASE.weights, adapters, ROWS)
    np.testing.assert_allclose(got, want, atol=ROUNDINGS * EPS * float(np.abs(want).max()))


def test_a_fit_through_the_kernels_takes_the_same_steps():
    def fitted(base: bl.Base) -> bl.Fit:
        model = classifier(base, targets=("q_proj", HEAD))
        guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
        return bl.fit(KEY, model, guide, ROWS, optax.adam(1e-2), num_steps=3, batch_size=4)

    expected, got = fitted(BASE), fitted(BASE.running(implementation="interpret"))
    assert got.num_traces == 1
    np.testing.assert_allclose(got.history["elbo"], expected.history["elbo"], rtol=1e-4)
    for name, value in expected.params.items():
        np.testing.assert_allclose(got.params[name], value, atol=1e-4)


@pytest.mark.parametrize("remat", sample_of(["elementwise", "layers"], ["elementwise"]))
def test_a_whole_gradient_lowers_for_a_tpu(remat):
    model = classifier(BASE.running(implementation="pallas", remat=remat))
    run = jax.jit(lambda params, adapters, rows: value_and_gradient(model, params, adapters, rows))
    checks = [export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    # Keys of the tree do not matter to the program, and `export` cannot write those of a Flax state.
    leaves, tree = jax.tree.flatten((BASE.weights, adapters_of(model), ROWS))
    flat = jax.jit(lambda *leaves: jax.tree.leaves(run(*jax.tree.unflatten(tree, leaves))))
    text = export.export(flat, platforms=["tpu"], disabled_checks=checks)(*leaves).mlir_module()
    # Forwards, dx and the gradients of the factors: seven products in the loop, seven in the last layer,
    # one of the head.
    # Running a layer again repeats all of its products but the last, whose output nothing else needs.
    assert text.count("tpu_custom_call") == 3 * 15 + (2 * 6 if remat == "layers" else 0)
