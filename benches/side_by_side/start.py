"""Starts a command and tells, as JSON on the descriptor that is the first argument, what it took.

A process of its own, and a small one: a child's peak of memory counts what its parent had when it was started.
"""

import json
import os
import sys
import time

answer, command = int(sys.argv[1]), sys.argv[2:]
os.set_inheritable(answer, False)
started = time.monotonic()
child = os.posix_spawnp(command[0], command, os.environ)
# a process that has ended keeps its counters until it is waited for
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
seconds = time.monotonic() - started
with open(f"/proc/{child}/io") as file:
    counters = dict(line.split(": ") for line in file.read().splitlines())
_, status, usage = os.wait4(child, 0)
took = {
    "seconds": seconds,
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "memory_bytes": usage.ru_maxrss * 1024,
    "read_bytes": int(counters["rchar"]),
    "written_bytes": int(counters["wchar"]),
    "read_calls": int(counters["syscr"]),
    "write_calls": int(counters["syscw"]),
    "switches": usage.ru_nvcsw + usage.ru_nivcsw,
}
with os.fdopen(answer, "w") as file:
    json.dump({"code": os.waitstatus_to_exitcode(status), "took": took}, file)
