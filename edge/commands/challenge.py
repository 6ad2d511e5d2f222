"""`kizu challenge CONFIG.toml`: does the line still tell good parts from bad ones?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.errors import ChallengeError, CommandError

if TYPE_CHECKING:
    from edge.challenge import ChallengeResult
    from edge.config import EdgeConfig

_PATIENCE_S = 120.0


def challenge(
    config: Annotated[Path, typer.Argument(help="The line's TOML file; its [challenge] dir holds the samples.")],
    apart: Annotated[
        bool, typer.Option("--apart", help="Try the samples here, without the daemon; nothing is logged or withheld.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Let the running line judge samples that are known to be good or bad, at the start of a shift.

    With `[challenge] required = true` (the default) the daemon withholds READY, and answers every frame
    INCONCLUSIVE(challenge), until the challenge is passed. It is in the event log, in the metrics and published. Exit
    status 1 if it is failed; which sample, and why, is said.

    Raises:
        CommandError: no daemon listens, or its file names no samples.
        ConfigError: the samples' folder is not as it should be.
        ChallengeError: a sample is not answered as it should be.
    """
    import msgspec

    from edge.config import load_config

    loaded = load_config(config)
    if loaded.challenge.dir is None:
        raise CommandError(f"{config}: no [challenge] dir; name a folder with good/ and bad/ samples there")
    result = _apart(loaded, config) if apart else _by_daemon(loaded)
    typer.echo(msgspec.json.encode(result).decode() if json else result.detail)
    if not result.passed:
        raise ChallengeError(f"the challenge of line {loaded.line} is failed")


def _by_daemon(config: EdgeConfig) -> ChallengeResult:
    from edge.challenge_duty import ask_daemon
    from edge.daemon import default_control_address

    return ask_daemon(config.control_address or default_control_address(config), patience_s=_PATIENCE_S)


def _apart(config: EdgeConfig, where: Path) -> ChallengeResult:
    """The line's own stages and engine, opened for this."""
    from edge.bundle import open_bundle
    from edge.challenge import take_apart
    from edge.clock import SystemClock
    from edge.line_stages import find_challenge, make_stages
    from edge.opening import EngineOpener

    bundle = open_bundle(Path(config.bundle))
    stages, samples = make_stages(config, bundle, where), find_challenge(config, where)
    engine = EngineOpener(config, bundle, fields=stages.fields).open()
    return take_apart(samples, engine, stages, SystemClock(), config.batching.max_batch)
