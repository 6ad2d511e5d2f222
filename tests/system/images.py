"""The images of deploy/ built and run where no registry is reached: `make images-check`, as root, some minutes.

Stand-ins carry the tags of the FROM lines, so that the Dockerfiles are built as they are: Debian bookworm (debootstrap)
for Ubuntu, and for NVIDIA's images the same with the CUDA toolkit of PyPI's wheels. Not tried that way: Ubuntu's own
packages, Arm, a GPU. Each step is told as one JSON line; the first that fails ends the run with status 1.
Needs root, buildah, podman, crun and debootstrap, else it says which is missing and ends with status 2.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
WORK = Path(os.environ.get("KIZU_IMAGES", ROOT / "build" / "images"))
TOOLS = ("buildah", "podman", "crun", "debootstrap", "gcc")
# What NVIDIA's 13.0.1-devel images hold of CUDA, as far as our builds ask for it.
CUDA = (
    "nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85", "nvidia-cuda-profiler-api==13.0.85", "nvidia-curand==10.4.0.35",
)  # fmt: skip
INSIDE = "KIZU_IMAGES_INSIDE"
GUARD = "find_spec('torch')"


def main() -> int:
    """Every step in turn; 0 if all held, 2 where this machine cannot do it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        print(
            f"skipped: needs root and {', '.join(missing or TOOLS)}: apt-get install {' '.join(TOOLS)}", file=sys.stderr
        )
        return 2
    if INSIDE not in os.environ:  # a mount namespace of our own, where crun finds only the second version of cgroups
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}).returncode
    if Path("/proc/1/comm").read_text().strip() != "systemd":
        subprocess.run(["umount", "-R", "/sys/fs/cgroup"], check=False)
        subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    WORK.mkdir(parents=True, exist_ok=True)
    asked = sys.argv[1:] or list(STEPS)
    for name in asked:
        began = time.monotonic()
        try:
            told = {"step": name, "ok": True, "found": STEPS[name]()}
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            told = {"step": name, "ok": False, "found": str(error)[-6000:]}
        print(json.dumps({**told, "seconds": round(time.monotonic() - began)}), flush=True)
        if not told["ok"]:
            return 1
    return 0


# --- steps ------------------------------------------------------------------------------------------------------------


def bases() -> list[str]:
    """An image under the tag of every FROM line that is not a stage of its own."""
    made = []
    for tag in sorted(set(tags())):
        if run(*buildah("images", "-q", full(tag)), check=False).stdout.strip():
            continue
        container = run(*buildah("from", "scratch")).stdout.strip()
        run(*buildah("add", "-q", container, str(debian()), "/"))
        if "nvidia" in tag:
            run(*buildah("add", "-q", container, str(cuda()), "/usr/local/cuda"))
            run(
                *buildah(
                    "config",
                    "--env",
                    "PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
                    container,
                )
            )
        run(*buildah("commit", "-q", container, full(tag)))
        run(*buildah("rm", container))
        made.append(tag)
    return made


def edge() -> dict[str, Any]:
    """Dockerfile.edge as compose builds it; what is in it, and how large it is."""
    extras = services()["daemon"]["build"]["args"]["EXTRAS"]
    build("Dockerfile.edge", "kizu-edge", f"EXTRAS={extras}")
    inside = "import importlib.util as u; print([n for n in ('torch', 'calib', 'trainer') if u.find_spec(n)])"
    assert podman("kizu-edge", "-c", inside, entry="python3").stdout.strip() == "[]"
    driver = podman("kizu-edge", "-c", "import pycuda.driver", entry="python3", check=False).stderr
    # The driver is the host's; anything else that pycuda misses would be missing on the line too.
    assert "libcuda.so.1: cannot open shared object file" in driver, driver
    kernels = podman(
        "kizu-edge", "-c", "from edge.engines.cuda import FATBIN; print(FATBIN.stat().st_size)", entry="python3"
    )
    return {"size_mb": size_mb("kizu-edge"), "fatbin_bytes": int(kernels.stdout), "user": user_of("kizu-edge")}


