"""The extension module, and the programs in C; everything else is in pyproject.toml."""

from itertools import takewhile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

HOSTED = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
# Without a C library, an interpreter or relocations: it runs on whatever root file system a guest has.
FREESTANDING = (
    "-std=gnu11 -Os -Wall -Wextra -ffreestanding -fno-stack-protector -fno-pie -fno-asynchronous-unwind-tables "
    "-fcf-protection=none -mno-red-zone -static -nostdlib -no-pie -s "
    "-Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,noexecstack"
)
# By their path, their sources below cffi_build and the compiler's further arguments.
PROGRAMS = {
    "kvmpass/files/confine": (["confine.c"], HOSTED),
    "kvmpass/files/noatime.so": (["noatime.c"], [*HOSTED, "-shared", "-fPIC"]),
    "kvmpass/initramfs/agent": (
        [f"agent/{name}.c" for name in ("agent", "beside", "init", "process", "streams", "text")],
        FREESTANDING.split(),
    ),
}


class BuildPrograms(build_ext):
    """Build the programs, too: beside the sources or, for a wheel, into it. cffi derives a class from this one."""

    def run(self) -> None:
        super().run()
        for path, (sources, arguments) in PROGRAMS.items():
            program = Path("" if self.inplace else self.build_lib, path)
            program.parent.mkdir(parents=True, exist_ok=True)
            files = [f"cffi_build/{source}" for source in sources]
            compiler = takewhile(lambda word: not word.startswith("-"), self.compiler.compiler)  # ccache gcc -O2
            self.spawn([*compiler, *arguments, "-o", str(program), *files])

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(str(Path(self.build_lib, path)) for path in PROGRAMS)]


# cffi_modules is a keyword of setup.py only.
setup(cffi_modules=["cffi_build/build.py:ffi"], cmdclass={"build_ext": BuildPrograms})
