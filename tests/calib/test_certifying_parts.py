"""A certificate about parts: several frames each, several cameras, regions and zones, and bad parts beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from calib.calibrate_command import calibrate
from calib.dataset import file_sha256
from calib.evaluate_command import evaluate
from edge.bundle import InputSpec, ModelBundle, derive_bundle, open_bundle
from edge.camera import open_camera, write_camera
from edge.errors import BundleError, CalibrationError, CommandError, DataError
from edge.images import encode_png

Invoke = Callable[..., Any]
MakeFakeBundle = Callable[..., ModelBundle]
PROMISE = ("--false-rejects", "5%", "--confidence", "90%", "--backend", "fake")  # 45 good parts
A_FOLDER_A_PART = ("--part-pattern", "(?P<part>[^/]+)/.*")


@pytest.fixture
def bundle(make_fake_bundle: MakeFakeBundle, tmp_path: Path) -> Path:
    """A provisional bundle that knows its training files; the fake's score is the largest distance from gray."""
    return make_fake_bundle(tmp_path / "bundle", provenance={"training_files": ["0" * 64]}).path


def gray(rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.integers(108, 149, (32, 32, 1), dtype=np.uint8)


def save(path: Path, image: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))
    return path


def parts_folder(tmp_path: Path, parts: int, frames: int = 2, seed: int = 3) -> Path:
    """`good/PART/FRAME.png`."""
    rng = np.random.default_rng(seed)
    for part in range(parts):
        for frame in range(frames):
            save(tmp_path / "good" / f"{part:03}" / f"{frame}.png", gray(rng))
    return tmp_path / "good"


def white_square(folder: Path, number: int, name: str = "bad") -> Path:
    rng = np.random.default_rng(8)
    for index in range(number):
        image = gray(rng)
        image[8:20, 8:20] = 255
        save(folder / f"{name}{index}.png", image)
    return folder


