"""Loggers that import ``logging`` late: in processes that have not imported it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from kvmpass._log import Log


def run(lines: str) -> tuple[str, str]:
    """Return what a process prints on standard output and standard error."""
    script = f"import sys\nfrom kvmpass._log import Log, keep_off_standard_error\nlog = Log('kvmpass.test')\n{lines}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_details_load_nothing() -> None:
    assert run("log.debug('a %d', 1); log.info('b'); print('logging' in sys.modules)") == ("False\n", "")


def test_a_warning_is_printed_unless_the_process_keeps_it_off() -> None:
    assert run("log.warning('a %d', 1)") == ("", "a 1\n")
    assert run("keep_off_standard_error(); log.warning('a'); print('logging' in sys.modules)") == ("True\n", "")
    with_handler = "keep_off_standard_error(); import logging; logging.basicConfig(); log.warning('a'); log.info('b')"
    assert run(with_handler) == ("", "WARNING:kvmpass.test:a\n")


def test_every_level_is_logged_with_the_place_of_its_caller(caplog: pytest.LogCaptureFixture) -> None:
    log = Log("kvmpass.test")
    with caplog.at_level(logging.DEBUG, log.name):
        log.debug("%d", 1)
        log.info("%d", 2)
        log.warning("%d", 3)
        log.error("%d", 4)
        try:
            raise ValueError
        except ValueError:
            log.exception("%d", 5)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "1"), ("INFO", "2"), ("WARNING", "3"), ("ERROR", "4"), ("ERROR", "5")
    ]  # fmt: skip
    assert {record.filename for record in caplog.records} == {"test_log.py"}
    assert caplog.records[-1].exc_info is not None
