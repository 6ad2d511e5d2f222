"""Engines built ahead: for every target and precision, kept privately, found again, and never trusted blindly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge import compile as compiling
from edge import plan_cache
from edge.bundle import ModelBundle, open_bundle
from edge.compile import Progress, check_targets, compile_bundle, load_library, plan_key
from edge.errors import BundleError, CommandError, ConfigError, EngineError, ParityError
from edge.plan_cache import PlanKey, cache_folder, find_plan, keep_plan

DEMO = Path(__file__).parents[2] / "edge" / "demo" / "bundle"
TARGETS = ("sm80", "sm86", "sm89", "sm120")

rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT for RTX is not installed: pip install 'kizu[tensorrt-rtx]'",
)


@pytest.fixture(scope="module")
def demo() -> ModelBundle:
    return open_bundle(DEMO)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "engines"


@rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_demo_builds_for_every_target_at_every_precision(demo: ModelBundle, cache: Path, precision: Any) -> None:
    """Each target alone, and all of them in one engine; half the precision is the smaller engine."""
    alone = [compile_bundle(demo, targets=[target], precision=precision, cache=cache) for target in TARGETS]
    together = compile_bundle(demo, targets=TARGETS, precision=precision, cache=cache)

    assert all(plan.fresh and plan.size > 500_000 for plan in [*alone, together])
    assert len({plan.path for plan in [*alone, together]}) == 5
    assert together.key.targets == TARGETS
    if precision != "fp32":
        assert together.size < compile_bundle(demo, targets=TARGETS, precision="fp32", cache=cache).size


def built_by_the_command(cache: Path, precision: str, *options: str) -> str:
    """The digest of the demo's engine, by `kizu compile` in a process of its own."""
    command = [sys.executable, "-m", "edge.cli", "compile", str(DEMO), "--target", "sm89", "--json", *options]
    done = subprocess.run(
        [*command, "--precision", precision, "--cache", str(cache)], capture_output=True, text=True, timeout=120
    )
    if "address randomization" in done.stderr:
        pytest.skip("this machine does not let a process switch address randomization off")
    return str(json.loads(done.stdout)["sha256"])


@rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_rebuild_is_the_same_bytes(tmp_path: Path, precision: str) -> None:
    """The library orders tables and names by address, so the command leaves it one order only."""
    assert built_by_the_command(tmp_path / "a", precision) == built_by_the_command(tmp_path / "b", precision)


def test_the_process_that_builds_is_steady_and_keeps_what_was_set() -> None:
    """One core, no thread preempts another, no address is random, and the user's own tunables still hold."""
    asked = "import os; from edge.steady import restart_steadily; before = os.environ['GLIBC_TUNABLES']; "
    asked += "told = restart_steadily(); print(told, len(os.sched_getaffinity(0)), os.sched_getscheduler(0), before, "
    asked += "'tensorrt_rtx' in os.environ['LD_PRELOAD'])"
    set_before = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, env=set_before)
    told, cores, policy, tunables, preloaded = done.stdout.split()
    if told == "False":
        pytest.skip("this machine does not let a process switch address randomization off")

    assert (cores, int(policy)) == ("1", os.SCHED_BATCH)
    assert tunables.startswith("glibc.malloc.perturb=0:") and "glibc.malloc.mmap_max=0" in tunables
    assert preloaded == str(find_spec("tensorrt_rtx_libs") is not None)


@rtx
def test_control_without_a_steady_process_the_bytes_differ(tmp_path: Path) -> None:
    """Random addresses, and threads as they come: of four builds at bf16 not all are the same."""
    digests = {built_by_the_command(tmp_path / name, "bf16", "--no-reproducible") for name in "abcd"}

    assert len(digests) > 1


@rtx
def test_an_engine_is_built_once(demo: ModelBundle, cache: Path) -> None:
    """The second time it is found, read and checked."""
    first = compile_bundle(demo, targets=["sm89"], precision="fp16", cache=cache)
    second = compile_bundle(demo, targets=["sm89", "sm89"], precision="fp16", cache=cache)

    assert (first.fresh, second.fresh) == (True, False)
    assert second.read() == first.read()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def foreign(path: Path) -> None:
    """Another engine with a description of its own, moved to this one's place."""
    described = json.loads((path.parent / "plan.json").read_text())
    described["key"]["version"] = "1.6.0"
    (path.parent / "plan.json").write_text(json.dumps(described))


def undescribed(path: Path) -> None:
    (path.parent / "plan.json").unlink()


@rtx
@pytest.mark.parametrize("damage", [flip, cut, foreign, undescribed])
def test_an_entry_that_is_not_as_it_was_written_is_built_anew(
    demo: ModelBundle, cache: Path, damage: Callable[[Path], None]
) -> None:
    """A flipped bit, a cut, another version's, one without a description: never loaded."""
    first = compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache)
    good = first.read()
    damage(first.path)

    again = compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache)

    assert again.fresh and again.read() == good


