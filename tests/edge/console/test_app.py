"""The console's web application: who may ask, what is answered, and what a label leaves on the disk."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from edge import images
from edge.clock import SystemClock
from edge.console.app import Console, make_app
from edge.console.board import Board
from edge.console.guard import COOKIE, Policy
from edge.console.pictures import Pictures, find_folder
from edge.console.rescoring import Rescoring
from edge.console.stream import Stream
from edge.errors import CommandError
from edge.labels import LabelFile, pictures_folder, read_labels
from edge.sinks.rejects import frame_path, rejects_folder
from sample_events import sample_event

HOME = "http://127.0.0.1:8470"
OURS = {"origin": HOME}


class Client:
    """A browser's requests, without its picture."""

    def __init__(self, app: Any) -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOME)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._client.get(path, **options))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._client.post(path, **options))


class Page:
    """The application with an event on its board and that event's picture in a log's folder."""

    def __init__(self, folder: Path, *, annotate: bool = True, token: str | None = None) -> None:
        self.log = folder / "events.sqlite"
        self.picture = np.random.default_rng(2).integers(0, 256, (90, 120, 3), np.uint8)
        file = frame_path(rejects_folder(self.log), "cam1", 7, 3)
        file.parent.mkdir()
        file.write_bytes(images.encode_png(self.picture))
        self.file = file
        self.labels = folder / "labels.jsonl"
        self.board = Board(SystemClock())
        self.board.take(sample_event(3, decision="reject", score=2.5, part_id="p-1"), None, live=True)
        self.console = Console(
            board=self.board,
            stream=Stream(self.board),
            pictures=Pictures(rejects_folder(self.log)),
            rescoring=Rescoring(None),
            labels=LabelFile(self.labels) if annotate else None,
            policy=Policy(token, None if token else frozenset({"127.0.0.1", "localhost"})),
            clock=SystemClock(),
        )
        self.client = Client(make_app(self.console))

    def label(self, word: str = "false_reject", **headers: str) -> Any:
        body = {"id": "cam1/7/3", "label": word, "note": "shadow"}
        return self.client.post("/label", json=body, headers=headers or OURS)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(tmp_path)


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/static/console.js", "/abilities", "/event/cam1/7/3", "/nothing", "/picture/x/1/2"]
)
def test_every_answer_forbids_what_is_not_ours(page: Page, path: str) -> None:
    """No script, style, picture or connection from elsewhere, nothing inline, no frame around it."""
    headers = page.client.get(path).headers

    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "frame-ancestors 'none'" in policy and headers["x-content-type-options"] == "nosniff"


def test_the_shipped_page_holds_nothing_inline_and_no_foreign_address() -> None:
    """What the policy forbids is not even there."""
    from edge.console.app import STATIC

    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text, file
        assert "https://" not in text and text.replace("http://www.w3.org/", "").count("http://") == 0, file
        if file.suffix == ".html":
            assert "<style" not in text and "style=" not in text and "onclick" not in text
            assert all('src="' in tag for tag in text.split("<script")[1:])


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8470", "127.0.0.1.evil.example", ""])
def test_a_site_that_points_its_name_at_this_machine_sees_nothing(page: Page, host: str) -> None:
    """DNS rebinding: the browser believes that it talks to the site, and says so."""
    assert page.client.get("/event/cam1/7/3", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:9999", "https://127.0.0.1", "file://"]
)
def test_another_sites_page_cannot_label(page: Page, origin: str | None) -> None:
    """The Origin of a POST has to be this very page; nothing is written."""
    headers = {} if origin is None else {"origin": origin}

    done = page.client.post("/label", json={"id": "cam1/7/3", "label": "seen"}, headers=headers)

    assert done.status_code == 403 and page.labels.read_bytes() == b""


def test_a_form_cannot_label_either(page: Page) -> None:
    """Only JSON, which a foreign page could not send without being asked."""
    done = page.client.post(
        "/label", content=b'{"id":"cam1/7/3","label":"seen"}', headers=OURS | {"content-type": "text/plain"}
    )

    assert done.status_code == 415


class TestToken:
    """Off this machine a token is asked for."""

    TOKEN = "correct-horse-battery-staple"

    @pytest.fixture
    def page(self, tmp_path: Path) -> Page:
        return Page(tmp_path, token=self.TOKEN)

    @pytest.mark.parametrize(
        "path", ["/events", "/abilities", "/event/cam1/7/3", "/picture/cam1/7/3", "/static/console.js"]
    )
    def test_without_it_nothing_is_shown(self, page: Page, path: str) -> None:
        """Not even the page's scripts."""
        assert page.client.get(path).status_code == 401

    def test_a_browser_is_led_to_the_door_and_in(self, page: Page) -> None:
        """The cookie is not the token, is kept from scripts, and is sent to this page alone."""
        door = page.client.get("/")
        wrong = page.client.post("/sign-in", data={"token": "guess"}, headers=OURS)
        right = page.client.post("/sign-in", data={"token": self.TOKEN}, headers=OURS)

        assert door.headers["location"] == "/sign-in" and wrong.headers["location"] == "/sign-in?wrong"
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and self.TOKEN not in cookie
        assert page.client.get("/abilities").status_code == 200

    @pytest.mark.parametrize("given", ["Bearer guess", "Basic x", "Bearer ", "Bearer correct-horse-battery-stapl\xe9"])
    def test_a_wrong_one_is_refused(self, page: Page, given: str) -> None:
        """Whatever its form."""
        assert page.client.get("/abilities", headers={"authorization": given.encode("latin-1")}).status_code == 401

    def test_programs_send_it_as_bearer(self, page: Page) -> None:
        """Control."""
        assert page.client.get("/abilities", headers={"authorization": f"Bearer {self.TOKEN}"}).status_code == 200

    def test_a_forged_cookie_is_refused(self, page: Page) -> None:
        """It has to prove the token."""
        assert page.client.get("/abilities", headers={"cookie": f"{COOKIE}={'0' * 64}"}).status_code == 401


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_picture_of_a_reject_is_shown_small_and_large(page: Page) -> None:
    """JPEG for eyes; the lossless file stays where it is."""
    small = page.client.get("/picture/cam1/7/3?size=thumb")

    decoded = images.decode_image(small.content)
    assert small.headers["content-type"] == "image/jpeg" and decoded.shape == (90, 120, 3)
    assert np.abs(decoded.astype(int).mean() - page.picture.mean()) < 4


