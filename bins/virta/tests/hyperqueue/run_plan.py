"""Runs a plan of `virta batch --plan hyperqueue` on a real HyperQueue of two workers, of which one is lost in between.

    python run_plan.py PLAN_FOLDER

The wheel has a server and workers, but no `hq` program, so what submit.sh says is read and submitted through the Python interface: the same
command, an entry of items.json a task in HQ_ENTRY, a task folder (whence HQ_ERROR_FILENAME), the same crash limit. The last line is JSON:
which tasks failed and what HyperQueue shows of it.

A worker of the wheel lives in the process of its server, so it cannot be killed alone. Its connection is cut instead: the server loses the
worker and gives its tasks to the other one, and the worker ends and takes its tasks with it.
"""

import json
import os
import pathlib
import shlex
import socket
import stat
import sys
import time

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig


def sockets():
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
        except OSError:
            pass
    return found


def cut(fds):
    """Ends connected TCP sockets, whoever of this process reads them."""
    count = 0
    for fd in fds:
        try:
            with socket.socket(fileno=os.dup(fd)) as end:
                end.getpeername()
                if end.family in (socket.AF_INET, socket.AF_INET6):
                    end.shutdown(socket.SHUT_RDWR)
                    count += 1
        except OSError:
            pass
    return count


def main():
    plan = pathlib.Path(sys.argv[1])
    items = json.loads((plan / "items.json").read_text())
    words = shlex.split((plan / "submit.sh").read_text().splitlines()[-1])
    hq, command = words[: words.index("--")], words[words.index("--") + 1 :]
    assert hq[:3] == ["exec", "hq", "submit"] and "--task-dir" in hq, hq
    assert pathlib.Path(hq[hq.index("--from-json") + 1]).samefile(plan / "items.json"), hq
    crash_limit = int(hq[hq.index("--crash-limit") + 1])

    with LocalCluster() as cluster:
        cluster.start_worker(WorkerConfig(cores=1))
        before = sockets()
        cluster.start_worker(WorkerConfig(cores=1))
        time.sleep(0.5)
        second = sockets() - before

        job = Job(max_fails=None)
        log = plan / "log"
        log.mkdir()
        # which tasks were begun a second time: HyperQueue counts them in HQ_INSTANCE_ID
        instances = log / "instances"
        noted = ["sh", "-c", 'echo "$HQ_INSTANCE_ID" >> "$0"; exec "$@"', str(instances), *command]
        for number, item in enumerate(items):
            job.program(
                noted,
                env={"HQ_ENTRY": json.dumps(item), **{key: os.environ[key] for key in ("XDG_STATE_HOME", "HOME", "PATH") if key in os.environ}},
                stdout=log / f"{number}.out",
                stderr=log / f"{number}.err",
                cwd=os.getcwd(),
                task_dir=True,
                crash_limit=crash_limit,
            )
        client = cluster.client()
        submitted = client.submit(job)

        killed = False
        deadline = time.time() + 60
        while time.time() < deadline and not killed:
            done = sum(1 for out in log.glob("*.out") if out.stat().st_size > 0)
            if done >= 3:
                killed = cut(second) > 0
            time.sleep(0.05)

        client.wait_for_jobs([submitted], raise_on_error=False)
        failed = []
        for task, context in client.get_failed_tasks(submitted).items():
            failed.append({"task": task, "image": items[task]["image"], "error": context.error})
        again = sum(1 for line in instances.read_text().split() if line != "0")
        print(json.dumps({"tasks": len(items), "failed": failed, "killed_a_worker": killed, "begun_again": again}))


if __name__ == "__main__":
    main()
