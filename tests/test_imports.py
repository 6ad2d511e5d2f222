"""The house's import rules: who may know whom, what may be loaded, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("edge", "calib", "trainer")

# Inside edge, a module imports only from rooms before its own; rooms in one entry do not know each other,
# except that a helper room may be named by its owner (second table).
ORDER = [
    ("errors",),
    ("run_kernels", "image_headers", "bundle_files", "model_file", "ring", "graph", "keys", "admission", "steady"),
    ("flat_kernels",),
    ("signature", "login", "plan_cache"),
    ("images",),
    ("masks",),
    ("types",),
    ("clock", "payloads", "events", "config", "bundle"),
    ("camera", "rule_file"),
    ("rules",),
    ("protocols",),
    ("wire",),
    ("series",),
    ("frame_account", "gpu_metrics", "metrics_server"),
    ("metrics",),
    ("sockets",),
    ("stages", "engines", "sources", "sinks"),
    ("replay_client",),
    ("part_scores", "cameras", "standstill"),
    ("compile", "client", "sender", "docket", "warrant", "opening", "inference", "pipeline", "health", "doorkeeper"),
    ("shadow", "bridge", "challenge"),
    ("challenge_duty",),
    ("swap", "line_stages"),
    ("loading",),
    ("daemon", "demo"),
    ("rescore", "heatmap"),
    ("labels",),
    ("console",),
    ("cli", "commands"),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SAME_RANK_ALLOWED = {
    ("protocols", "events"),
    ("payloads", "images"),
    ("demo", "daemon"),
    ("commands", "cli"),
    ("opening", "compile"),
    ("pipeline", "docket"),
    ("pipeline", "health"),
    ("pipeline", "inference"),
}
HEAVY = ("torch", "tensorrt", "tensorrt_rtx", "pycuda", "openvino", "onnxruntime", "onnx")
BACKENDS = {"edge.engines.openvino": "openvino", "edge.engines.onnxruntime": "onnxruntime"}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, module_level_only: bool = False) -> set[str]:
    """Every absolute module name that the file imports; `from a import b` gives a and a.b."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: Iterator[ast.AST] = iter(tree.body) if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def violations(name: str, path: Path) -> list[str]:
    """What `path`, as a module of edge, imports from a later room or from a neighbor."""
    own = name.split(".")[1] if "." in name else None
    wrong = []
    for target in imports(path):
        parts = target.split(".")
        if parts[0] != "edge" or len(parts) < 2 or parts[1] not in RANK or own is None:
            continue
        room = parts[1]
        allowed = room == own or RANK[room] < RANK[own] or (own, room) in SAME_RANK_ALLOWED
        # Sources do not know sinks, and one source does not know another, but a stage may use a stage of its own step.
        if not allowed:
            wrong.append(f"{name} imports {target}")
    return wrong


def test_every_room_of_edge_has_its_place_in_the_order() -> None:
    """A new file must be given a rank here before it can be imported by anyone."""
    rooms = {name.split(".")[1] for name, _ in modules("edge") if "." in name}

    assert rooms <= set(RANK), sorted(rooms - set(RANK))


def test_imports_inside_edge_go_in_one_direction() -> None:
    """The order of the rooms is the architecture; an import against it is a design change."""
    wrong = [line for name, path in modules("edge") for line in violations(name, path)]

    assert wrong == []


def test_an_import_against_the_order_is_noticed(tmp_path: Path) -> None:
    """Control: a planted import from a later room is found."""
    planted = tmp_path / "wire.py"
    planted.write_text("from edge.daemon import build\n")

    assert (
        violations("edge.wire", planted)
        == [
            "edge.wire imports edge.daemon",
            "edge.wire imports edge.daemon.build",
        ]
        or sorted(violations("edge.wire", planted))[0] == "edge.wire imports edge.daemon"
    )


def test_packages_import_only_downwards() -> None:
    """trainer may know calib and edge, calib may know edge, edge knows neither."""
    forbidden = {"edge": {"calib", "trainer"}, "calib": {"trainer"}, "trainer": set()}
    wrong = [
        (name, top)
        for package in PACKAGES
        for name, path in modules(package)
        for top in tops(path) & forbidden[package]
    ]

    assert wrong == []


def test_edge_does_not_even_name_the_other_packages_commands() -> None:
    """The command line finds subcommands by entry points; edge holds no list of what calib or trainer offer."""
    wrong = [
        name
        for name, path in modules("edge")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.split(":")[0].startswith(("calib.", "trainer."))
    ]

    assert wrong == []


def test_only_trainer_imports_torch() -> None:
    """The edge runtime and the acceptance tools install and run without torch."""
    wrong = [name for package in ("edge", "calib") for name, path in modules(package) if "torch" in tops(path)]

    assert wrong == []


def test_there_are_no_import_cycles() -> None:
    """Module-level imports form a tree that can be loaded from the leaves up."""
    known = {name: path for package in PACKAGES for name, path in modules(package)}
    graph = {name: {t for t in imports(path, True) if t in known and t != name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(known)


def test_init_files_hold_no_logic() -> None:
    """A package's __init__ is a docstring and at most names; importing `edge` must load nothing."""
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    wrong = [
        name
        for package in PACKAGES
        for name, path in modules(package)
        if path.name == "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if not isinstance(node, allowed)
    ]

    assert wrong == []
    assert imports(ROOT / "edge" / "__init__.py") == set()


BLOCK = """
import sys, importlib
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
"""


def test_edge_imports_without_torch_and_without_any_backend() -> None:
    """With every heavy package blocked, each module of edge still imports, except the backends' own files."""
    names = [name for name, _ in modules("edge") if name not in BACKENDS]
    script = BLOCK.format(blocked=HEAVY, names=names)

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["edge", "edge.types", "edge.cli"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """`import edge` and the command line must answer at once: no OpenCV, numba, SciPy or backend comes along."""
    heavy = {"cv2", "numba", "scipy", "zmq", *HEAVY}
    script = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]", done.stderr