@pytest.mark.parametrize(
    "path",
    ["cam1/7/4", "..%2f..%2fetc/7/3", "cam1/7/..%2f3", "CAM1/7/3", "cam1/-7/3", "cam1/٧/3", f"cam1/{'9' * 400}/3"],
)
def test_no_other_file_can_be_asked_for(page: Page, path: str) -> None:
    """Names are checked, numbers are numbers."""
    assert page.client.get(f"/picture/{path}").status_code in (400, 404)


def test_a_damaged_picture_is_not_kept_rather_than_an_error(page: Page) -> None:
    """The page shows the mask on an empty frame."""
    page.file.write_bytes(b"no picture")

    assert page.client.get("/picture/cam1/7/3").status_code == 404


def test_a_very_large_picture_is_made_small(page: Page) -> None:
    """A browser must not be given twenty megapixels for a tile."""
    page.file.write_bytes(images.encode_png(np.zeros((3000, 4000), np.uint8)))

    assert images.decode_image(page.client.get("/picture/cam1/7/3?size=full").content).shape[:2] == (1200, 1600)


@pytest.mark.parametrize("given", ["log", "folder", "pictures"])
def test_the_log_may_be_named_by_file_folder_or_pictures(tmp_path: Path, given: str) -> None:
    """`--log` takes what is at hand."""
    (tmp_path / "events.sqlite").write_bytes(b"SQLite format 3\0")
    pictures = tmp_path / "events.sqlite.rejects"
    pictures.mkdir()

    assert find_folder({"log": tmp_path / "events.sqlite", "folder": tmp_path, "pictures": pictures}[given]) == pictures


def test_a_folder_of_several_logs_is_refused(tmp_path: Path) -> None:
    """Guessing would show another line's parts."""
    for name in ("a.sqlite", "b.sqlite"):
        (tmp_path / name).write_bytes(b"SQLite format 3\0")

    with pytest.raises(CommandError, match=r"found a\.sqlite, b\.sqlite"):
        find_folder(tmp_path)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_label_is_on_the_disk_with_what_it_is_about(page: Page) -> None:
    """Event, scores, the part, the note, and the lossless picture with its digest."""
    done = page.label()

    found = read_labels(page.labels)["cam1/7/3"]
    kept = (pictures_folder(page.labels) / "cam1-7-3.png").read_bytes()
    assert done.json() == {"id": "cam1/7/3", "label": "false_reject"}
    assert (found.score, found.threshold, found.part_id, found.note) == (2.5, 1.0, "p-1", "shadow")
    assert kept == page.file.read_bytes() and found.picture_sha256 == hashlib.sha256(kept).hexdigest()


def test_a_label_can_be_taken_back(page: Page) -> None:
    """A slip of the finger costs nothing."""
    page.label()

    assert page.label("withdrawn").json() == {"id": "cam1/7/3", "label": None}
    assert read_labels(page.labels) == {}


def test_the_page_is_told_what_was_said(page: Page) -> None:
    """So that every open page shows it."""
    page.label("real_defect")

    assert page.client.get("/event/cam1/7/3").json()["label"] == "real_defect"


def test_a_console_without_annotate_writes_nothing(tmp_path: Path) -> None:
    """Read-only is the default."""
    page = Page(tmp_path, annotate=False)

    assert page.label().status_code == 403 and not page.labels.exists()
    assert page.client.get("/abilities").json() == {"pictures": True, "rescore": False, "annotate": False}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"id":"cam1/7/3"}',
        b'{"id":"cam1/7/3","label":"good"}',
        b'{"id":"cam1/7/3","label":"seen","x":1}',
        b'{"id":7,"label":"seen"}',
        b"\xff",
        b"[" * 4000,
        b'{"id":"' + b"x" * 100_000 + b'","label":"seen"}',
    ],
    ids=range(10),
)
def test_a_malformed_request_is_refused_and_writes_nothing(page: Page, body: bytes) -> None:
    """Unknown words, fields, sizes."""
    done = page.client.post("/label", content=body, headers=OURS | {"content-type": "application/json"})

    assert done.status_code == 400 and page.labels.read_bytes() == b""


def test_an_event_that_nobody_sees_cannot_be_labeled(page: Page) -> None:
    """A label is about what is on the screen."""
    done = page.client.post("/label", json={"id": "cam1/7/999", "label": "seen"}, headers=OURS)

    assert done.status_code == 404 and page.labels.read_bytes() == b""


def test_a_label_that_cannot_be_saved_is_said(page: Page) -> None:
    """The file's folder went away."""
    page.labels.unlink()

    done = page.label("seen")
    assert done.status_code == 507 and "not saved" in done.json()["error"]


def test_without_a_configuration_nothing_is_scored_again(page: Page) -> None:
    """It says which option is missing."""
    done = page.client.post("/rescore/cam1/7/3", headers=OURS)

    assert done.status_code == 404 and "--config" in done.json()["error"]
