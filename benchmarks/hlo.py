"""Products and collectives of a compiled program, read from its text (HLO), with every loop counted in full.

XLA's own cost analysis counts the body of a loop once. The compiler writes the number of turns beside most
loops (`known_trip_count`); here a body counts that often. A loop without a known number counts once.

| collective         | bytes that a device sends in a ring of g devices, for a result of n bytes |
|--------------------|---------------------------------------------------------------------------|
| all-gather         | n (g - 1) / g                                                             |
| all-reduce         | 2 n (g - 1) / g                                                           |
| reduce-scatter     | n (g - 1)                                                                 |
| all-to-all         | n (g - 1) / g                                                             |
| collective-permute | n                                                                         |

XLA's compiler for CPUs turns bfloat16 into float32, also in what is exchanged. A collective of float32 whose
input is converted from bfloat16 just before counts two bytes a number (`sent`); `compiled` has the bytes of
the text.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = (
    dict.fromkeys(("pred", "s8", "u8"), 8)
    | dict.fromkeys(("bf16", "f16", "s16", "u16"), 16)
    | dict.fromkeys(("f64", "s64", "u64"), 64)
)
"""Bits of a number by type; 32 for all others."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a program: name, type, operation, and the rest of the line after the opening bracket."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _OPERAND.findall(self.rest.split("), ")[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that the line runs."""
        branches = _BRANCHES.search(self.rest)
        return _CALLED.findall(self.rest) + (_OPERAND.findall(branches[1]) if branches else [])


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: One of `KINDS`.
        sent: Bytes that a device sends in one run, at the width of the program before the CPU's compiler.
        compiled: The same in the compiled text.
        turns: How often it runs.
        groups: Devices that exchange with each other, shape (group, member).
    """

    kind: str
    sent: float
    compiled: float
    turns: int
    groups: np.ndarray

    def leaves(self, island: int) -> bool:
        """Whether devices of different islands, of so many devices each, exchange."""
        islands = self.groups // island
        return bool((islands != islands[:, :1]).any())


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: Lines by computation.
        entry: Name of the computation that runs first.
        devices: Number of devices.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    devices: int

    @classmethod
    def read(cls, text: str, devices: int = 1) -> "Program":
        """Parse the text of `jax.stages.Compiled.as_text`."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, lines = "", {}
        for line in text.splitlines():
            if begins := _COMPUTATION.match(line):
                lines = computations.setdefault(begins[2], {})
                entry = begins[2] if begins[1] else entry
            elif found := _INSTRUCTION.match(line):
                lines[found[1]] = Instruction(*found.groups())
        return cls(computations, entry, devices)

    @cached_property
    def turns(self) -> Mapping[str, int]:
        """How often every computation runs."""
        counts: dict[str, int] = defaultdict(int)

        def run(name: str, times: int) -> None:
            counts[name] += times
            for line in self.computations[name].values():
                more = times * (_turns(line) or 1) if line.operation == "while" else times
                for called in line.called:
                    if called in self.computations:
                        run(called, more)

        run(self.entry, 1)
        return counts

    @property
    def open_loops(self) -> int:
        """Number of loops whose number of turns the compiler does not know."""
        return sum(line.operation == "while" and _turns(line) is None for _, line in self._lines())

    def products(self, *, once: bool = False) -> float:
        """Operations of all matrix products of a device; with `once`, the body of a loop counts once."""
        return sum(
            (1 if once else self.turns[name]) * self._product(name, line)
            for name, line in self._lines()
            if line.operation == "dot"
        )

    def collectives(self) -> list[Collective]:
        """All exchanges between devices."""
        return [
            self._collective(name, line)
            for name, line in self._lines()
            if line.operation.removesuffix("-start") in KINDS
        ]

    def _lines(self) -> Iterator[tuple[str, Instruction]]:
        """Lines that run, with the name of their computation."""
        return ((name, line) for name in self.turns for line in self.computations[name].values())

    def _product(self, name: str, line: Instruction) -> float:
        left, contracted = self.computations[name][line.operands[0]], _CONTRACTED.search(line.rest)
        sides = _shape(left.type)
        inner = math.prod(sides[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
        return 2.0 * math.prod(_shape(line.type)) * inner

    def _collective(self, name: str, line: Instruction) -> Collective:
        kind, groups = line.operation.removesuffix("-start"), groups_of(line.rest, self.devices)
        g = groups.shape[1]
        share = {"all-gather": (g - 1) / g, "all-reduce": 2 * (g - 1) / g, "all-to-all": (g - 1) / g}
        share |= {"reduce-scatter": g - 1, "collective-permute": 1.0}
        arrays = _ARRAY.findall(line.type)
        if line.operation.endswith("-start"):  # its result is a pair of operands and results
            arrays = arrays[len(arrays) // 2 :]
        sizes = [_bytes(*array) for array in arrays]
        widths = [self._share_of_width(name, line, i, array[0]) for i, array in enumerate(arrays)]
        sent = sum(size * width for size, width in zip(sizes, widths, strict=True))
        return Collective(kind, share[kind] * sent, share[kind] * sum(sizes), self.turns[name], groups)

    def _share_of_width(self, name: str, line: Instruction, index: int, kind: str) -> float:
        """A half where float32 was bfloat16 before the compiler for CPUs, else one."""
        if kind != "f32":
            return 1.0
        if "_promoted" in line.rest:  # the compiler's mark of a sum that it widened
            return 0.5
        source = self.computations[name].get(line.operands[min(index, len(line.operands) - 1)])
        inside = [x for c in (source.called if source else []) for x in self.computations.get(c, {}).values()]
        inside += [self.computations[name][o] for o in (source.operands if source else []) if not inside]
        return 0.5 if any(_ARRAY.match(x.type) and x.type.startswith("bf16") for x in inside) else 1.0


def groups_of(text: str, devices: int) -> np.ndarray:
    """The groups of devices of a collective, in any notation of XLA, shape (group, member).

    Raises:
        ValueError: If the notation is unknown.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _lists(lists[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        if ":" not in named[3]:
            return _of_axes(named[1], named[2], named[3])
    elif "replica_groups={}" in text:
        return np.arange(devices)[None]
    raise ValueError(f"the groups of a collective have an unknown notation: {text[:200]}")


def _of_axes(sizes: str, order: str | None, axes: str) -> np.ndarray:
    """Groups along some axes of a named mesh."""
    by_name = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    names, along = list(by_name), re.findall(r"'(\w+)'", axes)
    ids = _iota(order) if order else np.arange(math.prod(by_name.values()))
    others = [names.index(name) for name in names if name not in along]
    members = math.prod(by_name[name] for name in along)
    mesh = ids.reshape(tuple(by_name.values()))
    return mesh.transpose(*others, *(names.index(name) for name in along)).reshape(-1, members)


def _lists(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text)])


def _iota(text: str) -> np.ndarray:
    """Consecutive numbers in the order of `[4,2]T(1,0)`."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"an order of devices must be of the form [4,2]T(1,0); got {text!r}")
    ids = np.arange(math.prod(_numbers(found[1]))).reshape(_numbers(found[1]))
    return (ids.transpose(_numbers(found[2])) if found[2] else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x.strip()]


def _turns(line: Instruction) -> int | None:
    found = _TURNS.search(line.rest)
    return int(found[1]) if found else None


def _shape(kind: str) -> list[int]:
    found = _ARRAY.match(kind)
    return _numbers(found[2]) if found else []


def _bytes(kind: str, sides: str) -> float:
    return math.prod(_numbers(sides)) * BITS.get(kind, 32) / 8
