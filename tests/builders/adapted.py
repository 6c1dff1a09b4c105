"""Adapters of a classifier by hand, and what a fit differentiates, for tests of how a model runs."""

import jax
import jax.numpy as jnp
import numpy as np

import bnlora as bl


def adapters_of(model: bl.Classifier, *, seed: int = 0, draws: int = 0) -> dict:
    """Random adapters that change the logits, with a leading axis of draws where some are asked for."""
    generator, front = np.random.default_rng(seed), (draws,) if draws else ()
    return {
        name: {
            f: jnp.asarray(0.3 * generator.normal(size=(*front, *shape)), jnp.float32)
            for f, shape in site.shapes.items()
        }
        for name, site in model.sites.items()
    }


def value_and_gradient(model: bl.Classifier, params, adapters, batch: bl.Batch):
    """Log-likelihood and logits, and the gradient of the former in the adapters."""

    def log_likelihood(adapters):
        logits = model.logits(params, adapters, batch)
        at_labels = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[:, None], axis=1)
        return at_labels.sum(), logits

    return jax.value_and_grad(log_likelihood, has_aux=True)(adapters)
