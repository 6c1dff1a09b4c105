r"""Laws of priors written with NumPy and scipy.stats alone, for `test_prior_contract.py`.

A law of one factor has three parts: `density`, the log-densities of its sample sites by suffix; `marginal`,
the CDF of every weight; `joint`, the correlations of the scores of all its weights. Scores are normal scores
z = Phi^-1(F(w)): their correlations are those of `w` where the weights are Gaussian, and zero where they are
independent. Weights that share a random scale are dependent, but their signs are independent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from scipy import stats

from bnlora.adapters.frames import Frame, Frames
from bnlora.adapters.sites import Site, Sites, select
from bnlora.base import Base
from bnlora.priors.base import Prior
from bnlora.priors.sides import JITTER
from bnlora.testing import tiny_base

SCALE = {"a": 0.5, "b": 2.0}
KEY = jax.random.key(3)
TINY = Base.random(
    KEY, replace(tiny_base(KEY, num_layers=2).config, d_model=6, num_heads=2, num_kv_heads=1, head_dim=2)
)
"""A language model whose factors have few weights: all pairs of them are compared."""
ONE = select(TINY, ["q_proj"], rank=2)
TWO = select(TINY, ["q_proj", "lm_head"], rank=2).with_head_rows(3)
DRAW = np.random.default_rng(1)
FRAMES = {
    "q_proj.a": (DRAW.normal(size=(2, 2, 2)), DRAW.normal(size=(2, 6, 3))),
    "q_proj.b": (DRAW.normal(size=(2, 4, 3)), DRAW.normal(size=(2, 2, 2))),
}
"""Frames of one's own for `ONE` with three inducing rows and columns, clipped to their sides."""


def core_frames(sites: Sites) -> Frames:
    """Frames of a core prior for sites of rank two: orthonormal at random, with units that are not one."""
    families = {}
    for (name, site), unit in zip(sites.items(), (1.7, 0.6), strict=True):
        normal = (DRAW.normal(size=(site.depth, d, 2)) for d in (site.d_out, site.d_in))
        families[name] = Frame(*(np.linalg.qr(x)[0] for x in normal), unit)
    return Frames(families, sites, (3, 7, 9), "given", True, np.zeros(0))


CORE = core_frames(TWO)


@dataclass(frozen=True)
class At:
    """One factor of one family in a run of a prior; values (parameters too) are found by suffix."""

    values: Mapping[str, np.ndarray]
    site: Site
    factor: str

    def __getitem__(self, suffix: str) -> np.ndarray:
        return np.asarray(self.values[f"{self.site.name}.{self.factor}{suffix}"], np.float64)

    def __contains__(self, suffix: str) -> bool:
        return f"{self.site.name}.{self.factor}{suffix}" in self.values

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.site.shapes[self.factor]

    @property
    def sigma(self) -> float:
        return SCALE[self.factor] / self.shape[-1] ** 0.5

    def K(self, side: str, layer: int) -> np.ndarray:
        """The paper's K = Z Z^T + D^2, jitter included."""
        Z, D = self[f".{side}.Z"][layer], self[f".{side}.D"][layer]
        return Z @ Z.T + np.diag(D**2 + JITTER)

    def F(self, side: str, layer: int) -> np.ndarray:
        """A factor of P = F F^T: Q sqrt(p) with the frame's sign, or Z^T L^-T."""
        if f".{side}.Z" in self:
            root = np.linalg.cholesky(self.K(side, layer))
            return np.linalg.solve(root, self[f".{side}.Z"][layer]).T
        if f".{side}.frame" in self:
            free, p = self[f".{side}.frame"], self[f".{side}.reliability"]
        else:
            free = np.asarray(FRAMES[f"{self.site.name}.{self.factor}"][side == "cols"], np.float64)
            p = np.full(free.shape[::2], 0.95)
        layer = min(layer, len(free) - 1)
        Q, R = np.linalg.qr(free[layer])
        return Q * np.sign(np.diag(R)) * np.sqrt(p[layer])

    def PP(self, layer: int) -> np.ndarray:
        """`P_r (x) P_c` of a layer."""
        return np.kron(*(self.F(side, layer) @ self.F(side, layer).T for side in ("rows", "cols")))


Of = Callable[[At], Any]


@dataclass(frozen=True)
class Member:
    """A prior and its law; `weights` is the factor as a function of its sites, where that is short."""

    prior: Prior
    density: Callable[[At], dict[str, np.ndarray]]
    marginal: Callable[[At], Callable[[np.ndarray], np.ndarray]] | None = None
    joint: Callable[[At], np.ndarray] | None = lambda at: np.eye(int(np.prod(at.shape)))
    score: Callable[[np.ndarray, Callable], np.ndarray] = lambda w, cdf: stats.norm.ppf(cdf(w))
    sites: Sites = ONE
    weights: Callable[[At], np.ndarray] | None = None
    symbols: tuple[str, ...] | None = None

    def parts(self, site: Site) -> tuple[str, ...]:
        """What follows the family in the names of sites: its factors, or the symbols of what makes both."""
        return site.factors if self.symbols is None else self.symbols


