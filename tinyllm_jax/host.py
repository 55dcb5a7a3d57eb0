"""This machine: its cores, and memory that stays with the process from one step to the next."""

import ctypes
import os
import platform

# Of mallopt(3), by their numbers in glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
LARGEST_INT, PAD_BYTES = 2**31 - 1, 64 << 20


def available_cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, instead of asking the system for it anew at each step.

    XLA's CPU backend allocates the working memory of a program whenever it runs. glibc maps blocks of
    that size each time, so every page of it is first touched, zeroed by the kernel, again and again:
    260,000 page faults in a step of `tinystories_7m`, and 15 % of its processor time.

    To be called before JAX is imported: a thread that lives already has taken its arena.

    Returns:
        Whether there is such a C library; elsewhere nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # One arena, since only the main one can grow to the size of a step.
    options = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, LARGEST_INT), (TOP_PAD, PAD_BYTES))
    return all(library.mallopt(option, value) == 1 for option, value in options)
