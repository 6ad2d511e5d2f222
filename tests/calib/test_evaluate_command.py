"""`kizu evaluate` from a folder to figures, JSON and maps, with the fake engine; every figure is checked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tifffile

from calib import evaluation
from calib.dataset import file_sha256, read_mask, read_test_set
from calib.evaluate_command import evaluate
from calib.metrics import au_pro, image_auroc, pixel_auroc
from edge.bundle import Golden, ModelBundle
from edge.errors import CommandError, DataError, ParityError

Invoke = Callable[..., Any]
MakeFakeBundle = Callable[..., ModelBundle]
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def bundle(make_fake_bundle: MakeFakeBundle, tmp_path: Path) -> Path:
    """A provisional bundle for the fake engine."""
    return make_fake_bundle(tmp_path / "bundle").path


@pytest.fixture
def run(invoke: Invoke, bundle: Path, test_folder: Path) -> Callable[..., Any]:
    """Evaluate the bundle on the test folder with the fake engine."""
    return lambda *options: invoke(evaluate, bundle, "--data", test_folder, "--backend", "fake", *options)


def read_maps(folder: Path, data: Path, kinds: set[str]) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The maps that `--maps` wrote, with their masks."""
    chosen = [image for image in read_test_set(data) if image.kind in kinds]
    maps = [tifffile.imread((folder / image.name).with_suffix(".tiff")) for image in chosen]
    return maps, [read_mask(image, scores.shape) for image, scores in zip(chosen, maps, strict=True)]


def test_the_figures_are_those_of_the_maps_and_scores_it_writes(run: Invoke, test_folder: Path, tmp_path: Path) -> None:
    """Whoever has the JSON and the maps can compute every figure again, overall and for a kind."""
    run("--json", tmp_path / "figures.json", "--maps", tmp_path / "maps")
    found = json.loads((tmp_path / "figures.json").read_text())
    scores = {
        kind: [row["score"] for row in found["images"] if row["kind"] == kind] for kind in ("good", "hole", "stain")
    }

    for kinds, figures in (({"hole", "stain"}, found), ({"hole"}, found["kinds"]["hole"])):
        maps, masks = read_maps(tmp_path / "maps", test_folder, kinds | {"good"})
        assert figures["image_auroc"] == pytest.approx(
            image_auroc(scores["good"], [score for kind in kinds for score in scores[kind]])
        )
        assert figures["pixel_auroc"] == pytest.approx(pixel_auroc(maps, masks), abs=1e-12)
        assert figures["au_pro_30"] == pytest.approx(au_pro(maps, masks, 0.30), abs=1e-9)
        assert figures["au_pro_05"] == pytest.approx(au_pro(maps, masks, 0.05), abs=1e-9)
        for name in ("image_auroc", "pixel_auroc", "au_pro_30", "au_pro_05"):
            low, high = figures["intervals"][name]
            assert 0 <= low - 1e-3 <= figures[name] <= high + 1e-3 <= 1.002


def test_rates_and_decisions_are_those_at_the_bundles_threshold(
    make_fake_bundle: MakeFakeBundle, invoke: Invoke, test_folder: Path, tmp_path: Path
) -> None:
    """With a threshold that holes exceed and stains do not: five found, three escaped, nobody good rejected."""
    calibration = msgspec.structs.replace(make_fake_bundle(tmp_path / "high").calibration, threshold=0.5)
    strict = make_fake_bundle(tmp_path / "strict", calibration=calibration).path
    result = invoke(evaluate, strict, "--data", test_folder, "--backend", "fake", "--json", "-")
    found = json.loads(result.stdout)

    assert (found["false_rejects"], found["escapes"]) == (0, 3)
    assert found["escape_rate"] == 3 / 8 and found["kinds"]["stain"]["escape_rate"] == 1.0
    assert {row["decision"] for row in found["images"] if row["kind"] == "hole"} == {"reject"}
    assert found["intervals"]["false_reject_rate"] == pytest.approx([0, 1 - 0.025 ** (1 / 12)])


def test_json_to_stdout_is_one_line_and_nothing_else(run: Invoke) -> None:
    """A program can read it; table and warnings go to the other stream."""
    result = run("--json", "-")

    assert len(result.stdout.strip().splitlines()) == 1
    assert json.loads(result.stdout)["schema_version"] == 1
    assert "image AUROC" in result.stderr and "provisional" in result.stderr


def test_the_table_names_every_kind_and_a_provisional_threshold_is_said_to_be_one(run: Invoke) -> None:
    """What a person sees first, with the command that certifies."""
    result = run()

    assert all(word in result.stdout for word in ("all", "hole", "stain", "12+8", "not certified", "escapes"))
    assert "kizu calibrate" in result.stderr


