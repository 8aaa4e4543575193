"""How the threads of OpenMP, with which torch computes on a CPU, wait for each other. Without loading torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping

SPINS = "1000"  # of a waiting thread before it sleeps: microseconds, where libgomp's own default takes milliseconds
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def yield_waiting_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon instead of keeping their cores busy, which slows each step down several times
    beside other programs.

    For programs, as their first action. Without effect if torch is loaded, as it has read the variable then, or if the
    user has set it or OMP_WAIT_POLICY.
    """
    if "torch" not in sys.modules and not any(name in environment for name in CHOICES):
        environment["GOMP_SPINCOUNT"] = SPINS


def waiting_note(environment: Mapping[str, str] = os.environ) -> str:
    """Return a line about the choice of :func:`yield_waiting_cores`; empty if the user has made another one."""
    if environment.get("GOMP_SPINCOUNT") != SPINS:
        return ""
    return f"threads sleep soon while they wait for each other; set GOMP_SPINCOUNT (now {SPINS}) to choose otherwise"
