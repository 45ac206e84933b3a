"""What is run against what, and what the figures have to be.

A case names its input and its contestants; a contestant is a command in which `{virta}`, `{in}`, `{out}` and `{work}` are filled in.
Local cases look like this one; those of the network are made by functions, for they need ids.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import sys
import uuid
from collections.abc import Callable

import measure

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class Contestant:
    name: str
    #: A text in which places are filled in, or what makes the command of one run.
    command: str | Callable[[], str]
    #: Commands that have to be there.
    needs: tuple[str, ...] = ()
    #: Its output has to be the input's guest bytes: checked after the first round.
    makes_image: bool = True
    #: Called before and after each run, untimed.
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclasses.dataclass
class Ratio:
    """`over` / `under`: sums of the contestants' medians; of a tuple of alternatives, the one with the lowest median."""

    says: str
    over: list
    under: list
    at_least: float | None = None
    at_most: float | None = None
    #: What is divided.
    of: str = "seconds"


@dataclasses.dataclass
class Case:
    name: str
    what: str
    input: str
    contestants: list[Contestant]
    ratios: list[Ratio] = dataclasses.field(default_factory=list)
    cold: bool = False
    #: Outputs go to memory instead of the work folder.
    out_in_memory: bool = False
    #: Called after the last round.
    after: Callable[[], object] = lambda: None


VIRTA = Contestant("virta --no-sync", "{virta} convert {in} {out}.qcow2 --no-sync --force --progress none")
VIRTA_SYNC = Contestant("virta", "{virta} convert {in} {out}.qcow2 --force --progress none")
QEMU_16 = Contestant("qemu-img -W -m 16", "qemu-img convert -f raw -W -m 16 -O qcow2 {in} {out}.qcow2", ("qemu-img",))
QEMU_W = Contestant("qemu-img -W", "qemu-img convert -f raw -W -O qcow2 {in} {out}.qcow2", ("qemu-img",))
QEMU = Contestant("qemu-img", "qemu-img convert -f raw -O qcow2 {in} {out}.qcow2", ("qemu-img",))
QEMU_SYNC = Contestant(
    "qemu-img -W -m 16 -t writeback", "qemu-img convert -f raw -W -m 16 -t writeback -O qcow2 {in} {out}.qcow2", ("qemu-img",)
)
QEMUS = (QEMU_16.name, QEMU_W.name, QEMU.name)
CP = Contestant("cp --sparse=auto", "cp --sparse=auto {in} {out}.raw", makes_image=False)
CAT = Contestant("cat to /dev/null", "cat {in} > /dev/null", makes_image=False)
NBDCOPY = Contestant(
    "nbdcopy",
    "size=$(stat -c %s {in}); qemu-img create -q -f qcow2 {out}.qcow2 $size; rm -f {work}/nbd.sock;"
    " qemu-nbd --fork --persistent --pid-file={work}/nbd.pid -f qcow2 -k {work}/nbd.sock {out}.qcow2;"
    " nbdcopy -- [ nbdkit --exit-with-parent -r file {in} ] 'nbd+unix:///?socket={work}/nbd.sock';"
    " server=$(cat {work}/nbd.pid); kill $server; while kill -0 $server 2>/dev/null; do sleep 0.01; done",
    ("nbdcopy", "nbdkit", "qemu-nbd", "qemu-img"),
)
READ_DATA = Contestant(
    "read the data extents", f"{sys.executable} {HERE}/read_extents.py {{in}}", makes_image=False
)


def compressed(codec, level):
    flags = f"--compress {codec} --compress-level {level}"
    return Contestant(f"virta {codec} {level}", f"{{virta}} convert {{in}} {{out}}.qcow2 {flags} --no-sync --force --progress none")


QEMU_ZLIB = Contestant("qemu-img -c -W zlib", "qemu-img convert -f raw -c -W -O qcow2 {in} {out}.qcow2", ("qemu-img",))
QEMU_ZSTD = Contestant(
    "qemu-img -c -W zstd", "qemu-img convert -f raw -c -W -O qcow2 -o compression_type=zstd {in} {out}.qcow2", ("qemu-img",)
)


