"""Filters, one per file (block layer rows B20, B24, B30, B43); `vhostblk.block.drivers` lists them with the drivers."""
