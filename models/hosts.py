"""Several processes, on one machine or on several, as one program over the devices of all of them.

Every process runs the same program on the same rows. JAX's distributed runtime connects the processes, and
the mesh of a base says whether a program spans them. What a process decides by itself (how many steps run
before the next look, an interrupt, a loss on the host) would let the programs differ, and a program that
differs waits for the others without end. So process 0 decides, and the others get its decision:

| function     | what every process gets                                                      |
|--------------|------------------------------------------------------------------------------|
| `told`       | numbers of process 0                                                         |
| `handed`     | bytes of process 0                                                           |
| `gathered`   | numbers of all processes                                                     |
| `deferred`   | interrupts as a question, in place of an exception in the middle of a step   |
| `guarded`    | one error if another process is lost                                         |

Without a mesh of several processes they exchange nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from bnlora._util.checks import check_at_least

TIMEOUT = 60
"""Seconds without a sign of life after which a process counts as lost."""


class HostLost(ConnectionError):
    """Another process of a fit over several ended or does not answer.

    Example:
        >>> issubclass(bl.HostLost, OSError)
        True
    """


def hosts(coordinator: str, *, num_processes: int, process_id: int, timeout: int = TIMEOUT) -> None:
    """Join several processes into one program; `bnlora.mesh` then has the devices of all of them.

    Every process calls this before anything that asks JAX for a device, and then runs the same program. If a
    process is lost, the others end within `timeout` seconds. Under a scheduler that JAX knows (Slurm, Open
    MPI, TPU pods) `jax.distributed.initialize()` without arguments does the same.

    Args:
        coordinator: Address and free port of process 0, such as "10.0.0.1:1234".
        num_processes: Number of processes. With one there is nothing to join.
        process_id: Number of this process, from 0.
        timeout: Seconds without a sign of life after which a process counts as lost.

    Raises:
        ValueError: If there is no such process, the address has no port, or a number is below one.
        RuntimeError: If JAX has been asked for a device already, or this was called before.

    Example:
        >>> bl.hosts("10.0.0.1:1234", num_processes=2, process_id=2)
        Traceback (most recent call last):
        ValueError: process_id must be from 0 to 1, for 2 processes; got 2
    """
    check_at_least({"num_processes": num_processes, "timeout": timeout}, 1)
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be from 0 to {num_processes - 1}, for {num_processes} processes; "
            f"got {process_id}"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator must be HOST:PORT, such as '10.0.0.1:1234'; got {coordinator!r}")
    if num_processes == 1:
        return
    # JAX would catch SIGTERM, for a protocol of its own, and `kill` would no longer end a process.
    jax.config.update("jax_enable_preemption_service", False)  # noqa: FBT003
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=timeout)


def is_shared(over: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return over is not None and over.is_multi_process


def leads(over: Mesh | None) -> bool:
    """Whether this process writes files and reports: process 0, or the only one."""
    return not is_shared(over) or jax.process_index() == 0


def told(over: Mesh | None, *numbers: float) -> list[float]:
    """The numbers of process 0, in every process."""
    if not is_shared(over):
        return list(numbers)
    return np.frombuffer(_of_first(np.array(numbers, np.float64).tobytes()), np.float64).tolist()


def handed(over: Mesh | None, make: Callable[[], bytes]) -> bytes:
    """The bytes that `make` returns in process 0, in every process; it is not called in the others.

    Raises:
        ValueError: What `make` raised, in every process.
    """
    if not is_shared(over):
        return make()
    content, problem = b"", ""
    if leads(over):
        try:
            content = make()
        except ValueError as error:
            problem = str(error)
    size, failed = (int(x) for x in told(over, len(content or problem.encode()), bool(problem)))
    received = _of_first((problem.encode() or content) if leads(over) else bytes(size)) if size else b""
    if failed:
        raise ValueError(received.decode())
    return received


def gathered(over: Mesh | None, *numbers: int) -> Int[np.ndarray, "process k"]:
    """The numbers of every process, in the order of the processes."""
    own = np.array(numbers, np.int32)
    return multihost_utils.process_allgather(own) if is_shared(over) else own[None]


def _of_first(content: bytes) -> bytes:
    """The bytes of process 0; those of the others must be as many."""
    return multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8)).tobytes()


@contextmanager
def deferred(over: Mesh | None) -> Iterator[Callable[[], bool]]:
    """Let an interrupt wait until all processes ask for it; a second one ends this process at once.

    With one process an interrupt is an exception as usual, and the answer is always no.

    Yields:
        Whether there was an interrupt in this process.
    """
    if not is_shared(over) or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    usual, waiting = signal.getsignal(signal.SIGINT), threading.Event()

    def wait(*_: object) -> None:
        waiting.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, wait)
    try:
        yield waiting.is_set
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def guarded(over: Mesh | None) -> Iterator[None]:
    """Raise `HostLost` for the error of an exchange with a process that is gone."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # JAX raises either one
        if not is_shared(over) or "Gloo" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise HostLost(
            f"one of the {jax.process_count()} processes is lost ({reason}); start all of them again, and a "
            "fit with checkpoints goes on from the last one"
        ) from error