def signs(w, cdf):
    return np.sign(w)


# ---- densities of sites ---------------------------------------------------------------------------------


def white(*suffixes):
    return lambda at: {s: stats.norm.logpdf(at[s]) for s in suffixes}


def entries(law):
    return lambda at: {"": law(at).logpdf(at[""])}


def extended(density, **laws):
    """A density and those of hyper-parameters beside it."""
    return lambda at: density(at) | {f".{name}": law.logpdf(at[f".{name}"]) for name, law in laws.items()}


def factors(*, a: Of, b: Of) -> Of:
    return lambda at: {"a": a, "b": b}[at.factor](at)


def inducing(at):
    K = [(at.K("rows", layer), at.K("cols", layer)) for layer in range(at.shape[0])]
    laws = [stats.matrix_normal(rowcov=K_r, colcov=K_c) for K_r, K_c in K]
    U = np.array([law.logpdf(u) for law, u in zip(laws, at[".U"], strict=True)])
    return {".U": U, ".E": stats.norm.logpdf(at[".E"])}


def conditional(lam):
    def density(at):
        W = []
        for layer, (V, w) in enumerate(zip(at[".V"], at[".W"], strict=True)):
            mean = at.sigma * at.F("rows", layer) @ V @ at.F("cols", layer).T
            Sigma = (lam * at.sigma) ** 2 * (np.eye(w.size) - at.PP(layer))
            W.append(stats.multivariate_normal(mean.ravel(), Sigma).logpdf(w.ravel()))
        return {".V": stats.norm.logpdf(at[".V"]), ".W": np.array(W)}

    return density


def spike_mixture(at, inclusion, method):
    slab, spike = stats.norm(0, at.sigma), stats.norm(0, 0.1 * at.sigma)
    return lambda w: inclusion * getattr(slab, method)(w) + (1 - inclusion) * getattr(spike, method)(w)


def spiky_cdf(inclusion):
    return lambda at: spike_mixture(at, inclusion, "cdf")


def spiky(inclusion):
    return lambda at: {"": np.log(spike_mixture(at, inclusion(at), "pdf")(at[""]))}


# ---- laws of weights ------------------------------------------------------------------------------------


def gaussian(covariance: Callable[[At], np.ndarray]) -> dict:
    """Margins and correlations of Gaussian weights."""

    def sd(at):
        return np.sqrt(np.diag(covariance(at)))

    return {
        "marginal": lambda at: stats.norm(0, sd(at)).cdf,
        "joint": lambda at: covariance(at) / np.outer(sd(at), sd(at)),
    }


def gp_law(lam: Callable[[At], float] = lambda at: 1.0, rho: Callable[[At], float] = lambda at: 0.0):
    """sigma^2 (lam^2 I + (1 - lam^2) P_r (x) P_c) in a layer, rho sigma^2 P_r (x) P_c between two."""

    def covariance(at):
        depth, n = at.shape[0], at.shape[1] * at.shape[2]
        C = np.zeros((depth, n, depth, n))
        for i in range(depth):
            for j in range(depth):
                within = (
                    lam(at) ** 2 * np.eye(n) + (1 - lam(at) ** 2) * at.PP(i) if lam(at) < 1 else np.eye(n)
                )
                C[i, :, j] = within if i == j else (rho(at) * at.PP(i) if rho(at) else 0.0)
        return at.sigma**2 * C.reshape(depth * n, depth * n)

    return gaussian(covariance)


IID = gp_law()


def times(value: float) -> dict:
    """Independent normals whose scale is multiplied by a number."""
    return {"marginal": lambda at: stats.norm(0, at.sigma * value).cdf}


def mixture(law=stats.norm, **nodes) -> Callable[[At], Callable]:
    """CDF of sigma s z with s random: a quadrature rule over s."""

    def marginal(at):
        pairs = list(zip(nodes["s"](at), nodes["weight"], strict=True))
        return lambda w: sum(p * law.cdf(w / (at.sigma * s)) for s, p in pairs)

    return marginal


def quantiles(law, count: int = 60) -> dict:
    """Gauss-Legendre over the quantiles of s; 60 nodes leave 2e-5 of the CDF, where draws resolve 2e-2."""
    u, weight = np.polynomial.legendre.leggauss(count)
    return {"s": lambda at: law.ppf((u + 1) / 2), "weight": weight / 2}


def log_normal(spread: float) -> dict:
    z, weight = np.polynomial.hermite_e.hermegauss(40)
    return {"s": lambda at: np.exp(spread * z), "weight": weight / (2 * np.pi) ** 0.5}


