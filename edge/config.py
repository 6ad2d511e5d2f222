"""EdgeConfig: what one line's daemon is told, decoded strictly from TOML. Owns every key, its unit and its limits.

Says nothing about whether a bundle or an address can be used; that is found out by whoever opens it.
`deploy/line.example.toml` shows every key; `docs/configuration.md` explains them.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edge.errors import ConfigError

MAX_CONFIG_BYTES: Final = 1024 * 1024
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")

Name = Annotated[str, Meta(pattern=r"\A[a-z0-9_-]{1,64}\Z")]
_Text = Annotated[str, Meta(min_length=1)]
_Count = Annotated[int, Meta(ge=1)]
_Pixels = Annotated[int, Meta(ge=0, le=65_535)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file: frozen, and a key that is not declared is an error."""


class EngineConfig(_Section, frozen=True):
    """[engine]: which backend runs the graph, where, and on how many streams side by side.

    `refine` false computes every tile densely, also where the bundle has a coarse graph to look with first. `precision`
    and `on_gpu_failure` are TensorRT's: where the GPU cannot be used, "cpu" goes on with OpenVINO, says so and counts
    it, "refuse" does not start. So is `maps`: with "flawed", of frames without a cell above the pixel threshold only
    score and mask come back from the GPU; and `flat_field`: on the "device", the GPU corrects frames in place of the
    "host", to the same bytes.
    """

    backend: Literal["openvino", "onnxruntime", "tensorrt", "fake"] = "openvino"
    device: _Text = "cpu"
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = "fp16"
    on_gpu_failure: Literal["cpu", "refuse"] = "refuse"
    maps: Literal["all", "flawed"] = "all"
    flat_field: Literal["host", "device"] = "host"
    streams: Annotated[int, Meta(ge=1, le=64)] = 2
    refine: bool = True


class CameraConfig(_Section, frozen=True):
    """[[cameras]]: an admitted camera; `roi_xywh` is the inspected part of its frame, in pixels, None for all.

    `policy` `every` looks at each frame and lets the camera wait, `latest` gives a waiting frame up for a newer one.
    A frame without a verdict `deadline_ms` after its reception is INCONCLUSIVE(late); with `clock` `synchronized` the
    time runs from the camera's own time of exposure. From the `frozen_after`th picture in a row that is the same byte
    for byte its frames are INCONCLUSIVE(frozen). `calibration` is a folder that `kizu camera` wrote, `rules` a rule
    file.
    """

    name: Name
    roi_xywh: tuple[_Pixels, _Pixels, Annotated[int, Meta(ge=1, le=65_535)], Annotated[int, Meta(ge=1, le=65_535)]] | (
        None
    ) = None
    policy: Literal["every", "latest"] = "every"
    deadline_ms: Annotated[float, Meta(gt=0, le=600_000)] | None = None
    clock: Literal["free", "synchronized"] = "free"
    frozen_after: Annotated[int, Meta(ge=2, le=1_000_000)] | None = None
    calibration: _Text | None = None
    rules: _Text | None = None


class MetricsConfig(_Section, frozen=True):
    """[metrics]: where Prometheus finds the daemon; port 0 lets the system choose.

    `certificate` and `private_key` are PEM files, and the page is then given out by TLS only; `login` is a file from
    `kizu keys metrics NAME`, or `credential:NAME`, and the page is then for that name and its password only.
    """

    host: _Text = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 9464
    certificate: _Text | None = None
    private_key: _Text | None = None
    login: _Text | None = None


class LogConfig(_Section, frozen=True):
    """[log]: the event log's SQLite file, and how much of it is kept: None without a limit of that kind.

    What a registered subscriber has not got yet is kept beyond the limits while it was heard of within
    `keep_for_subscribers_days`; None keeps nothing for anybody.
    `rejects_bytes` and `rejects_count` bound the frames of rejected parts that are kept beside it; 0 keeps none.
    """

    path: _Text
    retain_bytes: Annotated[int, Meta(ge=1024 * 1024)] | None = None
    retain_days: Annotated[float, Meta(gt=0, le=36_500)] | None = None
    keep_for_subscribers_days: Annotated[float, Meta(gt=0, le=36_500)] | None = None
    rejects_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024
    rejects_count: Annotated[int, Meta(ge=0, le=1_000_000)] = 1000


class BatchingConfig(_Section, frozen=True):
    """[batching]: a batch goes to the engine when it holds `max_batch` frames or its first has waited `max_wait_ms`."""

    max_batch: _Count = 4
    max_wait_ms: Annotated[float, Meta(ge=0, le=10_000)] = 2.0