def torch_in_edge() -> str:
    """Control: with torch planted in the image the build fails, and says why; even with one that does not import."""
    text = (DEPLOY / "Dockerfile.edge").read_text()
    assert text.count(GUARD) == 1
    guard = next(line for line in text.splitlines() if GUARD in line)
    plant = "RUN d=$(ls -d /opt/kizu/.venv/lib/python3*/site-packages)/torch && mkdir $d && echo 1/0 > $d/__init__.py"
    planted = WORK / "Dockerfile.planted"
    planted.write_text(text.replace(guard, f"{plant}\n{guard}"))
    extras = services()["daemon"]["build"]["args"]["EXTRAS"]
    built = build(str(planted), "kizu-planted", f"EXTRAS={extras}", check=False)
    said = built.stdout + built.stderr
    assert built.returncode != 0 and "torch is in the runtime image" in said, said
    return "refused: torch is in the runtime image"


def commands() -> dict[str, Any]:
    """`kizu doctor` and every subcommand's help, as the image's user on a sealed root."""
    options = options_of(services()["camera-left"], volumes=False)
    report = json.loads(podman("kizu-edge", "doctor", "--json", options=options).stdout)
    assert report["backends"] == ["openvino"], report
    helped = podman("kizu-edge", "--help", options=options).stdout
    offered = re.findall(r"^  ([a-z-]+) {2,}", helped.partition("Commands:")[2], re.MULTILINE)
    for name in ("run", "send", "watch", "log", "swap", "keys", "compile", "verify"):
        assert name in offered, helped
    findings = {name: found["found"] for name, found in report["findings"].items()}
    return {"commands": len(offered), **{name: findings[name] for name in ("tensorrt", "pycuda", "kernels")}}


def engine() -> dict[str, Any]:
    """An engine for a GPU that is not here, built in the image as its user on a sealed root."""
    options = [*options_of(services()["camera-left"], volumes=False), "-v", f"{ROOT / 'edge/demo/bundle'}:/bundle:ro"]
    words = ["compile", "/bundle", "--target", "sm89", "--precision", "fp16", "--cache", "/tmp/engines", "--json"]
    told = json.loads(podman("kizu-edge", *words, options=options).stdout.splitlines()[-1])
    return {key: told[key] for key in told if key != "path"}


def line() -> dict[str, Any]:
    """The services of compose.yaml that are ours, sealed as it says: pictures in, verdicts on the metrics page."""
    ours = {name: service for name, service in services().items() if service["image"] == "kizu-edge"}
    started: list[str] = []
    try:
        for name, service in ours.items():
            started.append(f"kizu-check-{name}")
            podman("kizu-edge", *service["command"], options=["-d", "--name", started[-1], *options_of(service)])
        page = wait_for("http://127.0.0.1:9464/metrics", lambda text: all(judged(text).values()))
        console = wait_for("http://127.0.0.1:8470/", lambda text: "<html" in text.lower())
        sealed = seal_of("kizu-check-daemon")
        assert sealed == {"root": False, "CapEff": "0" * 16, "NoNewPrivs": "1", "mount": "ro"}, sealed
        run(*podman_base(), "stop", "-t", "30", "kizu-check-daemon")
        left = run(*podman_base(), "inspect", "-f", "{{.State.ExitCode}}", "kizu-check-daemon").stdout.strip()
        assert left == "0", f"the daemon ended with {left}\n{logs('kizu-check-daemon')}"
        return {
            "verdicts": judged(page),
            "sealed": sealed,
            "console_bytes": len(console),
        }
    except AssertionError as error:
        raise AssertionError(f"{error}\n" + "\n".join(f"--- {name}\n{logs(name)}" for name in started)) from None
    finally:
        for name in started:
            run(*podman_base(), "rm", "-f", "-t", "1", name, check=False)
        run(*podman_base(), "volume", "rm", "-f", "kizu-check-log", check=False)