def compressing(codec, name, peer, equal, larger):
    """A case of compression: a level that makes nothing larger than the peer's, and one that may be larger by so much."""
    level, faster = equal
    other, much_faster, size = larger
    same_or_smaller, a_bit_larger = compressed(codec, level), compressed(codec, other)
    says = "the same's size, virta / qemu-img"
    return Case(
        codec, f"local, {codec}, page cache warm, {name.replace('-', ' ')}", name,
        [a_bit_larger, same_or_smaller, peer],
        [
            Ratio("qemu-img -c -W / virta, equal or smaller", [peer.name], [same_or_smaller.name], at_least=faster),
            Ratio(says, [same_or_smaller.name], [peer.name], at_most=1.0, of="output_bytes"),
            Ratio(f"qemu-img -c -W / virta, level {other}", [peer.name], [a_bit_larger.name], at_least=much_faster),
            Ratio(says, [a_bit_larger.name], [peer.name], at_most=size, of="output_bytes"),
        ],
    )  # fmt: skip


def local(size):
    """The cases without a cloud; `size` scales them: 4g is what the promises speak of."""
    half = max(int(size[:-1]) // 2, 1)
    return [
        Case(
            "exact", f"local, exact, page cache warm, realistic {size}", f"realistic-{size}",
            [VIRTA, QEMU_16, QEMU_W, QEMU, VIRTA_SYNC, QEMU_SYNC, NBDCOPY, CP, CAT],
            [
                Ratio("best qemu-img / virta --no-sync", [QEMUS], [VIRTA.name], at_least=1.4),
                Ratio("virta / qemu-img -t writeback", [VIRTA_SYNC.name], [QEMU_SYNC.name], at_most=1.0),
                Ratio("virta --no-sync / cp --sparse=auto", [VIRTA.name], [CP.name], at_most=1.5),
            ],
        ),
        Case(
            "cold", f"local, exact, page cache dropped, output in memory, realistic {size}", f"realistic-{size}",
            [VIRTA, READ_DATA, QEMU_16],
            [Ratio("virta / reading the data extents", [VIRTA.name], [READ_DATA.name], at_most=1.15)],
            cold=True, out_in_memory=True,
        ),
        compressing("zlib", f"realistic-{half}g", QEMU_ZLIB, equal=(2, 4.0), larger=(1, 4.8, 1.01)),
        compressing("zstd", f"realistic-{half}g", QEMU_ZSTD, equal=(3, 1.5), larger=(2, 1.8, 1.02)),
        *(
            Case(
                kind, f"local, exact, page cache warm, {what}", name,
                [VIRTA, QEMU_16, QEMU_W, CP],
                [Ratio("best qemu-img / virta --no-sync", [(QEMU_16.name, QEMU_W.name)], [VIRTA.name])],
            )
            for kind, name, what in [
                ("random", "random-1g", "1 GiB of random bytes"),
                ("zeros", f"zeros-{size}", f"{size} of stored zeros"),
                ("alternating", "alternating-1g", "1 GiB, each second 64 KiB zero"),
                ("sparse", "sparse-1t", "1 TiB, 3 MiB of it data"),
            ]
        ),
    ]  # fmt: skip


def scaling():
    """What becomes of time and memory as the disk grows, as its data grows, and with more threads than there are cores."""
    alone = lambda flags: f"{{virta}} convert {{in}} {{out}}.qcow2 --no-sync --force --progress none{flags}"  # noqa: E731
    growing = [("sparse-1g", "1 GiB"), ("sparse-64g", "64 GiB"), ("sparse-1t", "1 TiB"), ("sparse-10t", "10 TiB")]
    filling = [("realistic-1g", "1 GiB"), ("realistic-2g", "2 GiB"), ("realistic-4g", "4 GiB")]
    workers = [Contestant(f"--workers {count}", alone(f" --workers {count}")) for count in (1, 2, 4, 8)]
    packing = [
        Contestant(f"zstd, --workers {count}", alone(f" --compress zstd --workers {count}")) for count in (1, 2, 4, 8)
    ]
    return [
        *(Case(f"disk-{name}", f"{size}, 3 MiB of it data", name, [Contestant("virta", alone(""))]) for name, size in growing),
        *(Case(f"data-{name}", f"{size}, 45 % of it data", name, [Contestant("virta", alone(""))]) for name, size in filling),
        Case(
            "workers", "more threads than cores, exact", "realistic-2g", workers,
            [Ratio("8 workers / the best number", ["--workers 8"], [tuple(one.name for one in workers)])],
        ),
        Case(
            "workers-zstd", "more threads than cores, zstd", "realistic-1g", packing,
            [Ratio("8 workers / the best number", ["zstd, --workers 8"], [tuple(one.name for one in packing)])],
        ),
    ]  # fmt: skip


class Fresh:
    """Sources that were never converted, for batches: each conversion that was deleted costs the next one of its source a request or two."""

    def __init__(self, cloud, inputs, names):
        self.cloud, self.inputs, self.names = cloud, inputs, names
        self.raw, self.made = f"bench-raw-{uuid.uuid4()}", f"bench-made-{uuid.uuid4()}"
        self.ids = []

    def ready(self):
        if not self.ids:
            self.finish()
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                self.ids[:] = pool.map(self.keep, range(len(self.names)))

    def keep(self, number):
        return self.cloud.keep(f"{self.raw}-{number}", "raw", self.inputs.get(self.names[number]))

    def finish(self):
        for prefix in (self.raw, self.made):
            self.cloud.delete(prefix)
        self.ids.clear()

    def batch(self, name, jobs):
        def command():
            return f"{{virta}} batch --verify none --jobs {jobs} --name-template '{self.made}-{{{{id}}}}' --progress none {' '.join(self.ids)}"

        return Contestant(name, command, makes_image=False, before=self.ready, after=self.finish)


def connections(cloud, inputs, size):
    """Fetching with more connections, and many conversions at once, from a real Glance."""
    raw = cloud.keep(f"bench-{size}", "raw", inputs.get(f"compressible-{size}"))
    fetch = [
        Contestant(f"--connections {count}", f"{{virta}} convert glance:{raw} {{out}}.qcow2 --connections {count} --verify none --no-sync --force --progress none")
        for count in (1, 2, 4, 8)
    ]  # fmt: skip
    small = Fresh(cloud, inputs, ["compressible-1g"] * 8)
    batch = [small.batch(f"batch --jobs {jobs}", jobs) for jobs in (1, 2, 4, 8)]
    best = lambda of_them: [tuple(one.name for one in of_them)]  # noqa: E731
    return [
        Case("connections", f"real Glance, {size}, to a file", f"compressible-{size}", fetch, [Ratio("8 connections / the best number", [fetch[-1].name], best(fetch))]),
        Case("jobs", "real Glance, 8 images of 1 GiB", "compressible-1g", batch, [Ratio("8 jobs / the best number", [batch[-1].name], best(batch))], after=small.finish),
    ]  # fmt: skip


def glance(cloud, inputs, virta, work, size):
    """The cases on a real Glance."""
    path = inputs.get(f"compressible-{size}")
    raw = cloud.keep(f"bench-{size}", "raw", path)
    # of this run alone: images of this name are deleted
    made = f"bench-made-{uuid.uuid4()}"
    new = {}
    delete = lambda: cloud.delete(made)  # noqa: E731
    # what virta sends is what curl has to send
    measure.run(f"{virta} convert {path} {work}/sent.qcow2 --force --no-sync --progress none", work / "log")

    def queued():
        new["id"] = cloud.new(made, "qcow2")

    def convert(name, flags):
        return Contestant(
            name, f"{{virta}} convert glance:{raw} glance:{made} -f value --progress none {flags}", makes_image=False, after=delete
        )

    raw_file, new_file = work / "procedure.raw", work / "procedure.qcow2"
    procedure = Contestant(
        "openstack image save; qemu-img convert; openstack image create",
        f"openstack image save --file {raw_file} {raw}; qemu-img convert -f raw -O qcow2 {raw_file} {new_file};"
        f" openstack image create --disk-format qcow2 --container-format bare --file {new_file} {made} -f value -c id;"
        f" rm {raw_file} {new_file}",
        ("openstack", "qemu-img"), makes_image=False, after=delete,
    )  # fmt: skip
    get = Contestant("curl GET to /dev/null", cloud.get(raw, "/dev/null"), ("curl",), makes_image=False)
    # it goes to an image that is new for each run
    put = Contestant("curl PUT", lambda: cloud.put(new["id"], work / "sent.qcow2"), ("curl",), makes_image=False, before=queued, after=delete)
    qemu = dataclasses.replace(QEMU_16, command=QEMU_16.command.replace("{in}", str(path)), makes_image=False)
    openssl = Contestant("openssl dgst -sha512", f"openssl dgst -sha512 {path}", ("openssl",), makes_image=False)
    hashed = convert("virta", "")
    none = convert("virta --verify none", "--verify none")
    zstd = convert("virta --verify none, zstd", "--verify none --compress zstd")
    transfers = [get.name, put.name]
    cases = [
        Case(
            "glance", f"real Glance, {size} raw, an eighth of it compressible data", f"compressible-{size}",
            [get, put, hashed, none, zstd, qemu, openssl, procedure],
            [
                Ratio("virta / (GET + PUT)", [hashed.name], transfers, at_most=1.25),
                Ratio("procedure / virta", [procedure.name], [hashed.name], at_least=4.0),
                Ratio("virta --verify none / (GET + PUT)", [none.name], transfers, at_most=1.1),
                Ratio("procedure / virta --verify none", [procedure.name], [none.name], at_least=5.0),
                Ratio("procedure / virta --verify none, zstd", [procedure.name], [zstd.name], at_least=7.0),
                Ratio("CPU: virta / (curl + qemu-img + openssl)", [hashed.name], [*transfers, qemu.name, openssl.name], at_most=1.0, of="cpu_s"),
                Ratio("CPU: virta --verify none / (curl + qemu-img)", [none.name], [*transfers, qemu.name], at_most=1.0, of="cpu_s"),
            ],
        )
    ]  # fmt: skip
    zeros_path = inputs.get(f"sparse-{size}")
    zeros = cloud.keep(f"bench-zeros-{size}", "raw", zeros_path)
    once = lambda contestant: dataclasses.replace(  # noqa: E731
        contestant, command=contestant.command.replace(raw, zeros).replace(str(path), str(zeros_path))
    )
    cases.append(
        Case(
            "glance-zeros", f"real Glance, {size} of zeros but for 3 MiB", f"sparse-{size}",
            [once(get), once(hashed), once(none), once(openssl)],
            [
                Ratio("virta --verify none / GET", [none.name], [get.name], at_most=1.2),
                Ratio("virta / the slower of GET and openssl", [hashed.name], [("slowest", get.name, openssl.name)], at_most=1.1),
            ],
        )
    )  # fmt: skip
    cases.append(many(cloud, inputs, virta, work))
    return cases


def many(cloud, inputs, virta, work):
    """A batch of 12 images, against as many transfers of the same bytes with as many curls at once as serve best."""
    names = [f"quarter-{160 + 40 * number}m" for number in range(12)]
    fresh = Fresh(cloud, inputs, names)

    @functools.cache
    def packed(name):
        """What virta sends is what curl has to send. Made when it is wanted, not for a run of other cases."""
        path = work / f"{name}.qcow2"
        measure.run(f"{virta} convert {inputs.get(name)} {path} --force --no-sync --progress none", work / "log")
        return path

    def transfers(parallel, hashed=False):
        lines = work / "transfers"

        def one(source, name):
            # a PUT that a test cloud's SQLite refuses is sent again, to another image
            puts = [cloud.put(cloud.new(fresh.made, "qcow2"), packed(name)) for _ in range(3)]
            # what Glance says that it got has to be compared with something
            beside = f"openssl dgst -sha512 {packed(name)} > /dev/null & " if hashed else ""
            return f"{cloud.get(source, '/dev/null')}; {beside}{' || '.join(puts)}{'; wait' if hashed else ''}\0"

        def command():
            lines.write_text("".join(map(one, fresh.ids, names)))
            return f"xargs -0 -n 1 -P {parallel} sh -ec < {lines}"

        return Contestant(
            f"curl GET, curl PUT{' beside openssl sha512' if hashed else ''}, {parallel} at once",
            command, ("curl", "xargs", *(("openssl",) if hashed else ())), makes_image=False,
            before=fresh.ready, after=lambda: cloud.delete(fresh.made),
        )  # fmt: skip

    batches = [fresh.batch(f"virta batch --verify none --jobs {jobs}", jobs) for jobs in (1, 4)]
    curls = [transfers(parallel) for parallel in (2, 4, 8)]
    hashed = transfers(4, hashed=True)
    return Case(
        "glance-batch", "real Glance, 12 raw images of 160 to 600 MiB, a quarter of them data", names[0], [*batches, *curls, hashed],
        [
            Ratio("virta batch --jobs 4 / the best number of curls", [batches[1].name], [tuple(curl.name for curl in curls)], at_most=1.25),
            Ratio("virta batch --jobs 4 / the curls that hash what they send, as it does", [batches[1].name], [hashed.name]),
            Ratio("virta batch --jobs 4 / --jobs 1", [batches[1].name], [batches[0].name]),
        ],
        after=fresh.finish,
    )  # fmt: skip