class SegmentConfig(_Section, frozen=True):
    """[segment]: `min_area_px` is the smallest region that is reported, in frame pixels; None takes the bundle's."""

    min_area_px: _Count | None = None


class WatchConfig(_Section, frozen=True):
    """[watch]: the test that voids a certificate when live parts are no longer like those it stands on.

    `parts_between_false_alarms` is the mean while nothing changed, at least; `reject_share` is how many of all parts
    may be rejected before the certificate is doubted.
    """

    enabled: bool = True
    parts_between_false_alarms: Annotated[float, Meta(ge=100, le=1e12)] = 1e7
    reject_share: Annotated[float, Meta(gt=0, lt=0.125)] = 0.05


class ChallengeConfig(_Section, frozen=True):
    """[challenge]: a folder of samples known to be good and to be bad, which the line must tell apart.

    Taken at the start, every `every_hours` and by `kizu challenge`. While it is `required` and not passed, the line is
    not ready and every frame is INCONCLUSIVE(challenge). None for `dir`: no challenge.
    """

    dir: _Text | None = None
    every_hours: Annotated[float, Meta(gt=0, le=10_000)] | None = None
    required: bool = True


class LimitsConfig(_Section, frozen=True):
    """[limits]: the largest picture that is looked at; what is larger becomes INCONCLUSIVE(unreadable)."""

    max_pixels: Annotated[int, Meta(ge=1, le=64 * 1024 * 1024)] = 64 * 1024 * 1024
    max_payload_bytes: Annotated[int, Meta(ge=1024, le=64 * 1024 * 1024)] = 64 * 1024 * 1024


class SecurityConfig(_Section, frozen=True):
    """[security]: keys of the wire and signers of bundles; all of it may be left out on a host of one's own.

    `secret_key` is the daemon's key file, or `credential:NAME`; with it every socket is encrypted and `peers` lists who
    may connect. `signers` is a public signing key or a folder of them; `require_signature` refuses every other bundle.
    """

    secret_key: _Text | None = None
    peers: _Text | None = None
    signers: _Text | None = None
    require_signature: bool = False


class EdgeConfig(_Section, frozen=True):
    """One line: its name, its bundle, its cameras and its addresses.

    `window` is how many frames each camera may have without a verdict. `plain_off_host` admits addresses outside this
    host, without encryption. `control_address` is where `kizu swap` asks; None is
    beside the event log. `bundle` and `log.path` are absolute after `load_config`.
    """

    line: Name
    bundle: _Text
    frames_address: _Text
    events_address: _Text
    cameras: Annotated[tuple[CameraConfig, ...], Meta(min_length=1, max_length=64)]
    log: LogConfig
    replay_address: _Text | None = None
    window: Annotated[int, Meta(ge=1, le=256)] = 8
    control_address: _Text | None = None
    plain_off_host: bool = False
    engine: EngineConfig = EngineConfig()
    metrics: MetricsConfig = MetricsConfig()
    batching: BatchingConfig = BatchingConfig()
    segment: SegmentConfig = SegmentConfig()
    limits: LimitsConfig = LimitsConfig()
    watch: WatchConfig = WatchConfig()
    security: SecurityConfig = SecurityConfig()
    challenge: ChallengeConfig = ChallengeConfig()


def load_config(path: Path | str) -> EdgeConfig:
    """Read and check the file at `path`; relative paths in it are relative to its folder.

    Raises:
        ConfigError: names file, line and key, what was given, what was expected and what to do.
    """
    path = Path(path)
    text = _read(path)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not TOML: {error}; correct that line") from None
    try:
        config = msgspec.convert(tables, EdgeConfig)
    except msgspec.ValidationError as error:
        raise _explained(error, path, text) from None
    _require_distinct_cameras(config, path, text)
    _require_gpu_for_flat_field(config.engine, path, text)
    _require_whole_security(config.security, path, text)
    _require_whole_metrics(config.metrics, path, text)
    _require_whole_challenge(config, path, text)
    folder = path.absolute().parent
    return msgspec.structs.replace(
        config,
        bundle=str(folder / config.bundle),
        log=msgspec.structs.replace(config.log, path=str(folder / config.log.path)),
        security=_with_absolute_paths(config.security, folder),
        metrics=msgspec.structs.replace(
            config.metrics,
            certificate=_absolute(config.metrics.certificate, folder),
            private_key=_absolute(config.metrics.private_key, folder),
            login=_absolute(config.metrics.login, folder),
        ),
        challenge=_challenge_with_absolute_path(config.challenge, folder),
        cameras=tuple(_camera_with_absolute_paths(camera, folder) for camera in config.cameras),
    )


