"""What pyproject.toml cannot say: that cffi builds an extension."""

from setuptools import setup

setup(cffi_modules=["vhostblk/native/build.py:ffibuilder"])
