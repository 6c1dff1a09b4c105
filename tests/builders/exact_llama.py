"""The tiny Llama once more in NumPy and float64, with updates of whole kernels, and its exact derivatives."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import bnlora as bl
from bnlora.adapters.sites import HEAD
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.rotary import rotary_frequencies

CONFIG = DecoderConfig(
    vocab_size=40, d_model=16, d_ff=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, rope_theta=1e4,
    norm_eps=1e-5, tied=False, max_length=64,
)  # fmt: skip
Updates = Mapping[tuple[str, int], np.ndarray]
"""dW (d_out, d_in) by module and layer; of the head the label rows, at layer 0."""


def logits(
    base: bl.Base,
    label_ids: tuple[int, ...],
    tokens: np.ndarray,
    updates: Updates,
    met: dict[tuple[str, int], np.ndarray] | None = None,
) -> np.ndarray:
    """Logits of the label tokens after the last of some tokens, none of them padding; `met` gets inputs."""
    met = {} if met is None else met
    module, config = base.module, base.config
    weights = {name: np.asarray(w[...], np.float64) for name, w in module.layers.items()}
    embedding = np.asarray(module.embedding[...], np.float64)
    angles = np.arange(len(tokens))[:, None] * rotary_frequencies(config.head_dim, config.rope_theta)
    causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
    x = embedding[tokens]
    for layer in range(config.num_layers):

        def dense(name: str, x: np.ndarray, layer: int = layer) -> np.ndarray:
            met[name, layer] = x
            return x @ (weights[name][layer] + np.asarray(updates.get((name, layer), 0.0)).T)

        def heads(name: str, x: np.ndarray, dense=dense) -> np.ndarray:
            split = dense(name, x).reshape(len(x), -1, config.head_dim)
            return np.repeat(split, config.num_heads // split.shape[1], axis=1)

        normal = _normal(x, weights["attention_norm"][layer], config.norm_eps)
        query, key = (_turned(heads(name, normal), angles) for name in ("q_proj", "k_proj"))
        scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(config.head_dim)
        scores = np.exp(np.where(causal, scores, -np.inf))
        shares = scores / scores.sum(2, keepdims=True)
        attended = np.einsum("hts,shd->thd", shares, heads("v_proj", normal)).reshape(len(x), -1)
        x = x + dense("o_proj", attended)
        normal = _normal(x, weights["mlp_norm"][layer], config.norm_eps)
        gate = dense("gate_proj", normal)
        x = x + dense("down_proj", gate / (1 + np.exp(-gate)) * dense("up_proj", normal))
    table = embedding if module.lm_head is None else np.asarray(module.lm_head[...], np.float64)
    rows = table[list(label_ids)] + updates.get((HEAD, 0), 0.0)
    met[HEAD, 0] = _normal(x[-1:], np.asarray(module.final_norm[...], np.float64), config.norm_eps)
    return rows @ met[HEAD, 0][0]


def _normal(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def jacobians(base: bl.Base, label_ids: tuple[int, ...], batch: bl.Batch) -> dict[str, np.ndarray]:
    """d logit / d W of every module, (row, class, layer, d_out, d_in), in the weights of an untied base."""
    assert base.module.lm_head is not None, "the embedding must not move with the head"

    def of_row(params, row: bl.Batch) -> jax.Array:
        module, row = base.bind(params), jax.tree.map(lambda x: x[None], row)
        hidden = module.blocks(
            module.embed(row.tokens), row.mask, first_layer=0, stop=base.num_layers, at=row.last[:, None]
        )
        return module.head(hidden[:, 0])[0, jnp.asarray(label_ids)]

    slopes = jax.jit(jax.vmap(jax.jacrev(of_row), in_axes=(None, 0)))(base.weights, batch)
    dense = [name for name in base.modules if name != HEAD]
    found = {name: np.asarray(slopes["layers"][name][...], np.float64).swapaxes(3, 4) for name in dense}
    return found | {HEAD: np.asarray(slopes["lm_head"][...], np.float64)[:, :, None, list(label_ids)]}