def keys() -> frozenset[str]:
    """Every key that a file may hold, with dots: `line`, `engine.streams`, `cameras.name`."""
    nested = {f"{table}.{name}" for table, section in _TABLES.items() for name in section.__struct_fields__}
    return frozenset(nested | (set(EdgeConfig.__struct_fields__) - _TABLES.keys()))


_TABLES: Final[dict[str, type[_Section]]] = {
    "batching": BatchingConfig,
    "challenge": ChallengeConfig,
    "cameras": CameraConfig,
    "engine": EngineConfig,
    "limits": LimitsConfig,
    "log": LogConfig,
    "metrics": MetricsConfig,
    "security": SecurityConfig,
    "segment": SegmentConfig,
    "watch": WatchConfig,
}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"configuration {path}: {error.strerror}; start from a copy of deploy/line.example.toml"
        ) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"configuration {path} is larger than {MAX_CONFIG_BYTES} bytes; is it the right file?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _require_distinct_cameras(config: EdgeConfig, path: Path, text: str) -> None:
    seen: set[str] = set()
    for index, camera in enumerate(config.cameras):
        if camera.name in seen:
            where = line_of(text, ["cameras", index, "name"])
            raise ConfigError(
                f"{path}:{where}: cameras.name {camera.name!r} is given twice; give each camera its own name"
            )
        seen.add(camera.name)


def _require_gpu_for_flat_field(engine: EngineConfig, path: Path, text: str) -> None:
    if engine.flat_field == "device" and engine.backend != "tensorrt":
        raise ConfigError(
            f'{path}:{line_of(text, ["engine", "flat_field"])}: engine.flat_field = "device" needs a GPU, and '
            f'engine.backend is {engine.backend!r}; write "host", or backend = "tensorrt"'
        )


def _require_whole_security(security: SecurityConfig, path: Path, text: str) -> None:
    """Half of a protection is none, so it is refused."""
    where = f"{path}:{line_of(text, ['security'])}"
    if (security.secret_key is None) != (security.peers is None):
        given, other = ("secret_key", "peers") if security.peers is None else ("peers", "secret_key")
        raise ConfigError(
            f"{where}: security.{given} is given without security.{other}; encryption needs both: `kizu keys server` "
            "makes the key, `kizu keys camera NAME` prints what goes into the list of peers"
        )
    if security.require_signature and security.signers is None:
        raise ConfigError(
            f"{where}: security.require_signature is true without security.signers; name the public key of whoever "
            "signs your bundles (`kizu keys signing NAME`), or a folder of such keys"
        )


def _require_whole_metrics(metrics: MetricsConfig, path: Path, text: str) -> None:
    where = f"{path}:{line_of(text, ['metrics'])}"
    if (metrics.certificate is None) != (metrics.private_key is None):
        given, other = ("private_key", "certificate") if metrics.certificate is None else ("certificate", "private_key")
        raise ConfigError(f"{where}: metrics.{given} is given without metrics.{other}; TLS needs both PEM files")
    if metrics.login is not None and metrics.certificate is None and metrics.host not in LOOPBACK:
        raise ConfigError(
            f"{where}: metrics.login on host {metrics.host} without metrics.certificate: the password would travel "
            "unencrypted; give certificate and private_key as well, or stay on 127.0.0.1"
        )


def _require_whole_challenge(config: EdgeConfig, path: Path, text: str) -> None:
    where = f"{path}:{line_of(text, ['challenge'])}"
    if config.challenge.dir is None and config.challenge != ChallengeConfig():
        raise ConfigError(
            f"{where}: [challenge] without dir: name the folder that holds good/ and bad/ samples, or remove the table"
        )
    if config.challenge.dir is not None and any(camera.name == "challenge" for camera in config.cameras):
        raise ConfigError(f"{where}: a camera is called challenge, the name of the challenge's own events; rename it")


def _challenge_with_absolute_path(challenge: ChallengeConfig, folder: Path) -> ChallengeConfig:
    if challenge.dir is None:
        return challenge
    return msgspec.structs.replace(challenge, dir=str(folder / challenge.dir))


def _camera_with_absolute_paths(camera: CameraConfig, folder: Path) -> CameraConfig:
    given = {"calibration": camera.calibration, "rules": camera.rules}
    changes = {key: str(folder / value) for key, value in given.items() if value is not None}
    return msgspec.structs.replace(camera, **changes)


def _absolute(value: str | None, folder: Path) -> str | None:
    return value if value is None or value.startswith("credential:") else str(folder / value)


def _with_absolute_paths(security: SecurityConfig, folder: Path) -> SecurityConfig:
    return SecurityConfig(
        secret_key=_absolute(security.secret_key, folder),
        peers=_absolute(security.peers, folder),
        signers=_absolute(security.signers, folder),
        require_signature=security.require_signature,
    )


