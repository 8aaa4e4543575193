"""Ray, for work that is spread over processes and machines: connect to a cluster, or start Ray on this machine."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localctl.files import first_line

ADDRESS = "RAY_ADDRESS"
_PACKAGE = Path(__file__).resolve().parent
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
_LOGGERS = ("ray", "ray.data")
_SHOWN = ("enable_progress_bars", "print_on_execution_start")
_PATIENCE = 10  # seconds


@contextmanager
def connected(cpus: int | None = None) -> Iterator[Any]:
    """Context connected to Ray; yields the module ``ray``, with ``ray.data`` loaded.

    With the environment variable RAY_ADDRESS, that cluster is used. Otherwise Ray starts on this machine, without
    dashboard and telemetry, and ends with the context. A connection that exists already is used and left as it is.
    Workers run one thread each, import this very package, and log to Ray's own files.

    Args:
        cpus: how many CPUs Ray may count on, if it starts here; None = those of this process. More than there are is
            allowed: it is the number of tasks at a time.

    Raises:
        ValueError: Ray is not installed, cannot be started, or there is no cluster at RAY_ADDRESS.
    """
    with _environment(_ENVIRONMENT):
        ray = load_ray()
        with _quiet(ray):
            if ray.is_initialized():
                yield ray
                return
            _connect(ray, cpus)
            try:
                yield ray
            finally:
                ray.shutdown()


def load_ray() -> Any:
    """Return the module ``ray``, with ``ray.data`` loaded. ValueError if it is not installed."""
    try:
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ValueError(
            f'This needs Ray, which cannot be imported ({first_line(error)}); run `pip install "localctl[scale]"`.'
        ) from None
    return importlib.import_module("ray")


def _connect(ray: Any, cpus: int | None) -> None:
    address = os.environ.get(ADDRESS, "").strip()
    here = address in ("", "local")
    if not here:
        _check_reachable(address)
    options: dict[str, Any] = {"num_cpus": cpus or available_cpus(), "include_dashboard": False} if here else {}
    with _own_handlers():
        try:
            ray.init(
                address="local" if here else address,
                runtime_env=_runtime_environment(here),
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.CRITICAL,
                **options,
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            ray.shutdown()
            if here:
                raise ValueError(f"Ray cannot be started on this machine ({first_line(error)}).") from error
            raise _no_cluster(address, error) from error


def _check_reachable(address: str) -> None:
    """Raise a ValueError unless something answers at HOST:PORT, as Ray itself would wait for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ValueError:
    return ValueError(
        f"There is no usable Ray cluster at {ADDRESS}={address} ({first_line(error)}); start one with `ray start "
        f"--head`, or unset {ADDRESS} to use this machine alone."
    )


def _runtime_environment(here: bool) -> dict[str, Any]:
    """Return how workers find this package: on this machine in its folder, elsewhere in a copy."""
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not here:
        return {"env_vars": variables, "py_modules": [str(_PACKAGE)]}
    paths = [str(_PACKAGE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return {"env_vars": variables}


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Context with ``defaults`` for environment variables that the user has not set."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Context that restores the signal handlers, as Ray sets its own for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Context in which Ray shows no messages and bars of its own: what matters is raised as an exception."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    screens = [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]
    items: list[logging.Logger | logging.Handler] = [*loggers, *screens]
    before = [(item, item.level) for item in items]
    for item, _ in before:
        item.setLevel(logging.CRITICAL + 1)
    context = ray.data.DataContext.get_current()
    shown = {name: getattr(context, name) for name in _SHOWN}
    vars(context).update(dict.fromkeys(_SHOWN, False))
    try:
        yield
    finally:
        vars(context).update(shown)
        for item, level in before:
            item.setLevel(level)
