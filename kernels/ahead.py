"""Compiling for a TPU on a host without one: the real compiler, without execution.

This detects errors that lowering does not (blocks too large for VMEM, layouts that Mosaic does not support),
and it counts the bytes and operations of the program. It needs the package `libtpu`
(`pip install "jax[tpu]"`).
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

SMALLEST = "v5e:2x2"
"""The smallest topology on the market; its cores have 16 MiB of VMEM."""


class Cost(NamedTuple):
    """Costs of a program, as counted by the compiler.

    Attributes:
        bytes_accessed: Bytes that the operations of the program read and write, including layout padding.
        flops: Floating-point operations.
        temporary: Bytes of memory in addition to arguments and results.
    """

    bytes_accessed: int
    flops: int
    temporary: int


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology, for which programs can be compiled on this host.

    Args:
        topology: Name of the topology, such as "v5e:2x4".

    Raises:
        RuntimeError: If `libtpu` is not installed.
    """
    # Otherwise the runtime queries the cloud's metadata server for the machine, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # The lock of libtpu protects a device, and there is none here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_for_tpu(
    function: Callable[..., Any], *shapes: Any, topology: str = SMALLEST
) -> jax.stages.Compiled:
    """Compile a function for one core of a TPU topology.

    Args:
        function: The function to compile. It must call `lora_matmul` with `implementation="pallas"`.
        *shapes: Its arguments, as pytrees of `jax.ShapeDtypeStruct`.
        topology: Name of the topology.

    Raises:
        RuntimeError: If `libtpu` is not installed, or the compiler rejects the program.
    """
    place = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",))
    with warnings.catch_warnings():
        # The disk cache stores such a program but cannot load it without a TPU; it is then compiled again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return lowered.compile()


def cost(compiled: jax.stages.Compiled) -> Cost:
    """The costs of a compiled program."""
    operations, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if operations is None or memory is None:
        raise RuntimeError("this compiler reports neither operations nor memory")
    return Cost(int(operations["bytes accessed"]), int(operations["flops"]), int(memory.temp_size_in_bytes))
