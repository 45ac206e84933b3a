"""One command, run once and measured as the kernel saw it."""

import dataclasses
import mmap
import os
import pathlib
import subprocess
import time


@dataclasses.dataclass
class Sample:
    """What one run took. Bytes are those of read and write calls, page cache included; a command's children count with it."""

    seconds: float
    cpu_s: float
    memory_bytes: int
    read_bytes: int
    written_bytes: int
    read_calls: int
    write_calls: int
    switches: int
    output_bytes: int | None = None


class Failed(Exception):
    """A command that ended with another code than 0."""


def run(command, log):
    """Runs a command (a list, or a line for `sh -c`) to its end. Its output goes to `log`, which is shown if it fails."""
    argv = command if isinstance(command, list) else ["sh", "-ec", command]
    with open(log, "wb") as out:
        started = time.monotonic()
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        # a process that has ended keeps its counters until it is waited for
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.monotonic() - started
        counters = dict(line.split(": ") for line in pathlib.Path(f"/proc/{child.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        said = pathlib.Path(log).read_text(errors="replace")[-2000:]
        raise Failed(f"{shown(command)}\nended with {child.returncode}:\n{said}")
    return Sample(
        seconds=seconds,
        cpu_s=usage.ru_utime + usage.ru_stime,
        memory_bytes=usage.ru_maxrss * 1024,
        read_bytes=int(counters["rchar"]),
        written_bytes=int(counters["wchar"]),
        read_calls=int(counters["syscr"]),
        write_calls=int(counters["syscw"]),
        switches=usage.ru_nvcsw + usage.ru_nivcsw,
    )


def shown(command):
    return " ".join(command) if isinstance(command, list) else command


def warm(path):
    """Into the page cache, if there is room."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(4 << 20)
        for start, end in data_of(file.fileno()):
            file.seek(start)
            while file.tell() < end and file.readinto(buffer):
                pass


def settle(bytes_):
    """Waits for what is still written, and touches so much free memory.

    A guest that gives free pages back to its host (free page reporting, a balloon) pays for each at its next use: that is the host's
    time, and it would fall upon one contestant or another by chance. Pages that were just used are free of it.
    """
    os.sync()
    available = int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemAvailable"))) << 10
    with mmap.mmap(-1, max(min(bytes_, available // 2), mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def drop_caches():
    """Out of the page cache with everything; False where that is not allowed."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def data_of(descriptor):
    """The runs of a file that are no holes."""
    at, end = 0, os.fstat(descriptor).st_size
    while at < end:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, at
