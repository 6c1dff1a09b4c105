"""Few compiled programs: each is stored with its owner, and is optimised only if that is worth the time.

A new process spends its first minutes in the compiler. Three functions reduce that time:

    `program`      compiles a function once for an owner; the program lives as long as the owner
    `by_pieces`    runs any number of draws through one program, `PIECE` at a time
    `options`      chooses the optimisation level of the compiler
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.caching import keep_programs

PIECE = 32
"""Number of draws that a program processes at a time."""

PADDED = 2**24
"""Numbers up to which a few draws are padded to `PIECE`, so that any number of draws runs in one program."""

SMALL = 2**14
"""A program whose largest array has at most this size is small: it compiles longer than it runs."""


class _Kept(dict):
    """The programs of one owner. A copy or a pickle of the owner starts without programs."""

    def __deepcopy__(self, memo: Any) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> Any:
        return _Kept, ()


def options(level: Literal[0, 1] = 0) -> dict[str, Any] | None:
    """Compiler options for a program; None (JAX's defaults) on an accelerator.

    Args:
        level: How much XLA optimises. Without optimisation (0) a program compiles in half the time and takes
            a third to two thirds longer to run, so 1 is for programs that run often on large arrays. Higher
            levels take longer to compile and do not speed up the step of a model of real size
            (`python -m benchmarks compiler`).

    Returns:
        The options. JAX's own setting `jax_disable_most_optimizations` means 0 for all programs.

    Every compilation of this library asks for options first, so JAX is told of the cache folder here.
    """
    keep_programs()
    if jax.default_backend() != "cpu":
        return None
    plain = jax.config.values.get("jax_disable_most_optimizations")
    chosen: dict[str, Any] = {"xla_backend_optimization_level": 0 if plain else level}
    if jax.__version_info__ < (0, 11):  # later compilers do not know the name
        chosen["xla_cpu_use_fusion_emitters"] = False
    return chosen


def level_for(numbers: int) -> Literal[0, 1]:
    """The level of a program that runs often, by the approximate size of its largest arrays."""
    return 0 if numbers <= SMALL else 1


def program(
    owner: Any,
    function: Callable[..., Any],
    *,
    level: Literal[0, 1] = 0,
    static: tuple[int, ...] = (),
) -> Any:
    """Compile `function(owner, ...)` once for an owner.

    Args:
        owner: An object with a `__dict__`, which stores the program.
        function: A module-level function; a closure would be a new function each time.
        level: As in `options`.
        static: Positions, after the owner, of arguments that are not arrays.

    Returns:
        The compiled function of the other arguments. Do not call it while another function is traced.
    """

    def compiled(owner: Any) -> Any:
        bound = partial(function, owner)
        bound.__name__ = function.__name__  # type: ignore[attr-defined]  # for profiles and logs
        return jax.jit(bound, static_argnums=static, compiler_options=options(level))

    return _once(owner, ("program", function, level), compiled)


def kept(owner: Any, function: Callable[[Any], Any]) -> Any:
    """The value of `function(owner)`, computed once for an owner."""
    return _once(owner, ("value", function), function)


def _once(owner: Any, name: tuple[Any, ...], make: Callable[[Any], Any]) -> Any:
    stored = vars(owner).setdefault("_kept", _Kept())
    if name not in stored:
        stored[name] = make(owner)
    return stored[name]


def by_pieces(run: Callable[[Any, int], Any], stacks: Any, *, numbers: int) -> Any:
    """Run a program on all entries of stacked arrays, `PIECE` at a time.

    Args:
        run: Takes a piece (arrays whose first axis has the same length in every call) and the number of its
            valid entries. Returns arrays with that axis, as `first_entries` does; the other entries are
            dropped.
        stacks: Arrays with the same first axis.
        numbers: Size of the results of one entry.

    Returns:
        The results with the first axis of `stacks`, as NumPy arrays.
    """
    found = [(run(piece, count), count) for piece, count in pieces(stacks, numbers=numbers)]
    counts = [count for _, count in found]

    def joined(*parts: Array) -> np.ndarray:
        return np.concatenate([np.asarray(x)[:n] for x, n in zip(parts, counts, strict=True)])

    return jax.tree.map(joined, *(results for results, _ in found))


def pieces(stacks: Any, *, multiple: int = 1, numbers: int = 0) -> Iterator[tuple[Any, int]]:
    """Pieces of stacked arrays of one length (the last is padded), each with its number of valid entries.

    Args:
        stacks: Arrays with the same first axis.
        multiple: The length of a piece is a multiple of this.
        numbers: Size of the results of one entry, if that is more than the entry's own.
    """
    stacks = jax.tree.map(np.asarray, stacks)
    total = len(jax.tree.leaves(stacks)[0])
    size = multiple * max(PIECE // multiple, 1)
    numbers = max(numbers, sum(x[0].size for x in jax.tree.leaves(stacks)))
    if size * numbers > PADDED:
        size = min(size, -(-total // multiple) * multiple)

    def cut(x: np.ndarray, begin: int) -> np.ndarray:
        part = x[begin : begin + size]
        return part if len(part) == size else np.concatenate([part, np.repeat(x[:1], size - len(part), 0)])

    for begin in range(0, total, size):
        yield jax.tree.map(partial(cut, begin=begin), stacks), min(size, total - begin)


def first_entries(
    one: Callable[..., Any],
    stacks: Any,
    count: Any,
    *shared: Any,
    together: int = 1,
    place: Callable[[Any], Any] | None = None,
) -> Any:
    """Apply `one(entry, *shared)` to the first `count` entries of stacked arrays; later results are invalid.

    The loop stops after `count` entries, so a piece that is not full only costs its valid entries.

    Args:
        one: A function of one entry.
        stacks: Arrays with the same first axis.
        count: Number of entries; can be traced.
        *shared: Arguments that all entries share.
        together: Number of entries in one turn of the loop; must divide the first axis.
        place: Puts the entries of a turn on several devices.
    """
    if together > 1:
        stacks = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), stacks)
        one = jax.vmap(one, in_axes=(0, *(None for _ in shared)))
    turn = jax.jit(one)  # traced once, for its shapes and for the loop

    def entry(index: Any) -> Any:
        found = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacks)
        return found if place is None else place(found)

    turns = len(jax.tree.leaves(stacks)[0])
    blank = jax.tree.map(
        lambda x: jnp.zeros((turns, *x.shape), x.dtype), jax.eval_shape(lambda: turn(entry(0), *shared))
    )

    def body(index: Any, done: Any) -> Any:
        found = turn(entry(index), *shared)
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), done, found)

    filled = jax.lax.fori_loop(0, (count + together - 1) // together, body, blank)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), filled) if together > 1 else filled


def split_keys(key: Array, count: int) -> tuple[np.ndarray, str]:
    """Split a key; return the data of the new keys and their kind, from which `key_of` rebuilds keys.

    NumPy can slice the data. Slicing JAX keys would compile a program for each length.
    """
    kind = str(jax.random.key_impl(key))
    split = _split(kind, count, tuple((options() or {}).items()))
    return np.asarray(split(jax.random.key_data(key))), kind


@lru_cache(maxsize=64)
def _split(kind: str, count: int, chosen: tuple) -> Callable[[Array], Array]:
    """The program that splits a key; it stores no array."""

    def split(data: Array) -> Array:
        return jax.random.key_data(jax.random.split(key_of(data, kind), count))

    return jax.jit(split, compiler_options=dict(chosen) or None)


def keys_from(key: Array, count: int) -> list[Array]:
    """Split a key into a list of keys, without compiling a program for each element."""
    data, kind = split_keys(key, count)
    return [key_of(jax.device_put(one), kind) for one in data]


def key_of(data: Array, kind: str) -> Array:
    """The key with this data."""
    return jax.random.wrap_key_data(data, impl=kind)
