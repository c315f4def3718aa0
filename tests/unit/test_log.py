"""Loggers that import ``logging`` late: in processes that have not imported it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from kvmpass._log import Log


def run(lines: str) -> tuple[str, str]:
    """Return what a process prints on standard output and standard error."""
    imports = "import sys\nfrom kvmpass._log import Log, keep_off_standard_error, load_logging"
    script = f"{imports}\nlog = Log('kvmpass.test')\n{lines}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_details_load_nothing() -> None:
    assert run("log.debug('a %d', 1); log.info('b'); print('logging' in sys.modules)") == ("False\n", "")


def test_a_warning_is_printed_unless_the_process_keeps_it_off() -> None:
    assert run("log.warning('a %d', 1)") == ("", "a 1\n")
    assert run("keep_off_standard_error(); log.warning('a'); print('logging' in sys.modules)") == ("False\n", "")
    with_handler = "keep_off_standard_error(); import logging; logging.basicConfig(); log.warning('a'); log.info('b')"
    assert run(with_handler) == ("", "WARNING:kvmpass.test:a\n")


def test_logging_that_the_process_imports_later_prints_nothing_either() -> None:
    """And the logger is looked up once: every message of a guest would take a lock of the process."""
    assert run("import logging; log.warning('a'); keep_off_standard_error(); log.warning('b')") == ("", "a\n")
    assert run("keep_off_standard_error(); log.warning('a'); import logging; log.warning('b')") == ("", "")
    looked_up = "import logging; logging.getLogger = None; log.warning('b')"
    assert run(f"log.warning('a'); {looked_up}") == ("", "a\nb\n")


def test_without_a_descriptor_messages_are_dropped_until_logging_is_loaded() -> None:
    """A guest can use up descriptors: what warns of that must go on."""
    full = (
        "import os, resource; from kvmpass._ratelimit import log_errors\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); free = os.open('/dev/null', 0); os.close(free)\n"
        "def refused():\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))\n"
        "    with log_errors(log, 'refused: %s'): os.eventfd(0)\n"
        "    try: os.eventfd(0)\n"
        "    except OSError: log.exception('again'); log.error('and'); log.debug('c')\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "refused(); print('logging' in sys.modules); load_logging(); refused()"
    )
    out, err = run(full)
    assert out == "False\n"
    lines = err.splitlines()
    assert lines[:2] == ["refused: [Errno 24] Too many open files", "again"] and lines[-1] == "and"


def test_a_guest_that_runs_has_logging_loaded() -> None:
    """Unless its messages would go nowhere."""
    threads = "import threading; from kvmpass.machine.vcpus import VcpuThreads"
    started = "VcpuThreads([], None, None, threading.RLock(), lambda: None).start()"
    loaded = "print('logging' in sys.modules)"
    assert run(f"{threads}; {loaded}; {started}; {loaded}") == ("False\nTrue\n", "")
    assert run(f"{threads}; keep_off_standard_error(); {started}; {loaded}") == ("False\n", "")


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