def test_frames_are_not_parts(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """Ninety frames of thirty parts are thirty parts, however they are counted by others."""
    folder = parts_folder(tmp_path, 30, frames=3)

    with pytest.raises(CalibrationError, match=r"at least 45 good parts, but 30 were given.*a part is by pattern"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, *A_FOLDER_A_PART)


def test_a_part_scores_as_its_highest_frame(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """Forty-five scores from ninety frames; the bundle says what a part is, and whose frames they were."""
    folder = parts_folder(tmp_path, 45)
    result = invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, *A_FOLDER_A_PART)
    derived = open_bundle(tmp_path / "line")

    assert derived.calibration.unit == "part" and len(derived.calibration.scores) == 45
    assert len(derived.provenance["score_calibration"]["files"]) == 90
    assert "45; 90 pictures" in result.stdout


def test_a_part_with_a_picture_that_cannot_be_inspected_does_not_count(
    bundle: Path, invoke: Invoke, tmp_path: Path
) -> None:
    """The highest of its other frames is lower than a whole part's, and the promise would be too good."""
    folder = parts_folder(tmp_path, 46)
    (folder / "003" / "1.png").write_bytes(b"")
    result = invoke(
        calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, *A_FOLDER_A_PART,
        "--skip-bad-images", "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)

    assert (found["parts"], found["images"], found["left_out"]) == (45, 90, ["003"])


def test_one_content_under_two_part_names_is_refused(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """It is one part; counted as two it would promise more than it can."""
    folder = parts_folder(tmp_path, 46)
    (folder / "004" / "0.png").write_bytes((folder / "005" / "0.png").read_bytes())

    with pytest.raises(DataError, match=r"004/0\.png and 005/0\.png have the same bytes.*'004' and '005'"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, *A_FOLDER_A_PART)


def test_a_table_that_names_a_file_that_is_not_there_is_refused(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """Somebody meant it to count."""
    folder = parts_folder(tmp_path, 45, frames=1)
    lines = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "parts.csv").write_text("\n".join(["file,part", *lines, "045/0.png,45"]))

    with pytest.raises(DataError, match=r"045/0\.png, which is in no folder"):
        invoke(
            calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, "--parts", tmp_path / "parts.csv"
        )


def test_blocks_make_a_certificate_for_blocks(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Forty-five blocks of two with a gap of one; the line will watch it in the same steps."""
    result = invoke(
        calibrate, bundle, "--good", good_folder(135), "--out", tmp_path / "line", *PROMISE, "--block", "2:1", "--json"
    )
    calibration, found = open_bundle(tmp_path / "line").calibration, json.loads(result.stdout)

    assert (calibration.unit, calibration.block) == ("block", (2, 1))
    assert (found["parts"], found["images"], found["spacing"]) == (45, 90, 45)


def test_bad_parts_are_counted_and_change_nothing(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Six with a white square are found, two like good ones pass; threshold and scores are those without them."""
    good, bad = good_folder(45), white_square(tmp_path / "bad", 6)
    # Two of the good kind: no threshold from good parts can find them, and none must be picked to.
    for index in range(2):
        save(bad / f"faint{index}.png", gray(np.random.default_rng(90 + index)))
    without = invoke(calibrate, bundle, "--good", good, "--out", tmp_path / "plain", *PROMISE, "--json")
    result = invoke(calibrate, bundle, "--good", good, "--out", tmp_path / "line", *PROMISE, "--json", "--bad", bad)
    escapes = json.loads(result.stdout)["escapes"]

    assert json.loads(without.stdout)["escapes"] is None
    assert open_bundle(tmp_path / "line").calibration == open_bundle(tmp_path / "plain").calibration
    assert (escapes["parts"], escapes["escaped"]) == (8, 2) and set(escapes["names"]) == {"faint0.png", "faint1.png"}
    assert escapes["bound"] == pytest.approx(0.53822, abs=1e-4)  # 2 of 8, one-sided at 90 %
    assert "2 of 8 bad parts pass" in (tmp_path / "line.certificate.html").read_text()


def test_control_a_threshold_that_bad_parts_move_is_seen(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the fit looks at bad parts too; the comparison above would notice."""
    from calib import certificate

    honest = certificate.score_parts

    def peeking(*arguments: Any, **options: Any) -> Any:
        scored = honest(*arguments, **options)
        if options["lowest"]:
            seen[0].scores.update(scored.scores)
        seen.append(scored)
        return scored

    seen: list[Any] = []
    good, bad = good_folder(45), white_square(tmp_path / "bad", 6)
    invoke(calibrate, bundle, "--good", good, "--out", tmp_path / "plain", *PROMISE)
    monkeypatch.setattr(certificate, "score_parts", peeking)
    seen.clear()
    invoke(calibrate, bundle, "--good", good, "--out", tmp_path / "line", *PROMISE, "--bad", bad)

    assert open_bundle(tmp_path / "line").calibration != open_bundle(tmp_path / "plain").calibration


def test_a_part_cannot_be_good_and_bad(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """The same bytes in both folders: one of them is wrong, and nobody but the user knows which."""
    good, bad = good_folder(45), white_square(tmp_path / "bad", 2)
    (bad / "x.png").write_bytes((good / "0004.png").read_bytes())

    with pytest.raises(DataError, match=r"x\.png has the bytes of the good part 0004\.png"):
        invoke(calibrate, bundle, "--good", good, "--out", tmp_path / "line", *PROMISE, "--bad", bad)


def test_bad_parts_that_the_model_learned_from_say_nothing_about_others(
    make_fake_bundle: MakeFakeBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """`kizu train --bad` leaves their digests in the bundle."""
    good, bad = good_folder(45), white_square(tmp_path / "bad", 2)
    learned = {"training_files": [], "method": {"bad": {"images": 1, "files": [file_sha256(bad / "bad1.png")]}}}
    source = make_fake_bundle(tmp_path / "learned", provenance=learned).path

    with pytest.raises(DataError, match=r"bad1\.png of the images that .* was trained or quantized on"):
        invoke(calibrate, source, "--good", good, "--out", tmp_path / "line", *PROMISE, "--bad", bad)


def test_bad_parts_among_the_good_ones_are_shown_and_still_count(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Two white squares: named in a warning and in the bundle, pictured on the page, and the threshold is theirs."""
    folder = white_square(good_folder(60), 2, name="sneaked")
    result = invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE)
    derived, page = open_bundle(tmp_path / "line"), (tmp_path / "line.certificate.html").read_text()

    assert "may be bad ones: sneaked" in result.stderr
    assert set(derived.provenance["score_calibration"]["suspects"]) == {"sneaked0.png", "sneaked1.png"}
    assert len(derived.calibration.scores) == 62 and derived.calibration.threshold > 0.9
    assert "sneaked1.png, score" in page and "(may be a bad part)" in page and page.count("data:image/png") == 12


def test_clean_good_parts_raise_no_suspicion(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """The control of the test above."""
    result = invoke(calibrate, bundle, "--good", good_folder(60), "--out", tmp_path / "line", *PROMISE, "--json")

    assert json.loads(result.stdout)["suspects"] == {} and "may be bad" not in result.stderr


def test_constant_scores_promise_nothing(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """A covered lens gives forty-five different files and one score."""
    for index in range(45):
        image = np.full((32, 32, 1), 128, np.uint8)
        image[0, 0], image[0, 1], image[1, 0], image[1, 1] = 128 + 40, 128, 128, 128
        image[2 * (index % 16), 2 + 2 * (index // 16)] = 129
        save(tmp_path / "good" / f"{index}.png", image)

    with pytest.raises(CalibrationError, match=r"all 45 good parts score 0\.07.*does not see them"):
        invoke(calibrate, bundle, "--good", tmp_path / "good", "--out", tmp_path / "line", *PROMISE)


def test_pictures_that_a_bundle_of_another_size_takes_are_refused(
    make_fake_bundle: MakeFakeBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """All of them, with the sizes; nothing is written."""
    larger = InputSpec(32, 32, 1, 4, min_side_px=64)
    source = make_fake_bundle(tmp_path / "larger", input=larger, provenance={"training_files": []}).path

    with pytest.raises(DataError, match=r"45 of 45 files(?s:.*)frame of 32 x 32 px, the bundle takes sides of 64"):
        invoke(calibrate, source, "--good", good_folder(45), "--out", tmp_path / "line", *PROMISE)
    assert not (tmp_path / "line").exists() and not (tmp_path / "line.certificate.html").exists()


def test_a_certificate_of_another_model_is_refused_wherever_the_bundle_is_opened(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Scores say nothing about a model that did not give them, however well-formed the bundle is."""
    invoke(calibrate, bundle, "--good", good_folder(45), "--out", tmp_path / "line", *PROMISE)
    certified = open_bundle(tmp_path / "line")
    with pytest.raises(BundleError, match="certificate of another model"):
        derive_bundle(
            certified,
            tmp_path / "mixed",
            calibration=certified.calibration,
            provenance_extra={},
            model=certified.model + b"\x32\x01x",  # ModelProto.doc_string: the same network, another file
        )
    assert not (tmp_path / "mixed").exists()


def test_the_lines_cameras_are_those_of_the_pictures(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """A camera without pictures is pointed out; one that the line does not have is refused."""
    rng = np.random.default_rng(5)
    for index in range(45):
        save(tmp_path / "good" / f"{index}_left.png", gray(rng))
    (tmp_path / "line.toml").write_text(LINE + '[[cameras]]\nname = "right"\n')
    arguments = (calibrate, bundle, "--good", tmp_path / "good", *PROMISE, "--line", tmp_path / "line.toml")
    by_camera = ("--part-pattern", "(?P<part>[^_]+)_(?P<camera>[a-z]+).png")
    result = invoke(*arguments, "--out", tmp_path / "line", *by_camera)

    assert "no pictures of the line's camera right" in result.stderr
    assert open_bundle(tmp_path / "line").calibration.of("left").roi_xywh == (0, 0, 32, 16)
    (tmp_path / "line.toml").write_text(LINE.replace('"left"', '"top"'))
    with pytest.raises(CommandError, match="pictures of camera 'left', but the line has top"):
        invoke(*arguments, "--out", tmp_path / "other", *by_camera)


def test_each_camera_has_its_certificate(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """The dark camera's threshold is its own; together they promise less, which is said."""
    rng = np.random.default_rng(5)
    for index in range(45):
        save(tmp_path / "good" / f"{index}_left.png", gray(rng))
        save(tmp_path / "good" / f"{index}_right.png", gray(rng) - np.uint8(60))
    pattern = "(?P<part>[^_]+)_(?P<camera>[a-z]+).png"
    result = invoke(
        calibrate, bundle, "--good", tmp_path / "good", "--out", tmp_path / "line", *PROMISE, "--part-pattern", pattern
    )
    calibration = open_bundle(tmp_path / "line").calibration

    assert set(calibration.cameras) == {"left", "right"}
    assert calibration.of("left").threshold < 0.3 < calibration.of("right").threshold == calibration.threshold
    assert calibration.of("left").certified and not calibration.of("top").certified
    test_set = tmp_path / "data"
    for place in range(3):
        save(test_set / "test" / "good" / f"{place}.png", gray(rng))
    for camera, threshold in (("left", 0.3), ("right", 0.7)):
        options = ("--backend", "fake", "--json", "-", "--camera", camera)
        found = json.loads(invoke(evaluate, tmp_path / "line", "--data", test_set, *options).stdout)
        assert found["certified"] and found["threshold"] < threshold
    with pytest.raises(CommandError, match="for the cameras left, right; say with --camera"):
        invoke(evaluate, tmp_path / "line", "--data", test_set, "--backend", "fake")
    assert "at most 10% of good parts are rejected by any of them has 80% confidence" in result.stderr
    assert (tmp_path / "line.certificate.html").read_text().count("Camera right") == 3


LINE = """
line = "door"
bundle = "x"
frames_address = "tcp://127.0.0.1:5550"
events_address = "tcp://127.0.0.1:5551"
[log]
path = "events.db"
[[cameras]]
name = "left"
roi_xywh = [0, 0, 32, 16]
"""


def test_the_lines_region_of_interest_is_what_is_certified(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """A bright lower half is outside of it, so the scores are those of the upper one; a second camera is ambiguous."""
    rng = np.random.default_rng(5)
    for index in range(45):
        image = gray(rng)
        image[20:] = 255
        save(tmp_path / "good" / f"{index}.png", image)
    (tmp_path / "line.toml").write_text(LINE)
    arguments = (calibrate, bundle, "--good", tmp_path / "good", *PROMISE, "--line", tmp_path / "line.toml")
    invoke(*arguments, "--out", tmp_path / "line")
    calibration = open_bundle(tmp_path / "line").calibration

    assert calibration.roi_xywh == (0, 0, 32, 16) and calibration.threshold < 0.3
    (tmp_path / "line.toml").write_text(LINE + '[[cameras]]\nname = "right"\n')
    with pytest.raises(CommandError, match="the cameras left, right; say which one took each picture"):
        invoke(*arguments, "--out", tmp_path / "other")


def test_a_line_that_corrects_its_frames_asks_for_pictures_that_are_corrected(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Nothing in a file says whether it was; the warning names the command. Control: a camera with a lens only."""
    even, told = np.ones((32, 32, 1), np.float32), []
    folder = good_folder(45)
    for name, flat in (("flat", {"gain": even * 1.1, "dark": even * 2}), ("plain", {})):
        write_camera(tmp_path / f"{name}.camera", size=(32, 32), **flat)
        line = tmp_path / f"{name}.toml"
        line.write_text(LINE + f'calibration = "{name}.camera"\n')
        options = ("--good", folder, *PROMISE, "--line", line, "--out", tmp_path / name)
        told.append("what `kizu correct` makes" in invoke(calibrate, bundle, *options).stderr)

    assert told == [True, False]
    flat, plain = (open_bundle(tmp_path / name).calibration.flat_field for name in ("flat", "plain"))
    assert str(flat) in (tmp_path / "flat.certificate.html").read_text()  # whoever signs sees it
    assert (flat, plain) == (open_camera(tmp_path / "flat.camera").flat_field_id, None) and flat is not None


ZONES = """
[[zones]]
name = "print"
polygon_xy = [[0, 0], [16, 0], [16, 32], [0, 32]]
[[zones]]
name = "plain"
polygon_xy = [[16, 0], [32, 0], [32, 24], [16, 24]]
"""


def zoned(tmp_path: Path, number: int) -> Path:
    """A busy left half, a quiet right one, and a lower right corner that is always white."""
    rng = np.random.default_rng(6)
    for index in range(number):
        image = gray(rng)
        image[:, :16] = rng.integers(0, 256, (32, 16, 1), dtype=np.uint8)
        image[26:, 20:] = 255
        save(tmp_path / "zoned" / f"{index:03}.png", image)
    (tmp_path / "zones.toml").write_text(ZONES)
    return tmp_path / "zoned"


def test_zones_have_thresholds_of_their_own_and_the_rest_is_not_inspected(
    bundle: Path, invoke: Invoke, tmp_path: Path
) -> None:
    """A flaw in the quiet zone is found though the busy one scores higher on every good part."""
    folder = zoned(tmp_path, 80)
    result = invoke(
        calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, "--json",
        "--zones", tmp_path / "zones.toml",
    )  # fmt: skip
    found = json.loads(result.stdout)
    flawed = gray(np.random.default_rng(7))
    flawed[4:8, 20:24] = 220
    save(tmp_path / "data" / "test" / "hole" / "flawed.png", flawed)
    larger = save(tmp_path / "data" / "test" / "hole" / "larger.png", np.full((64, 64, 1), 128, np.uint8))
    judge = (evaluate, tmp_path / "line", "--data", tmp_path / "data", "--backend", "fake", "--json", "-")
    with pytest.raises(DataError, match=r"larger\.png: frame of 64 x 64 px, zone print was drawn for 32 x 32"):
        invoke(*judge)
    larger.unlink()
    judged = invoke(*judge)
    rows = {row["path"]: row for row in json.loads(judged.stdout)["images"]}

    assert found["zones"]["plain"] < 0.3 < 0.6 < found["zones"]["print"] == found["threshold"]
    assert found["threshold"] < 0.99  # the white corner is outside
    assert rows["test/hole/flawed.png"]["decision"] == "reject"


def test_several_zones_need_more_parts_and_say_how_many(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """Each threshold costs a part of the sample; two at 5 % and 90 % need 77."""
    with pytest.raises(CalibrationError, match=r"over 2 zones needs at least 77 good parts, but 60.*supports 1 zones"):
        invoke(
            calibrate, bundle, "--good", zoned(tmp_path, 60), "--out", tmp_path / "line", *PROMISE,
            "--zones", tmp_path / "zones.toml",
        )  # fmt: skip


def test_a_painted_mask_is_a_zone_for_every_gray_level(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """The same as the polygons: two levels, and 0 where nothing is inspected."""
    folder = zoned(tmp_path, 80)
    mask = np.zeros((32, 32, 1), np.uint8)
    mask[:, :16], mask[:24, 16:] = 100, 200
    save(tmp_path / "mask.png", mask)
    arguments = (calibrate, bundle, "--good", folder, *PROMISE)
    invoke(*arguments, "--out", tmp_path / "drawn", "--zones", tmp_path / "zones.toml")
    invoke(*arguments, "--out", tmp_path / "painted", "--zones", tmp_path / "mask.png")
    drawn, painted = (open_bundle(tmp_path / name).calibration for name in ("drawn", "painted"))

    assert (painted.threshold, painted.scores) == (drawn.threshold, drawn.scores)
    assert [zone.name for zone in painted.zones] == ["gray 100", "gray 200"]


def test_zones_need_pictures_of_one_size(bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    """In a frame of another size the same corners lie elsewhere."""
    folder = zoned(tmp_path, 80)
    save(folder / "larger.png", np.full((64, 64, 1), 128, np.uint8))

    with pytest.raises(CalibrationError, match=r"2 sizes \(32 x 32, 64 x 64 px\)"):
        invoke(
            calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE,
            "--zones", tmp_path / "zones.toml",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("zones = []", "length >= 1"),
        ('[[zones]]\nname = "a"\npolygon_xy = [[0, 0], [1, 1]]', "length >= 3"),
        ('[[zones]]\nname = "a"\npolygon = [[0, 0], [1, 1], [2, 0]]', "unknown field `polygon`"),
        ('[[zones]]\nname = "a"\npolygon_xy = [[0, 0], [1, 1], [2, 0]]\n' * 2, "'a' is given twice"),
        ('[[zones]]\nname = "a"\npolygon_xy = [[0, 0], [0.1, 0], [0, 0.1]]', "no cell of the map lies in zone a"),
        (f"{ZONES}[[zones]]\nname = 'under'\npolygon_xy = [[0, 0], [9, 0], [9, 9], [0, 9]]", "'under' holds no cell"),
        (
            '[[zones]]\nname = "a"\ncamera = "top"\npolygon_xy = [[0, 0], [9, 0], [0, 9]]',
            "zones of camera 'top', but the pictures are not told",
        ),
    ],
)
def test_zones_that_cannot_be_are_refused(
    bundle: Path, invoke: Invoke, tmp_path: Path, text: str, complaint: str
) -> None:
    """Two corners, a misspelled key, a name twice, a speck between two cells, another camera's."""
    folder = zoned(tmp_path, 105)
    (tmp_path / "zones.toml").write_text(text)

    with pytest.raises((DataError, CalibrationError, CommandError, BundleError), match=complaint):
        invoke(
            calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE,
            "--zones", tmp_path / "zones.toml",
        )  # fmt: skip


def test_a_minimum_area_is_certified_like_the_threshold(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path, make_fake_bundle: MakeFakeBundle
) -> None:
    """At the source's pixel threshold no good part of the sample shows a region of that size, and one shows the next
    smaller."""
    low = msgspec.structs.replace(open_bundle(bundle).calibration, pixel_threshold=0.12)
    source = make_fake_bundle(tmp_path / "low", calibration=low, provenance={"training_files": []}).path
    result = invoke(
        calibrate, source, "--good", good_folder(45), "--out", tmp_path / "line", *PROMISE, "--min-area", "certify",
        "--json",
    )  # fmt: skip
    found, promise = json.loads(result.stdout), open_bundle(tmp_path / "line").calibration

    assert (promise.pixel_threshold, promise.min_area_px) == (0.12, found["min_area_px"])
    assert found["min_area_px"] > 1 and promise.threshold > 0.12
    with pytest.raises(CommandError, match="--min-area 'none'"):
        invoke(calibrate, source, "--good", bundle, "--out", tmp_path / "x", *PROMISE, "--min-area", "none")


def test_the_page_goes_where_it_is_asked_for_and_replaces_nothing(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """A page that is there may be signed already."""
    (tmp_path / "signed.html").write_text("signed")
    folder = good_folder(45)

    with pytest.raises(CommandError, match=r"--report .*signed\.html: exists already"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, "--report",
               tmp_path / "signed.html")  # fmt: skip
    invoke(
        calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, "--report", tmp_path / "page.html"
    )
    page = (tmp_path / "page.html").read_text()
    assert open_bundle(tmp_path / "line").model_id in page and "Signature" in page
    assert "at most 5% will be rejected" in page and "wrong at most once in 10" in page
