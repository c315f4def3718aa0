"""Start a session: from the arguments of a call, or from a ``GuestSpec``."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvmpass import host
from kvmpass._teardown import undo_on_error
from kvmpass.assignment.assign import assigned
from kvmpass.dma import BackendFactory
from kvmpass.errors import DeviceInUse, GuestError
from kvmpass.events import DeviceEvent
from kvmpass.guest import Guest, GuestImage, GuestSpec, Sink
from kvmpass.host.backend import AUTO
from kvmpass.memory import Backing
from kvmpass.session.directory import naming_guest
from kvmpass.session.session import BOOT_SECONDS, Session
from kvmpass.timings import Mark, unmarked


def open_session(
    devices: Sequence[str | host.Bdf],
    spec: GuestSpec,
    *,
    name: str | None = None,
    console: Sink | None = None,
    boot_timeout: float = BOOT_SECONDS,
    timeout: float | None = None,
    on_event: Callable[[DeviceEvent], None] | None = None,
    mark: Mark = unmarked,
    warn: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Session:
    """Start a session from a ``GuestSpec`` whose ``session`` is set; ``options`` are those of ``assigned``.

    ``console`` gets all that the guest's console prints, from a thread. ``timeout``: the guest is ended after so many
    seconds, its boot included. Raises as :func:`start`.
    """
    session: Session | None = None
    images: list[GuestImage] = []

    def note(event: DeviceEvent) -> None:
        if session is not None:
            session.note(event)
        if on_event is not None:
            on_event(event)

    with undo_on_error() as undo:
        readers = undo.enter_context(ExitStack())  # the devices are rebound first: a destination of files may stall
        try:
            machine = undo.enter_context(
                assigned(devices, spec, on_event=note, on_image=images.append, mark=mark, warn=warn, **options)
            )
        except DeviceInUse as error:
            raise naming_guest(error, [*map(str, devices)]) from None
        guest = readers.enter_context(
            Guest(
                machine,
                console=console,
                output=_nowhere,
                errors=_nowhere,
                copy_out=spec.copy_out,
                session=True,
                mark=mark,
            )
        )
        if guest.agent is None:
            raise GuestError("the guest's image has no agent", "set session in its GuestSpec")
        first = str(machine.devices[0].bdf) if machine.devices else "guest"
        own_init = spec.initrd is not None
        session = Session(name or first, machine, guest, guest.agent, images[0].entry, own_init=own_init)
        session.begin(boot_timeout, warn, timeout)
        session.own(undo.pop_all())
    return session


def start(
    devices: Sequence[str | host.Bdf] = (),
    *,
    name: str | None = None,
    memory: str = "1G",
    cpus: int = 1,
    root: str = "minimal",
    kernel: str | os.PathLike[str] | None = None,
    initrd: str | os.PathLike[str] | None = None,
    append: str = "",
    shares: Sequence[str] = (),
    copies: Sequence[str] = (),
    modules: Sequence[str | os.PathLike[str]] = (),
    backing: str = Backing.ANONYMOUS,
    backend: str | BackendFactory = AUTO,
    p2p: bool = False,
    vf_token: uuid.UUID | None = None,
    on_event: Callable[[DeviceEvent], None] | None = None,
    on_console: Sink | None = None,
    boot_timeout: float = BOOT_SECONDS,
    kaslr: bool = False,
) -> Session:
    """Boot a Linux guest with ``devices`` assigned, and return it once it runs commands.

    ``with kvmpass.start(["0000:01:00.0"]) as guest: guest.run(["lspci"])``. The arguments are the options of
    ``kvmpass assign``: ``name`` (by default the address of the first device), ``initrd`` (an initramfs of the user's
    own, beside whose init the agent runs; the next four are refused with it), ``root`` (``minimal``, ``host`` or a
    directory), ``shares`` (``SRC[:DST][,rw]`` each), ``copies`` (``SRC:DST`` each), ``modules``, ``backing`` (a value
    of ``kvmpass.memory.Backing``, or ``auto``: the largest huge pages that the host has for all of the guest's
    memory, else anonymous memory), ``boot_timeout`` in seconds.
    ``on_event``: as for ``Machine``. ``on_console`` gets all that the guest's console prints, from a thread.

    Raises what :func:`kvmpass.assignment.assign.assigned` raises, and ``GuestDied`` for a guest that does not boot;
    then the devices are rebound.
    """
    spec = GuestSpec(
        kernel=Path(kernel) if kernel is not None else None,
        initrd=Path(initrd) if initrd is not None else None,
        append=append,
        kaslr=kaslr,
        root=root,
        shares=tuple(shares),
        copy=tuple(copies),
        modules=tuple(map(Path, modules)),
        session=True,
    )
    return open_session(
        devices,
        spec,
        name=name,
        console=on_console,
        boot_timeout=boot_timeout,
        on_event=on_event,
        memory=memory,
        cpus=cpus,
        backing=backing,
        backend=backend,
        p2p=p2p,
        vf_token=vf_token,
    )


def _nowhere(data: bytes) -> None:
    """Drop ``data``: a session's guest has no command of its own."""
