"""Loggers that import ``logging`` when there is something to log: it takes as long as a dozen of our modules."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import logging

_files_only = False


def keep_off_standard_error() -> None:
    """Keep warnings off standard error where the process has no handler for them: there ``logging`` prints them.

    What is logged while no module has imported ``logging`` is dropped then: nobody can have a handler for it.
    """
    global _files_only
    _files_only = True
    if "logging" in sys.modules:
        _keep_off()


def _keep_off() -> None:
    import logging

    package = logging.getLogger("kvmpass")
    if not package.handlers:
        package.addHandler(logging.NullHandler())


def load_logging() -> None:
    """Import ``logging`` now, so that there are messages when no descriptor is left to import it with.

    Does nothing where it cannot be imported, or where messages would be dropped. Idempotent.
    """
    if not _files_only:
        with suppress(ImportError, OSError):
            import logging  # noqa: F401


class Filter(Protocol):
    """What ``logging.Logger.addFilter`` takes."""

    def filter(self, record: logging.LogRecord, /) -> bool:
        """Return whether the record is logged."""


class Log:
    """The logger of a module, as ``logging.getLogger(name)`` returns it.

    Messages below a warning are dropped while no module has imported ``logging``: no handler can want them then. So
    is a message while ``logging`` cannot be imported, as without a free descriptor: code that warns of that goes on.

    Synchronization: from any thread.
    """

    def __init__(self, name: str, limit: Filter | None = None) -> None:
        self.name = name
        self._limit = limit
        self._found: logging.Logger | None = None  # a look-up takes a lock of the process

    @property
    def logger(self) -> logging.Logger | None:
        """The logger itself; None while ``logging`` cannot be imported, or nobody can have a handler."""
        if self._found is None:
            if _files_only and "logging" not in sys.modules:
                return None
            try:
                import logging
            except (ImportError, OSError):
                return None
            if _files_only:
                _keep_off()
            logger = logging.getLogger(self.name)
            if self._limit is not None:
                logger.addFilter(self._limit)  # which does nothing the second time
            self._found = logger
        return self._found

    def debug(self, message: str, *args: object) -> None:
        """Log at level ``DEBUG``."""
        if "logging" in sys.modules and (logger := self.logger) is not None:
            logger.debug(message, *args, stacklevel=2)

    def info(self, message: str, *args: object) -> None:
        """Log at level ``INFO``."""
        if "logging" in sys.modules and (logger := self.logger) is not None:
            logger.info(message, *args, stacklevel=2)

    def warning(self, message: str, *args: object) -> None:
        """Log at level ``WARNING``."""
        if (logger := self.logger) is not None:
            logger.warning(message, *args, stacklevel=2)

    def error(self, message: str, *args: object) -> None:
        """Log at level ``ERROR``."""
        if (logger := self.logger) is not None:
            logger.error(message, *args, stacklevel=2)

    def exception(self, message: str, *args: object) -> None:
        """Log at level ``ERROR``, with the exception that is being handled."""
        if (logger := self.logger) is not None:
            logger.exception(message, *args, stacklevel=2)
