r"""A prior as a user would write one: a horseshoe over ranks with a hierarchy over layers.

tau ~ C+(0, 1)                          one scale for all updates
s ~ HalfNormal(0.5)                     how much the layers differ
log t_l ~ N(0, s^2)                     a scale for each layer of a family
lambda_lk ~ C+(0, 1)                    one for each rank of each layer
b_l[:, k] = tau t_l lambda_lk z_l[:, k],    z ~ N(0, 1 / rank),    a ~ N(0, 1 / d_in)
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import bnlora as bl

MEDIAN = {"init": "median"}


def hierarchy(sites):
    """Sites `tau` and `s`, and `<family>.layer_scale` and `<family>.local` of every family."""
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0), infer=MEDIAN)
    s = numpyro.sample("s", dist.HalfNormal(0.5), infer=MEDIAN)
    adapters = {}
    for name, pair in bl.priors.normal()(sites).items():
        site = sites[name]
        with bl.priors.layers(site):
            e = numpyro.sample(f"{name}.layer_scale", dist.Normal(0.0, 1.0), infer={"init": "zero"})
            law = dist.HalfCauchy(jnp.ones(site.rank)).to_event(1)
            local = numpyro.sample(f"{name}.local", law, infer={**MEDIAN, "dims": ("rank",)})
        gain = tau * jnp.exp(s * e)[:, None] * local
        adapters[name] = {"a": pair["a"], "b": gain[:, None, :] * pair["b"]}
    return adapters
