"""The operator's page in a real headless Chromium, before a real console, behind a real log, publisher and replay.

Screenshots stay in build/console. Nothing here decides by time: what is waited for comes, or the test fails.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from browser import MISSING, Browser, chromium
from console_line import Line, ServedConsole, blob
from edge.demo.line import BUNDLE, ConsoleProcess, DaemonProcess, SimulatedCamera, load_photos, write_config
from edge.labels import pictures_folder, read_labels

SHOTS = Path(__file__).parents[2] / "build" / "console"
HOSTILE = "<img src=x onerror=document.title='pwned'><script>document.title='pwned'</script>"

pytestmark = pytest.mark.skipif(chromium() is None, reason=MISSING)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path) as made:
        yield made


@pytest.fixture
def show(line: Line, browser: Browser) -> Iterator[Callable[..., ServedConsole]]:
    """Starts a console with these options and opens its page."""
    started: list[ServedConsole] = []

    def open_page(*options: str) -> ServedConsole:
        started.append(ServedConsole(line, "--log", str(line.log_path), *options))
        browser.open("about:blank")
        browser.complaints.clear()
        browser.requests.clear()
        browser.resize(1440, 900)
        browser.theme(False)
        browser.open(started[-1].page)
        browser.run("localStorage.clear()")
        browser.wait("document.querySelector('#state').dataset.state === 'live'")
        return started[-1]

    yield open_page
    browser.open("about:blank")
    for console in started:
        console.__exit__(None, None, None)


def cards(browser: Browser) -> int:
    return int(browser.run("document.querySelectorAll('.card').length"))


def focused(browser: Browser) -> str:
    """What has the focus: its id or first class."""
    return str(browser.run("document.activeElement.id || document.activeElement.className.split(' ')[0]"))


def test_a_reject_is_on_tile_and_strip_with_its_mask(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Word, sign and fill on the tile; picture and contour; score and threshold."""
    show()
    line.judge("cam1")
    line.reject("cam2")
    browser.wait("document.querySelectorAll('.card').length === 1")
    browser.wait("document.querySelector('.card img').complete && !document.querySelector('.card img').hidden")

    assert browser.text('.tile[data-decision="reject"]').split("\n")[:1] == ["cam2"]
    assert "REJECT" in browser.text('[data-decision="reject"]') and "2.50" in browser.text('[data-decision="reject"]')
    assert "ACCEPT" in browser.text('[data-decision="accept"]')
    assert browser.run("document.querySelector('.card .contour').getBBox().width") > 30
    assert list(browser.complaints) == []


