"""The FFI builder: hands each room's declarations and C to cffi, in API mode.

The C compiler reads layouts and numbers from the kernel's headers, and from ``iommufd.h`` what is newer than those of
build machines; the .cdef files name them and nothing more.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
PARTS = ("memory", "beneath", "fastpath", "kvm", "vfio", "iommufd")

ffi = FFI()
ffi.cdef("\n".join((HERE / f"{part}.cdef").read_text() for part in PARTS))
ffi.set_source(
    "kvmpass._native",
    "\n".join((HERE / f"{part}.c").read_text() for part in ("result", *PARTS)),
    py_limited_api=True,
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-function"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
