"""VIRTIO 1.2: features, split and packed virtqueues (both halves) and the block device's formats.

Nothing here knows how a queue or its memory reached this process, or what a disk is made of.
"""
