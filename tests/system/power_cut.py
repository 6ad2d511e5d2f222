"""Power cuts: a virtual machine whose disk loses what was not flushed; nothing acknowledged may be missing afterwards.

Run by `make power-cut`; minutes, not for CI. Needs qemu-system-x86_64 and busybox-static, no root and no KVM (the
machine is emulated in software); the kernel is Debian's, fetched once into build/power-cut (`apt-get download`) or
given with --kernel-deb. In the machine runs the event log and nothing else of Kizu (`power_guest.py`), on an ext4 with
its defaults; its disk is `volatile_disk.py`. At a random write or flush the disk stops and qemu is killed; then the
machine boots again on what is left, and says what the log holds before it goes on.

The control runs the same with `synchronous=NORMAL` planted, and must lose acknowledged events.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from volatile_disk import VolatileDisk  # noqa: E402

PACKAGE = "linux-image-cloud-amd64"
DRIVERS = ("virtio_pci", "virtio_blk")
DISK_BYTES = 64 * 1024 * 1024
PER_BOOT = 1_000_000
"""Frame numbers of one boot: none is ever used again, also if the log lost it."""
SURVIVES = (0.0, 0.5, 0.9)
"""The share of cached sectors that reach the disk, one of them drawn for each cut."""
BOOT_S = 240.0
BOOT_TRIES = 3
MEMORY_MIB = 512

INIT = """#!/bin/busybox sh
echo
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
for module in {modules}; do /bin/busybox insmod $module || echo "failed insmod $module"; done
/bin/busybox mount -t ext4 /dev/vda /disk || echo "failed mount"
export {environment}
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in kizu=*) words=$(echo ${{word#kizu=}} | /bin/busybox tr , ' ') ;; esac
done
{python} {guest} /disk/events.sqlite $words 2>&1
echo "failed: the log's program ended"
/bin/busybox sleep 1000000
"""


# --- building ---------------------------------------------------------------------------------------------------------


def kernel_of(folder: Path, deb: Path | None) -> Path:
    """Debian's kernel and its modules, unpacked below `folder`; fetched once."""
    tree = folder / "kernel"
    if not tree.exists():
        if deb is None:
            found = subprocess.run(["apt-cache", "depends", PACKAGE], capture_output=True, text=True, check=True).stdout
            name = found.split("Depends: ")[1].split()[0]
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True)
            deb = next(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(deb), str(tree)], check=True)
    return tree


def drivers_of(tree: Path) -> list[Path]:
    """The modules of the disk, each after those that it needs."""
    modules = next((tree / "lib" / "modules").iterdir())
    known = {path.name.removesuffix(".ko"): path for path in modules.rglob("*.ko")}
    found: dict[str, Path] = {}

    def take(name: str) -> None:
        for needed in _needs(known[name]):
            if needed in known and needed not in found:
                take(needed)
        found[name] = known[name]

    for name in DRIVERS:
        take(name)
    return list(found.values())


def _needs(module: Path) -> list[str]:
    """What the module's own section says: `depends=a,b`."""
    _, _, rest = module.read_bytes().partition(b"\0depends=")
    return [name for name in rest.partition(b"\0")[0].decode().split(",") if name]


def needed_files() -> dict[str, list[str]]:
    """What the guest's program loads here, it will load there: run it once and ask."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(HERE / "power_guest.py"), f"{folder}/log", "0", "--needed"],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def build_initramfs(target: Path, tree: Path) -> None:
    """One archive with busybox, the disk's drivers, and the files that the log's program loads, at their own places."""
    needed, drivers = needed_files(), drivers_of(tree)
    archive = Archive()
    for name in ("proc", "sys", "dev", "disk", "tmp", "bin", "lib64"):
        archive.folder(name)
    archive.file("bin/busybox", Path(shutil.which("busybox") or "/bin/busybox").read_bytes(), 0o755)
    for path in drivers:
        archive.file(f"drivers/{path.name}", path.read_bytes())
    for name in needed["files"]:
        archive.file(name.lstrip("/"), Path(name).read_bytes(), 0o755)
        for short in _shorter(name):
            archive.link(short.lstrip("/"), Path(name).name)
    loader = next(name for name in needed["libraries"] if Path(name).name.startswith("ld-linux"))
    archive.file("lib64/ld-linux-x86-64.so.2", Path(loader).read_bytes(), 0o755)
    # Python takes its home for one only with these in it.
    home = Path(sys.base_prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    archive.folder(str(home / "lib-dynload").lstrip("/"))
    environment = {
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": ":".join(needed["path"]),
        "LD_LIBRARY_PATH": ":".join(sorted({str(Path(name).parent) for name in needed["libraries"]})),
        "OMP_NUM_THREADS": "1",
    }
    init = INIT.format(
        modules=" ".join(f"/drivers/{path.name}" for path in drivers),
        environment=" ".join(f"{name}={value}" for name, value in environment.items()),
        python=Path(sys.executable).resolve(),
        guest=HERE / "power_guest.py",
    )
    archive.file("init", init.encode(), 0o755)
    target.write_bytes(archive.bytes())


def _shorter(name: str) -> list[str]:
    """The names under which a library is asked for: libz.so.1.2.13 is wanted as libz.so.1."""
    stem, _, version = name.partition(".so.")
    numbers = version.split(".")
    return [f"{stem}.so.{'.'.join(numbers[:count])}" for count in range(1, len(numbers))] if version else []


class Archive:
    """A cpio archive as the kernel unpacks it (newc)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def folder(self, name: str) -> None:
        if name not in self._names and name not in ("", "."):
            self.folder(str(Path(name).parent))
            self._add(name, 0o040755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self.folder(str(Path(name).parent))
        self._add(name, 0o100000 | mode, data)

    def link(self, name: str, target: str) -> None:
        if name not in self._names:
            self._add(name, 0o120777, target.encode())

    def bytes(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._names.add(name)
        fields = (len(self._names), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        self._parts += [head + bytes(-len(head) % 4), data + bytes(-len(data) % 4)]


def make_disk(path: Path) -> None:
    """An empty ext4 with the defaults of mke2fs: barriers are on."""
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)


class NeverBooted(RuntimeError):
    """A software-emulated machine on a busy host may miss its own timers; the log was not reached."""


@dataclass(frozen=True, slots=True)
class Cut:
    """When the power goes: after so many acknowledgements, and then so many writes and flushes of the disk."""

    after_acked: int
    after_requests: int
    survives: float
    seed: int

    @classmethod
    def drawn(cls, rng: random.Random) -> Self:
        return cls(rng.randrange(20, 400), rng.randrange(1, 30), rng.choice(SURVIVES), rng.randrange(2**31))


# --- running ----------------------------------------------------------------------------------------------------------


class Machine:
    """One boot of the virtual machine; `lines` is its serial console."""

    def __init__(self, kernel: Path, initramfs: Path, socket: Path, words: Sequence[str]) -> None:
        self.lines: list[str] = []
        self._words: Counter[str] = Counter()
        self._more = threading.Condition()
        disk = {"driver": "nbd", "server.type": "unix", "server.path": str(socket), "node-name": "disk"}
        # no_timer_check: on a busy host an emulated clock looks broken to the kernel, which would give up.
        append = f"console=ttyS0 quiet panic=-1 no_timer_check nowatchdog kizu={','.join(words)}"
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB), "-nographic"),
                *("-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", str(kernel)),
                *("-initrd", str(initramfs), "-append", append),
                *("-blockdev", ",".join(f"{name}={value}" for name, value in disk.items())),
                *("-blockdev", "driver=raw,node-name=raw,file=disk"),
                *("-device", "virtio-blk-pci,drive=raw,write-cache=on"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, word: str, count: int, timeout_s: float, late: type[RuntimeError] = RuntimeError) -> None:
        """Wait until `count` lines begin with `word`.

        Raises:
            RuntimeError: the machine says that something failed.
            late: it ended or took too long.
        """
        deadline = time.monotonic() + timeout_s
        with self._more:
            while self._words[word] < count:
                left_s = deadline - time.monotonic()
                wrong = self._words["failed"] or self._words["Traceback"]
                if wrong or left_s <= 0 or self._process.poll() is not None:
                    said = "\n".join(self.lines[-30:])
                    raise (RuntimeError if wrong else late)(f"it did not say {word!r} {count} times:\n{said}")
                self._more.wait(min(left_s, 1.0))

    def kill(self) -> list[str]:
        """SIGKILL; everything that it had said."""
        self._process.kill()
        self._process.wait(30)
        self._reader.join(30)
        return self.lines

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            with self._more:
                self.lines.append(raw.decode("ascii", "replace").strip())
                self._words[self.lines[-1].partition(" ")[0]] += 1
                self._more.notify_all()


def numbers(lines: Iterable[str], word: str) -> list[tuple[int, ...]]:
    """The numbers of the lines that begin with `word`; a line that the cut tore is left out."""
    found = []
    for line in lines:
        first, *rest = line.split()[:3] or [""]
        if first == word and rest and all(one.isdecimal() for one in rest):
            found.append(tuple(map(int, rest)))
    return found


def held(lines: Iterable[str]) -> set[int]:
    """The frames that the log holds, as told at a boot."""
    return {number for first, last in numbers(lines, "holds") for number in range(first, last + 1)}


@dataclass(frozen=True, slots=True)
class Boot:
    """What one boot found in the log and acknowledged until its end; `figures` are the disk's at the cut."""

    held: set[int]
    acked: set[int]
    figures: dict[str, int]


def boot_once(disk: Path, socket: Path, kernel: Path, initramfs: Path, words: Sequence[str], cut: Cut | None) -> Boot:
    """Boot on what is left of the disk, and let the power go as `cut` says; without one, only look.

    Raises:
        NeverBooted: the machine did not come as far as the log.
        RuntimeError: the log failed, or the machine stopped appending.
    """
    with VolatileDisk(disk, socket) as volatile:
        machine = Machine(kernel, initramfs, socket, words)
        try:
            machine.wait_for("sound", 1, BOOT_S, NeverBooted)
            if cut is not None:
                machine.wait_for("acked", cut.after_acked, BOOT_S)
                volatile.cut_after(cut.after_requests, random.Random(cut.seed), cut.survives)
                if not volatile.gone.wait(BOOT_S):
                    raise RuntimeError("the machine does not write any more:\n" + "\n".join(machine.lines[-30:]))
        finally:
            lines = machine.kill()
        figures = {"flushes": volatile.flushes, "in_cache": volatile.cached, "of_it_kept": volatile.survived}
        return Boot(held(lines), {one[0] for one in numbers(lines, "acked")} if cut else set(), figures)


def cut_power(folder: Path, kernel: Path, initramfs: Path, cuts: int, seed: int, *, faulty: bool) -> dict[str, Any]:
    """Boot, append, cut, as often as asked; what of the acknowledged was missing at the boot that followed."""
    rng, disk, sockets = random.Random(seed), folder / f"disk-{faulty}.img", itertools.count()
    make_disk(disk)
    acked, lost, rounds = set[int](), set[int](), list[dict[str, int]]()
    for number in range(cuts + 1):
        words = [str(number * PER_BOOT), *(["--normal"] if faulty else [])]
        cut = Cut.drawn(rng) if number < cuts else None
        for tries in range(1, BOOT_TRIES + 1):
            socket = folder / f"nbd-{faulty}-{next(sockets)}"
            try:
                found = boot_once(disk, socket, kernel, initramfs, words, cut)
                break
            except NeverBooted as error:
                print(f"the machine did not boot, try {tries} of {BOOT_TRIES}: {error}", file=sys.stderr, flush=True)
        else:
            raise RuntimeError("the machine does not boot; see above")
        missing = acked - found.held
        lost |= missing
        acked = (acked - missing) | found.acked  # each is counted once
        if cut is not None:
            rounds.append({"acked": len(found.acked), **found.figures})
            print(json.dumps({"cut": number + 1, "lost_so_far": len(lost), **rounds[-1]}), file=sys.stderr, flush=True)
    return {
        "cuts": cuts,
        "acknowledged": sum(one["acked"] for one in rounds),
        "acknowledged_lost": len(lost),
        "sectors_lost_at_cuts": sum(one["in_cache"] - one["of_it_kept"] for one in rounds),
    }


def main() -> None:
    """Ten cuts, and three of the control."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--control-cuts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernel-deb", type=Path, help="a linux-image-*-amd64 package, instead of fetching one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # qemu must not outlive us
    for tool in ("qemu-system-x86_64", "busybox", "mkfs.ext4", "dpkg-deb"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is missing: apt-get install qemu-system-x86 busybox-static e2fsprogs")
    build = ROOT / "build" / "power-cut"
    build.mkdir(parents=True, exist_ok=True)
    tree, initramfs = kernel_of(build, options.kernel_deb), build / "initramfs.cpio"
    build_initramfs(initramfs, tree)
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    found: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory(prefix="kizu-") as name:
        for kind, cuts, faulty in (("full", options.cuts, False), ("control_normal", options.control_cuts, True)):
            if cuts:
                found[kind] = cut_power(Path(name), kernel, initramfs, cuts, options.seed, faulty=faulty)
    print(json.dumps(found, indent=2))
    kept = found.get("full", {}).get("acknowledged_lost", 0) == 0
    caught = "control_normal" not in found or found["control_normal"]["acknowledged_lost"] > 0
    sys.exit(not (kept and caught))


if __name__ == "__main__":
    main()