def trainer() -> dict[str, Any]:
    """Dockerfile.trainer with the CPU's torch: it trains the line preset on the demo's photographs for a few steps."""
    build("Dockerfile.trainer", "kizu-trainer", f"TORCH={os.environ.get('TORCH', 'torch==2.13.0+cpu')}")
    photos = ["-v", f"{ROOT / 'edge/demo/photos'}:/data:ro", "--tmpfs", "/out"]
    trained = podman(
        "kizu-trainer", "train", "student-teacher", "--preset", "line", "--data", "/data", "--out", "/out/bundle",
        "--set", "steps=20", options=photos, check=False,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    return {"size_mb": size_mb("kizu-trainer"), "told": trained.stdout.splitlines()[-1:]}


def jetson() -> dict[str, Any]:
    """Dockerfile.jetson on this machine's architecture: refused without TensorRT, built with a stand-in for it."""
    refused = build("Dockerfile.jetson", "kizu-jetson", check=False)
    said = refused.stdout + refused.stderr
    assert refused.returncode != 0 and "this base has no tensorrt for its Python" in said, said
    container = run(*buildah("from", "--pull-never", full(jetson_base()))).stdout.strip()
    module = WORK / "tensorrt.py"
    module.write_text('__version__ = "10.13.2"\n')
    run(*buildah("add", "-q", container, str(module), "/usr/lib/python3/dist-packages/tensorrt.py"))
    run(*buildah("commit", "-q", container, "localhost/with-tensorrt"))
    run(*buildah("rm", container))
    build("Dockerfile.jetson", "kizu-jetson", "BASE=localhost/with-tensorrt")
    report = json.loads(podman("kizu-jetson", "doctor", "--json").stdout)
    found = report["findings"]["tensorrt"]["found"]
    assert found == "TensorRT of unknown version", report
    return {"refused": "without tensorrt", "tensorrt": found, "user": user_of("kizu-jetson")}


STEPS: dict[str, Callable[[], object]] = {
    step.__name__: step for step in (bases, edge, torch_in_edge, commands, engine, line, jetson, trainer)
}


# --- stand-ins --------------------------------------------------------------------------------------------------------


def tags() -> list[str]:
    """The images that the Dockerfiles start from."""
    found = []
    for path in sorted(DEPLOY.glob("Dockerfile.*")):
        text = path.read_text()
        given = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
        for tag in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            found.append(given[tag[1:]] if tag.startswith("$") else tag)
    return found


def jetson_base() -> str:
    return next(tag for tag in tags() if tag.startswith("nvcr.io/"))


def full(tag: str) -> str:
    """The name under which a short one is looked for."""
    if "/" not in tag:
        return f"docker.io/library/{tag}"
    return tag if "." in tag.split("/")[0] else f"docker.io/{tag}"


def debian() -> Path:
    """A root file system of Debian bookworm, Python 3.11's; made once."""
    archive, folder = WORK / "bookworm.tar", WORK / "bookworm"
    if not archive.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(folder))
        shutil.rmtree(folder / "var/lib/apt/lists")
        run("tar", "-C", str(folder), "-cf", str(archive), ".")
        shutil.rmtree(folder)
    return archive


def cuda() -> Path:
    """A CUDA toolkit as NVIDIA's packages lay it out, from wheels; with a libcuda to link against, as theirs has."""
    folder = WORK / "cuda"
    if folder.exists():
        return folder
    wheels = WORK / "wheels"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(wheels), *CUDA)
    made = wheels / "nvidia" / "cu13"
    (made / "lib64").symlink_to("lib")
    for library in made.glob("lib/*.so.*"):
        (made / "lib" / library.name.partition(".so")[0]).with_suffix(".so").symlink_to(library.name)
    named = re.findall(
        r"\bcu[A-Z]\w*\b", (made / "include/cuda.h").read_text() + (made / "include/cudaProfiler.h").read_text()
    )
    source = "".join(f"int {name}(void){{return 100;}}\n" for name in sorted(set(named)))
    stubs = made / "lib" / "stubs"
    stubs.mkdir()
    link = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        "-Wl,-soname,libcuda.so.1",
        "-x",
        "c",
        "-",
        "-o",
        str(stubs / "libcuda.so"),
    ]
    subprocess.run(link, input=source, text=True, check=True)
    made.rename(folder)
    shutil.rmtree(wheels)
    return folder


# --- tools ------------------------------------------------------------------------------------------------------------


def store() -> list[str]:
    return ["--root", str(WORK / "store"), "--runroot", str(WORK / "run"), "--storage-driver", "overlay"]


def buildah(*words: str) -> list[str]:
    return ["buildah", *store(), *words]


