"""Training in processes of their own, killed and signalled at chosen moments.

They are forked from a server that has everything imported and does nothing else, so that one costs no more than its
steps. A fork of the test itself would inherit the locks and pools of whatever threads earlier tests have started."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from localctl.training import loop

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch.distributed", "torch.utils.tensorboard", "localctl.training.loop"])


def _run(work: Callable[..., int | None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    multiprocessing.set_start_method(None, force=True)  # data workers are forked, as in a program of its own
    AcceleratorState._reset_state(reset_partial_state=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    raise SystemExit(work(*arguments) or 0)


def start(work: Callable[..., int | None], *arguments: Any, **environment: str) -> Any:
    """A process that runs ``work`` (of a module, not of another function) on one thread and ends with what it returns;
    its output is in no test's way."""
    process = _SERVER.Process(target=_run, args=(work, arguments, {**os.environ, **environment}))
    process.start()
    return process


def start_ranks(count: int, work: Callable[..., int | None], *arguments: Any, only: int | None = None) -> list[Any]:
    """``count`` processes that know of each other as torchrun's would, on a machine without a GPU. ``only``: the rank
    of the single one that is started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **place}
    return [
        start(work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(count)
        if only in (None, rank)
    ]


def finish(process: Any, seconds: float = 60) -> int:
    """The exit code, negative for the signal that killed it; a process that does not end fails the test."""
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)  # where it is, to stderr
        time.sleep(1)
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition: Callable[[], Any], process: Any, seconds: float = 60) -> None:
    """Until ``condition`` holds; fails when the process is gone or the time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.0005)


def record_samples(path: Path) -> None:
    """Write a line to ``path`` at the beginning of every micro-batch: the position in the run and the sample ids."""
    step = loop.training_step

    def recorded(batch: Any, models: Any, settings: Any, draws: Any) -> Any:
        with path.open("a") as file:
            file.write(json.dumps([list(visit) for visit in zip(batch.keys, batch.epochs, strict=True)]) + "\n")
        return step(batch, models, settings, draws)

    loop.training_step = recorded


def sample_lines(path: Path) -> list[Any]:
    """What :func:`record_samples` wrote; a line cut off by a kill is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint but its manifest and clock times, by file name."""
    contents: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            contents[name] = load_file(path)
        elif path.suffix == ".pt":
            contents[name] = torch.load(path, weights_only=True)
        elif path.name == "state.json":
            contents[name] = json.loads(path.read_text())
            contents[name]["stats"] = contents[name]["stats"]["terms"]
        else:
            contents[name] = path.read_bytes()
    return contents


def difference(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two trees of containers, tensors and values are not the same, bit for bit."""
    if type(first) is not type(second):
        return [where]
    if isinstance(first, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    if isinstance(first, dict):
        keys = [*first, *(key for key in second if key not in first)]
        missing = object()
        return [d for k in keys for d in difference(first.get(k, missing), second.get(k, missing), f"{where}/{k}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [where]
        return [d for i, (a, b) in enumerate(zip(first, second, strict=True)) for d in difference(a, b, f"{where}/{i}")]
    return [] if first == second else [where]
