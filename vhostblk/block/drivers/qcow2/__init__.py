"""qcow2, cut up by structure.

| module | what it knows |
|---|---|
| `header`, `extensions`, `header_change` | the header and its extensions; changing them so that nothing can tear them |
| `entries` | what an entry of an L2 table says |
| `tables`, `cache` | tables as bytes and as numbers; parts of them in memory |
| `refcounts`, `free_clusters` | who uses which cluster of the file |
| `refcount_blocks`, `refcount_table` | where that is |
| `cluster_map` | which cluster has which bytes of the disk: L1 and L2 tables in memory |
| `metadata` | the order in which all tables reach the disk; the header |
| `clusters` | where guest clusters are, and how they get a place |
| `first_writes` | how many of them get theirs before the engine writes to them |
| `extents` | what the engine may do alone |
| `snapshots`, `bitmaps` | the table of internal snapshots, the directory of bitmaps and their tables |
| `bitmap_store`, `bitmap_node` | bits of bitmaps in the image, all of them written anew; for whom |
| `shadow`, `snapshot_changes`, `snapshot_node` | the image's next state; what snapshots change in it; for whom |
| `backing` | what the header says the image is backed by, and how that changes |
| `survey`, `l2_table`, `tally` | what all tables say, and how often each cluster is used: a check |
| `recorded` | what is recorded about that, and how it differs |
| `repair`, `check_node` | what can be repaired, in which order; for whom |
| `rebuild`, `snapshot_repair` | all counts anew; the table of snapshots |
| `overlaps`, `places` | where all tables are, which nobody may overwrite |
| `data_file` | external data files, raw or not |
| `locks` | who uses which range of the disk |
| `compressed`, `compressing` | compressed clusters as bytes; how they are written |
| `layout`, `create` | where things are in a new image; making one |
| `encryption`, `encryption_options`, `encrypted_node` | what opens an encrypted image; what users say; for whom |
| `measuring`, `unwritten` | how large an image gets; clusters that have a place and no bytes |
| `resize`, `amend`, `amend_options` | a disk that grows or shrinks; an image that is to be like another |
| `emptying` | an image that gives up all it has, at once |
| `format_info` | what an image is like, in QMP's words |
| `request_node` | what is done with requests |
| `options`, `node` | what users may ask for, the driver |
"""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.node import Qcow2Node

__all__ = ["Qcow2Node"]
