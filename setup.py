"""The extension module; everything else is in pyproject.toml (cffi_modules is a keyword of setup.py only)."""

from setuptools import setup

setup(cffi_modules=["cffi_build/build.py:ffi"])
