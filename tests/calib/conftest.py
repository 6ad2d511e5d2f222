"""A bundle that the fake engine runs, and test sets made for it: gray pictures in which a white square is a defect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from edge.bundle import Golden, MapGeometry, ModelBundle
from edge.engines.fake import FakeEngine
from edge.images import encode_mask_png, encode_png
from edge.protocols import EngineSpec

SPEC = EngineSpec("fake", "1", "cpu", 32, 32, 1, 16, 16, 4, 2)

MakeFakeBundle = Callable[..., ModelBundle]


@pytest.fixture(scope="session")
def make_fake_bundle(make_bundle: Callable[..., ModelBundle]) -> MakeFakeBundle:
    """Write a bundle whose golden answers are the fake engine's; its map has 16 x 16 cells of 2 px, threshold 0.5."""

    def make(path: Path, **changes: Any) -> ModelBundle:
        frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
        with FakeEngine(SPEC) as engine:
            golden = Golden(frames, *engine.infer(frames))
        geometry = MapGeometry(16, 16, stride=2.0, offset_y=0.5, offset_x=0.5)
        return make_bundle(path, **{"golden": golden, "map": geometry, **changes})

    return make


def picture(rng: np.random.Generator, size: tuple[int, int] = (64, 96)) -> NDArray[np.uint8]:
    """A good part: gray with noise, so that no two files are alike."""
    return rng.integers(108, 149, (*size, 1), dtype=np.uint8)


@pytest.fixture
def good_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write `number` pictures of good parts into a new folder."""

    def write(number: int, name: str = "good", seed: int = 1) -> Path:
        rng, folder = np.random.default_rng(seed), tmp_path / name
        folder.mkdir(parents=True)
        for index in range(number):
            (folder / f"{index:04}.png").write_bytes(encode_png(picture(rng, (32, 32))))
        return folder

    return write


@pytest.fixture
def test_folder(tmp_path: Path) -> Path:
    """Twelve good parts, five with a `hole` (white square) and three with a `stain` (hardly brighter), with masks."""
    rng, data = np.random.default_rng(2), tmp_path / "data"
    for kind, number, white in (("good", 12, None), ("hole", 5, 255), ("stain", 3, 150)):
        (data / "test" / kind).mkdir(parents=True)
        for index in range(number):
            image = picture(rng, (64 + 8 * index, 96))
            if white is not None:
                mask = np.zeros(image.shape[:2], dtype=bool)
                mask[20:40, 30 : 50 + index] = True
                image[mask] = white
                (data / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                (data / "ground_truth" / kind / f"{index:03}_mask.png").write_bytes(encode_mask_png(mask))
            (data / "test" / kind / f"{index:03}.png").write_bytes(encode_png(image))
    return data


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Run one command function as the command line would; errors come out as they were raised."""

    def run(command: Callable[..., None], *arguments: object) -> Any:
        app = typer.Typer()
        app.command()(command)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