def log_normal_mixture(law) -> dict:
    """The same with a random spread."""
    z, weight = np.polynomial.hermite_e.hermegauss(40)
    u, other = np.polynomial.legendre.leggauss(20)
    s = np.exp(law.ppf((u[:, None] + 1) / 2) * z)
    return {"s": lambda at: s.ravel(), "weight": np.outer(other / 2, weight / (2 * np.pi) ** 0.5).ravel()}


X = np.linspace(-30, 30, 121)
HALF_CAUCHYS = 2 / np.pi**2 * np.where(X == 0, 1, X / np.sinh(np.where(X == 0, 1, X))) * (X[1] - X[0])
"""Density of the logarithm of a product of two half-Cauchy variables, (2 / pi^2) x / sinh x, as a rule."""


def slab_law(slab: float):
    """c^2 with four degrees of freedom."""
    return stats.invgamma(2.0, scale=2.0 * slab**2)


def horseshoe(slab: float | None = None) -> Callable:
    free = 0.5 * np.exp(X)
    if slab is None:
        return mixture(s=lambda at: free, weight=HALF_CAUCHYS)
    u, weight = np.polynomial.legendre.leggauss(20)
    c2 = slab_law(slab).ppf((u + 1) / 2)
    s = free[:, None] / np.sqrt(1 + free[:, None] ** 2 / c2)
    return mixture(s=lambda at: s.ravel(), weight=(HALF_CAUCHYS[:, None] * weight / 2).ravel())


def some_lam(at):
    """lam uniform on (0, 1), with entries of unequal spread."""
    u, weight = np.polynomial.legendre.leggauss(12)
    lam = (u + 1) / 2
    p = np.concatenate([np.diag(at.PP(layer)) for layer in range(at.shape[0])])
    rule = list(zip(lam, weight / 2, strict=True))
    return lambda w: sum(q * stats.norm.cdf(w, 0, at.sigma * np.sqrt(m**2 + (1 - m**2) * p)) for m, q in rule)


def plain(at):
    return stats.norm(0, at.sigma)


def laplace(at):
    return stats.laplace(0, at.sigma / 2**0.5)


def unit_laplace(at):
    return {".z": stats.laplace(scale=0.5**0.5).logpdf(at[".z"])}


def laplace_mixture(law):
    return mixture(stats.laplace(scale=0.5**0.5), **quantiles(law))


def scaled(value: float):
    return lambda at: stats.norm(0, at.sigma * value)


def families(**by_name):
    """A law for each family."""
    return lambda at: by_name[at.site.name](at)


# ---- weights as functions of sites ----------------------------------------------------------------------


def direct(at):
    return at[""]


def noncentred(at):
    return at.sigma / SCALE[at.factor] * at[".scale"] * at[".z"]


def gained(gain: Of) -> Of:
    """Priors that weigh ranks: gains of shape (layer, rank) on the columns of `b`."""
    return factors(a=direct, b=lambda at: gain(at)[:, None, :] * at[""])


def cored(scale: Of) -> Of:
    """a = R^T and b = s / unit L U, for every layer by itself."""

    def weights(at):
        frame, U = CORE[at.site.name], at.values[f"{at.site.name}.U"]
        spread = np.broadcast_to(scale(at) / frame.unit, len(U))
        pairs = zip(frame.left, U, spread, strict=True)
        b = np.array([s * L @ u for L, u, s in pairs]) * at.site.rank / at.site.alpha
        return {"a": np.array([R.T for R in frame.right]), "b": b}[at.factor]

    return weights


def of_family(symbol: str) -> Of:
    """The value of a family as a whole."""
    return lambda at: np.asarray(at.values[f"{at.site.name}.{symbol}"], np.float64)


def regularised(at):
    """Gains of the regularised horseshoe, as Piironen and Vehtari write them."""
    local, c2 = at[".local"], at[".slab"]
    return at[".tau"] * np.sqrt(c2 * local**2 / (c2 + at[".tau"] ** 2 * local**2))


def pooled(spread: Of) -> Of:
    return gained(lambda at: np.exp(spread(at) * at[".pool"])[:, None])


def pooled_gp(rho: Of) -> Of:
    """sigma (F_r V F_c^T + Sigma^{1/2} E), with the symmetric root by an eigendecomposition."""

    def weights(at):
        layers = []
        for layer, (V, E) in enumerate(zip(at[".V"], at[".E"], strict=True)):
            p, Q = np.linalg.eigh(np.eye(E.size) - at.PP(layer))
            mixed = np.sqrt(rho(at)) * at[".V_0"] + np.sqrt(1 - rho(at)) * V
            noise = (Q @ (np.sqrt(p) * (Q.T @ E.ravel()))).reshape(E.shape)
            layers.append(at.F("rows", layer) @ mixed @ at.F("cols", layer).T + noise)
        return at.sigma * np.array(layers)

    return weights
