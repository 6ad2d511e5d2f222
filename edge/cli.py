"""`kizu`: one command whose subcommands are found by the entry-point group `kizu.commands` and loaded only when called.

Owns finding them, their one-line helps (read from their source, not imported), and what errors look like. What a
subcommand does is its own module's matter, whichever package that is in.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from edge.errors import CommandError, KizuError

GROUP: Final = "kizu.commands"
INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells give it: 128 + SIGINT."""

_DISTRIBUTION: Final = "kizu"
_DEBUG: Final = "KIZU_DEBUG"


def main() -> None:
    """The console script."""
    build(sys.argv[1:])(prog_name=_DISTRIBUTION)


def build(arguments: list[str]) -> typer.Typer:
    """The command line for `arguments`: every subcommand by name and help, the one that is called with its code."""
    app = typer.Typer(
        name="kizu",
        help="Learns from good parts only; inspects every camera frame in real time.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    found = commands()
    called = next((word for word in [*arguments, *_words_to_complete()] if word in found), None)
    for name, entry in found.items():
        function = _load(entry) if name == called else _stub(entry)
        app.command(name, help=_for_people(function.__doc__), short_help=help_line(entry))(guard(function))
    return app


def commands() -> dict[str, metadata.EntryPoint]:
    """Every registered subcommand by name, in alphabetical order."""
    found = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    if not found:
        raise SystemExit(
            "kizu: no subcommands are registered, so this is a bare checkout; run `make demo` or `pip install -e .`"
        )
    return dict(sorted(found.items()))


def help_line(entry: metadata.EntryPoint) -> str:
    """The first line of the subcommand's docstring, and how to install what it lacks; nothing is executed."""
    lacking = missing_extras(entry)
    note = f" [needs: {install_command(lacking)}]" if lacking else ""
    return _docstring(entry).partition("\n")[0] + note


def missing_extras(entry: metadata.EntryPoint) -> list[str]:
    """The extras that the entry point names and whose packages are not all installed."""
    return [extra for extra in entry.extras if not all(_is_installed(name) for name in _packages_of(extra))]


def _is_installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def install_command(extras: list[str]) -> str:
    """How to install `extras`."""
    return f"pip install '{_DISTRIBUTION}[{','.join(extras)}]'"


def guard(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with manners: an error raised on purpose is one message and its exit status, no traceback."""

    @functools.wraps(function)
    def guarded(*values: Any, **options: Any) -> None:
        try:
            function(*values, **options)
        except KizuError as error:
            _show(error)
            raise typer.Exit(error.exit_code) from None
        except ModuleNotFoundError as error:
            refused = _missing(error)
            _show(refused)
            raise typer.Exit(refused.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output is gone (`kizu watch | head`); a second failure at exit would only add noise.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return guarded


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kizu {metadata.version(_DISTRIBUTION)}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; KIZU_DEBUG=1 does the same.")] = False,
) -> None:
    if debug:
        os.environ[_DEBUG] = "1"


def _show(error: KizuError) -> None:
    """Called while `error` is handled, so its traceback is at hand when it is asked for."""
    if os.environ.get(_DEBUG, "") not in ("", "0"):
        import traceback

        traceback.print_exc()
    typer.echo(f"kizu: {error}", err=True)


def _load(entry: metadata.EntryPoint) -> Callable[..., None]:
    """The subcommand's function; one that says what is missing where it cannot be imported."""
    try:
        function: Callable[..., None] = entry.load()
    except ModuleNotFoundError as error:
        return _refusing(_missing(error, entry), _docstring(entry))
    except KizuError as error:
        return _refusing(error, _docstring(entry))
    return function


def _stub(entry: metadata.EntryPoint) -> Callable[..., None]:
    """Stands in for a subcommand that was not called."""
    return _refusing(CommandError(f"`kizu {entry.name}` was not loaded; call it as the first word"), "")


def _refusing(error: KizuError, text: str) -> Callable[..., None]:
    def refuse(words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        raise error

    refuse.__doc__ = f"{text}\n\n{error}" if text else None
    return refuse


def _missing(error: ModuleNotFoundError, entry: metadata.EntryPoint | None = None) -> CommandError:
    """What to install, from the distribution's own metadata."""
    module = (error.name or "").partition(".")[0]
    extras = [] if entry is None else missing_extras(entry)
    extras = extras or [extra for extra in _extras() if module in _packages_of(extra)][:1]
    what = f"`kizu {entry.name}`" if entry is not None else "this command"
    if extras:
        return CommandError(f"{what} needs {module}, which is not installed; run: {install_command(extras)}")
    return CommandError(f"{what} needs the module {error.name}, which is not installed; install kizu again")


def _extras() -> list[str]:
    try:
        return metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+).*;\s*extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


def _packages_of(extra: str) -> list[str]:
    """Import names of an extra's packages, taken to be those of their distributions."""
    try:
        requirements = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    parsed = [_REQUIREMENT.match(line) for line in requirements]
    return [found["name"].replace("-", "_") for found in parsed if found and found["extra"] == extra]


def _docstring(entry: metadata.EntryPoint) -> str:
    """The function's docstring from its source: a help page must not cost the import of a training framework."""
    try:
        spec = util.find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return "not installed"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return ast.get_docstring(node) or ""
    return ast.get_docstring(tree) or ""


def _for_people(docstring: str | None) -> str:
    """A docstring without its part for programmers."""
    return inspect.cleandoc(docstring or "").partition("\nRaises:")[0].strip()


def _words_to_complete() -> list[str]:
    """What a shell asks to complete, so that the subcommand's options are known."""
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()


if __name__ == "__main__":
    main()
