r"""A posterior as adapters of the `peft` library: its mean, some draws, and a card that says what they are.

Factors are not identifiable, so the mean is that of the update, cut to the rank r of the sites:

    M = 1/S sum_s scale b_s a_s = [b_1, ..., b_S] [a_1; ...; a_S] scale / S,      M ~ U_r D_r V_r^T

by the singular value decomposition of the product of two thin factors; the full update is never formed.

An adapter of the head with only the rows of the label words gets zeros for all other words. The classes keep
their probabilities.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_at_least, check_key
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora._util.typing import Adapters
from bnlora.adapters.peft import require_named, write
from bnlora.adapters.sites import HEAD, Site
from bnlora.data.batch import Batch
from bnlora.prediction.posterior import PointPosterior, Posterior
from bnlora.prediction.predict import all_equal, drawn_outputs, log_likelihood_by_draw, log_mixture
from bnlora.program.likelihoods import PARAMETERS
from bnlora.program.model import kind_of

CARD = "README.md"


@dataclass(frozen=True)
class Export(Shown):
    """What `export_peft` wrote.

    Attributes:
        mean: Folder of the mean.
        draws: Folders of the draws.
        retained: Share of the squared norm of the mean update that the rank of the sites keeps, by family.
        nll: Negative log-likelihood of a row of the given data, in nats, under the posterior and under the
            exported mean; empty without data.

    Example:
        >>> export = bl.export_peft(key, fit, folder / "mean-only", mean_of=4)
        >>> export.draws, export.nll, export.retained["lm_head"] <= 1
        ((), {}, True)
    """

    mean: Path
    draws: tuple[Path, ...]
    retained: dict[str, float]
    nll: dict[str, float]

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Folders, what the rank keeps, and what the mean loses."""
        about = {"mean": str(self.mean), "draws": str(len(self.draws))}
        about |= {f"nll of a row, {name} (nats)": f"{value:.4f}" for name, value in self.nll.items()}
        rows = tuple((name, f"{share:.4f}") for name, share in self.retained.items())
        return (
            facts("Export for peft", about),
            Table("Mean update", ("family", "share of its squared norm at this rank"), rows),
        )

    def __repr__(self) -> str:
        loss = "".join(f", nll of the {name} {value:.4f}" for name, value in self.nll.items())
        return f"Export({self.mean}, {len(self.draws)} draws{loss})"


def export_peft(
    key: Array,
    posterior: Posterior,
    folder: str | Path,
    *,
    num_draws: int = 0,
    mean_of: int = 100,
    data: Batch | None = None,
    console: Console | None = None,
) -> Export:
    """Write a posterior for `peft`: `folder/mean`, `folder/draw-000`, ..., and a card, `folder/README.md`.

    Args:
        key: Random key of the draws.
        posterior: A posterior of adapters. Of a tangent posterior only the mean can be written.
        folder: Folder to write to; it is created if necessary.
        num_draws: Number of draws to write, each an adapter of its own.
        mean_of: Number of draws whose mean update is written.
        data: Rows with outcomes, on which posterior and mean are compared. Required for a tangent posterior,
            because its mean belongs to another model than the network.
        console: Where to draw progress bars; the terminal or notebook when omitted.

    Returns:
        The folders, what the rank of the sites keeps of the mean update, and both negative log-likelihoods.

    Raises:
        ValueError: If a tangent posterior is given without data or with draws, the base stores several
            modules fused or is an encoder whose head does not read the pooling layer, or a number is out of
            its range.

    Example:
        >>> rows_of_words = bl.export_peft(key, fit, folder / "export", num_draws=2, mean_of=4, data=rows)
        >>> [path.name for path in (rows_of_words.mean, *rows_of_words.draws)], sorted(rows_of_words.nll)
        (['mean', 'draw-000', 'draw-001'], ['mean', 'posterior'])
    """
    key = check_key(key)
    check_at_least({"num_draws": num_draws}, 0)
    check_at_least({"mean_of": mean_of}, 1)
    model: Any = posterior.model
    require_named(model.base)
    tangent = kind_of(model) == "tangent"
    if tangent and (num_draws or data is None):
        raise ValueError(
            "of a tangent posterior only the mean can be exported, with `data` on which it is measured; "
            "its draws belong to the linear model, and the network is far too uncertain under them"
        )
    network = model.network if tangent else model
    drawn = posterior.draw_adapters(key, max(mean_of, num_draws))
    mean, retained = mean_update(network.sites, jax.tree.map(lambda x: x[:mean_of], drawn))
    place = Path(folder).expanduser()
    _write(place / "mean", network, mean)
    folders = [place / f"draw-{index:03d}" for index in range(num_draws)]
    for index, path in enumerate(folders):
        _write(path, network, jax.tree.map(lambda x, i=index: x[i], drawn))
    nll = {}
    if data is not None:
        model.check_outcomes("given", data)
        point = PointPosterior(network, mean)
        for name, one, count in (("posterior", posterior, min(mean_of, 32)), ("mean", point, 1)):
            outputs = drawn_outputs(key, one, data, num_draws=count, batch_size=32, console=console)
            by_draw = log_likelihood_by_draw(one.model, outputs, data)
            nll[name] = -float(log_mixture(by_draw).mean())
    export = Export(place / "mean", tuple(folders), retained, nll)
    (place / CARD).write_text(_card(posterior, export, None if data is None else len(data)), encoding="utf-8")
    return export


