"""Reads a file's data, and nothing else: what a disk gives at best to whoever reads in order."""

import os
import sys

from measure import data_of

with open(sys.argv[1], "rb", buffering=0) as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = bytearray(2 << 20)
    for start, end in data_of(file.fileno()):
        file.seek(start)
        while start < end:
            start += file.readinto(memoryview(buffer)[: min(len(buffer), end - start)])
