"""Virta and its peers on the same input, in turn.

    cargo build --release -p virta
    python3 benches/side_by_side --work /var/tmp/bench                      all local cases, 7 rounds, 4 GiB
    python3 benches/side_by_side --case exact --case cold                   some of them
    python3 benches/side_by_side --scaling                                  one job, growing
    eval "$(.ci/openstack/up | grep '^export ')"; OS_CLOUD=donor python3 benches/side_by_side --glance      those on a real cloud

Cases: exact cold zlib zstd random zeros alternating sparse; with --glance: glance glance-zeros glance-batch; with --scaling: disk-* data-*
workers workers-zstd, and with both: connections jobs.
Writes NAME.json (every sample) and NAME.md (medians, spread, ratios) into --out. Inputs are kept in --work (about 14 GiB), so
that a second run begins at once. A contestant that is not installed is named in the report. Some ratios have a limit (`at least`, `at most` in
the report): exit 1 if one does not hold.
"""

import argparse
import datetime
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

import cases
import measure
import report
from cloud import Cloud
from inputs import Inputs


def above_zero(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least one round is needed")
    return int(text)


def a_size(text):
    if not re.fullmatch(r"[1-9][0-9]*g", text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of GiB, such as 4g")
    return text


def writable(path):
    """Makes a folder, or ends with a line that says why not: before a minute's work, not behind it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        sys.exit(f"nothing can be written in {path}: {error.strerror}")
    return path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--virta", default="target/release/virta", type=pathlib.Path, help="the program")
    parser.add_argument("--work", default="target/side-by-side", type=pathlib.Path, help="folder for inputs and outputs")
    parser.add_argument("--rounds", default=7, type=above_zero)
    parser.add_argument("--size", default="4g", type=a_size, help="of the realistic disk: 1g, 2g, 4g …")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    parser.add_argument("--without", action="append", default=[], metavar="TEXT", help="no contestant whose name has this in it; may be repeated")
    parser.add_argument("--scaling", action="store_true", help="as disks, data, threads and, with --glance, connections and jobs grow")
    parser.add_argument("--glance", action="store_true", help="the cases on a real Glance; OS_CLOUD says which")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the report [default: benches/runs/DATE]")
    parser.add_argument("--name", help="the report's name [default: local, glance, scaling-local, scaling-glance]")
    return parser.parse_args()


def main():
    given = arguments()
    virta = given.virta.resolve()
    if not virta.exists():
        sys.exit(f"{virta} is not there: cargo build --release -p virta, or --virta PATH")
    work = writable(given.work.resolve())
    today = datetime.date.today().isoformat()
    out = writable(given.out or pathlib.Path("benches/runs") / today)
    inputs = Inputs(work / "inputs")
    if given.glance:
        if not Cloud.available():
            sys.exit("--glance wants OS_CLOUD and a clouds.yaml: see the head of this file")
        cloud = Cloud(work)
        wanted = cases.connections(cloud, inputs, given.size) if given.scaling else cases.glance(cloud, inputs, virta, work, given.size)
    else:
        wanted = cases.scaling() if given.scaling else cases.local(given.size)
    names = [case.name for case in wanted]
    if unknown := set(given.case or []) - set(names):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    about = {
        "date": today, "command": shlex.join(["python3", "benches/side_by_side", *sys.argv[1:]]), "rounds": given.rounds,
        "virta": subprocess.run([virta, "--version"], capture_output=True, text=True, check=True).stdout.strip(), **report.machine(),
    }  # fmt: skip
    results = []
    for case in wanted:
        if not given.case or case.name in given.case:
            try:
                results.append(run_case(case, given.rounds, virta, inputs, work, given.without))
            finally:
                case.after()
            report.write(out, given.name or "-".join(word for word, on in [("scaling", given.scaling), ("glance" if given.glance else "local", True)] if on), about, results)
    ratios = [ratio for result in results for ratio in result["ratios"]]
    for ratio in ratios:
        limit = report.limit_of(ratio)
        if ratio["value"] is None:
            print(f"     ---  {ratio['says']}  {limit}  not checked: a contestant was not run")
            continue
        verdict = {True: "holds", False: "DOES NOT HOLD", None: ""}[ratio["held"]]
        print(f"{ratio['value']:8.3f}  {ratio['says']}  {limit}  {verdict}")
    sys.exit(any(ratio["held"] is False for ratio in ratios))


def run_case(case, rounds, virta, inputs, work, without):
    """All rounds of a case."""
    source = inputs.get(case.input)
    skipped, samples, commands = {}, {}, {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if case.out_in_memory else work) as folder:
        places = {"virta": virta, "in": source, "out": f"{folder}/out", "work": folder}
        fill = lambda text: text if "{" not in text else text.format(**places)  # noqa: E731
        entered = []
        for contestant in case.contestants:
            if any(text in contestant.name for text in without):
                skipped[contestant.name] = "left out (--without)"
            elif missing := [tool for tool in contestant.needs if shutil.which(tool) is None]:
                skipped[contestant.name] = f"{', '.join(missing)} not installed"
            else:
                entered.append(contestant)
        if case.cold and not measure.drop_caches():
            skipped = {contestant.name: "dropping the page cache needs root" for contestant in case.contestants}
            entered = []
        shuffled = random.Random(1)
        for number in range(rounds):
            for contestant in shuffled.sample(entered, len(entered)):
                contestant.before()
                command = fill(contestant.command() if callable(contestant.command) else contestant.command)
                commands[contestant.name] = command.replace(str(virta), "virta").replace(str(work), "WORK").replace(folder, "OUT")
                if case.cold:
                    measure.drop_caches()
                measure.settle(2 * source.stat().st_blocks * 512 + (1 << 30))
                if not case.cold:
                    measure.warm(source)
                sample = measure.run(command, f"{folder}/log")
                for output in pathlib.Path(folder).glob("out.*"):
                    sample.output_bytes = output.stat().st_blocks * 512 if output.suffix == ".raw" else output.stat().st_size
                    if number == 0 and contestant.makes_image and shutil.which("qemu-img"):
                        subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", source, "-F", "qcow2", output], check=True)
                    output.unlink()
                contestant.after()
                samples.setdefault(contestant.name, []).append(sample)
                print(f"{case.name} {number + 1}/{rounds} {sample.seconds:8.3f} s  {contestant.name}", file=sys.stderr, flush=True)
    ordered = {contestant.name: samples[contestant.name] for contestant in case.contestants if contestant.name in samples}
    ratios = [report.figure(ratio, ordered) for ratio in case.ratios]
    return {"case": case, "skipped": skipped, "samples": ordered, "commands": commands, "ratios": ratios}


main()