# --- explaining a refusal ---------------------------------------------------------------------------------------------

_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<key>[A-Za-z0-9_]+)|\[(?P<index>\d+|\.\.\.)\]")
_QUOTED = re.compile(r"field `(?P<name>[^`]*)`")


def _explained(error: msgspec.ValidationError, path: Path, text: str) -> ConfigError:
    """msgspec's message with its JSON path turned into file, line and key, and the next step added."""
    message = str(error)
    found = _AT.search(message)
    steps = _steps(found["path"]) if found else []
    what = message[: found.start()] if found else message
    named = _QUOTED.search(what)
    if "unknown field" in what and named:
        steps = [*steps, named["name"]]
        what = f"unknown key; {_suggestion(steps)}"
    elif "missing required field" in what and named:
        key = _dotted([*steps, named["name"]])
        return ConfigError(f"{path}:{line_of(text, steps)}: {key} is missing; {_next_step(key)}")
    else:
        what = f"{what[:1].lower()}{what[1:]}; {_next_step(_dotted(steps))}"
    return ConfigError(f"{path}:{line_of(text, steps)}: {_dotted(steps)}: {what}")


def _steps(path: str) -> list[str | int]:
    steps: list[str | int] = []
    for step in _STEP.finditer(path):
        if step["key"]:
            steps.append(step["key"])
        elif step["index"].isdecimal():
            steps.append(int(step["index"]))
    return steps


def _dotted(steps: list[str | int]) -> str:
    return ".".join(step if isinstance(step, str) else f"{step}" for step in steps) or "the file"


def _pattern(steps: list[str | int]) -> str:
    """The key as `keys()` spells it: without indices."""
    return ".".join(step for step in steps if isinstance(step, str))


def _suggestion(steps: list[str | int]) -> str:
    key, known = _pattern(steps), sorted(keys())
    section = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    siblings += [] if section else _TABLES
    near = difflib.get_close_matches(key, siblings, 1, 0.7) or difflib.get_close_matches(key, known, 1, 0.7)
    if near:
        return (
            f"did you mean {near[0].rpartition('.')[2] if near[0] in siblings else near[0]}? {_unit(near[0])}".rstrip()
        )
    return f"known here: {', '.join(name.rpartition('.')[2] for name in siblings) or 'no key'}; remove it"


_UNITS: Final = {
    "_ms": "milliseconds",
    "_px": "pixels",
    "_bytes": "bytes",
    "_xywh": "[x, y, width, height] in pixels",
    "_pixels": "pixels",
}


def _unit(key: str) -> str:
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix):
            return f"(in {unit})" if not unit.startswith("[") else f"({unit})"
    return ""


def _next_step(key: str) -> str:
    leaf = re.sub(r"\.\d+", "", key)
    unit = _unit(leaf)
    if leaf.endswith("name") or leaf == "line":
        return "a name has 1 to 64 of a-z, 0-9, _ and -"
    example = "deploy/line.example.toml shows every key"
    if unit.startswith("(in"):
        return f"write a plain number {unit}: the unit is part of the key; {example}"
    return f"write {unit.strip('()')}; {example}" if unit else example


_TABLE = re.compile(r"\s*\[(?P<name>[^\[\]]+)\]\s*(?:#.*)?")
_ARRAY = re.compile(r"\s*\[\[(?P<name>[^\[\]]+)\]\]\s*(?:#.*)?")
_KEY = re.compile(r"\s*(?P<name>[A-Za-z0-9_\"'.-]+)\s*=")


def line_of(text: str, steps: list[str | int]) -> int:
    """The line on which the key at `steps` stands, or the nearest table around it; 1 when the file has neither."""
    places = _places(text)
    while steps:
        if tuple(steps) in places:
            return places[tuple(steps)]
        steps = steps[:-1]
    return 1


def _places(text: str) -> dict[tuple[str | int, ...], int]:
    """Line numbers of every table and key; keys inside inline tables are not told apart from their table."""
    places: dict[tuple[str | int, ...], int] = {}
    counts: dict[str, int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _ARRAY.fullmatch(line):
            name = header["name"].strip()
            table = (name, counts.get(name, 0))
            counts[name] = counts.get(name, 0) + 1
        elif header := _TABLE.fullmatch(line):
            table = tuple(part.strip().strip("\"'") for part in header["name"].split("."))
        elif key := _KEY.match(line):
            inner = tuple(part.strip("\"'") for part in key["name"].split("."))
            places.setdefault((*table, *inner), number)
            continue
        else:
            continue
        places.setdefault(table, number)
        places.setdefault(table[:1], number)
    return places
