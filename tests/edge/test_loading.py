"""How a model gets in: hashed before anything looks into it, built from those bytes, and never by running them."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge import bundle as bundles
from edge.bundle import MAX_FILE_BYTES, ModelBundle, open_bundle
from edge.engines.registry import open_engine
from edge.errors import BundleError

ROOT = Path(__file__).parents[2]
RUNS_WHAT_IT_READS = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "yaml"}
# torch.load reads a downloaded checkpoint under weights_only; pickle is named there for the error that it then raises.
NAMES_AN_ERROR = {"trainer/backbones.py"}


def dangers(source: str) -> Iterator[str]:
    """What in a module could run code that it reads from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (name for name in names if name.partition(".")[0] in RUNS_WHAT_IT_READS)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in ("eval", "exec", "compile") or options.get("allow_pickle") == "True":
                yield called
            if called == "torch.load" and options.get("weights_only") != "True":
                yield called


def test_nothing_runs_what_it_reads() -> None:
    """No pickle in any of its shapes, in none of the three packages."""
    found = {
        str(path.relative_to(ROOT)): danger
        for package in ("edge", "calib", "trainer")
        for path in sorted((ROOT / package).rglob("*.py"))
        for danger in dangers(path.read_text(encoding="utf-8"))
    }

    assert found == dict.fromkeys(NAMES_AN_ERROR, "pickle")


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "np.load(path, allow_pickle=True)", "torch.load(path)", "eval(text)",
     "torch.load(path, weights_only=False)", "import yaml.loader"],
)  # fmt: skip
def test_each_of_these_would_be_noticed(source: str) -> None:
    """Control."""
    assert list(dangers(source))
    assert not list(dangers("torch.load(path, weights_only=True)\nnp.load(path)\nre.compile(text)"))


@pytest.mark.parametrize("name", sorted(MAX_FILE_BYTES))
def test_nothing_is_parsed_before_its_digest_is_right(
    tiny_bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A changed file is refused before any parser sees a byte of any of them."""
    copy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    parsed: list[str] = []
    for parser in ("require_self_contained", "parse_array", "_parse_golden"):
        monkeypatch.setattr(bundles, parser, lambda *rest, name=parser: parsed.append(name))

    with pytest.raises(BundleError, match="was changed"):
        open_bundle(copy)
    assert parsed == []


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_engine_is_built_from_the_hashed_bytes_and_not_from_the_path(
    tiny_bundle: ModelBundle, tmp_path: Path, backend: str
) -> None:
    """Whoever swaps the file after the check swaps nothing."""
    opened = open_bundle(Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy")))
    (opened.path / "model.onnx").write_bytes(b"another model")
    (opened.path / "golden" / "frames.npy").unlink()

    with open_engine(opened, backend=backend) as engine:
        maps, _ = engine.infer(opened.golden.frames[:1])
    assert maps.shape == (1, *opened.golden.maps.shape[1:])
