"""Accelerators by the numbers of their makers, and the least time of a program on them.

    time >= max(operations / peak,  bytes of memory / bandwidth,  bytes exchanged / bandwidth)

This is the roofline of Williams, Waterman and Patterson (2009), with a third side for what chips exchange. It
assumes that the three overlap without loss, so it is a lower bound: no program here has run on such a chip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: Name.
        peak: Dense bfloat16 operations a second.
        memory: Bytes of its memory.
        bandwidth: Bytes a second of its memory.
        link: Bytes a second that it sends to chips of its island, in one direction.
        network: Bytes a second that it sends to other islands, in one direction.
        island: Number of chips that the fast links connect.
        source: Where the numbers are from.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    island: int
    source: str


@dataclass(frozen=True)
class Work:
    """What one program does on one chip.

    Attributes:
        operations: Floating-point operations.
        moved: Bytes read from and written to memory.
        near: Bytes sent to chips of the same island.
        far: Bytes sent to other islands.
    """

    operations: float
    moved: float
    near: float
    far: float


CHIPS = (
    Chip(
        "H100 SXM", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, 8,
        "NVIDIA's data sheets. H100: 1,979 TFLOP/s with sparsity, half of it without; NVLink of 900 GB/s in "
        "both directions. DGX H100: eight chips share NVLink, and each has 400 Gb/s to other hosts",
    ),
    Chip(
        "TPU v5e", 197e12, 16e9, 819e9, 200e9, 200e9, 256,
        "cloud.google.com/tpu/docs/v5e: links of 400 GB/s in both directions, pods of 256",
    ),
    Chip(
        "TPU v5p", 459e12, 95e9, 2765e9, 600e9, 600e9, 8960,
        "cloud.google.com/tpu/docs/v5p: links of 1,200 GB/s in both directions, pods of 8,960",
    ),
)  # fmt: skip
"""The chips of the plan."""


def parts(chip: Chip, work: Work) -> Mapping[str, float]:
    """Seconds of each side of the roofline."""
    return MappingProxyType(
        {
            "operations": work.operations / chip.peak,
            "memory": work.moved / chip.bandwidth,
            "exchange": max(work.near / chip.link, work.far / chip.network),
        }
    )


def roofline(chip: Chip, work: Work) -> tuple[float, str]:
    """Least seconds of a program, and the side that decides them."""
    sides = parts(chip, work)
    decisive = max(sides, key=lambda side: sides[side])
    return sides[decisive], decisive
