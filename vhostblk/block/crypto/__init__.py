"""Encryption of images: secrets, LUKS version 1, and what turns sectors into other sectors.

`secret.py` is what users know; `library.py` is the only place that imports the package that has the ciphers;
`sector_cipher.py` (with `aes_modes.py`) encrypts sectors, and `threaded.py` has others do it; `luks_header.py` and
`af_split.py` are bytes in, bytes out, `luks_options.py` is what users may say, and `luks.py` makes, opens and changes
LUKS volumes.

Nothing here knows about nodes.
"""