def test_a_tile_keeps_its_last_reject_among_a_thousand_good_parts(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """The newest part is seldom the one that matters; a page that is opened later shows it as well."""
    console = show()
    for part in range(300):
        if part == 150:
            line.reject("cam1")
        line.judge("cam1")
    has = (
        "document.querySelector('.tile[data-decision=accept] .frame[data-old] .contour').getAttribute('d').length > 20"
    )
    browser.wait(has)
    browser.open(console.page)

    browser.wait(has)


def test_no_name_from_the_line_becomes_markup(line: Line, browser: Browser, show: Callable[..., ServedConsole]) -> None:
    """Camera, part, model, reason: shown as they are, in tile, strip, dialog and notices."""
    show()
    line.judge(HOSTILE, "reject", blob(), part_id=HOSTILE, model_id=HOSTILE, detail=HOSTILE)
    line.judge("cam1", "inconclusive", reason=HOSTILE, detail=HOSTILE)
    browser.wait("document.querySelectorAll('.card').length === 1 && document.querySelectorAll('.tile').length === 2")
    browser.click(".card")

    assert browser.run("document.querySelector('.card .camera').textContent") == HOSTILE[:64]
    assert HOSTILE[:40] in browser.text("#facts")
    assert browser.run("document.title") != "pwned"
    assert browser.run("document.querySelectorAll('img[onerror], body script').length") == 0
    browser.screenshot(SHOTS / "hostile.png")
    browser.press("Escape")


def test_markup_would_be_noticed(line: Line, browser: Browser, show: Callable[..., ServedConsole]) -> None:
    """Control: the same name put in as markup is found by the same look; the policy keeps even that from running."""
    show()
    browser.run(f"document.querySelector('#tiles').innerHTML = {json.dumps(HOSTILE)}")

    assert browser.run("document.querySelectorAll('img[onerror], body script').length") == 2
    assert browser.run("document.title") != "pwned"


def test_nothing_is_fetched_from_elsewhere(line: Line, browser: Browser, show: Callable[..., ServedConsole]) -> None:
    """Not a font, not a script: a line has no way out. What would try is stopped by the page's own policy."""
    console = show()
    line.reject("cam1")
    browser.wait("document.querySelectorAll('.card').length === 1")
    asked = {urlsplit(url).netloc for url in browser.requests} - {""}
    browser.run(
        "new Promise(done => { const one = new Image(); one.onerror = done; one.src = 'http://127.0.0.1:9/x'; })"
    )

    assert asked == {urlsplit(console.page).netloc}
    browser.wait("true")
    assert any("Content Security Policy" in said for said in browser.complaints)


def test_everything_can_be_done_from_the_keyboard(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Tab to the tiles, arrows among them, Enter opens, arrows walk through the rejects, Escape leads back."""
    show()
    for camera in ("cam1", "cam2", "cam10"):
        line.judge(camera)
        line.reject(camera)
    browser.wait("document.querySelectorAll('.card').length === 3 && document.querySelectorAll('.tile').length === 3")
    browser.run("document.activeElement.blur()")
    seen = []
    for _ in range(3):
        browser.press("Tab")
        seen.append(focused(browser))
    assert seen == ["skip", "theme", "tile"]
    ring = browser.run("(s => [s.outlineStyle, parseFloat(s.outlineWidth)])(getComputedStyle(document.activeElement))")
    assert ring[0] == "solid" and ring[1] >= 2
    browser.press("ArrowRight")
    browser.press("End")
    assert browser.run("document.activeElement.querySelector('.camera').textContent") == "cam10"
    browser.press("Tab")
    assert focused(browser) == "card"
    browser.press("Enter")
    first = browser.wait("document.querySelector('#detail').open && document.querySelector('#detail').dataset.id")
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#detail').dataset.id") != first
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('#detail').dataset.id") == first
    browser.press("Escape")
    browser.wait("!document.querySelector('#detail').open")
    assert focused(browser) == "card"


def test_a_reader_hears_names_roles_and_the_verdict(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Every button has a name, lists are lists, headings say what follows, a reject is spoken."""
    show()
    line.judge("cam1")
    browser.wait("document.querySelectorAll('.tile').length === 1")
    line.reject("cam1")
    browser.wait("document.querySelector('#spoken').textContent !== ''")
    browser.wait("(document.querySelector('.tile').getAttribute('aria-label') || '').includes('reject')")
    nodes = [node for node in browser.accessible() if not node.get("ignored")]
    names = {node["role"]["value"]: [] for node in nodes}
    for node in nodes:
        names[node["role"]["value"]].append(node.get("name", {}).get("value", ""))

    assert all(names["button"]) and any("Camera cam1: reject" in name for name in names["button"])
    assert {"Cameras", "Last rejects", "Reject rate", "Health"} <= set(names["heading"])
    assert len(names["list"]) == 2 and browser.text("#spoken") == "Reject, camera cam1"


CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  return SELECTORS.flatMap(selector => [...document.querySelectorAll(selector)].map(node => {
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    return [selector, (a + 0.05) / (b + 0.05)];
  }));
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_in_both_themes(
    line: Line, browser: Browser, show: Callable[..., ServedConsole], dark: bool
) -> None:
    """At least 4.5 : 1, as WCAG asks; the machine's preference is followed, the button overrides it."""
    show()
    browser.theme(dark)
    line.judge("cam1")
    line.reject("cam2")
    line.judge("cam3", "inconclusive")
    browser.wait("document.querySelectorAll('.tile').length === 3 && document.querySelectorAll('.card').length === 1")
    selectors = [".word", ".score", ".against", ".rate", ".time", ".totals dt", "h2", ".facts dt", ".state", "#theme"]
    found = browser.run(CONTRAST.replace("SELECTORS", json.dumps(selectors)))
    background = "getComputedStyle(document.body).backgroundColor"
    before = browser.run(background)
    browser.click("#theme")
    browser.click("#theme")
    forced = browser.run(background)
    browser.run("localStorage.clear()")

    assert len(found) > 15 and min(ratio for _, ratio in found) >= 4.5, sorted(found, key=lambda one: one[1])[:3]
    assert (before == forced) is dark


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (1180, 820), (820, 1180), (390, 844)])
def test_no_screen_is_too_small_and_fingers_find_the_buttons(
    line: Line, browser: Browser, show: Callable[..., ServedConsole], width: int, height: int
) -> None:
    """Monitor, tablet both ways, telephone: nothing hangs over, and what is pressed is at least 44 px."""
    show()
    for number in range(4):
        line.judge(f"a-camera-with-a-long-name-{number}")
        line.reject(f"a-camera-with-a-long-name-{number}")
    browser.wait("document.querySelectorAll('.card').length === 4")
    browser.resize(width, height)
    browser.screenshot(SHOTS / f"{width}x{height}.png")
    over = browser.run("document.scrollingElement.scrollWidth - innerWidth")
    tiles = browser.run("[...document.querySelectorAll('.tile')].filter(t => t.scrollWidth > t.clientWidth + 1).length")
    browser.click(".card")
    browser.wait("document.querySelector('#detail').open")
    small = browser.run(
        "[...document.querySelectorAll('button')].filter(b => b.offsetParent).map(b => b.getBoundingClientRect())"
        ".filter(b => b.height < 43.9 || b.width < 43.9).length"
    )
    dialog = browser.run("(d => d.scrollWidth - d.clientWidth)(document.querySelector('#detail'))")
    browser.press("Escape")

    assert (over, tiles, small, dialog) == (0, 0, 0, 0)


