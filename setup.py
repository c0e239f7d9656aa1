"""What pyproject.toml cannot say: that cffi builds extensions."""

from setuptools import setup

setup(cffi_modules=["vhostblk/native/build.py:ffibuilder", "vhostblk/native/build.py:loadbuilder"])
