"""Loggers that import ``logging`` when there is something to log: it takes as long as a dozen of our modules."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import logging

_files_only = False


def keep_off_standard_error() -> None:
    """Keep warnings off standard error where the process has no handler for them: there ``logging`` prints them."""
    global _files_only
    _files_only = True


class Filter(Protocol):
    """What ``logging.Logger.addFilter`` takes."""

    def filter(self, record: logging.LogRecord, /) -> bool:
        """Return whether the record is logged."""


class Log:
    """The logger of a module, as ``logging.getLogger(name)`` returns it.

    Messages below a warning are dropped while no module has imported ``logging``: no handler can want them then.

    Synchronization: from any thread.
    """

    def __init__(self, name: str, limit: Filter | None = None) -> None:
        self.name = name
        self._limit = limit

    @property
    def logger(self) -> logging.Logger:
        """The logger itself."""
        import logging

        if _files_only and not (package := logging.getLogger("kvmpass")).handlers:
            package.addHandler(logging.NullHandler())
        logger = logging.getLogger(self.name)
        if self._limit is not None:
            logger.addFilter(self._limit)  # which does nothing the second time
        return logger

    def debug(self, message: str, *args: object) -> None:
        """Log at level ``DEBUG``."""
        if "logging" in sys.modules:
            self.logger.debug(message, *args, stacklevel=2)

    def info(self, message: str, *args: object) -> None:
        """Log at level ``INFO``."""
        if "logging" in sys.modules:
            self.logger.info(message, *args, stacklevel=2)

    def warning(self, message: str, *args: object) -> None:
        """Log at level ``WARNING``."""
        self.logger.warning(message, *args, stacklevel=2)

    def error(self, message: str, *args: object) -> None:
        """Log at level ``ERROR``."""
        self.logger.error(message, *args, stacklevel=2)

    def exception(self, message: str, *args: object) -> None:
        """Log at level ``ERROR``, with the exception that is being handled."""
        self.logger.exception(message, *args, stacklevel=2)
