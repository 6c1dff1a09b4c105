"""Cost of the adapted product, on the available device.

Times "pallas" (the fused kernels) against "xla" (the reference compiled by XLA) and against the product x W
without adapters, a lower bound: forward with one adapter and with S draws over the same inputs, and the
gradient with one adapter. With the device's peaks (`--tflops`, `--gbs`), the table also has the fraction of
the roofline max(operations / peak rate, bytes / peak bandwidth). On a host without accelerator only "xla"
runs; `--ahead` counts the memory traffic on a TPU with its compiler instead (it needs `libtpu`).
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report
from benchmarks.timing import in_turn, spread
from bnlora.kernels import ahead, api

# (tokens, d_in, d_out): SmolLM2-135M's queries and feed-forward, and the same of a model of seven billion.
SIZES = [(512, 576, 576), (512, 576, 1536), (2048, 4096, 4096), (2048, 4096, 11_008)]
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def arrays(size: tuple[int, int, int], rank: int, draws: int, dtype: str) -> Arrays:
    """Inputs, kernel and adapters; adapters have a leading draw axis if there are several draws."""
    (m, k, n), front = size, (draws,) if draws > 1 else ()
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((m, k), (k, n), (*front, rank, k), (*front, n, rank))
    x, w, a, b = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True))
    return x, w, a, b


def forward(implementation: str, draws: int) -> Callable[..., jax.Array]:
    """The product, mapped over the draws if there are several."""
    apply = partial(api.lora_matmul, implementation=implementation)
    return jax.vmap(apply, in_axes=(None, None, 0, 0)) if draws > 1 else apply


def gradient(implementation: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Gradients of a sum of squares with respect to inputs and factors."""

    def total(x: jax.Array, a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.square(api.lora_matmul(x, w, a, b, implementation=implementation).astype("float32")).sum()

    return lambda x, w, a, b: jax.grad(total, argnums=(0, 1, 2))(x, a, b, w)


def roofline(size: tuple[int, int, int], rank: int, draws: int, itemsize: int) -> tuple[int, int]:
    """Operations and bytes of the forward pass if every array is moved once."""
    m, k, n = size
    operations = 2 * m * (k * n + draws * rank * (k + n))
    return operations, itemsize * (m * k + k * n + draws * (rank * (k + n) + m * n))


def called(function: Callable, inputs: Arrays) -> Callable[[int], jax.Array]:
    """The compiled function with these inputs, for `in_turn`."""
    compiled = jax.jit(function)
    return lambda _: compiled(*inputs)


def measure(given: argparse.Namespace, report: Report) -> None:
    """Rows of times: median, spread of the ratio to x W, and fraction of the roofline."""
    names = ["xla"] if jax.default_backend() == "cpu" else ["xla", "pallas"]
    header = ("m, d_in, d_out", "draws", "what", "median ms", "over x W (middle 80 %)", "roofline")
    table = report.table(f"Seconds on {jax.devices()[0].device_kind}", header)
    for size in SIZES[: given.sizes]:
        for draws in given.draws:
            inputs = arrays(size, given.rank, draws, given.dtype)
            functions: dict[str, Callable] = {"x W": lambda x, w, a, b: x @ w}
            functions |= {f"{name}, forward": forward(name, draws) for name in names}
            functions |= {f"{name}, gradient": gradient(name) for name in names} if draws == 1 else {}
            programs = {name: called(function, inputs) for name, function in functions.items()}
            times = {name: taken.wall for name, taken in in_turn(programs, given.rounds).items()}
            for name, seconds in times.items():
                median, ratio = float(np.median(seconds)), spread(seconds / times["x W"])
                share = fraction(given, size, draws, inputs[0].dtype.itemsize, median)
                known = share if name.endswith("forward") else ""
                table.row(sizes_text(size), draws, name, f"{1e3 * median:.3f}", ratio, known)


def sizes_text(size: tuple[int, int, int]) -> str:
    """The sizes of a product."""
    return ", ".join(map(str, size))


def fraction(
    given: argparse.Namespace, size: tuple[int, int, int], draws: int, itemsize: int, seconds: float
) -> str:
    """Fraction of the roofline, if the peaks are known."""
    if not (given.tflops and given.gbs):
        return ""
    operations, moved = roofline(size, given.rank, draws, itemsize)
    return f"{max(operations / given.tflops / 1e12, moved / given.gbs / 1e9) / seconds:.2f}"


def count(given: argparse.Namespace, report: Report) -> None:
    """Rows of counts by the TPU's compiler: megabytes moved, and the smallest possible number."""
    header = ("m, d_in, d_out", "draws", "W, MB", "least", "fused", "XLA's program", "ratio")
    table = report.table("Megabytes moved on a TPU", header)
    for size in SIZES[: given.sizes]:
        for draws in given.draws:
            shapes = jax.eval_shape(partial(arrays, size, given.rank, draws, given.dtype))
            _, least = roofline(size, given.rank, draws, shapes[0].dtype.itemsize)
            moved = {}
            for name in ("xla", "pallas"):
                moved[name] = ahead.cost(ahead.compile_for_tpu(forward(name, draws), *shapes)).bytes_accessed
            fused, plain = moved["pallas"], moved["xla"]
            weights = shapes[1].size * shapes[1].dtype.itemsize
            megabytes = [f"{value / 1e6:.1f}" for value in (weights, least, fused, plain)]
            table.row(sizes_text(size), draws, *megabytes, f"{fused / plain:.2f}")


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes, and the peaks of the device."""
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="number of sizes, from the first")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tflops", type=float, help="peak rate of the device, 10^12 operations a second")
    parser.add_argument("--gbs", type=float, help="peak bandwidth of its memory, 10^9 bytes a second")
    parser.add_argument("--ahead", action="store_true", help="count for a TPU instead of timing")


def run(given: argparse.Namespace, report: Report) -> None:
    """Time on this device, or count for a TPU."""
    (count if given.ahead else measure)(given, report)
