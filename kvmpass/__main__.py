"""The ``kvmpass`` command, and ``python -m kvmpass``: what happens to signals before and after the command runs."""

# Not signal, which imports enum: that takes some milliseconds, in which Ctrl-C would print a traceback.
import _signal  # type: ignore[import-not-found]
import os
import sys

from kvmpass._garbage import collect_rarely


def main() -> None:
    """Run the command line and exit; a signal before that or after it exits at once."""
    _exit_at_signals()
    collect_rarely()  # a command that runs a guest ends this; others are short, or make little garbage
    from kvmpass.cli.main import main as run

    try:
        run()
    except KeyboardInterrupt:  # while the error of the command is printed
        sys.exit(128 + _signal.SIGINT)
    finally:
        _exit_at_signals()


def _exit_at_signals() -> None:
    """Without a traceback of an import. No driver is changed yet, or every change is undone."""
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT):
        if _signal.getsignal(number) != _signal.SIG_IGN:  # nohup
            _signal.signal(number, lambda number, frame: os._exit(128 + number))


if __name__ == "__main__":
    main()
