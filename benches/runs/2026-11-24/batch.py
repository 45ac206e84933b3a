"""12 images on a real Glance: `virta batch --verify none` with 1 and 4 jobs against parallel curl transfers of the same bytes.

    eval "$(.ci/openstack/up | grep '^export ')"; python3 benches/runs/2026-11-24/batch.py target/release/virta ROUNDS

curl moves what has to be moved whatever moves it: a GET of each raw image, and a PUT of the qcow2 that virta made of it, with P of them at a
time; the best P counts. All are run in turn, round by round.
"""

import concurrent.futures
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

VIRTA, ROUNDS = sys.argv[1], int(sys.argv[2])
COUNT, MIB = 12, 1 << 20
ENV = {**os.environ, "OS_CLOUD": "donor"}


def openstack(*words):
    return subprocess.run(["openstack", *words], env=ENV, check=True, capture_output=True, text=True).stdout.strip()


TOKEN = openstack("token", "issue", "-f", "value", "-c", "id")
GLANCE = openstack("catalog", "show", "image", "-f", "json")
GLANCE = next(e["url"] for e in json.loads(GLANCE)["endpoints"] if e["interface"] == "public").rstrip("/")


def call(method, path, body=None, kind="application/json"):
    request = urllib.request.Request(GLANCE + path, method=method, data=None if body is None else json.dumps(body).encode())
    request.add_header("X-Auth-Token", TOKEN)
    request.add_header("Content-Type", kind)
    for _ in range(8):
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            # the lab's Glance keeps its records in SQLite, which is "locked" now and then
            if error.code < 500:
                raise
            time.sleep(0.5)
    raise RuntimeError(f"{method} {path} failed")


def put(image, path):
    subprocess.run(
        ["curl", "-sS", "--fail", "-X", "PUT", "-H", f"X-Auth-Token: {TOKEN}", "-H", "Content-Type: application/octet-stream", "-T", path,
         f"{GLANCE}/v2/images/{image}/file"], check=True)  # fmt: skip


def new(name, disk_format):
    return call("POST", "/v2/images", {"name": name, "disk_format": disk_format, "container_format": "bare", "visibility": "private"})["id"]


def delete(image):
    call("DELETE", f"/v2/images/{image}")


def curl_round(sources, made, parallel):
    """A GET of the raw image and a PUT of the compact one, for each; P at a time."""
    targets = [new("curl", "qcow2") for _ in sources]

    def one(number):
        subprocess.run(["curl", "-sS", "--fail", "-o", "/dev/null", "-H", f"X-Auth-Token: {TOKEN}", f"{GLANCE}/v2/images/{sources[number]}/file"], check=True)
        for _ in range(5):
            try:
                return put(targets[number], made[number])
            except subprocess.CalledProcessError:
                print("a PUT of curl failed and is tried again", file=sys.stderr)
                delete(targets[number])
                targets[number] = new("curl", "qcow2")
        raise RuntimeError("curl cannot upload")

    started = time.time()
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, range(len(sources))))
    elapsed = time.time() - started
    for target in targets:
        delete(target)
    return elapsed


def virta_round(sources, jobs):
    started = time.time()
    run = subprocess.run(
        [VIRTA, "batch", "--verify", "none", "--jobs", str(jobs), "--progress", "none", "-f", "json", *sources], env=ENV, capture_output=True, text=True)  # fmt: skip
    elapsed = time.time() - started
    assert run.returncode == 0, run.stderr
    images = [item["report"]["destination"].removeprefix("glance:") for item in json.loads(run.stdout)["items"]]
    return elapsed, images


def main():
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = pathlib.Path(folder)
        sources, noise = [], random.Random(1)
        for number in range(COUNT):
            raw = folder / "raw"
            with open(raw, "wb") as file:
                # sizes differ; a quarter is data
                mib = 160 + 40 * number
                file.truncate(mib * MIB)
                for at in range(0, mib, 8):
                    file.seek(at * MIB)
                    file.write(noise.randbytes(2 * MIB))
            image = new(f"bench-{number}", "raw")
            put(image, raw)
            sources.append(image)
        _, images = virta_round(sources, 4)
        made = []
        for number, image in enumerate(images):
            path = folder / f"{number}.qcow2"
            subprocess.run(["curl", "-sS", "--fail", "-o", path, "-H", f"X-Auth-Token: {TOKEN}", f"{GLANCE}/v2/images/{image}/file"], check=True)
            made.append(path)
            delete(image)
        raw_bytes = sum((160 + 40 * n) * MIB for n in range(COUNT))
        print(f"{COUNT} images, {raw_bytes / MIB:.0f} MiB raw, {sum(p.stat().st_size for p in made) / MIB:.0f} MiB qcow2")
        times = {}
        for _ in range(ROUNDS):
            for name, run in [
                ("virta --jobs 1", lambda: virta_round(sources, 1)),
                ("curl 1", lambda: curl_round(sources, made, 1)),
                ("curl 2", lambda: curl_round(sources, made, 2)),
                ("virta --jobs 4", lambda: virta_round(sources, 4)),
                ("curl 4", lambda: curl_round(sources, made, 4)),
            ]:
                result = run()
                if isinstance(result, tuple):
                    result, images = result
                    for image in images:
                        delete(image)
                times.setdefault(name, []).append(result)
                print(f"  {name}: {result:.2f}", file=sys.stderr, flush=True)
        for name, taken in times.items():
            print(f"{name:15} median {statistics.median(taken):6.2f} s  ({min(taken):.2f} to {max(taken):.2f})  {[round(t, 2) for t in taken]}")
        best = min((statistics.median(taken), name) for name, taken in times.items() if name.startswith("curl"))
        for jobs in (1, 4):
            virta = statistics.median(times[f"virta --jobs {jobs}"])
            print(f"virta --jobs {jobs} / best curl ({best[1]}): {virta / best[0]:.2f}")
        for source in sources:
            delete(source)


main()