@pytest.mark.parametrize(("cameras", "pixels"), [(1, 70), (4, 60), (20, 30)])
def test_the_verdict_is_large(
    line: Line, browser: Browser, show: Callable[..., ServedConsole], cameras: int, pixels: int
) -> None:
    """On a full HD screen: for a few cameras 60 px and more, which on a 24-inch one is read at three meters."""
    show()
    browser.resize(1920, 1080)
    for number in range(cameras):
        line.judge(f"cam{number}")
    browser.wait(f"document.querySelectorAll('.tile').length === {cameras}")

    sizes = browser.run("[...document.querySelectorAll('.word')].map(w => parseFloat(getComputedStyle(w).fontSize))")
    cut = browser.run("[...document.querySelectorAll('.verdict')].filter(v => v.scrollWidth > v.clientWidth).length")
    browser.screenshot(SHOTS / f"cameras-{cameras}.png")
    assert min(sizes) >= pixels and cut == 0
    assert browser.run("document.querySelector('#tiles').getBoundingClientRect().bottom <= innerHeight")


def test_the_page_says_since_when_the_daemon_is_away_and_goes_on_by_itself(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Its tiles turn gray: what stands there is old. What was judged meanwhile is there when it is back."""
    show()
    line.judge("cam1")
    browser.wait("document.querySelectorAll('.tile').length === 1")
    line.stop()
    browser.wait("document.querySelector('.notice.bad') !== null")
    said = browser.text(".notice.bad")
    browser.screenshot(SHOTS / "away.png")
    gray = browser.run("getComputedStyle(document.querySelector('.tile')).filter")
    line.start()
    line.reject("cam1")
    browser.wait("document.querySelector('.notice.bad') === null && document.querySelectorAll('.card').length === 1")

    assert said.startswith("The daemon is away since ") and "grayscale" in gray
    assert browser.text("#state") == "live"


def test_the_page_says_since_when_the_console_is_away_and_goes_on_by_itself(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """The browser knows that by its own watch; the new console shows everything again, nothing twice."""
    console = show()
    line.reject("cam1")
    browser.wait("document.querySelectorAll('.card').length === 1")
    console.stop()
    browser.wait("document.querySelector('.notice.bad') !== null")
    said = browser.text(".notice.bad")
    line.reject("cam1")
    console.start()
    browser.wait("document.querySelector('.notice.bad') === null && document.querySelectorAll('.card').length === 2")

    assert said.startswith("The console does not answer since ")


def test_a_wiped_log_is_told_and_followed(line: Line, browser: Browser, show: Callable[..., ServedConsole]) -> None:
    """Another epoch: the page says so and goes on."""
    show()
    line.reject("cam1")
    browser.wait("document.querySelectorAll('.card').length === 1")
    line.stop()
    line.wipe()
    line.start()
    line.reject("cam1")
    browser.wait("document.querySelectorAll('.card').length === 2")
    browser.wait("document.querySelector('#notices').textContent.includes('event log was replaced')")


def test_health_is_told_in_words(line: Line, browser: Browser, show: Callable[..., ServedConsole]) -> None:
    """Certificate void, CPU in place of the GPU, a failed challenge, a line whose clock is off."""
    show()
    line.judge("cam1", certified=True)
    line.judge("cam1", certified=False)
    browser.wait("document.querySelector('#notices').textContent.includes('certificate has been void')")
    assert "void" in browser.text("#health")
    line.state, line.fallback = "degraded", "driver"
    browser.wait("document.querySelector('#notices').textContent.includes('The GPU cannot be used (driver)')")
    line.judge("challenge", "inconclusive", kind="challenge", reason="challenge", detail="bad-3.png was accepted")
    browser.wait("document.querySelector('#notices').textContent.includes('bad-3.png was accepted')")
    line.state = "withheld"
    browser.wait("document.querySelector('#state').textContent === 'withheld'")
    browser.wait("document.querySelector('#notices').textContent.includes('holds every part')")
    line.state = "degraded"
    line.judge("cam1", decided_ns=time.time_ns() - 7210 * 10**9)
    browser.wait("document.querySelector('#notices').textContent.includes('clock was set back by 2 h 00 min')")

    browser.wait("document.querySelector('#state').textContent === 'degraded'")
    assert "not on the CPU" in browser.text("#health") and "CPU instead of GPU" in browser.text("#health")


def test_a_burst_leaves_a_page_that_answers_and_has_not_grown(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Two thousand rejects from twenty cameras as fast as they go: twenty tiles, twenty-four cards, no node more."""
    show()
    mask = blob()
    nodes = []
    for _ in range(2):
        for number in range(1000):
            line.judge(f"cam{number % 20}", "reject", mask)
        last = line.judge("cam0", "reject", mask).id
        browser.wait(f"document.querySelector('.tile[data-number=\"{last}\"]') !== null", 60)
        browser.wait("document.querySelectorAll('.card').length === 24")
        nodes.append(browser.run("document.querySelectorAll('*').length"))

    assert browser.run("document.querySelectorAll('.tile').length") == 20
    assert abs(nodes[1] - nodes[0]) <= 10
    browser.click(".card")
    browser.wait("document.querySelector('#detail').open")
    browser.press("Escape")


def test_a_browser_that_stops_reading_costs_the_console_nothing(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Its socket is full after a moment; the others hear everything, and the console's memory stays where it was."""
    console = show()
    address = urlsplit(console.page)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((address.hostname, address.port))
        slow.sendall(f"GET /events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        before: list[int] = []
        for _ in range(3):
            for number in range(1000):
                line.judge(f"cam{number % 8}", "reject", blob())
            last = line.judge("cam0", "reject", blob()).id
            browser.wait(f"document.querySelector('.tile[data-number=\"{last}\"]') !== null", 60)
            before.append(psutil.Process(console.pid).memory_info().rss)

    assert before[-1] - before[0] < 24 * 1024 * 1024


def test_labels_reach_the_file_and_can_be_taken_back(
    line: Line, browser: Browser, show: Callable[..., ServedConsole], tmp_path: Path
) -> None:
    """By mouse and by keyboard; the card bears the word, the file the line, the picture lies beside it."""
    labels = tmp_path / "labels.jsonl"
    show("--annotate", str(labels))
    event = line.reject("cam1")
    browser.wait("document.querySelectorAll('.card').length === 1")
    browser.click(".card")
    browser.wait("document.querySelector('#detail').open")
    browser.click("#note")
    browser.type("shadow of the gripper")
    browser.click("[data-label=false_reject]")
    browser.wait("document.querySelector('#labeled').textContent === 'Saved.'")
    browser.screenshot(SHOTS / "label.png")
    said = read_labels(labels)[event.id]
    tag = browser.run("document.querySelector('.card .tag').textContent")
    browser.press("Enter")
    browser.wait("document.querySelector('#labeled').textContent === 'Taken back.'")
    browser.press("Escape")

    assert (said.label, said.note) == ("false_reject", "shadow of the gripper") and tag == "false reject"
    assert (pictures_folder(labels) / "cam1-7-0.png").is_file()
    assert read_labels(labels) == {}


def test_without_annotate_the_page_offers_no_label(
    line: Line, browser: Browser, show: Callable[..., ServedConsole]
) -> None:
    """Read-only by default, and it looks so."""
    show()
    line.reject("cam1")
    browser.wait("document.querySelectorAll('.card').length === 1")
    browser.click(".card")
    browser.wait("document.querySelector('#detail').open")

    assert browser.run("document.querySelector('#labels').offsetParent") is None
    assert browser.run("document.querySelector('#rescore').disabled") is True
    browser.press("Escape")


def test_a_token_is_asked_for_and_opens_the_page(line: Line, browser: Browser, tmp_path: Path) -> None:
    """A console for other machines: the door, a wrong word, the right one."""
    token = tmp_path / "token"
    token.write_text("correct-horse-battery-staple\n")
    token.chmod(0o600)
    with ServedConsole(line, "--token", str(token)) as console:
        browser.open(console.page)
        for word in ("guess", "correct-horse-battery-staple"):
            browser.wait("document.querySelector('#token') !== null && location.pathname === '/sign-in'")
            browser.click("#token")
            browser.type(word)
            browser.press("Enter")
            browser.wait("location.search === '?wrong' || location.pathname === '/'")
        browser.wait("document.querySelector('#state') && document.querySelector('#state').dataset.state === 'live'")


def test_a_part_is_scored_again_behind_a_real_daemon(browser: Browser, tmp_path: Path) -> None:
    """The shipped bundle on shipped photographs: picture, contour, heat map, "identical"."""
    config = write_config(tmp_path / "line.toml", BUNDLE, ["left", "right"], replay_address="tcp://127.0.0.1:*")
    photos = load_photos()
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(60)
        cameras = [
            SimulatedCamera(ready["frames_address"], name, photos[7 * index :], 2.0)
            for index, name in enumerate(("left", "right"))
        ]
        with ConsoleProcess(config, ready) as console:
            try:
                for camera in cameras:
                    camera.start()
                browser.resize(1440, 900)
                browser.open(console.page)
                browser.wait("document.querySelectorAll('.card').length >= 4", 60)
                for camera in cameras:
                    camera.stop()
                browser.wait("[...document.querySelectorAll('.card img')].every(i => i.complete && !i.hidden)")
                browser.wait("document.querySelector('#health').textContent.includes('Daemonready')")
                browser.screenshot(SHOTS / "live.png")
                browser.theme(True)
                browser.screenshot(SHOTS / "live-dark.png")
                browser.theme(False)
                browser.click(".card")
                browser.wait("document.querySelector('#picture img').naturalWidth > 200")
                browser.click("#rescore")
                answer = browser.wait("document.querySelector('#rescored').textContent", 90)
                browser.wait(
                    "document.querySelector('.heat').naturalWidth > 200 && !document.querySelector('.heat').hidden"
                )
                browser.screenshot(SHOTS / "scored-again.png")
            finally:
                for camera in cameras:
                    camera.stop()
                browser.open("about:blank")

    assert answer.startswith("Identical: reject, score ")


def test_the_screenshot_of_the_page_is_small() -> None:
    """The one in the documentation."""
    assert (Path(__file__).parents[2] / "docs" / "console.png").stat().st_size < 200_000
