"""Laplace's approximation of a linear model by SciPy and dense Hessians; call it in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from bnlora.program.tangent.linear import Linear


def problem(rows: int = 12, classes: int = 2, sizes: tuple[int, ...] = (3, 2), seed: int = 0) -> Linear:
    """Random rows, with labels from the model itself at scales near one."""
    generator = np.random.default_rng(seed)
    offset = generator.normal(size=(rows, classes - 1))
    groups = [generator.normal(size=(rows, classes - 1, d)) for d in sizes]
    eta = offset + sum(group @ generator.normal(size=d) for group, d in zip(groups, sizes, strict=True))
    noisy = np.pad(eta, ((0, 0), (1, 0))) + generator.gumbel(size=(rows, classes))
    return Linear(offset, groups, noisy.argmax(1))


@jax.jit
def negative_log_joint(u, phi, offset, labels):
    """Written anew: -log p(y, u), without the constant of the prior."""
    eta = offset + phi @ u
    log_probs = jax.nn.log_softmax(jnp.concatenate([jnp.zeros((len(eta), 1)), eta], axis=1))
    return 0.5 * u @ u - log_probs[jnp.arange(len(eta)), labels].sum()


SLOPE = jax.jit(jax.grad(negative_log_joint))
CURVATURE = jax.jit(jax.hessian(negative_log_joint))


def dense(model: Linear, log_scales: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Evidence, mode and covariance from SciPy's minimiser and the Hessian of the negative log joint in u."""
    scales = np.repeat(np.exp(log_scales), [g.shape[2] for g in model.groups])
    data = np.concatenate(model.groups, axis=2) * scales, model.offset, model.labels
    made = scipy.optimize.minimize(
        negative_log_joint, np.zeros(len(scales)), data, jac=SLOPE, hess=CURVATURE,
        method="trust-exact", options={"gtol": 1e-10},
    )  # fmt: skip
    u = made.x
    for _ in range(3):  # the minimiser compares values, which tell a mode to half of their digits
        u = u - np.linalg.solve(CURVATURE(u, *data), SLOPE(u, *data))
    assert np.abs(SLOPE(u, *data)).max() < 1e-8
    curvature = np.asarray(CURVATURE(u, *data))
    value = -float(negative_log_joint(u, *data)) - 0.5 * np.linalg.slogdet(curvature)[1]
    return value, u, np.linalg.inv(curvature)
