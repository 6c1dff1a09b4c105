"""Argument checks whose error messages have the same form in the whole library."""

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

_LISTED, _LONGEST = 5, 120  # largest number of names in a message, and of letters in a name
_LARGEST = 2**31 - 1
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _LONGEST


def check_option(name: str, got: object, options: Sequence[str]) -> None:
    """Raise `ValueError` unless `got` is one of the options; the message names the nearest."""
    if not isinstance(got, str) or got not in options:
        near = difflib.get_close_matches(str(got), options, n=1, cutoff=0.0)
        raise ValueError(f"{name} must be one of {tuple(options)}; got {got!r}, nearest is {near[0]!r}")


def check_at_least(values: Mapping[str, int], least: int) -> None:
    """Raise `ValueError` unless every value is an integer of at least `least`; keys are the names."""
    for name, value in values.items():
        if not is_integer(value):
            raise ValueError(f"{name} must be an integer of at least {least}; got {brief(value)}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Raise `ValueError` unless a minibatch has between one and `num_rows` rows."""
    check_at_least({"batch_size": batch_size, "number of rows": num_rows}, 1)
    if batch_size > num_rows:
        raise ValueError(
            f"batch_size must be at most the number of training rows; got {batch_size} for {num_rows} rows, "
            f"nearest is {num_rows}"
        )


def check_positive(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless every value is positive and finite; keys are the names."""
    for name, value in values.items():
        if not is_positive(value):
            raise ValueError(f"{name} must be a positive number; got {brief(value)}")


LARGEST_FLOAT = 3.4e38
"""Just below the largest number of float32."""


def is_positive(value: Any) -> bool:
    """Whether a value is a positive number that float32 can hold."""
    try:  # an integer too large for a float overflows here
        return not isinstance(value, bool | str) and 0 < float(value) <= LARGEST_FLOAT
    except (TypeError, ValueError, OverflowError):
        return False


def check_size(values: Mapping[str, Any], least: int = 1) -> None:
    """Raise `ValueError` unless every value is an integer that can be a size; keys are the names.

    It is for values from a file, where 3.0, "3" and true are errors too.
    """
    for name, value in values.items():
        if not is_integer(value) or not least <= value <= _LARGEST:
            raise ValueError(f"{name} must be an integer from {least} to {_LARGEST}; got {brief(value)}")


def is_integer(value: object) -> bool:
    """Whether a value is an integer; True and False do not count."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_indices(name: str, indices: Any, size: int, *, least: int = 0) -> None:
    """Raise `ValueError` unless every index is an integer from `least` to `size` - 1.

    JAX clamps an index beyond the end without an error. Traced indices cannot be checked.
    """
    if isinstance(indices, jax.core.Tracer):
        return
    values = np.asarray(indices)
    if not values.size:
        return
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers; got {brief(indices)}")
    outside = values[(values < least) | (values >= size)]
    if outside.size:
        raise ValueError(f"{name} must be from {least} to {size - 1}; got {outside[0]}")


def brief(value: object) -> str:
    """A short form of a value for messages; a value from a file may have millions of characters."""
    return _BRIEF.repr(value.item() if isinstance(value, np.generic) else value)


def listed(names: Collection[str]) -> str:
    """The first five names, and the number of further names."""
    first = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in islice(names, _LISTED)]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest:,} more" if rest else "")


def check_level(level: float) -> None:
    """Raise `ValueError` unless a level is in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")


def divisors(total: int) -> list[int]:
    """The divisors of a total, increasing."""
    return [n for n in range(1, total + 1) if total % n == 0]


def check_parts(name: str, parts: int, batch_size: int) -> None:
    """Raise `ValueError` unless `parts` divides the batch size; `name` is the name of the argument."""
    check_at_least({name: parts}, 1)
    if batch_size % parts:
        # Of two equally near divisors, suggest the larger: more parts need less memory.
        near = min(divisors(batch_size), key=lambda n: (abs(n - parts), -n))
        raise ValueError(f"{name} must divide batch_size={batch_size}; got {parts}, nearest is {near}")


def class_numbers(
    name: str, labels: Any, num_rows: int, num_classes: int | None = None
) -> Int[np.ndarray, " n"]:
    """Labels as integers, one for each row; `ValueError` for another shape or labels that are not classes.

    Args:
        name: Name of the rows, for messages.
        labels: Class of each row; booleans count as 0 and 1.
        num_rows: Number of rows.
        num_classes: Number of classes; not checked if omitted.
    """
    classes = np.asarray(labels)
    if classes.shape != (num_rows,):  # another shape could broadcast and silently give a wrong result
        remedy = "; pass labels[:, 0]" if classes.shape == (num_rows, 1) else ""
        raise ValueError(
            f"{name} need one label each, shape ({num_rows},); got shape {classes.shape}{remedy}"
        )
    if classes.dtype.kind not in "biu" and num_rows:
        raise ValueError(f"the labels of {name} must be class numbers, integers; got {_no_integer(classes)}")
    classes = classes.astype(np.int64)
    if num_rows and num_classes is not None and not (classes.min() >= 0 and classes.max() < num_classes):
        unlabelled = " (-1 marks rows without a label)" if classes.min() == -1 else ""
        raise ValueError(
            f"the labels of {name} must be in 0..{num_classes - 1}; got {classes.min()}..{classes.max()}"
            f"{unlabelled}"
        )
    return classes


def _no_integer(labels: np.ndarray) -> str:
    """The first label, which is not an integer, and what to pass instead."""
    first = labels.tolist()[0]
    if isinstance(first, str):
        remedy = "pass the index of each label word, [words.index(label) for label in labels]"
    else:
        remedy = "if all are whole numbers, pass labels.astype(int)"
    return f"{first!r} of type {labels.dtype}: {remedy}"


def broken_weights(params: Any) -> str:
    """A message about frozen weights that are not finite, and what to do; "" if all are finite."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not jnp.isfinite(leaf).all()
    ]
    if not names:
        return ""
    return f"weights of the base are not finite, in {listed(names)}; load it again from intact files"


def numpy_generator(key: Array) -> np.random.Generator:
    """A NumPy generator seeded by a random key, for code outside of compiled programs."""
    return np.random.default_rng(np.asarray(jax.random.bits(check_key(key), (4,))))


def check_key(key: Any) -> Array:
    """The key as a typed JAX key; an old-style key (`jax.random.PRNGKey`) is converted.

    Raises:
        ValueError: If it is not a single key, for example a number or several keys.
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
                pass  # the array does not have the length of a key
    raise ValueError(f"key must be a random key, such as jax.random.key(0); got {got}")
