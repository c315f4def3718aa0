"""What the comparison of two kernel logs takes for a complaint, and what not."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

# Of a full kernel, without an unwinder: every frame carries a question mark.
WARNING = """\
<4>[    0.000000] ------------[ cut here ]------------
<4>[    0.000000] XSAVE consistency problem: size 2696 != kernel_size 576
<4>[    0.000000] WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:605 fpu__init_system_xstate+0xa6c/0xc20
<4>[    0.000000] CPU: 0 UID: 0 PID: 0 Comm: swapper/0 Not tainted 6.12.117 #2
<4>[    0.000000] RIP: 0010:fpu__init_system_xstate+0xa6c/0xc20
<4>[    0.000000] Code: e9 14 f9 ff ff 80 3d 21 d4 f6 ff 00 0f 85 e4 f8 ff ff 44 89 fa 89 c6 a8 73 dd 81 <0f> 0b
<4>[    0.000000] RSP: 0000:ffffffff82003e88 EFLAGS: 00010282
<4>[    0.000000] RAX: 0000000000000037 RBX: 0000000000000a88 RCX: 00000000ffffefff
<4>[    0.000000] R13: 0000000000000009 R14: 0000000000000207 R15: 0000000000000240
<4>[    0.000000] FS:  0000000000000000(0000) GS:ffff88801f200000(0000) knlGS:0000000000000000
<4>[    0.000000] CS:  0010 DS: 0000 ES: 0000 CR0: 0000000080050033
<4>[    0.000000] CR2: ffff888002400000 CR3: 000000000203e000 CR4: 00000000007506b0
<4>[    0.000000] PKRU: 55555554
<4>[    0.000000] Call Trace:
<4>[    0.000000]  <TASK>
<4>[    0.000000]  ? fpu__init_system+0xb6/0x160
<4>[    0.000000]  start_kernel+0x4cb/0x7b0
<4>[    0.000000]  </TASK>
<4>[    0.000000] ---[ end trace 0000000000000000 ]---""".splitlines()

LEFT_OVER = """\
<4>[    0.000000]  ? cpu_bugs_smt_update+0x11/0x490
<4> ? nvme_probe+0x1f/0x700 [nvme]
<4> ? __pfx_autoremove_wake_function.isra.0+0x10/0x10
<4> <IRQ>
<4> </IRQ>
<4>[    1.000000] Modules linked in: nvme(+) nvme_core e1000e
<4>[    1.000000] CPU: 0 UID: 0 PID: 71 Comm: (udev-worker) Tainted: G   W   6.12.117 #1  Debian 6.12.117-1
<4>[    1.000000] Tainted: [W]=WARN
<4>[    1.000000] Hardware name: QEMU Standard PC (Q35 + ICH9, 2009), BIOS 1.16.2-debian-1.16.2-1 04/01/2014
<4>[    0.000000] R10: 00000000ffffefff R11: ffffffff82065f60 R12: 0000000000000200
<4>[    0.000000] Code: Unable to access opcode bytes at 0xffffffffffffffd6.""".splitlines()

FINDINGS = """\
<4>[    0.000000] WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:605 other_function+0xa6c/0xc20
<4>[    0.000000] RIP: 0010:elsewhere+0xa6c/0xc20
<4>[    0.000000]  pci_scan_slot+0x4cb/0x7b0
<4>[    0.000000] nvme 0000:00:04.0: what is that?
<4>? a question
<3>[    0.000000] BUG: kernel NULL pointer dereference, address: 0000000000000008""".splitlines()


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from support import complaints

    yield complaints


@pytest.mark.parametrize("line", LEFT_OVER)
def test_what_a_stack_dump_says_of_the_moment_is_no_finding(complaints: ModuleType, line: str) -> None:
    assert complaints.unexplained([*WARNING[:-3], line, *WARNING[-3:]], WARNING) == []


@pytest.mark.parametrize("line", FINDINGS)
def test_what_a_stack_dump_says_of_the_machine_is_one(complaints: ModuleType, line: str) -> None:
    """Where it was, and from where it was called."""
    assert complaints.unexplained([*WARNING[:-3], line, *WARNING[-3:]], WARNING) == [line]


def test_a_warning_that_the_other_has_not_is_a_finding(complaints: ModuleType) -> None:
    found = complaints.unexplained(WARNING, [])
    assert [line.split("] ", 1)[1] for line in found] == [
        "------------[ cut here ]------------",
        "XSAVE consistency problem: size 2696 != kernel_size 576",
        "WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:605 fpu__init_system_xstate+0xa6c/0xc20",
        "RIP: 0010:fpu__init_system_xstate+0xa6c/0xc20",
        " start_kernel+0x4cb/0x7b0",
        "---[ end trace 0000000000000000 ]---",
    ]
