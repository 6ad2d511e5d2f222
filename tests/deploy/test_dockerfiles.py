"""What can be said of the Dockerfiles without docker: what they copy and install is there, and torch stays outside."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "deploy").glob("Dockerfile.*"))
EDGE = ("Dockerfile.edge", "Dockerfile.jetson")


def problems(text: str, *, edge: bool) -> list[str]:
    """Everything that would fail, or should, when the file is built."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wrong = []
    for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE):
        wrong += [f"{name} is not there" for name in line.split() if not (ROOT / name).exists()]
    for name in re.findall(r"sh (\S+\.sh)", text):
        wrong += [] if (ROOT / name).is_file() else [f"{name} is not there"]
    for listed in re.findall(r"(?:\"\.\[|^ARG EXTRAS=\")([\w,-]+)", text, re.MULTILINE):
        wrong += [f"extra {name} is unknown" for name in listed.split(",") if name not in extras]
        if edge and "train" in listed.split(","):
            wrong.append("the runtime's image installs torch")
    if edge and not re.search(r"^RUN python3 -c .*sys\.exit\(u\.find_spec\('torch'\)", text, re.MULTILINE):
        wrong.append("an image with torch in it would be built")
    if edge and not re.search(r"^USER (?!root)", text, re.MULTILINE):
        wrong.append("the daemon would run as root")
    return wrong


def test_there_is_a_file_for_each_machine() -> None:
    """A line on x86-64, a line on Jetson, and a place to train."""
    assert FILES == ["Dockerfile.edge", "Dockerfile.jetson", "Dockerfile.trainer"]


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_names_is_there(name: str) -> None:
    """Paths, scripts and extras; in the runtime's images no torch and no root."""
    assert problems((ROOT / "deploy" / name).read_text(), edge=name in EDGE) == []


def ignored(rules: list[str], name: str) -> bool:
    """Whether .dockerignore keeps a path out of the build, by its last rule that matches, as docker reads it."""
    kept_out = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        parts = [name, *(str(folder) for folder in Path(name).parents)]
        if any(fnmatch(part, pattern) or fnmatch(f"/{part}", pattern) for part in parts):
            kept_out = not rule.startswith("!")
    return kept_out


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_copies_reaches_the_build(name: str) -> None:
    """.dockerignore admits it, and neither this machine's kernels and byte code nor .venv and .git."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    text = (ROOT / "deploy" / name).read_text()
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for word in line.split()]

    assert [path for path in copied if ignored(rules, path)] == []
    for path in (".venv/bin/kizu", ".git/HEAD", "edge/__pycache__/cli.pyc", "edge/engines/kernels/kernels.fatbin"):
        assert ignored(rules, path), path
    assert not ignored(rules, "edge/engines/kernels/kernels.cu")


def test_control_a_file_that_would_not_build_is_noticed() -> None:
    """Planted: a file that is gone, an extra that is not, torch, root."""
    planted = 'COPY pyproject.toml gone.txt ./\nRUN sh edge/none.sh\nRUN pip install ".[train,cuda]"\n'

    found = problems(planted, edge=True)

    assert found == [
        "gone.txt is not there",
        "edge/none.sh is not there",
        "extra cuda is unknown",
        "the runtime's image installs torch",
        "an image with torch in it would be built",
        "the daemon would run as root",
    ]
