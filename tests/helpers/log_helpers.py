"""What the packages log, as a list."""

from __future__ import annotations

import logging

from localctl.messages import LOGGERS, BareFormatter


class ListHandler(logging.Handler):
    """Appends each formatted message to ``texts``."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(BareFormatter())
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


def logged() -> list[str]:
    """Return a list to which every message is appended until the test ends (``no_handlers_left`` in conftest.py)."""
    handler = ListHandler()
    for logger in map(logging.getLogger, LOGGERS):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return handler.texts


def forget_handlers() -> None:
    """Remove the handlers that :func:`logged` added."""
    for logger in map(logging.getLogger, LOGGERS):
        for handler in [other for other in logger.handlers if isinstance(other, ListHandler)]:
            logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