def build(file: str, tag: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Build one Dockerfile from this checkout; inside, pip finds the indexes that this machine's pip finds."""
    given = [word for argument in arguments for word in ("--build-arg", argument)]
    mounts = [word for mount in pip_mounts() for word in ("--volume", mount)]
    path = file if Path(file).is_absolute() else str(DEPLOY / file)
    options = ["--isolation", "chroot", "--pull-never", "--layers", *mounts, *given, "-f", path, "-t", tag]
    return run(*buildah("bud", *options, str(ROOT)), check=check)


def pip_mounts() -> list[str]:
    """This machine's settings of pip as a file, and every local path that they name."""
    kept = {"index-url", "extra-index-url", "find-links", "cert", "trusted-host", "default-timeout", "timeout"}
    listed = run(sys.executable, "-m", "pip", "config", "list").stdout
    settings = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    lines = [f"{key} = {value}" for key, value in settings.items() if key in kept]
    file = WORK / "pip.conf"
    file.write_text("\n".join(["[global]", *lines, ""]).replace("default-timeout", "timeout"))
    paths = re.findall(r"(?:^|\s|file://)(/[^\s]+)", " ".join(settings[key] for key in settings if key in kept))
    # An index in a folder names files beside it.
    paths = [str(Path(path).parent) if Path(path).name == "simple" else path for path in paths]
    return [f"{file}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in paths if Path(path).exists())]


def podman_base() -> list[str]:
    return ["podman", *store(), "--cgroup-manager", "cgroupfs"]


def podman(
    image: str, *command: str, options: Iterable[str] = (), entry: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a container in the host's network, as every service of compose.yaml is."""
    # podman would ask for more than this machine may have.
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 16384)
    ulimits = ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]
    fixed = ["run", "--network", "host", "--cgroups=disabled", "--pull", "never", *ulimits]
    kept = [] if "-d" in options else ["--rm"]
    entered = [] if entry is None else ["--entrypoint", entry]
    return run(*podman_base(), *fixed, *kept, *entered, *options, f"localhost/{image}", *command, check=check)


def options_of(service: dict[str, Any], *, volumes: bool = True) -> list[str]:
    """A compose service as options of `podman run`."""
    options = ["--read-only"] if service.get("read_only") else []
    options += [word for path in service.get("tmpfs", []) for word in ("--tmpfs", path)]
    options += [f"--cap-drop={name}" for name in service.get("cap_drop", [])]
    options += [word for text in service.get("security_opt", []) for word in ("--security-opt", text.partition(":")[0])]
    for volume in service.get("volumes", []) if volumes else []:
        source, _, rest = volume.partition(":")
        options += ["-v", f"{(DEPLOY / source).resolve() if source.startswith('.') else f'kizu-check-{source}'}:{rest}"]
    return options


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def size_mb(image: str) -> int:
    told = run(*podman_base(), "image", "inspect", "-f", "{{.Size}}", f"localhost/{image}").stdout
    return round(int(told) / 1e6)


def user_of(image: str) -> str:
    return run(*podman_base(), "image", "inspect", "-f", "{{.Config.User}}", f"localhost/{image}").stdout.strip()


def seal_of(container: str) -> dict[str, Any]:
    """Whether its first process is root, what it may, and how its root is mounted, as the kernel tells."""
    process = Path("/proc", run(*podman_base(), "inspect", "-f", "{{.State.Pid}}", container).stdout.strip())
    status = dict(re.findall(r"^(Uid|CapEff|NoNewPrivs):\s*(\w+)", (process / "status").read_text(), re.MULTILINE))
    mounts = [text.split() for text in (process / "mountinfo").read_text().splitlines()]
    mount = next(words[5].split(",")[0] for words in mounts if words[4] == "/")
    return {"root": status.pop("Uid") == "0", **status, "mount": mount}


def logs(container: str) -> str:
    told = run(*podman_base(), "logs", "--tail", "20", container, check=False)
    return told.stdout + told.stderr


def judged(page: str) -> dict[str, int]:
    """Verdicts of each camera, and how many were accept: on a slow machine the camera with a deadline is late."""
    counts = re.findall(r'^kizu_verdicts_total{camera="(\w+)",decision="(\w+)",[^}]*} (\S+)$', page, re.MULTILINE)
    found = {camera: 0 for camera, _, _ in counts} | {"accept": 0}
    for camera, decision, count in counts:
        found[camera] += int(float(count))
        found["accept"] += int(float(count)) if decision == "accept" else 0
    return found


def wait_for(url: str, enough: Callable[[str], object], limit_s: float = 180) -> str:
    """The page at `url` once it holds what it should."""
    deadline, last = time.monotonic() + limit_s, "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                last = answer.read().decode()
            if enough(last):
                return last
        except OSError as error:
            last = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{url} in {limit_s} s: {last[:1000]}")


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError(f"{shlex.join(command)[:600]}: {done.returncode}\n{(done.stdout + done.stderr)[-5000:]}")
    return done


if __name__ == "__main__":
    sys.exit(main())
