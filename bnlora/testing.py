r"""Small problems with exact solutions, to test priors and guides.

`LinearGaussian`: Y = X W^T + noise with W of shape (d_o, d_i). If the entries of W are independent
N(0, sigma^2) under the prior, evidence and posterior are known in closed form, and a valid bound cannot
exceed the evidence.

`maximise_bound`: a fit of such a problem to convergence, in one compiled loop.

`tiny_base`, `tiny_encoder` and `tiny_rows`: small models and a task, on which a fit takes seconds.

`frozen_scale`: a deliberately wrong guide, which every check of a posterior must detect.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from jaxtyping import Float
from numpyro import handlers

from bnlora._util.checks import check_key
from bnlora._util.typing import Parameters
from bnlora.base import Base
from bnlora.data.batch import Batch
from bnlora.infer.svi.elbo import initial_parameters
from bnlora.infer.svi.maximise import maximise
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.encoder_config import EncoderConfig
from bnlora.program.protocol import Program


@dataclass(frozen=True)
class LinearGaussian:
    """A conjugate regression on a matrix of weights, as a NumPyro model with a `prior`.

    Attributes:
        X: Inputs, shape (n, d_i).
        Y: Responses, shape (n, d_o).
        noise: Standard deviation of the responses around `X W^T`.
        program: NumPyro program that samples `W`, shape (1, d_o, d_i), with a layer axis of length one.
    """

    X: Float[Array, "n d_i"]
    Y: Float[Array, "n d_o"]
    noise: float
    program: Callable[[], Array]

    def prior(self, *args, **kwargs) -> Array:
        """The prior program; arguments are ignored."""
        return self.program()

    def __call__(self, *args, **kwargs) -> None:
        """Sample `W` and observe `Y`."""
        mean = self.X @ self.prior()[0].T
        numpyro.sample("Y", dist.Normal(mean, self.noise).to_event(2), obs=self.Y)

    def log_evidence(self, sigma: float) -> float:
        """Exact `log p(Y)` in nats, if the entries of `W` are independent N(0, sigma^2)."""
        X, Y = np.asarray(self.X, np.float64), np.asarray(self.Y, np.float64)
        # Columns of Y are independent, each with this covariance over the rows.
        covariance = sigma**2 * X @ X.T + self.noise**2 * np.eye(len(X))
        _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
        quadratic = np.einsum("nd,nm,md->", Y, np.linalg.inv(covariance), Y)
        return float(-0.5 * (Y.shape[1] * logdet + quadratic))

    def posterior(self, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """Exact posterior mean of `W`, shape (d_o, d_i), and covariance of each row, (d_i, d_i)."""
        X, Y = np.asarray(self.X, np.float64), np.asarray(self.Y, np.float64)
        covariance = np.linalg.inv(X.T @ X / self.noise**2 + np.eye(X.shape[1]) / sigma**2)
        return (covariance @ X.T @ Y).T / self.noise**2, covariance


def linear_gaussian(
    key: Array,
    program: Callable[[], Array],
    *,
    shape: tuple[int, int] = (3, 4),
    rows: int = 12,
    noise: float = 0.5,
) -> LinearGaussian:
    """A `LinearGaussian` with data from a standard normal `W` of shape (d_o, d_i)."""
    key = check_key(key)
    k_x, k_w, k_y = jax.random.split(key, 3)
    X = jax.random.normal(k_x, (rows, shape[1]))
    mean = X @ jax.random.normal(k_w, shape).T
    return LinearGaussian(X, mean + noise * jax.random.normal(k_y, mean.shape), noise, program)


def maximise_bound(
    key: Array,
    model: Program,
    guide: Callable,
    *,
    num_steps: int,
    learning_rate: float,
    num_particles: int = 4,
    learn: Callable[[str], bool] = lambda name: True,
) -> Parameters:
    """Fit prior and guide by Adam with a decaying rate, compiled as one loop; return their parameters.

    Args:
        key: Random key.
        model: NumPyro model without arguments, with `prior`.
        guide: NumPyro guide.
        num_steps: Number of steps.
        learning_rate: Rate at the start; it decays to zero along a cosine.
        num_particles: Number of guide draws that each step averages over.
        learn: Whether to train a parameter, by its name.
    """
    key = check_key(key)
    start_key, step_key = jax.random.split(key)
    start, constrain = initial_parameters(start_key, model, guide)
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    still = {name: not learn(name) for name in start}
    optimizer = optax.multi_transform({False: adam, True: optax.set_to_zero()}, still)
    run = partial(maximise, optimizer=optimizer, num_steps=num_steps, num_particles=num_particles)
    return jax.jit(lambda start: run(step_key, start, constrain, model, guide))(start)


def tiny_base(key: Array, *, num_layers: int = 4) -> Base:
    """A Llama with a few thousand random weights and grouped heads, to try a prior or a guide."""
    key = check_key(key)
    config = DecoderConfig(
        vocab_size=40,
        d_model=16,
        d_ff=24,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        rope_theta=1e4,
        norm_eps=1e-5,
        tied=True,
        max_length=64,
    )
    return Base.random(key, config)


def tiny_encoder(key: Array, *, num_layers: int = 2, num_labels: int = 2, new_head: bool = False) -> Base:
    """A BERT with a few thousand random weights; its classification head is zero if it is new."""
    key = check_key(key)
    config = EncoderConfig(
        vocab_size=40,
        d_model=16,
        d_ff=24,
        num_layers=num_layers,
        num_heads=4,
        num_labels=num_labels,
        max_length=64,
        new_head=new_head,
    )
    return Base.random(key, config)


def tiny_rows(key: Array, num_rows: int, *, length: int = 8, vocabulary: int = 40) -> Batch:
    """Random rows of two to `length` tokens, padded right; the class is the parity of the first token."""
    key = check_key(key)
    k_tokens, k_length = jax.random.split(key)
    tokens = jax.random.randint(k_tokens, (num_rows, length), 0, vocabulary)
    lengths = jax.random.randint(k_length, (num_rows, 1), 2, length + 1)
    return Batch(tokens, jnp.arange(length)[None, :] < lengths, tokens[:, 0] % 2)


def frozen_scale(prior: Callable[..., Any], scale: float) -> Callable[..., None]:
    """A guide of independent normals with fitted locations and a fixed scale.

    Args:
        prior: The prior program; its latent sites must be real.
        scale: Standard deviation of every entry. If it is much smaller than that of the posterior, the draws
            are too narrow for every choice of locations.
    """
    trace = handlers.trace(handlers.seed(prior, jax.random.key(0))).get_trace()
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}

    def guide(*args, **kwargs) -> None:
        for name, site in latent.items():
            loc = numpyro.param(f"{name}.q.loc", lambda key, site=site: site["fn"].sample(key))
            with ExitStack() as plates:
                for frame in site["cond_indep_stack"]:
                    plates.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
                numpyro.sample(name, dist.Normal(loc, scale).to_event(site["fn"].event_dim))

    return guide
