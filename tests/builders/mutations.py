"""Files with something wrong in them: bytes changed at random, and JSON values replaced by hostile ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "0", "../../etc/passwd", "\x00", "{text}", [], [[]], [0], [None], ["a", 1], {},
    {"a": {}},
)  # fmt: skip
"""Values of every type that JSON has, and sizes beyond every limit."""

NUMBERS = np.array([0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1], np.uint64)


def changed_bytes(random: np.random.Generator, content: bytes) -> bytes:
    """The content with a few random changes: bytes, numbers of eight bytes, cuts, repetitions."""
    found = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        # Headers are at the front of a file, and few bytes of it.
        limit = len(found) if random.random() < 0.3 else min(len(found), 2048)
        at = int(random.integers(0, max(limit, 1)))
        kind = random.integers(0, 5)
        if kind == 0 and found:
            found[at % len(found)] = int(random.integers(0, 256))
        elif kind == 1:
            found[at : at + 8] = random.choice(NUMBERS).tobytes()
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            del found[at : at + int(random.integers(1, 16))]
        else:
            found[at:at] = found[at : at + int(random.integers(1, 64))]
    return bytes(found)


def changed_json(random: np.random.Generator, value: Any) -> Any:
    """The value with one entry, at any depth, that is replaced, removed or repeated under another name."""
    if isinstance(value, dict) and value and random.random() < 0.95:
        name = str(random.choice(sorted(value)))
        rest = {key: item for key, item in value.items() if key != name}
        kind = random.integers(0, 10)
        if kind == 0:
            return rest
        if kind == 1:
            return value | {name + "x": value[name]}
        return value | {name: changed_json(random, value[name])}
    if isinstance(value, list) and value and random.random() < 0.6:
        at = int(random.integers(0, len(value)))
        return [*value[:at], changed_json(random, value[at]), *value[at + 1 :]]
    return HOSTILE[int(random.integers(0, len(HOSTILE)))]


def write_changed(random: np.random.Generator, path: Path, content: bytes) -> None:
    """Write a changed file: JSON by its values or by its bytes, everything else by its bytes."""
    if path.suffix == ".json" and random.random() < 0.8:
        text = json.dumps(changed_json(random, json.loads(content)))
        path.write_text(text, encoding="utf-8")
    else:
        path.write_bytes(changed_bytes(random, content))
