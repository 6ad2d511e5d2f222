"""Score again: `kizu rescore` in a process of its own, one at a time, its heat map kept for the page.

Owns that process. The console itself holds no engine: a model that is large, or a backend that dies, costs the page
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import msgspec

TIMEOUT_S: Final = 150.0
_KEPT: Final = 16
_MAX_ANSWER: Final = 600


class Rescoring:
    """For the line of `config`; all methods in one event loop."""

    def __init__(self, config: Path | None) -> None:
        self._config = config
        self._busy = asyncio.Lock()
        self._maps: OrderedDict[str, bytes] = OrderedDict()

    @property
    def available(self) -> bool:
        """Whether the line's configuration is known."""
        return self._config is not None

    @property
    def busy(self) -> bool:
        """Whether one is being scored now."""
        return self._busy.locked()

    def heatmap(self, event_id: str) -> bytes | None:
        """PNG to lay over the frame, once that was scored again."""
        return self._maps.get(event_id)

    async def score(self, event_id: str) -> dict[str, Any]:
        """What `kizu rescore --json` answers, or {"error": why}."""
        async with self._busy:
            with tempfile.TemporaryDirectory(prefix="kizu-console-") as folder:
                picture = Path(folder) / "heatmap.png"
                answer = await self._ask(event_id, picture)
                if picture.is_file():
                    self._keep(event_id, picture.read_bytes())
            return answer | {"heatmap": event_id in self._maps}

    async def _ask(self, event_id: str, picture: Path) -> dict[str, Any]:
        words = ["-m", "edge.cli", "rescore", event_id, str(self._config), "--json", "--heatmap", str(picture)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
        )
        try:
            out, told = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        except TimeoutError:
            return {"error": f"no answer within {TIMEOUT_S:.0f} s"}
        finally:
            # Also when the page that asked is gone.
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        try:
            return msgspec.json.decode(out, type=dict[str, Any])
        except msgspec.DecodeError:
            return {"error": told.decode("utf-8", "replace").strip()[-_MAX_ANSWER:] or "kizu rescore said nothing"}

    def _keep(self, event_id: str, data: bytes) -> None:
        self._maps[event_id] = data
        if len(self._maps) > _KEPT:
            self._maps.popitem(last=False)
