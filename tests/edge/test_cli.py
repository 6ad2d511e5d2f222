"""`kizu`: subcommands that are found but not loaded, and errors that are messages and not tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edge import cli
from edge.errors import ConfigError, KizuError

ROOT = Path(__file__).parents[2]


def kizu(*arguments: str, script: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    call = ["-m", "edge.cli", *arguments] if script is None else ["-c", script, *arguments]
    return subprocess.run(
        [sys.executable, *call],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def app_of(function: object) -> typer.Typer:
    app = typer.Typer()
    app.command()(cli.guard(function))  # type: ignore[arg-type]
    return app


def test_help_lists_every_registered_command_with_its_first_line() -> None:
    """A newcomer sees what there is."""
    done = kizu("--help")

    assert done.returncode == 0
    for name in metadata.entry_points(group=cli.GROUP).names:
        assert f"  {name} " in done.stdout
    assert "Inspect a line" in done.stdout


def test_help_and_each_call_load_no_other_command() -> None:
    """`kizu --help` reads sources instead of importing them; a call imports its own module only."""
    script = (
        "import sys; from edge import cli; cli.build(sys.argv[1:]); "
        "print(sorted(name for name in sys.modules if name.startswith(('edge.commands.', 'trainer.', 'calib.'))))"
    )

    assert kizu("--help", script=script).stdout.strip() == "[]"
    assert kizu("run", "line.toml", script=script).stdout.strip() == "['edge.commands.run']"


def test_the_help_of_a_command_leaves_out_what_is_for_programmers() -> None:
    """`Raises:` is for those who call the function."""
    done = kizu("run", "--help")

    assert "SIGTERM" in done.stdout
    assert "Raises" not in done.stdout
    assert "--check" in done.stdout


def test_a_command_whose_extra_is_missing_is_listed_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is visible on the edge machine, and how to get it."""
    entry = metadata.EntryPoint("train", "edge.commands.run:run [train]", cli.GROUP)
    monkeypatch.setattr(cli, "_packages_of", lambda extra: ["a_package_that_nobody_has"])

    assert cli.help_line(entry).endswith("[needs: pip install 'kizu[train]']")


def test_calling_it_says_what_to_install_and_ends_with_2() -> None:
    """No traceback: the package, the command that installs it."""
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError('No module', name='torch')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from edge import cli\n"
        "cli.main()\n"
    )
    entry = next(iter(metadata.entry_points(group=cli.GROUP, name="train")))
    if not entry.extras:
        pytest.skip("kizu was installed before its entry points named their extras; run `make setup` again")

    done = kizu("train", "student-teacher", "--data", "x", "--out", "y", script=blocked)

    assert done.returncode == 2, done.stderr
    assert "torch" in done.stderr and "pip install 'kizu[train]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "status"), [(KizuError("the line failed"), 1), (ConfigError("line.toml:3"), 2)])
def test_an_error_on_purpose_is_a_message_and_its_exit_status(error: KizuError, status: int) -> None:
    """1: the work failed; 2: the command line or a file is wrong."""

    def work() -> None:
        raise error

    done = CliRunner().invoke(app_of(work))

    assert done.exit_code == status
    assert done.output == f"kizu: {error}\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """--debug and KIZU_DEBUG=1 are the same."""
    plain = kizu("run", str(tmp_path / "none.toml"))
    by_option = kizu("--debug", "run", str(tmp_path / "none.toml"))
    by_environment = kizu("run", str(tmp_path / "none.toml"), KIZU_DEBUG="1")

    assert "Traceback" not in plain.stderr
    assert "Traceback" in by_option.stderr and "Traceback" in by_environment.stderr
    assert {plain.returncode, by_option.returncode, by_environment.returncode} == {2}


def test_an_error_nobody_foresaw_keeps_its_traceback() -> None:
    """Control: the guard does not swallow faults of the program."""

    def work() -> None:
        raise ZeroDivisionError

    done = CliRunner().invoke(app_of(work))

    assert isinstance(done.exception, ZeroDivisionError)


def test_ctrl_c_ends_with_130() -> None:
    """As a shell expects it."""

    def work() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(app_of(work)).exit_code == 130


def test_a_typo_is_answered_with_the_nearest_command() -> None:
    """Exit status 2, as for every wrong command line."""
    done = kizu("verfy", "bundle")

    assert done.returncode == 2
    assert "verify" in done.stderr


def test_version_is_the_distributions() -> None:
    """`kizu --version`."""
    assert kizu("--version").stdout == f"kizu {metadata.version('kizu')}\n"


def test_the_command_line_answers_at_once() -> None:
    """--help loads neither NumPy nor OpenCV nor a backend."""
    script = (
        "import sys; from edge import cli; cli.build(['--help']); "
        "print(sorted({'numpy', 'cv2', 'zmq', 'rich'} & set(sys.modules)))"
    )

    assert kizu(script=script).stdout.strip() == "[]"
