"""Compiling for a TPU on a host without one: the real compiler, no execution.

It finds what lowering alone does not (blocks too large for VMEM, layouts that Mosaic cannot make) and counts
the bytes and operations of the program. It needs the package `libtpu` (`pip install "jax[tpu]"`).
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

SMALLEST = "v5e:2x2"
"""The smallest topology that is sold; its cores have 16 MiB of VMEM."""


class Cost(NamedTuple):
    """What the compiler counts.

    Attributes:
        bytes_accessed: Bytes that the operations of the program read and write, layouts' padding included.
        flops: Floating-point operations.
        temporary: Bytes of memory beside arguments and results.
    """

    bytes_accessed: int
    flops: int
    temporary: int


def compile_for_tpu(
    function: Callable[..., Any], *shapes: Any, topology: str = SMALLEST
) -> jax.stages.Compiled:
    """Compile a function for one core of a TPU topology.

    Args:
        function: What to compile; `lora_matmul` in it must be told `implementation="pallas"`.
        *shapes: Its arguments as pytrees of `jax.ShapeDtypeStruct`.
        topology: Name of the topology.

    Raises:
        RuntimeError: If `libtpu` is not installed, or the compiler refuses the program.
    """
    # Without it the runtime asks the cloud which machine this is, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # A device belongs to one process; there is none here to fight for.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",))
    with warnings.catch_warnings():
        # A cache on disk takes such a program, cannot give it back without a TPU, and then compiles it anew.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return lowered.compile()


def cost(compiled: jax.stages.Compiled) -> Cost:
    """What the compiler counted of a program."""
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if counted is None or memory is None:
        raise RuntimeError("this compiler counts neither operations nor memory")
    return Cost(int(counted["bytes accessed"]), int(counted["flops"]), int(memory.temp_size_in_bytes))
