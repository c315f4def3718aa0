"""The ``kvmpass`` command, and ``python -m kvmpass``: what happens to signals before and after the command runs."""

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit; a signal before that or after it exits at once."""
    _exit_at_signals()
    from kvmpass.cli.main import main as run

    try:
        run()
    except KeyboardInterrupt:  # while the error of the command is printed
        sys.exit(128 + signal.SIGINT)
    finally:
        _exit_at_signals()


def _exit_at_signals() -> None:
    """Without a traceback of an import. No driver is changed yet, or every change is undone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, frame: os._exit(128 + number))


if __name__ == "__main__":
    main()
