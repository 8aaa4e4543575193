"""Which launcher started this process, and among how many others. Nothing here loads torch."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from localctl.lock import start_time

_TORCHRUN, _ACCELERATE = "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"  # set by the launchers
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # of torchrun and `accelerate launch`: ATTEMPT/RANK/error.json
_HERE, _PORT = "127.0.0.1", "29500"  # the port is torchrun's own default
# Variables of torch -> those of Open MPI, of MPICH and Intel MPI, and of MVAPICH.
_OF_MPI = {
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
_STARTED = time.time()  # about when this process began
_RAY = "RAY_ADDRESS"  # of a command that Ray runs once, within a step of SLURM that starts Ray on all nodes


def launcher() -> int | None:
    """Return the process id of torchrun, ``mpirun`` or `accelerate launch` if one of them started this process, else
    None."""
    parent = os.getppid()
    among_others = any(os.environ.get(name, "1") != "1" for name in _OF_MPI["WORLD_SIZE"])
    started = _TORCHRUN in os.environ or among_others or (_ACCELERATE in os.environ and _is_accelerate(parent))
    return parent if started else None


def _is_accelerate(pid: int) -> bool:
    """Return whether a process is `accelerate launch`, as users set its variables, too; True without /proc."""
    try:
        return b"accelerate" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def read_launcher(environment: MutableMapping[str, str] = os.environ, slurm: bool = False) -> None:
    """Set torch's variables of processes for one that ``mpirun`` started among others, where WORLD_SIZE is not set.

    For programs, as one of their first actions. Processes of ``mpirun`` on one machine meet there, at torchrun's own
    port.

    slurm: also for a task of ``srun``; they meet on the first machine of their step. Otherwise its tasks stay runs of
    their own, as of a script that gives each a part of the work.
    """
    of_mpi = {name: next(filter(None, map(environment.get, names)), "") for name, names in _OF_MPI.items()}
    of_slurm = _read_slurm(environment)
    same = all(of_mpi[name] == of_slurm.get(name) for name in ("WORLD_SIZE", "RANK"))  # srun's own PMI says less
    if not slurm:
        found = {} if same and not of_mpi["LOCAL_RANK"] else of_mpi
    else:
        found = of_mpi if of_mpi["WORLD_SIZE"] and not same else of_slurm
    if "WORLD_SIZE" in environment or not found.get("WORLD_SIZE", "").isdigit() or found["WORLD_SIZE"] == "1":
        return
    if found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
        found |= {"MASTER_ADDR": _HERE, "MASTER_PORT": found.get("MASTER_PORT", _PORT)}
    for name, value in found.items():
        if value:
            environment.setdefault(name, value)


def _read_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables for a task of ``srun``; none for any other process, as the script of a batch job or
    what a user starts in ``srun --pty bash``. The port is one of the step's own, as several may share a machine."""
    step, job = environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_JOB_ID", "")
    if _RAY in environment or "SLURM_PTY_PORT" in environment or not (step.isdigit() and job.isdigit()):
        return {}
    nodes = re.sub(r"\[(\w+)[^]]*]", r"\1", environment.get("SLURM_STEP_NODELIST", ""))  # gpu[03-05,9],cpu1
    tasks = environment.get("SLURM_GTIDS", "")  # those on this machine, with commas between
    return {
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS", ""),
        "RANK": environment.get("SLURM_PROCID", ""),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "LOCAL_WORLD_SIZE": str(len(tasks.split(","))) if tasks else "",
        "MASTER_ADDR": nodes.partition(",")[0],
        "MASTER_PORT": str(20000 + (int(job) * 31 + int(step)) % 10000),
    }


def is_first() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _began() -> float:
    """Return when this process began, in seconds since the epoch; without /proc, when this module was imported."""
    ticks = start_time(os.getpid())  # since the machine started
    if not ticks:
        return _STARTED
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")


def tells(text: str, follows: bool = False) -> bool:
    """Return whether this process is to print an error: of the processes that torchrun or `accelerate launch` started
    on this machine, the first that has it; of any others, each.

    follows: what is told follows from whatever ended another process, so it is told only if that was silent.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or _ERROR_FILE not in os.environ:
        return True
    folder, name, began = Path(os.environ[_ERROR_FILE]).parents[1], "localctl_told_", _began()
    try:
        for mark in folder.glob(f"{name}*"):
            if mark.stat().st_mtime < began:  # of a program that the processes ran before
                mark.unlink(missing_ok=True)
            elif follows:
                return False
        if not follows:
            name += hashlib.sha256(text.encode(errors="replace")).hexdigest()
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the disk is full, for example
        return True
    return True
