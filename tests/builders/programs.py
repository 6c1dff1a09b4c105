"""Reading compiled programs in tests: what is in them, without running them."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from bnlora.kernels.quantised import QuantisedMatrix


def walk(jaxpr: Any, *, into_kernels: bool = True) -> Iterator[Any]:
    """Every equation of a program, those of its loops and calls included, and of its kernels where wanted."""
    for equation in jaxpr.eqns:
        yield equation
        if into_kernels or equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner, into_kernels=into_kernels)


def kernel_calls(function: Any, *args: Any) -> list[dict[str, Any]]:
    """The parameters of every Pallas kernel in a function's program."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    return [e.params for e in walk(program, into_kernels=False) if e.primitive.name == "pallas_call"]


def product_shapes(sides: tuple[int, int, int, int], dtype: Any, *, draws: int = 0, eight_bits: bool = False):
    """Shapes of x, w, a and b for the sides m, d_in, d_out and rank of an adapted product."""
    m, k, n, rank = sides
    front = (draws,) if draws else ()
    w: Any = jax.ShapeDtypeStruct((k, n), dtype)
    if eight_bits:
        w = QuantisedMatrix(jax.ShapeDtypeStruct((k, n), "int8"), jax.ShapeDtypeStruct((n,), dtype))
    x, a, b = (jax.ShapeDtypeStruct(s, dtype) for s in ((m, k), (*front, rank, k), (*front, n, rank)))
    return x, w, a, b


FACTORISATIONS = {"qr", "geqrf", "householder_product", "cholesky", "eigh", "triangular_solve", "svd"}


def factorised(jaxpr):
    """Ranks of the operands of every matrix factorisation in a program and in its parts."""
    for equation in walk(jaxpr):
        if equation.primitive.name in FACTORISATIONS:
            yield equation.primitive.name, max(v.aval.ndim for v in equation.invars)
