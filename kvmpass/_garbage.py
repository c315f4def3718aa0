"""How often the command searches for garbage: hardly while it imports, as usual once a guest runs."""

import gc

_WHILE_IMPORTING = 50_000  # objects; the imports of a command make 40 000
_usual: tuple[int, int, int] | None = None


def collect_rarely() -> None:
    """Search for garbage after 50 000 objects only, until ``collect_as_usual``: what imports make stays.

    Without this they are searched over and over. For the command, whose process is its own; main thread only.
    """
    global _usual
    _usual = _usual or gc.get_threshold()
    gc.set_threshold(_WHILE_IMPORTING, *_usual[1:])


def collect_as_usual() -> None:
    """End ``collect_rarely``: a guest runs for days, and a single object of garbage may be large.

    What there is by now is never searched (``gc.freeze``): most of it is modules. Main thread only. Idempotent; does
    nothing in a program of others, which has not called ``collect_rarely``.
    """
    global _usual
    if _usual is not None:
        gc.freeze()
        gc.set_threshold(*_usual)
        _usual = None
