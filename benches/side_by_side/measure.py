"""One command, run once and measured as the kernel saw it."""

import dataclasses
import json
import mmap
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TOUCH = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"


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
    reader, writer = os.pipe()
    with open(log, "wb") as out, os.fdopen(reader) as answer:
        starter = subprocess.Popen(
            [sys.executable, "-S", "-E", HERE / "start.py", str(writer), *map(str, argv)], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            pass_fds=[writer],
        )  # fmt: skip
        os.close(writer)
        text = answer.read()
        starter.wait()
    told = json.loads(text) if text else {"code": f"nothing: {starter.returncode}"}
    if told["code"] != 0:
        said = pathlib.Path(log).read_text(errors="replace")[-2000:]
        raise Failed(f"{shown(command)}\nended with {told['code']}:\n{said}")
    return Sample(**told["took"])


def shown(command):
    return " ".join(command) if isinstance(command, list) else command


def warm(path):
    """Into the page cache, if there is room."""
    subprocess.run([sys.executable, "-S", "-E", HERE / "read_extents.py", path], check=True)


def settle(bytes_):
    """Waits for what is still written, and touches so much free memory.

    A guest that gives free pages back to its host (free page reporting, a balloon) pays for each at its next use: that is the host's
    time, and it would fall upon one contestant or another by chance. Pages that were just used are free of it.
    """
    os.sync()
    available = int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemAvailable"))) << 10
    subprocess.run([sys.executable, "-S", "-E", "-c", TOUCH, str(max(min(bytes_, available // 2), mmap.PAGESIZE))], check=True)


def drop_caches():
    """Out of the page cache with everything; False where that is not allowed."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
