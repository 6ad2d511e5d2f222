"""The console's web application: its pages, its stream and the few things that a page may ask for.

Owns addresses and answers. Who may ask is `guard`'s, what is shown is `board`'s; every text that comes from the line is
sent as JSON and put into the page as text.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from edge.console.board import Board
from edge.console.guard import COOKIE, Guard, Policy
from edge.console.pictures import Pictures, Size
from edge.console.rescoring import Rescoring
from edge.console.shown import Shown
from edge.console.stream import MAX_PAGES, Stream
from edge.errors import LabelError
from edge.labels import LABELS_VERSION, MAX_NOTE, Label, LabelFile, Word, picture_name
from edge.protocols import Clock

STATIC: Final = Path(__file__).parent / "static"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_MAX_BODY: Final = 8192
_PICTURE_TRIES: Final = 8
_PICTURE_WAIT_S: Final = 0.06


class LabelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the page posts: a person's word about an event."""

    id: str
    label: Word
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Console:
    """What the application is made of; `labels` None is read-only."""

    board: Board
    stream: Stream
    pictures: Pictures
    rescoring: Rescoring
    labels: LabelFile | None
    policy: Policy
    clock: Clock


def make_app(console: Console) -> ASGIApp:
    """The application, guarded."""
    handlers = _Handlers(console)
    event = "{camera}/{epoch}/{sequence}"
    routes = [
        Route("/", handlers.index),
        Route("/sign-in", handlers.sign_in, methods=["GET", "POST"]),
        Route("/static/{name}", handlers.static),
        Route("/events", handlers.events),
        Route("/abilities", handlers.abilities),
        Route(f"/event/{event}", handlers.event),
        Route(f"/picture/{event}", handlers.picture),
        Route(f"/heatmap/{event}", handlers.heatmap),
        Route(f"/rescore/{event}", handlers.rescore, methods=["POST"]),
        Route("/label", handlers.label, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), console.policy)


class _Handlers:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._files = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.suffix in _TYPES}

    async def index(self, request: Request) -> Response:
        return self._file(request, "index.html")

    async def static(self, request: Request) -> Response:
        return self._file(request, request.path_params["name"])

    async def sign_in(self, request: Request) -> Response:
        policy = self._console.policy
        if request.method == "GET":
            return self._file(request, "sign-in.html")
        form = parse_qs((await _body(request)).decode("utf-8", "replace"))
        if not policy.is_token(form.get("token", [""])[0].strip()):
            return RedirectResponse("/sign-in?wrong", 303)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE, policy.session, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return answer

    async def events(self, request: Request) -> Response:
        stream = self._console.stream
        if stream.pages >= MAX_PAGES:
            return _json({"error": f"{MAX_PAGES} pages are open already; close one"}, 503)
        return StreamingResponse(stream.events(), media_type="text/event-stream")

    async def abilities(self, request: Request) -> Response:
        """What this console can do, so that the page offers nothing else."""
        console = self._console
        return _json(
            {
                "pictures": console.pictures.available,
                "rescore": console.rescoring.available,
                "annotate": console.labels is not None,
            }
        )

    async def event(self, request: Request) -> Response:
        found = self._console.board.find(_event_id(request))
        return _json({"error": "not among the last events"}, 404) if found is None else _json(found)

    async def picture(self, request: Request) -> Response:
        size: Size = "full" if request.query_params.get("size") == "full" else "thumb"
        event_id, pictures = _event_id(request), self._console.pictures
        # The daemon writes the picture beside the event: for a part that is still on the board it may be on its way.
        for _ in range(_PICTURE_TRIES):
            if pictures.path(event_id) is not None or self._console.board.find(event_id) is None:
                break
            await asyncio.sleep(_PICTURE_WAIT_S)
        return _picture(await run_in_threadpool(pictures.scaled, event_id, size), "image/jpeg")

    async def heatmap(self, request: Request) -> Response:
        return _picture(self._console.rescoring.heatmap(_event_id(request)), "image/png", keep_s=0)

    async def rescore(self, request: Request) -> Response:
        console, event_id = self._console, _event_id(request)
        if not console.rescoring.available:
            return _json({"error": "start the console with --config LINE.toml to score again"}, 404)
        if console.pictures.path(event_id) is None:
            return _json({"error": "its picture is not kept (any more)"}, 404)
        if console.rescoring.busy:
            return _json({"error": "another part is being scored; try again in a moment"}, 409)
        return _json(await console.rescoring.score(event_id))

    async def label(self, request: Request) -> Response:
        labels = self._console.labels
        if labels is None:
            return _json({"error": "this console is read-only; start it with --annotate FILE"}, 403)
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _json({"error": "expected application/json"}, 415)
        try:
            asked = msgspec.json.decode(await _body(request), type=LabelRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _json({"error": str(error)}, 400)
        found = self._console.board.find(asked.id)
        if found is None:
            return _json({"error": "not among the last events"}, 404)
        try:
            label = await run_in_threadpool(self._save, labels, asked, found)
        except LabelError as error:
            return _json({"error": str(error)}, 507)
        return _json({"id": label.id, "label": None if label.label == "withdrawn" else label.label})

    def _save(self, labels: LabelFile, asked: LabelRequest, found: Shown) -> Label:
        """Durable before the page hears of it."""
        console = self._console
        wants_picture = asked.label in ("false_reject", "real_defect")
        picture = console.pictures.original(asked.id) if wants_picture else None
        label = Label(
            version=LABELS_VERSION,
            id=found.id,
            label=asked.label,
            at_ns=console.clock.wall_ns(),
            line=console.board.line,
            camera=found.camera,
            decision=found.decision,
            model_id=found.model,
            score=found.score,
            threshold=found.threshold,
            part_id=found.part,
            note=asked.note[:MAX_NOTE],
            picture=None if picture is None else picture_name(asked.id),
            picture_sha256=None if picture is None else hashlib.sha256(picture).hexdigest(),
        )
        labels.append(label, picture)
        console.board.label(found.id, None if label.label == "withdrawn" else label.label)
        return label

    def _file(self, request: Request, name: str) -> Response:
        data = self._files.get(name)
        if data is None:
            return Response("no such file", 404, media_type="text/plain")
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        headers = {"cache-control": "no-cache", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=f"{_TYPES[Path(name).suffix]}", headers=headers)


def _event_id(request: Request) -> str:
    parts = request.path_params
    return f"{parts['camera']}/{parts['epoch']}/{parts['sequence']}"


async def _body(request: Request) -> bytes:
    """At most _MAX_BODY bytes of it; more is no request of ours and fails to decode."""
    data = b""
    try:
        async for part in request.stream():
            data += part
            if len(data) > _MAX_BODY:
                return b""
    except ClientDisconnect:
        return b""
    return data


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _picture(data: bytes | None, kind: str, keep_s: int = 3600) -> Response:
    """An event's picture never changes, so browsers may keep it for `keep_s`."""
    if data is None:
        return Response("not kept", 404, media_type="text/plain")
    return Response(data, media_type=kind, headers={"cache-control": f"private, max-age={keep_s}"})
