"""The disks that are converted. Each is made once, and kept in the work folder.

The same seed gives the same bytes, but for the realistic one, whose files are this machine's own.
"""

import os
import pathlib
import random
import shutil
import subprocess

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


class Inputs:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name):
        """The path of an input by its name: `kind-size`."""
        path = self.folder / f"{name}.raw"
        if not path.exists():
            kind, size = name.rsplit("-", 1)
            partial = path.with_suffix(".partial")
            getattr(self, kind)(partial, parse(size))
            partial.rename(path)
        return path

    def realistic(self, path, size):
        """An ext4 filesystem with a Linux system's files on 30 % of it, and what deleted files left behind on another 15 %."""
        tree = self.folder / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        system, deleted = tree / "usr", tree / "deleted"
        copy_files(["/usr/bin", "/usr/lib", "/usr/share", "/usr/include"], system, size * 30 // 100)
        copy_files(["/usr/sbin", "/usr/local", "/opt", "/usr/lib/x86_64-linux-gnu", "/usr/share/doc"], deleted, size * 15 // 100)
        with open(path, "wb") as file:
            file.truncate(size)
        tool("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", "-d", str(tree), str(path))
        names = [f"rm /{found.relative_to(tree)}\n" for found in sorted(deleted.rglob("*")) if found.is_file()]
        tool("debugfs", "-w", "-f", "/dev/stdin", str(path), stdin="".join(names))
        shutil.rmtree(tree)

    def compressible(self, path, size):
        """An eighth of the disk is a system's files, in 16 MiB runs that lie evenly on it; the rest are holes."""
        runs = size // 8 // (16 * MIB)
        source = stream(["/usr/bin", "/usr/lib", "/usr/share"])
        with open(path, "wb") as file:
            file.truncate(size)
            for run in range(runs):
                file.seek(run * (size // runs))
                left = 16 * MIB
                while left:
                    part = next(source)[:left]
                    file.write(part)
                    left -= len(part)

    def quarter(self, path, size):
        """Random bytes in the first 2 MiB of each 8, the rest holes."""
        generator = random.Random(size)
        with open(path, "wb") as file:
            file.truncate(size)
            for at in range(0, size, 8 * MIB):
                file.seek(at)
                file.write(generator.randbytes(2 * MIB))

    def random(self, path, size):
        """Nothing that is zero, nothing that compresses."""
        generator = random.Random(1)
        with open(path, "wb") as file:
            for _ in range(size // MIB):
                file.write(generator.randbytes(MIB))

    def zeros(self, path, size):
        """Zeros that are stored: each has to be read."""
        with open(path, "wb") as file:
            for _ in range(size // MIB):
                file.write(bytes(MIB))

    def sparse(self, path, size):
        """One hole, with a little data at its beginning, middle and end."""
        with open(path, "wb") as file:
            file.truncate(size)
            for at in (0, size // 2, size - MIB):
                file.seek(at)
                file.write(random.Random(at).randbytes(MIB))

    def alternating(self, path, size):
        """64 KiB of data, 64 KiB of stored zeros, and so on: the worst for whoever thinks in runs."""
        generator = random.Random(2)
        with open(path, "wb") as file:
            for _ in range(size // (128 << 10)):
                file.write(generator.randbytes(64 << 10) + bytes(64 << 10))


def parse(size):
    return int(size[:-1]) * {"m": MIB, "g": GIB, "t": TIB}[size[-1]]


def tool(*argv, stdin=None):
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    subprocess.run(argv, input=stdin, text=True, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def files_of(roots):
    for root in roots:
        for folder, below, names in os.walk(root):
            below.sort()
            for name in sorted(names):
                path = pathlib.Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def copy_files(roots, target, most):
    """Copies files until `most` bytes are there."""
    copied = 0
    for path in files_of(roots):
        bytes_ = path.stat().st_size
        if copied + bytes_ > most:
            continue
        to = target / path.relative_to("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
        copied += bytes_
        if copied > most * 99 // 100:
            return


def stream(roots):
    """The bytes of files, one after the other, for ever."""
    while True:
        for path in files_of(roots):
            with open(path, "rb") as file:
                while part := file.read(MIB):
                    yield part
