"""A program of the guest that copies its standard input to its standard output: between a pipe and a named port.

A port has one opener, so that a command on it could not open ``/dev/stdout``. A pipe can be opened again, but what
is in it when the kernel crashes is lost: therefore the program runs before all others (SCHED_FIFO), as soon as there
is something to copy. busybox has no such program, and the host no compiler: these are its machine instructions.
"""

from __future__ import annotations

import struct

BUFFER = 32 << 10  # what Linux passes to a port in one buffer (drivers/char/virtio_console.c: port_fops_write)

_BASE = 0x400000
_CODE = """
    b8 90000000     mov eax, 144            ; sched_setscheduler(0, SCHED_FIFO, {1}): without it only slower
    31 ff           xor edi, edi
    6a 01           push 1
    be 01000000     mov esi, 1
    48 89e2         mov rdx, rsp
    0f 05           syscall
    48 81ec {size}  sub rsp, BUFFER
    31 c0       1a: xor eax, eax            ; read(0, buffer, BUFFER)
    31 ff           xor edi, edi
    48 89e6         mov rsi, rsp
    ba {size}       mov edx, BUFFER
    0f 05           syscall
    48 89c3         mov rbx, rax            ; what is left, and where
    48 89e5         mov rbp, rsp
    f7 d8           neg eax
    79 26           jns 58                  ; the end, or an error: its number is the exit status
    b8 01000000 32: mov eax, 1              ; write(1, rest)
    bf 01000000     mov edi, 1
    48 89ee         mov rsi, rbp
    48 89da         mov rdx, rbx
    0f 05           syscall
    48 85c0         test rax, rax
    78 0a           js 53
    48 01c5         add rbp, rax
    48 29c3         sub rbx, rax
    75 e1           jnz 32
    eb c7           jmp 1a
    b8 01000000 53: mov eax, 1
    89 c7       58: mov edi, eax            ; exit(status)
    b8 3c000000     mov eax, 60
    0f 05           syscall
"""
_ENCODED_WIDTH = 20  # columns of the listing before its text


def program() -> bytes:
    """Return the program: a static ELF file for x86-64 (System V ABI; ELF-64 object file format, version 1.5)."""
    size = struct.pack("<I", BUFFER).hex()
    lines = (line[:_ENCODED_WIDTH].format(size=size) for line in _CODE.splitlines())
    code = bytes.fromhex("".join(word for line in lines for word in line.split() if not word.endswith(":")))
    start = 64 + 56  # after the two headers
    identity = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 62, 1, _BASE + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    total = start + len(code)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, total, total, 0x1000)  # PT_LOAD, read and execute
    return header + segment + code
