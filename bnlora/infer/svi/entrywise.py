"""Whether an optimiser treats every number alike, so that it may see one long vector instead of many arrays.

Most rules of optax do: sgd, adam, adamw, rmsprop, lion. Then the rule of one vector is a few operations, and
that of eighty arrays is eighty times as many, all of which must be compiled. Some rules do not: those with a
norm by array (lars, adafactor) or a mask by name or shape. They must see the arrays as they are.

The proof is by expressions. `init` and `update` are traced, not run, once on the arrays and once on a
vector. What they compute for an entry is an expression in the entry's own gradient, state and value and in
numbers that all entries share. The rule is entrywise if these expressions are the same for every array and
the vector.
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.extend import core

PROBE = 13
"""Length of the vector in the comparison; any number that is no size of a state by itself will do."""

ENTRYWISE = frozenset(
    """abs add and cbrt clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
    is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign sin sqrt
    square stop_gradient sub tanh xor""".split()
)
"""Primitives that compute an entry of the result from the same entries of their arguments."""

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"})

_Value = tuple[int, int | None]
"""An expression by its number, and the array on whose entries it depends; None for a shared number."""


class _NotEntrywise(Exception):
    """An entry depends on others, or on what this module does not know."""


def is_entrywise(rule: optax.GradientTransformation, values: Any) -> bool:
    """Whether a rule does the same for every entry of some arrays as for every entry of a vector.

    Args:
        rule: The optimiser.
        values: A tree of arrays or shapes, the parameters.

    Returns:
        True only where it is certain; False for rules that fail on a vector.
    """
    types = {leaf.dtype for leaf in jax.tree.leaves(values)}
    if len(types) != 1:
        return False
    known: dict[Any, int] = {}
    vector = jax.ShapeDtypeStruct((PROBE,), types.pop())
    try:
        return _Traced(rule, vector, known).of(values) == _Traced(rule, vector, known).of(vector)
    except Exception:  # a rule may raise anything on arrays that it was not made for
        return False


class _Traced:
    """The expressions of a rule's `init` and `update`; equal ones have the same number in `known`."""

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
        given = [*symbols("gradient"), *memory, *symbols("value")]
        update = self._run(jax.make_jaxpr(self.rule.update)(values, state, values), given)
        after = jax.eval_shape(self.rule.update, values, state, values)[1]
        return [
            *self._by_part(state, values, begin),
            self._one(update[:number], own=True),
            *self._by_part(after, values, update[number:]),
        ]

    def _by_part(self, state: Any, values: Any, found: list[_Value]) -> list[int]:
        """The expression of each part of a state, which is a shared number or a tree like the parameters."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(values)]
        expressions = []
        for part, own in zip(self.structure.flatten_up_to(state), self.is_own, strict=True):
            leaves = jax.tree.leaves(part)
            if [leaf.shape for leaf in leaves] != (shapes if own else [()]):
                raise _NotEntrywise
            expressions.append(self._one(found[: len(leaves)], own=own))
            found = found[len(leaves) :]
        return expressions

    def _one(self, found: list[_Value], *, own: bool) -> int:
        """The expression that some results have in common, each one of its own array at most."""
        if any(owner not in ((None, i) if own else (None,)) for i, (_, owner) in enumerate(found)):
            raise _NotEntrywise
        (number,) = {number for number, _ in found}
        return number

    def _number(self, expression: Any) -> int:
        return self.known.setdefault(expression, len(self.known))

    def _run(self, program: core.ClosedJaxpr, given: list[_Value]) -> list[_Value]:
        """The expressions of a program's results from those of its arguments."""
        jaxpr = program.jaxpr
        found: dict[Any, _Value] = dict(zip(jaxpr.invars, given, strict=True))
        found |= {v: self._constant(x) for v, x in zip(jaxpr.constvars, program.consts, strict=True)}

        def read(variable: Any) -> _Value:
            return self._constant(variable.val) if hasattr(variable, "val") else found[variable]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(v) for v in equation.invars])
            found |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _constant(self, value: Any) -> _Value:
        if isinstance(value, jax.core.Tracer) or np.ndim(value) > 0:
            raise _NotEntrywise
        array = np.asarray(value)
        return self._number(("constant", array.dtype.str, array.tobytes())), None

    def _equation(self, equation: Any, given: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self._run(params.get("jaxpr") or params["call_jaxpr"], given)
        if name == "broadcast_in_dim" and equation.invars[0].aval.shape in ((), params["shape"]):
            return given
        if name not in ENTRYWISE:
            raise _NotEntrywise
        owners = {owner for _, owner in given} - {None}
        if len(owners) > 1:
            raise _NotEntrywise
        told = tuple(sorted((key, str(value)) for key, value in params.items()))
        number = self._number((name, told, tuple(expression for expression, _ in given)))
        return [(number, owners.pop() if owners else None)]
