"""Values of compiled programs that outlive them, for tests that nothing keeps one."""

import gc

import jax


def tracers(besides=()):
    """Values of a program under compilation that something still holds.

    Args:
        besides: Those that other tests left in this process, for instance in the frames of one that failed.
    """
    gc.collect()
    known = {id(one) for one in besides}
    # By its type: an object may answer for its class itself, such as a proxy whose owner is gone.
    found = (one for one in gc.get_objects() if issubclass(type(one), jax.core.Tracer))
    return [one for one in found if id(one) not in known]
