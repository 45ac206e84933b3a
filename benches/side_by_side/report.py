"""What was measured, as JSON and as a Markdown table."""

import dataclasses
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess

MIB = 1 << 20


def machine():
    def first(command):
        if shutil.which(command[0]) is None:
            return None
        ran = subprocess.run(command, capture_output=True, text=True)
        return (ran.stdout or ran.stderr).splitlines()[0].strip()

    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    memory = int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemTotal"))) << 10
    versions = {
        name: first(command)
        for name, command in {
            "qemu-img": ["qemu-img", "--version"],
            "nbdkit": ["nbdkit", "--version"],
            "nbdcopy": ["nbdcopy", "--version"],
            "curl": ["curl", "--version"],
            "openssl": ["openssl", "version"],
            "openstack": ["openstack", "--version"],
            "cp": ["cp", "--version"],
        }.items()
    }
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "kernel": platform.release(), "versions": versions}


def figure(ratio, samples):
    """The ratio of the medians, and its value in each round."""

    def of(name, number=None):
        values = [getattr(sample, ratio.of) for sample in samples[name]]
        return statistics.median(values) if number is None else values[number]

    def settled(term):
        """Alternatives are settled by their medians, once for all rounds."""
        if isinstance(term, tuple):
            slowest = term[0] == "slowest"
            names = [name for name in (term[1:] if slowest else term) if name in samples]
            return (max if slowest else min)(names, key=of, default=None)
        return term

    over, under = [settled(term) for term in ratio.over], [settled(term) for term in ratio.under]
    if not all(name in samples for name in over + under):
        return {"says": ratio.says, "of": ratio.of, "over": over, "under": under, "value": None, "rounds": [],
                "at_least": ratio.at_least, "at_most": ratio.at_most, "held": None}  # fmt: skip
    total = lambda names, number=None: sum(of(name, number) for name in names)  # noqa: E731
    rounds = [total(over, number) / total(under, number) for number in range(len(samples[over[0]]))]
    value = total(over) / total(under)
    held = not (ratio.at_least is not None and value < ratio.at_least or ratio.at_most is not None and value > ratio.at_most)
    limited = ratio.at_least is not None or ratio.at_most is not None
    return {"says": ratio.says, "of": ratio.of, "over": over, "under": under, "value": value, "rounds": rounds,
            "at_least": ratio.at_least, "at_most": ratio.at_most, "held": held if limited else None}  # fmt: skip


def limit_of(ratio):
    """What a figure has to be, in words."""
    return f"at least {ratio['at_least']}" if ratio["at_least"] else f"at most {ratio['at_most']}" if ratio["at_most"] else ""


def as_json(about, results):
    def case(result):
        case = result["case"]
        return {
            "name": case.name, "what": case.what, "input": case.input, "cold": case.cold, "skipped": result["skipped"],
            "contestants": [
                {"name": name, "command": result["commands"][name], "samples": [dataclasses.asdict(sample) for sample in samples]}
                for name, samples in result["samples"].items()
            ],
            "ratios": result["ratios"],
        }  # fmt: skip

    return json.dumps({**about, "cases": [case(result) for result in results]}, indent=1)


def as_markdown(about, results):
    versions = "; ".join(text for text in about["versions"].values() if text)
    lines = [
        f"# {about['date']}", "",
        f"{about['cpu']}, {about['cores']} cores, {about['memory_bytes'] / (1 << 30):.1f} GiB of memory, Linux {about['kernel']}. {versions}; {about['virta']}.",
        "",
        f"`{about['command']}`: {about['rounds']} rounds, all contestants of a case in turn in each, in an order that is shuffled for each. Median (range).",
        "CPU: user and system seconds of the command and its children; a server that goes into the background (nbdcopy's qemu-nbd) is not among them. Read, written,"
        " calls: by read and write calls, page cache included; what goes through io_uring (virta's writes to files) is not counted there.", "",
    ]  # fmt: skip
    for result in results:
        case = result["case"]
        lines += [f"## {case.name}: {case.what}", ""]
        for name, why in result["skipped"].items():
            lines.append(f"Not run: {name} ({why})")
        if result["samples"]:
            lines += ["| | seconds | CPU s | memory MiB | read MiB | written MiB | calls | switches | output MiB |", "|---|---|---|---|---|---|---|---|---|"]
        for name, samples in result["samples"].items():
            median = lambda field: statistics.median(getattr(sample, field) for sample in samples)  # noqa: E731
            seconds = [sample.seconds for sample in samples]
            output = samples[0].output_bytes
            lines.append(
                f"| {name} | {median('seconds'):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {median('cpu_s'):.2f} |"
                f" {median('memory_bytes') / MIB:.0f} | {median('read_bytes') / MIB:.0f} | {median('written_bytes') / MIB:.0f} |"
                f" {median('read_calls') + median('write_calls'):.0f} | {median('switches'):.0f} |"
                f" {'' if output is None else f'{output / MIB:.1f}'} |"
            )
        lines.append("")
        for ratio in result["ratios"]:
            if ratio["value"] is None:
                lines.append(f"- {ratio['says']}: not checked, a contestant was not run")
                continue
            limit = f", {limit_of(ratio)}" if limit_of(ratio) else ""
            verdict = {True: ": holds", False: ": **does not hold**", None: ""}[ratio["held"]]
            spread = f"{min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f}"
            over = " + ".join(ratio["over"])
            lines.append(f"- {ratio['says']} ({ratio['of']}; {over}): **{ratio['value']:.3f}** ({spread}){limit}{verdict}")
        lines.append("")
    lines += ["## Commands", ""]
    for result in results:
        for name in result["samples"]:
            lines.append(f"- {result['case'].name}, {name}: `{result['commands'][name]}`")
    return "\n".join(lines) + "\n"


def write(folder, name, about, results):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(as_json(about, results))
    (folder / f"{name}.md").write_text(as_markdown(about, results))
