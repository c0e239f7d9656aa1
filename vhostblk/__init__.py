"""vhostblk: serve disks to virtual machines over vhost-user-blk.

ARCHITECTURE.md is the map; each folder is one specification.
"""

__version__ = "0.1.0"
