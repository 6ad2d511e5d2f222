"""`make images-check` without building anything: what it starts from, how it reads compose.yaml, what it says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("images.py")


@pytest.fixture(scope="module")
def images() -> ModuleType:
    spec = importlib.util.spec_from_file_location("images", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_its_tools_it_says_which_and_ends_with_status_2(tmp_path: Path) -> None:
    """Not a failure of the images, and not a success either."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr.startswith("skipped: needs root and buildah, podman") and "apt-get install" in done.stderr


def test_every_from_line_gets_a_stand_in_under_the_name_that_buildah_looks_for(images: ModuleType) -> None:
    """Short names are Docker's own; a stage of the same file is none of them."""
    assert [images.full(tag) for tag in images.tags()] == [
        "docker.io/nvidia/cuda:13.0.1-devel-ubuntu24.04",
        "docker.io/library/ubuntu:24.04",
        "nvcr.io/nvidia/tensorrt:25.08-py3",
        "docker.io/library/ubuntu:24.04",
    ]


def test_our_services_are_run_as_sealed_as_compose_says(images: ModuleType) -> None:
    """Every one of them: no writable root, no capability, no way to new privileges."""
    ours = [service for service in images.services().values() if service["image"] == "kizu-edge"]

    assert len(ours) == 4
    for service in ours:
        sealed = ["--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--security-opt", "no-new-privileges"]
        assert images.options_of(service, volumes=False) == sealed


def test_verdicts_are_counted_over_cameras_and_reasons(images: ModuleType) -> None:
    """The page as the daemon writes it."""
    page = (
        'kizu_verdicts_total{camera="left",decision="accept",reason="score"} 3.0\n'
        'kizu_verdicts_total{camera="right",decision="accept",reason="score"} 4.0\n'
        'kizu_verdicts_total{camera="right",decision="reject",reason="score"} 2.0\n'
    )

    assert images.judged(page) == {"left": 3, "right": 6, "accept": 7}
