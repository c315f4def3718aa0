"""``kvmpass borrow``."""

from __future__ import annotations

import click

from kvmpass import host
from kvmpass.cli.params import BDF
from kvmpass.host.program import run_program


@click.command()
@click.argument("bdfs", metavar="BDF... -- PROGRAM...", nargs=-1, required=True, type=BDF)
@click.option("-v", "--verbose", is_flag=True, help="Print the descriptors, the status of PROGRAM, and each step.")
@click.pass_obj
def borrow(command: list[str] | None, /, bdfs: tuple[host.Bdf, ...], verbose: bool) -> int:
    """Run a program of this host while devices are bound to vfio-pci.

    The devices are bound to vfio-pci and rebound to their drivers when PROGRAM ends, for any reason (after a SIGKILL
    of kvmpass: kvmpass restore, once PROGRAM has ended). In its arguments these are replaced, for the first BDF (0)
    and the following ones; PROGRAM inherits the descriptors that they name:

    \b
      {iommufd}               /dev/iommu, opened for this PROGRAM
      {vfio0}, {vfio1} ...    the device's own node, not bound to an iommufd yet
      {container}             /dev/vfio/vfio, for type 1
      {group0}, {group1} ...  the node of the device's IOMMU group, for type 1
      {bdf0}, {bdf1} ...      the device's address

    QEMU 9.0 and later take descriptors; before, a QEMU that runs as root opens the group itself:

    \b
      kvmpass borrow 01:00.0 -- qemu-system-x86_64 ... -object iommufd,id=iommu,fd={iommufd} \\
          -device vfio-pci,id=device,iommufd=iommu,fd={vfio0}
      kvmpass borrow 01:00.0 -- qemu-system-x86_64 ... -device vfio-pci,host={bdf0}

    kvmpass assign takes them, too, as any user who may open /dev/kvm: --iommu-fd {iommufd} --vfio-fd {vfio0}.

    SIGTERM and SIGHUP are forwarded to PROGRAM. Ctrl-C reaches it from the terminal, and kvmpass waits for its end.
    Needs root, or devices that root has bound (kvmpass bind).

    \b
    Exit status: that of PROGRAM, 128+N if signal N has ended it, or:
      125  kvmpass failed, or was called wrongly: this QEMU does not know iommufd, the kernel does not have it ...
      126, 127  PROGRAM is not executable, was not found
    """
    if not command:
        raise click.UsageError("missing PROGRAM: write it after --")
    return run_program(bdfs, command, say=lambda line: _say(line) if verbose else None)


def _say(line: str) -> None:
    click.echo(f"kvmpass: {line}", err=True)
