"""The last of several programs to arrive goes on with what all of them have written."""

import triton
import triton.language as tl


@triton.jit
def last_to_arrive(
    counter,  # int32, 0 before the launch, and 0 again after it
    programs,  # that will arrive, each once
):
    """Whether all the others have arrived, and all that they stored before can be read.

    Three programs that arrive as 1, 0, 2 read 1, 0, 2 from the counter in turn: the third goes on.

    What makes the others' stores visible: `debug_barrier` puts the stores of all threads of a program before
    the one addition that its first thread does. The addition releases them to the whole GPU, and acquires
    what the additions before it released: every addition reads the one before it, so the last has acquired
    them all. Its result reaches the other threads through a barrier of their own, which puts their loads
    after it. Loads of what others wrote ask for L2 all the same (`cache_modifier=".cg"`): a line that L1 kept
    from earlier must not answer.

    An NVIDIA barrier orders what the threads stored in global memory. An AMD one does not wait for stores
    under way, and a release waits for those of its own warp only: there a program that arrives has one warp.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == programs - 1
    if last:
        # Nobody else will look at it in this launch, and the next launch begins after this one's end.
        tl.store(counter, 0)
    return last
