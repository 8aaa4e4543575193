"""The server of the studio: where it listens, what it refuses, and what it says of that."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from localctl.images import MAX_PIXELS
from localctl.studio import theme
from localctl.studio.config import DEFAULT_PORT, StudioConfig

logger = logging.getLogger(__name__)
MAX_UPLOAD = 10_000_000  # bytes
# The two variables that do not open anything; all other settings of Gradio come from the flags.
_KEPT = ("GRADIO_TEMP_DIR", "GRADIO_SERVER_PORT")
_DARK = "() => { try { const dark = localStorage.getItem('studio-dark'); "
_DARK += "if (dark !== null) document.body.classList.toggle('dark', dark === 'true'); } catch (e) {} }"


def launch_options(config: StudioConfig) -> dict[str, Any]:
    """Return the arguments of ``Blocks.launch``: every one that opens something is given, none is left to Gradio."""
    return {
        "server_name": config.host,
        "server_port": config.port or _free_port(config.host),
        "share": config.share,
        "auth": config.login,
        "auth_message": "This studio asks for a login." if config.auth else None,
        "inbrowser": config.open,
        "max_file_size": MAX_UPLOAD,
        "allowed_paths": [],
        "enable_monitoring": False,
        "mcp_server": False,
        "run_history": False,
        "pwa": False,
        "ssr_mode": False,
        "strict_cors": True,
        "show_error": False,
        "state_session_capacity": 200,
        "footer_links": [],
        "quiet": True,
        "theme": theme.theme(),
        "css": theme.css(),
        "js": _DARK,
        "app_kwargs": {"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [_guard(config)]},
    }


def _guard(config: StudioConfig) -> Any:
    from starlette.middleware import Middleware

    from localctl.studio.guard import Guard

    return Middleware(Guard, is_local=not config.exposed, checks_origin=not config.share)


def serve(config: StudioConfig, block: bool = True) -> Any:
    """Start the server and say where it is; without ``block``, return the blocks once it answers.

    ValueError for a base or adapter that is not there, and for a port that is taken.
    """
    config.check_places()
    _own_environment()
    from localctl.studio.app import build  # with gradio

    if config.exposed:
        logger.warning(
            f"{config.opened} opens this page to others: they can generate images on this machine, see its base and "
            "adapters, and upload images."
        )
    blocks = build(config)
    guarded = ExitStack()
    guarded.enter_context(_guarded_decoding())
    blocks.studio.closing.append(guarded.close)
    try:
        _, url, link = blocks.launch(prevent_thread_lock=True, **launch_options(config))
    except OSError as error:
        blocks.studio.close()
        port = config.port or DEFAULT_PORT
        raise ValueError(f"The port {port} cannot be used ({error}); choose another --port.") from error
    except BaseException:
        blocks.studio.close()
        raise
    print(f"The studio is at {url}", flush=True)
    if link:
        print(f"and at {link}", flush=True)
    if not block:
        return blocks
    try:
        blocks.block_thread()
    finally:
        blocks.studio.close()
    return blocks


def _own_environment() -> None:
    """Take Gradio's variables out of this process's environment: a server must not open more than its flags say."""
    for name in sorted(os.environ):
        if name.startswith("GRADIO_") and name not in _KEPT:
            logger.warning(f"{name} is set but not used: the flags of the studio alone say what it opens.")
            del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@contextmanager
def _guarded_decoding() -> Iterator[None]:
    """Make Pillow refuse images of more than ``MAX_PIXELS`` in this process, whoever opens them."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _free_port(host: str) -> int | None:
    """Return the usual port, or None, for any near it, if that is taken."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host if host not in ("", "localhost") else "127.0.0.1", DEFAULT_PORT))
        except OSError:
            return None
    return DEFAULT_PORT
