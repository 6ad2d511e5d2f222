"""The documentation cannot fall behind: its commands are run, its links resolve, its names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
# Commands that need no minutes of training, no running daemon and no data of the reader's own.
RUNNABLE = ("verify", "inspect", "evaluate", "run")


def console_lines(page: Path) -> list[str]:
    """Every command in the page's ```console blocks, continuation lines joined."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def kizu_commands() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in console_lines(page) if line.startswith("kizu ")]


def kizu(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


@pytest.mark.parametrize(("page", "line"), kizu_commands())
def test_every_kizu_command_in_the_docs_exists_with_its_options(page: str, line: str) -> None:
    """A reader can type what the page shows: the subcommand answers --help and knows each option."""
    words = shlex.split(line)
    done = kizu(words[1], "--help")

    assert done.returncode == 0, f"{page}: {line}\n{done.stderr}"
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in done.stdout, f"{page}: {line}: {option} is unknown"


@pytest.mark.parametrize("line", [line for page, line in kizu_commands() if page == "README.md"])
def test_the_readmes_commands_run(line: str) -> None:
    """Those on what is shipped are run as they stand, from the checkout's root."""
    words = shlex.split(line)
    if words[1] not in RUNNABLE:
        pytest.skip(f"`kizu {words[1]}` needs data or minutes of the reader's own; its options are checked above")

    done = kizu(*words[1:])

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_make_targets_exist() -> None:
    """`make demo` and `make test` are the two commands; every target named anywhere is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {line.split()[1] for page in PAGES for line in console_lines(page) if line.startswith("make ")}

    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_resolve(page: Path) -> None:
    """Every relative link leads to a file of the checkout."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists()]

    assert broken == []


def test_ci_runs_the_readmes_test_command() -> None:
    """CI is the README's command and nothing more, so a green CI means that a newcomer's `make test` is green."""
    # Before it, only system packages are installed, for tests that would be skipped without them.
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "set ", "cd ", "if ", "fi", "    "))
    ]

    assert commands == ["make test"]


PROMISE = """
Every frame the daemon acknowledged has its verdict in the log. Every event any subscriber ever saw is in the log.
Every registered subscriber can get every event exactly once in order, within retention. If that cannot be kept
(disk full, failing disk, retention passed), the daemon says so and stops acknowledging. A frame never acknowledged
is sent again by `kizu send` and recognized, never judged twice.
"""


@pytest.mark.parametrize("page", ["README.md", "docs/wire.md"])
def test_the_promise_stands_word_for_word(page: str) -> None:
    """What tests/system holds is what readers are told."""
    quoted = " ".join(re.findall(r"^> (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))

    assert PROMISE.split() == quoted.split()
