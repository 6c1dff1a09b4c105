"""Whether an optimiser treats all numbers alike, so that it can get one long vector instead of many arrays.

Most rules of optax do: sgd, adam, adamw, rmsprop, lion. On one vector such a rule is a few operations. On
eighty arrays it is eighty times as many, and all must be compiled. Some rules do not: those with a norm for
each array (lars, adafactor) or a mask by name or shape. They must get the arrays themselves.

The check compares expressions. `init` and `update` are traced, not run, once on the arrays and once on a
vector. The result for an entry is an expression in this entry's gradient, state and value, and in numbers
that all entries share. The rule is entrywise if these expressions are equal for every array and the vector.
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.extend import core

PROBE = 13
"""Length of the vector in the comparison; any number that is not a size within a state."""

ENTRYWISE = frozenset(
    """abs add and cbrt clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
    is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign sin sqrt
    square stop_gradient sub tanh xor""".split()
)
"""Primitives that compute each entry of the result from the same entry of their arguments."""

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"})

_Value = tuple[int, int | None]
"""The number of an expression, and the array on whose entries it depends (None for a shared number)."""


class _NotEntrywise(Exception):
    """An entry depends on other entries, or on an operation that this module does not know."""


def is_entrywise(rule: optax.GradientTransformation, values: Any) -> bool:
    """Whether a rule does the same for every entry of the arrays as for every entry of a vector.

    Args:
        rule: The optimiser.
        values: A tree of arrays or shapes, the parameters.

    Returns:
        True only if it is certain; False for rules that fail on a vector.
    """
    types = {leaf.dtype for leaf in jax.tree.leaves(values)}
    if len(types) != 1:
        return False
    known: dict[Any, int] = {}
    vector = jax.ShapeDtypeStruct((PROBE,), types.pop())
    try:
        return _Traced(rule, vector, known).of(values) == _Traced(rule, vector, known).of(vector)
    except Exception:  # a rule may raise any error on arrays that it was not written for
        return False


class _Traced:
    """The expressions of a rule's `init` and `update`; equal expressions have the same number in `known`."""

    def __init__(self, rule: optax.GradientTransformation, vector: jax.ShapeDtypeStruct, known: dict):
        self.rule, self.known = rule, known
        like = jax.eval_shape(rule.init, vector)
        self.structure: Any = jax.tree.structure(like)
        self.is_own = [leaf.shape == vector.shape for leaf in jax.tree.leaves(like)]
        if any(leaf.shape not in ((), vector.shape) for leaf in jax.tree.leaves(like)):
            raise _NotEntrywise

    def of(self, values: Any) -> list[int]:
        """The expressions of the start of the state, of the update, and of the next state."""
        values = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
        state, number = jax.eval_shape(self.rule.init, values), len(jax.tree.leaves(values))

        def symbols(name: str) -> list[_Value]:
            return [(self._number(name), i) for i in range(number)]

        begin = self._run(jax.make_jaxpr(self.rule.init)(values), symbols("value"))
        memory: list[_Value] = []
        for part, own in enumerate(self.is_own):
            memory += symbols(f"state {part}") if own else [(self._number(f"state {part}"), None)]
        arguments = [*symbols("gradient"), *memory, *symbols("value")]
        update = self._run(jax.make_jaxpr(self.rule.update)(values, state, values), arguments)
        after = jax.eval_shape(self.rule.update, values, state, values)[1]
        return [
            *self._by_part(state, values, begin),
            self._one(update[:number], own=True),
            *self._by_part(after, values, update[number:]),
        ]

    def _by_part(self, state: Any, values: Any, results: list[_Value]) -> list[int]:
        """The expression of each part of a state, which is a shared number or a tree like the parameters."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(values)]
        expressions = []
        for part, own in zip(self.structure.flatten_up_to(state), self.is_own, strict=True):
            leaves = jax.tree.leaves(part)
            if [leaf.shape for leaf in leaves] != (shapes if own else [()]):
                raise _NotEntrywise
            expressions.append(self._one(results[: len(leaves)], own=own))
            results = results[len(leaves) :]
        return expressions

    def _one(self, results: list[_Value], *, own: bool) -> int:
        """The common expression of some results, of which each may depend only on its own array."""
        if any(owner not in ((None, i) if own else (None,)) for i, (_, owner) in enumerate(results)):
            raise _NotEntrywise
        (number,) = {number for number, _ in results}
        return number

    def _number(self, expression: Any) -> int:
        return self.known.setdefault(expression, len(self.known))

    def _run(self, program: core.ClosedJaxpr, arguments: list[_Value]) -> list[_Value]:
        """The expressions of a program's results from those of its arguments."""
        jaxpr = program.jaxpr
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= {v: self._constant(x) for v, x in zip(jaxpr.constvars, program.consts, strict=True)}

        def read(variable: Any) -> _Value:
            return self._constant(variable.val) if hasattr(variable, "val") else values[variable]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(v) for v in equation.invars])
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _constant(self, value: Any) -> _Value:
        if isinstance(value, jax.core.Tracer) or np.ndim(value) > 0:
            raise _NotEntrywise
        array = np.asarray(value)
        return self._number(("constant", array.dtype.str, array.tobytes())), None

    def _equation(self, equation: Any, arguments: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self._run(params.get("jaxpr") or params["call_jaxpr"], arguments)
        if name == "broadcast_in_dim" and equation.invars[0].aval.shape in ((), params["shape"]):
            return arguments
        if name not in ENTRYWISE:
            raise _NotEntrywise
        owners = {owner for _, owner in arguments} - {None}
        if len(owners) > 1:
            raise _NotEntrywise
        settings = tuple(sorted((key, str(value)) for key, value in params.items()))
        number = self._number((name, settings, tuple(expression for expression, _ in arguments)))
        return [(number, owners.pop() if owners else None)]
