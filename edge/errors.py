"""Every error that Kizu raises on purpose; imports nothing.

    KizuError                   base; `exit_code` is what the command line returns for it
    ├── UsageError              exit 2: the command line or a file is wrong
    │   ├── CommandError        an option or argument
    │   ├── ConfigError         the TOML configuration: names file, line or key
    │   ├── BundleError         a bundle is missing, changed, foreign or of another schema
    │   └── DataError           a data folder or an image in it
    ├── ImageRefused            bytes that are not an admissible image; carries `reason`
    ├── WireError               a message that breaks the wire layout; carries `reason`
    ├── SourceError
    │   ├── SourceTimeout       nothing came within the time given; try again
    │   ├── EndOfStream         the source is finished and says so
    │   └── SourceBroken        the source cannot deliver any more
    ├── EngineError             a backend failed or is missing; names the extra to install
    │   ├── EngineBusy          `depth` tickets are out already
    │   └── DeviceError         a GPU, its driver or a compiled engine; carries `reason`
    ├── SinkError
    │   ├── SinkFull            the stated bound is reached; nothing was dropped
    │   ├── LogError            the event log cannot keep its promise
    │   └── LabelError          a person's label could not be saved
    ├── ChallengeError          known samples are not answered as they should be
    ├── TrainingError           training cannot go on (diverged, wrong checkpoint)
    ├── ParityError             two backends disagree beyond the stated tolerance
    └── CalibrationError        the sample cannot support what was asked

Every message says what was given, what was expected, where, and the next step.
"""

from __future__ import annotations


class KizuError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the process's exit status."""

    exit_code = 1


class UsageError(KizuError):
    """The command line or a file is wrong."""

    exit_code = 2


class CommandError(UsageError):
    """An option or argument cannot be used as given."""


class ConfigError(UsageError):
    """The configuration file is wrong; the message names file and key."""


class BundleError(UsageError):
    """A bundle is missing, incomplete, changed or of an unknown schema."""


class DataError(UsageError):
    """A data folder or an image in it cannot be used."""


class ImageRefused(KizuError):
    """Bytes are not an admissible image.

    `reason` is one word for a counter: `truncated`, `bomb`, `format`, `size`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WireError(KizuError):
    """A message breaks the wire layout; `reason` is one word for a counter."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SourceError(KizuError):
    """A source of frames did not deliver."""


class SourceTimeout(SourceError):
    """No frame came within the time given; the caller may try again."""


class EndOfStream(SourceError):
    """The source is finished; there will be no more frames."""


class SourceBroken(SourceError):
    """The source failed and will not recover by itself."""


class EngineError(KizuError):
    """A backend is missing, refused the model or failed to run it."""


class EngineBusy(EngineError):
    """`submit` was called with `depth` tickets out; collect one first."""


DEVICE_REASONS: tuple[str, ...] = ("package", "driver", "device", "engine", "memory", "lost")
"""Every `DeviceError.reason`: no package; no driver or a wrong one; no such GPU; an engine file that does not belong
here or cannot be built; GPU memory is full; a device or its context failed while it ran."""


class DeviceError(EngineError):
    """A GPU, its driver or a compiled engine cannot be used; `reason` is one of DEVICE_REASONS, for a counter."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SinkError(KizuError):
    """A sink could not take an event."""


class SinkFull(SinkError):
    """The sink's stated bound is reached; the event was not taken."""


class LogError(SinkError):
    """The event log cannot keep its promise (disk full, failed sync, damaged file)."""


class LabelError(SinkError):
    """A person's label could not be made durable."""


class ChallengeError(KizuError):
    """Samples known to be good or bad are not answered as they should be."""


class TrainingError(KizuError):
    """Training cannot go on."""


class ParityError(KizuError):
    """Two backends disagree on the golden frames beyond the stated tolerance."""


class CalibrationError(KizuError):
    """The sample of good parts cannot support what was asked."""