@rtx
def test_control_without_the_digest_a_damaged_entry_would_be_loaded(
    demo: ModelBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: a digest that always agrees."""
    first = compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache)
    flip(first.path)
    monkeypatch.setattr(plan_cache, "sha256_hex", lambda data: first.sha256)

    assert find_plan(first.key, first.path.parent) is not None


@rtx
def test_an_engine_that_changes_between_finding_and_reading_is_refused(demo: ModelBundle, cache: Path) -> None:
    """What is loaded is what was hashed."""
    plan = compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache)
    flip(plan.path)

    with pytest.raises(EngineError, match="was changed after it was built; run `kizu compile` again"):
        plan.read()


def test_everything_that_decides_an_engine_is_in_its_key() -> None:
    """Another value anywhere is another folder."""
    key = PlanKey("tensorrt_rtx", "1.7", "0" * 64, "model", "fp16", ("sm89",), 4, (256, 256, 3))
    changes: dict[str, Any] = {
        "library": "tensorrt", "version": "1.8", "model_sha256": "1" * 64, "graph": "coarse", "precision": "bf16",
        "targets": ("sm80",), "max_batch": 5, "shape": (256, 256, 1),
    }  # fmt: skip

    assert set(changes) == set(PlanKey.__struct_fields__)
    digests = {msgspec.structs.replace(key, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {key.digest}) == len(changes) + 1


@rtx
@pytest.mark.parametrize(
    ("targets", "precision", "message"),
    [
        (["sm90"], "fp32", r"--target sm90: unknown to tensorrt_rtx; expected some of sm75, sm80"),
        (["89"], "fp32", "--target 89: unknown"),
        ([], "fp32", "--target is missing"),
        (["sm89"], "fp12", "--precision fp12: expected one of fp32, fp16, bf16, int8, fp8"),
        (["sm89"], "int8", "is not quantized to it; make one that is: kizu quantize"),
        (["sm89"], "fp8", "kizu quantize .* --precision fp8"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    demo: ModelBundle, cache: Path, targets: list[str], precision: Any, message: str
) -> None:
    """Before anything is built."""
    with pytest.raises(CommandError, match=message):
        compile_bundle(demo, targets=targets, precision=precision, cache=cache)

    assert not cache.exists() or not any(cache.iterdir())


@rtx
def test_fp8_is_refused_on_gpus_that_do_not_have_it(demo: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the target's name, with those that do."""
    monkeypatch.setattr(compiling, "quantized_types", lambda model: ("fp8",))

    with pytest.raises(CommandError, match=r"GPUs of sm80, sm86 do not compute in fp8; sm89 and later do"):
        plan_key(demo, load_library(), targets=TARGETS, precision="fp8")
    assert plan_key(demo, load_library(), targets=["sm89", "sm120"], precision="fp8").precision == "fp8"


def test_a_quantized_bundle_is_not_compiled_as_if_it_were_not(
    demo: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thresholds belong to its own precision."""
    monkeypatch.setattr(compiling, "quantized_types", lambda model: ("int8",))

    with pytest.raises(CommandError, match="is quantized; compile it with int8"):
        compiling._require_precision(demo.model, demo, "fp16", ("sm89",))


def test_a_library_that_builds_for_the_gpu_at_hand_takes_no_target() -> None:
    """The regular TensorRT; its absence of other targets is said."""

    class Regular:
        __name__ = "tensorrt"

    assert check_targets(Regular(), []) == ()
    with pytest.raises(CommandError, match="builds for the GPU at hand only"):
        check_targets(Regular(), ["sm89"])


@rtx
def test_a_graph_that_the_rules_refuse_is_named_and_not_built(
    demo: ModelBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The linter speaks first."""
    monkeypatch.setattr("edge.graph.OPERATORS", frozenset({"Cast"}))

    with pytest.raises(EngineError, match=r"model\.onnx cannot be built by TensorRT:\n  node"):
        compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache)
    assert list(cache.iterdir()) == []


def test_a_bundle_without_a_coarse_graph_has_none_to_build(demo: ModelBundle, cache: Path) -> None:
    """Said with the option that makes one."""
    with pytest.raises(BundleError, match="--refine"):
        plan_key(demo, load_library(), targets=["sm89"], precision="fp32", graph="coarse")


def test_without_a_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is imported before it is needed."""
    monkeypatch.setattr(compiling, "LIBRARIES", ("no_such_tensorrt",))

    with pytest.raises(EngineError, match=r"pip install 'kizu\[tensorrt-rtx\]'"):
        load_library()


def test_the_cache_is_private_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made as 0700 where systemd or XDG say; one that others can write is not used."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "system"))
    made = cache_folder()
    assert made == tmp_path / "system" / "kizu" / "engines" and made.stat().st_mode & 0o777 == 0o700

    made.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others; run `chmod 700"):
        cache_folder()


@rtx
def test_a_build_tells_how_far_it_is(demo: ModelBundle, cache: Path) -> None:
    """From 0 to 1 without going back."""
    seen: list[float] = []

    class Noting(Progress):
        def __call__(self, done: float, phase: str) -> None:
            seen.append(done)

    compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache, progress=Noting())

    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)


@rtx
def test_a_build_that_is_interrupted_leaves_nothing(demo: ModelBundle, cache: Path) -> None:
    """Ctrl-C in the middle: the library stops at its next step, and the cache stays as it was."""

    class Interrupting(Progress):
        def __call__(self, done: float, phase: str) -> None:
            if done > 0:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # let the interpreter run the handler

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(demo, targets=["sm89"], precision="fp32", cache=cache, progress=Interrupting())

    assert list(cache.iterdir()) == [] and signal.getsignal(signal.SIGINT) is before


@rtx
def test_the_command_builds_and_finds(tmp_path: Path) -> None:
    """One line an engine, or JSON; other backends are tried and keep nothing."""
    shutil.copytree(DEMO, tmp_path / "bundle")

    def kizu(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "edge.cli",
            "compile",
            str(tmp_path / "bundle"),
            "--cache",
            str(tmp_path / "c"),
        ]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)

    built = kizu("--target", "sm80,sm89", "--precision", "fp16")
    found = json.loads(kizu("--target", "sm89,sm80", "--precision", "fp16", "--json").stdout)
    other = kizu("--backend", "onnxruntime")
    wrong = kizu("--backend", "onnxruntime", "--target", "sm89")

    assert built.returncode == 0 and "model fp16 for sm80, sm89" in built.stdout, built.stderr
    assert found["fresh"] is False and found["targets"] == ["sm80", "sm89"]
    assert other.returncode == 0 and "nothing to keep" in other.stdout
    assert wrong.returncode == 2 and "leave --target" in wrong.stderr


def test_a_stop_while_an_engine_is_put_away_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes lie aside until one rename; Ctrl-C just before it takes them away again."""

    def interrupted(source: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    key = PlanKey("tensorrt_rtx", "1.7", "0" * 64, "model", "fp16", ("sm89",), 4, (256, 256, 3))
    monkeypatch.setattr(Path, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt):
        keep_plan(cache_folder(cache) / key.digest, key, b"engine", 1.0, None)

    assert list(cache.iterdir()) == []


def test_what_a_killed_build_left_is_swept_away_and_a_running_one_is_not(cache: Path) -> None:
    """SIGKILL gives nobody the time to tidy up; the next build does."""
    folder = cache_folder(cache)
    killed, running = folder / ".building-killed", folder / ".building-running"
    for attempt in (killed, running):
        attempt.mkdir()
        (attempt / "plan.engine").write_bytes(b"half")
    os.utime(killed, (time.time() - 7200, time.time() - 7200))
    key = PlanKey("tensorrt_rtx", "1.7", "0" * 64, "model", "fp16", ("sm89",), 4, (256, 256, 3))

    keep_plan(folder / key.digest, key, b"engine", 1.0, None)

    assert not killed.exists() and running.exists()


@rtx
def test_fp16_is_compared_with_the_golden_frames_before_anything_is_kept(demo: ModelBundle, cache: Path) -> None:
    """The share is kept with the engine; fp32 needs no comparison, and bf16 has none on a CPU."""
    half = compile_bundle(demo, targets=["sm89"], precision="fp16", cache=cache)
    again = compile_bundle(demo, targets=["sm89"], precision="fp16", cache=cache)

    assert half.map_share is not None and 0 < half.map_share < 0.01
    assert (again.fresh, again.map_share) == (False, half.map_share)
    assert compile_bundle(demo, targets=["sm89"], precision="bf16", cache=cache).map_share is None


@rtx
def test_a_graph_that_fp16_changes_too_much_is_refused_with_what_to_use(
    demo: ModelBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the desk, not when the line starts; control: the same graph is taken where that much is allowed."""
    monkeypatch.setattr(compiling, "LOOSE", {"fp16": 1e-4})
    with pytest.raises(ParityError, match=r"in fp16 its model map is up to .* compile with --precision bf16 or fp32"):
        compile_bundle(demo, targets=["sm89"], precision="fp16", cache=cache)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(compiling, "LOOSE", {"fp16": 1.0})
    assert compile_bundle(demo, targets=["sm89"], precision="fp16", cache=cache).fresh
