"""The grids by name: lists of cells. `benchmarks/protocol.md` says what each is for."""

from collections.abc import Callable, Iterable, Mapping
from itertools import product

from benchmarks.cells.rows import Cell

SEEDS = (3, 4, 5, 6, 7)
"""Seeds 0 to 2 are for development: placement, sizes and the scale prior were chosen on them."""

MINIMUM = (
    "untouched base",
    "LoRA, 20 epochs",
    "LoRA, careful",
    "core Laplace",
    "core Gaussian",
    "core MAP",
    "core NUTS",
    "LoRA, 3 epochs",
    "Laplace-LoRA",
    "MAP",
    "MC dropout",
    "core network",
)
"""Methods of the grid that is committed; those that share a fit follow one another."""

CHEAP = ("untouched base", "LoRA, 20 epochs", "LoRA, careful", "core Laplace", "core Gaussian")
OTHERS = (
    "Bayesian-LoRA, published",
    "ScalaBL",
    "LoRA, label smoothing",
    "BLoB",
    "deep ensemble",
    "SWAG",
    "TFB",
    "core SiteFlow",
)
SIZES: Mapping[str, int] = {"vader": 560, "arc_easy": 80, "openbookqa": 80}
"""Labelled rows of each task in the minimal grid. Steps on questions take far longer."""


def _cells(
    methods: Iterable[str], sizes: Iterable[tuple[str, int]], seeds: Iterable[int] = SEEDS, **options: object
) -> list[Cell]:
    crossed = product(sizes, seeds, methods)
    return [Cell(task, method, size, seed, options) for (task, size), seed, method in crossed]


def smoke() -> list[Cell]:
    """A few cells of few rows, to see that everything works."""
    methods = ("untouched base", "LoRA, 3 epochs", "core Laplace")
    return _cells(methods, [("vader", 80)], seeds=(0,))


def minimum() -> list[Cell]:
    """Three tasks, one size, five seeds, twelve methods."""
    return _cells(MINIMUM, SIZES.items())


def methods() -> list[Cell]:
    """The methods that the minimal grid leaves out."""
    return _cells(OTHERS, SIZES.items())


def sizes() -> list[Cell]:
    """The cheap methods at other numbers of labelled rows."""
    return _cells(CHEAP, product(SIZES, (80, 320, 1280)))


def sets() -> list[Cell]:
    """The cheap methods on the other sets of the paper, at sizes of its own where it has them."""
    return _cells(CHEAP, [("arc_challenge", 320), ("winogrande", 640), ("boolq", 320)])


def shifts() -> list[Cell]:
    """The cheap methods under far shifts: medical questions, and news of unseen topics."""
    return _cells(CHEAP, [("medical", 320), ("reuters", 320)])


def ablations() -> list[Cell]:
    """What results depend on: frames, scales, placement, layers and draws; the source of noise; the rank."""
    rows = [("vader", SIZES["vader"])]
    changes: list[dict[str, object]] = [
        *({"size": {"q_proj": 8, "k_proj": 8, "v_proj": n}} for n in (8, 16, 64)),
        {"targets": ["v_proj", "o_proj"]},
        {"targets": ["q_proj", "lm_head"]},
        {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "slope"]},
        *({"source": source} for source in ("activations", "weights", "random")),
        {"scales_by": "validation"},
        *({"layers": n} for n in (1, 4)),
        *({"draws": n} for n in (4, 16, 256)),
        *({"within": n} for n in (1.0, 4.0)),
    ]
    cells = [cell for change in changes for cell in _cells(["core Laplace"], rows, **change)]
    sources = ("both", "inducing", "conditional")
    cells += [cell for n in sources for cell in _cells(["Bayesian-LoRA, published"], rows, noise=n)]
    return cells + [cell for rank in (2, 32) for cell in _cells(["LoRA, 20 epochs"], rows, rank=rank)]


GRIDS: Mapping[str, Callable[[], list[Cell]]] = {
    grid.__name__: grid for grid in (smoke, minimum, methods, sizes, sets, shifts, ablations)
}
"""A function that lists the cells, by the name of its grid."""
