"""One sentence for a wrong option or number, in the words that the whole library shares."""

import difflib
import reprlib
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

_LISTED, _LONGEST = 5, 120  # names in a message, and letters of each
_LARGEST = 2**31 - 1
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _LONGEST


def check_option(name: str, got: object, options: Sequence[str]) -> None:
    """Raise `ValueError` unless `got` is one of the options; the message names the nearest."""
    if not isinstance(got, str) or got not in options:
        near = difflib.get_close_matches(str(got), options, n=1, cutoff=0.0)
        raise ValueError(f"{name} must be one of {tuple(options)}; got {got!r}, nearest is {near[0]!r}")


def check_at_least(values: Mapping[str, int], least: int) -> None:
    """Raise `ValueError` unless every value, given by its name, is an integer of at least `least`."""
    for name, value in values.items():
        if not is_integer(value):
            raise ValueError(f"{name} must be an integer of at least {least}; got {brief(value)}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Raise `ValueError` unless a minibatch is of one row to all `num_rows` of them."""
    check_at_least({"batch_size": batch_size, "number of rows": num_rows}, 1)
    if batch_size > num_rows:
        raise ValueError(
            f"batch_size must be at most the number of training rows; got {batch_size} for {num_rows} rows, "
            f"nearest is {num_rows}"
        )


def check_positive(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless every value, given by the name of its argument, is positive and finite."""
    for name, value in values.items():
        if not is_positive(value):
            raise ValueError(f"{name} must be a positive number; got {brief(value)}")


def is_positive(value: Any) -> bool:
    """Whether a value is a positive finite number."""
    try:  # an integer too large for a float overflows here rather than later
        return not isinstance(value, bool | str) and 0 < float(value) < float("inf")
    except (TypeError, ValueError, OverflowError):
        return False


def check_size(values: Mapping[str, Any], least: int = 1) -> None:
    """Raise `ValueError` unless every value, given by its name, is an integer that may be a size.

    For values that come from a file, where 3.0, "3" and true are mistakes as well.
    """
    for name, value in values.items():
        if not is_integer(value) or not least <= value <= _LARGEST:
            raise ValueError(f"{name} must be an integer from {least} to {_LARGEST}; got {brief(value)}")


def is_integer(value: object) -> bool:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_indices(name: str, indices: Any, size: int, *, least: int = 0) -> None:
    """Raise `ValueError` unless every index is an integer from `least` to `size` - 1.

    JAX reads the last entry for an index beyond the end, and says nothing. Traced indices are not known.
    """
    if isinstance(indices, jax.core.Tracer):
        return
    found = np.asarray(indices)
    if not found.size:
        return
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} must be integers; got {brief(indices)}")
    outside = found[(found < least) | (found >= size)]
    if outside.size:
        raise ValueError(f"{name} must be from {least} to {size - 1}; got {outside[0]}")


def brief(value: object) -> str:
    """A short form of a value for messages; a value from a file may have millions of characters."""
    return _BRIEF.repr(value.item() if isinstance(value, np.generic) else value)


def listed(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    first = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in islice(names, _LISTED)]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest:,} more" if rest else "")


def check_level(level: float) -> None:
    """Raise `ValueError` unless a level lies in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")


def divisors(total: int) -> list[int]:
    """Numbers of equal parts that a total falls into, from one up."""
    return [n for n in range(1, total + 1) if total % n == 0]


def check_parts(name: str, parts: int, batch_size: int) -> None:
    """Raise `ValueError` unless a minibatch falls into that many equal parts; `name` is the argument's."""
    check_at_least({name: parts}, 1)
    if batch_size % parts:
        # The larger of two that are equally near: who asks for parts is short of memory.
        near = min(divisors(batch_size), key=lambda n: (abs(n - parts), -n))
        raise ValueError(f"{name} must divide batch_size={batch_size}; got {parts}, nearest is {near}")


def class_numbers(
    name: str, labels: Any, num_rows: int, num_classes: int | None = None
) -> Int[np.ndarray, " n"]:
    """Labels as integers, one for each row; `ValueError` for another shape or labels that are not classes.

    Args:
        name: Whose labels they are.
        labels: Class of each row; truth values count as 0 and 1.
        num_rows: How many there must be.
        num_classes: Number of classes; not looked at when omitted.
    """
    found = np.asarray(labels)
    if found.shape != (num_rows,):  # a shape that broadcasts would give a wrong number in silence
        remedy = "; pass labels[:, 0]" if found.shape == (num_rows, 1) else ""
        raise ValueError(f"{name} need one label each, shape ({num_rows},); got shape {found.shape}{remedy}")
    if found.dtype.kind not in "biu" and num_rows:
        raise ValueError(f"the labels of {name} must be class numbers, integers; got {_no_integer(found)}")
    found = found.astype(np.int64)
    if num_rows and num_classes is not None and not (found.min() >= 0 and found.max() < num_classes):
        unlabelled = " (-1 marks rows without a label)" if found.min() == -1 else ""
        raise ValueError(
            f"the labels of {name} must lie in 0..{num_classes - 1}; got {found.min()}..{found.max()}"
            f"{unlabelled}"
        )
    return found


def _no_integer(labels: np.ndarray) -> str:
    """The first of labels that are not integers, and what to pass instead."""
    first = labels.tolist()[0]
    if isinstance(first, str):
        remedy = "give the place of each among the label words, [words.index(label) for label in labels]"
    else:
        remedy = "where all are whole numbers, labels.astype(int) makes them so"
    return f"{first!r} of type {labels.dtype}: {remedy}"


def broken_weights(params: Any) -> str:
    """What is wrong with a tree of frozen weights that are not finite, and what to do; "" where all are."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not jnp.isfinite(leaf).all()
    ]
    if not names:
        return ""
    return f"the base's own weights are not finite, in {listed(names)}; load it again from sound files"


def numpy_generator(key: Array) -> np.random.Generator:
    """NumPy's source of random numbers from a random key, for what runs outside compiled programs."""
    return np.random.default_rng(np.asarray(jax.random.bits(check_key(key), (4,))))


def check_key(key: Any) -> Array:
    """The key as a typed JAX key; an old-style key (`jax.random.PRNGKey`) is converted.

    Raises:
        ValueError: When it is anything else, such as a number or several keys.
    """
    plain = isinstance(key, int | float | str | np.generic | None)
    got = repr(key) if plain else f"an object of type {type(key).__name__}"
    if isinstance(key, Array | np.ndarray):
        key = jnp.asarray(key) if isinstance(key, np.ndarray) else key
        got = f"an array of {key.dtype} of shape {key.shape}"
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape == ():
                return key
            got = f"an array of keys of shape {key.shape}, take one of them"
        elif key.dtype == np.uint32 and key.ndim == 1:
            try:
                return jax.random.wrap_key_data(key)
            except TypeError:
                pass  # not as many numbers as a key has
    raise ValueError(f"key must be a random key, such as jax.random.key(0); got {got}")
