"""How the C library treats memory that is free again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc
_NEVER = (2**30, 2**25)  # bytes; glibc before 2.35 allows no larger _MMAP_THRESHOLD than the second


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process keep the memory that it frees, and return whether that could be chosen.

    Otherwise it goes back to the system after each step on a CPU, which clears every page of it again. For programs.
    Without effect where the C library is not glibc, or if the user has set one of its variables (MALLOC_...).
    """
    if "GLIBC_TUNABLES" in environment or any(name.startswith("MALLOC_") for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # In this order: the first choice ends the C library's own adaptation of the other threshold.
    return all(any(mallopt(option, size) for size in _NEVER) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