def mean_update(sites: Any, drawn: Adapters) -> tuple[Adapters, dict[str, float]]:
    """The mean update of draws at the rank of the sites, and the share of its squared norm, by family.

    Args:
        sites: The sites.
        drawn: Adapters with a leading draw axis.

    Returns:
        Adapters without that axis, and shares from 0 to 1. Parameters of the likelihood are averaged.
    """
    if all_equal(drawn):
        return jax.tree.map(lambda x: jnp.asarray(x[0]), drawn), dict.fromkeys(sites, 1.0)
    mean: dict[str, Any] = {}
    retained = {}
    for name, site in sites.items():
        layers = [_mean_of_layer(drawn[name], site, index) for index in range(site.depth)]
        mean[name] = {
            "a": jnp.asarray(np.stack([a for a, _, _ in layers])),
            "b": jnp.asarray(np.stack([b for _, b, _ in layers]) / site.scale),
        }
        kept, whole = np.sum([norms for _, _, norms in layers], axis=0)
        retained[name] = float(kept / whole) if whole else 1.0
    if PARAMETERS in drawn:
        mean[PARAMETERS] = {n: jnp.asarray(np.asarray(x).mean(0)) for n, x in drawn[PARAMETERS].items()}
    return mean, retained


def _mean_of_layer(
    drawn: Any, site: Site, index: int
) -> tuple[Float[np.ndarray, "r i"], Float[np.ndarray, "o r"], tuple[float, float]]:
    """Factors of the mean of `scale b a` at the site's rank, and squared norms: kept, whole."""
    a, b = (np.asarray(drawn[factor][:, index], np.float64) for factor in ("a", "b"))
    count = len(a)
    inner = a.reshape(-1, a.shape[2])  # (draws x r, d_in)
    outer = np.swapaxes(b, 0, 1).reshape(b.shape[1], -1) * (site.scale / count)  # (d_out, draws x r)
    left, first = np.linalg.qr(outer)
    right, second = np.linalg.qr(inner.T)
    u, singular, vt = np.linalg.svd(first @ second.T)
    root = np.sqrt(singular[: site.rank])
    width = len(root)
    out_factor = np.zeros((b.shape[1], site.rank))
    in_factor = np.zeros((site.rank, a.shape[2]))
    out_factor[:, :width] = left @ u[:, :width] * root
    in_factor[:width] = root[:, None] * (vt[:width] @ right.T)
    squared = singular**2
    norms = float(squared[: site.rank].sum()), float(squared.sum())
    return in_factor.astype(np.float32), out_factor.astype(np.float32), norms


def _write(folder: Path, model: Any, adapters: Adapters) -> None:
    """Write one adapter, the head with all rows of the vocabulary."""
    base, sites = model.base, model.sites
    rows = base.modules[HEAD][1]
    whole = {name: adapters[name] for name in sites}
    for name, site in sites.items():
        if site.module == HEAD and site.d_out != rows:
            b = np.zeros((1, rows, site.rank), np.float32)
            b[:, list(model.label_ids)] = np.asarray(adapters[name]["b"])
            whole[name] = {"a": adapters[name]["a"], "b": jnp.asarray(b)}
    write(folder, whole, sites.with_head_rows(rows), base)


def _card(posterior: Posterior, export: Export, rows: int | None) -> str:
    """The model card, in Markdown."""
    model: Any = posterior.model
    name, kind = model.base.name, kind_of(model)
    lines = [
        f"---\nbase_model: {name}\nlibrary_name: peft\n---",
        f"# Adapters of {name}\n",
        f"Written by bnlora {version('bnlora')} from a posterior of a {kind}: {type(posterior).__name__}.\n",
        "- `mean` is the mean of the update over draws of the posterior, at the rank below. It is one "
        "adapter: its predictions have no epistemic uncertainty and are more confident than the posterior's.",
    ]
    if export.draws:
        lines.append(
            f"- `draw-000` to `{export.draws[-1].name}` are draws of the posterior. Predict with each of "
            "them and average the *probabilities*."
        )
    if export.nll:
        lines.append(f"\nNegative log-likelihood of a row, on {rows} rows, in nats:\n")
        lines += [f"- {name}: {value:.4f}" for name, value in export.nll.items()]
    if kind == "tangent":
        lines.append("\nThe posterior is that of a linear model; `mean` runs in the network, another model.")
    lines.append("\n| family | layers | rank | share of the mean update kept |\n|---|---|---|---|")
    lines += [
        f"| {name} | {site.where} | {site.rank} | {export.retained[name]:.4f} |"
        for name, site in model.sites.items()
    ]
    lines.append("")
    lines += [f"Outcome: {name}, {value}." for name, value in model.likelihood.facts(model.base).items()]
    return "\n".join(lines) + "\n"