def test_maps_are_float32_tiffs_at_the_size_of_the_mask(run: Invoke, test_folder: Path, tmp_path: Path) -> None:
    """test/KIND/STEM.tiff for every image, good ones included."""
    run("--maps", tmp_path / "maps")
    written = sorted(path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.tiff"))
    scores = tifffile.imread(tmp_path / "maps" / "test" / "hole" / "002.tiff")

    assert written == sorted(f"{image.name[:-4]}.tiff" for image in read_test_set(test_folder))
    assert scores.shape == (80, 96) and scores.dtype == np.float32


def test_a_set_without_masks_has_image_figures_only(run: Invoke, test_folder: Path) -> None:
    """Null, not zero and not an error; the warning says why."""
    for mask in (test_folder / "ground_truth").rglob("*.png"):
        mask.unlink()
    result = run("--json", "-")
    found = json.loads(result.stdout)

    assert found["image_auroc"] > 0.9 and found["with_mask"] == 0
    assert found["pixel_auroc"] is found["au_pro_30"] is found["au_pro_05"] is None
    assert "no defective image has a mask" in result.stderr


def test_a_defective_image_without_mask_is_in_no_pixel_figure(run: Invoke, test_folder: Path) -> None:
    """Its pixels are unknown: neither normal nor defective."""
    (test_folder / "ground_truth" / "hole" / "000_mask.png").unlink()
    found = json.loads(run("--json", "-").stdout)

    assert (found["with_mask"], found["defective"]) == (7, 8)
    assert "1 of 8 defective images have no mask" in " ".join(found["warnings"])


def test_unreadable_images_are_inconclusive_and_in_no_figure_when_skipped(run: Invoke, test_folder: Path) -> None:
    """Refused without the option; with it, listed with a null score and counted apart."""
    (test_folder / "test" / "hole" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"000\.png"):
        run()
    found = json.loads(run("--skip-bad-images", "--json", "-").stdout)
    row = next(row for row in found["images"] if row["path"] == "test/hole/000.png")

    assert row == {
        "path": "test/hole/000.png",
        "kind": "hole",
        "score": None,
        "decision": "inconclusive",
        "reason": "unreadable",
    }
    assert (found["inconclusive"], found["defective"], found["kinds"]["stain"]["inconclusive"]) == (1, 7, 0)


def test_good_parts_only_give_a_false_reject_rate(run: Invoke, test_folder: Path) -> None:
    """Before the first defect is found there is still something to measure."""
    for path in [*(test_folder / "test" / "hole").iterdir(), *(test_folder / "test" / "stain").iterdir()]:
        path.unlink()
    found = json.loads(run("--json", "-").stdout)

    assert found["image_auroc"] is None and found["kinds"] == {}
    assert found["false_reject_rate"] == 0.0


def test_test_images_that_were_trained_on_are_pointed_out(
    make_fake_bundle: MakeFakeBundle, invoke: Invoke, test_folder: Path, tmp_path: Path
) -> None:
    """Three of the good test images are in the bundle's list of training files."""
    seen = [file_sha256(path) for path in sorted((test_folder / "test" / "good").iterdir())[:3]]
    bundle = make_fake_bundle(tmp_path / "leaky", provenance={"training_files": [*seen, "0" * 64]}).path
    result = invoke(evaluate, bundle, "--data", test_folder, "--backend", "fake")

    assert "3 of the good test images were trained on" in result.stderr


def test_a_backend_that_misses_the_golden_answers_is_refused(
    make_bundle: Callable[..., ModelBundle], invoke: Invoke, test_folder: Path, tmp_path: Path
) -> None:
    """Control for the gate: figures of an engine that computes something else are never shown."""
    rng = np.random.default_rng(0)
    wrong = Golden(
        rng.integers(0, 256, (1, 32, 32, 1), dtype=np.uint8), np.ones((1, 14, 14), np.float32), np.ones(1, np.float32)
    )
    bundle = make_bundle(tmp_path / "wrong", golden=wrong).path

    with pytest.raises(ParityError):
        invoke(evaluate, bundle, "--data", test_folder, "--backend", "fake")


def test_a_real_engine_gives_the_same_report(
    make_bundle: Callable[..., ModelBundle], invoke: Invoke, test_folder: Path, tmp_path: Path
) -> None:
    """The tiny model on OpenVINO: the whole way through without a fake."""
    bundle = make_bundle(tmp_path / "tiny").path
    found = json.loads(invoke(evaluate, bundle, "--data", test_folder, "--json", "-").stdout)

    assert found["engine"].startswith("openvino")
    assert found["image_auroc"] is not None and len(found["images"]) == 20


def test_what_cannot_be_written_is_refused_before_the_work(run: Invoke, tmp_path: Path) -> None:
    """A missing folder, maps over other files, an unknown backend."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.tiff").write_bytes(b"")

    with pytest.raises(CommandError, match="folder does not exist"):
        run("--json", tmp_path / "nowhere" / "f.json")
    with pytest.raises(CommandError, match="not an empty folder"):
        run("--maps", tmp_path / "full")
    with pytest.raises(CommandError, match="unknown"):
        run("--backend", "abacus")


def test_every_key_of_the_json_is_documented() -> None:
    """The page falls behind as soon as a field is added; this notices."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    keys = {*evaluation.Evaluation.__struct_fields__, *evaluation.ImageRow.__struct_fields__}

    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_real_photographs_are_evaluated_at_their_own_size(
    make_fake_bundle: MakeFakeBundle, make_bundle: Callable[..., ModelBundle], invoke: Invoke, tmp_path: Path
) -> None:
    """Hazelnuts in color into a gray bundle are refused, as the daemon would; gray fabric tiles have all figures."""
    if not (SHARED / "hazelnut_toy").is_dir() or not (SHARED / "aitex_01").is_dir():
        pytest.skip("the shared data sets hazelnut_toy and aitex_01 are not beside this checkout")
    bundle = make_fake_bundle(tmp_path / "gray").path
    with pytest.raises(DataError, match="15 of 15"):
        invoke(evaluate, bundle, "--data", SHARED / "hazelnut_toy", "--backend", "fake")
    options = ("--data", SHARED / "aitex_01", "--backend", "fake", "--json", "-", "--maps", tmp_path / "maps")
    found = json.loads(invoke(evaluate, bundle, *options).stdout)

    assert (found["good"], found["defective"], found["with_mask"]) == (44, 8, 8)
    assert set(found["kinds"]) == {"broken_end", "crease", "nep"}
    assert 0 < found["au_pro_05"] < found["au_pro_30"] < 1
    assert tifffile.imread(next((tmp_path / "maps").rglob("*.tiff"))).shape == (256, 256)
