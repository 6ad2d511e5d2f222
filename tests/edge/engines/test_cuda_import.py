"""What one is told where pycuda cannot be imported: which of driver and package is missing, or does not fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge.engines.cuda import import_driver
from edge.errors import DeviceError


@pytest.mark.parametrize(
    ("words", "reason", "said"),
    [
        ("libcuda.so.1: cannot open shared object file", "driver", "no NVIDIA driver"),
        ("_driver.so: undefined symbol: cuCtxCreate_v4", "driver", "the NVIDIA driver is too old for this pycuda"),
        ("No module named 'pytools'", "package", "pip install 'kizu[gpu]'"),
    ],
)
def test_the_loaders_words_become_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, reason: str, said: str
) -> None:
    """A pycuda that fails as it does without a driver, with an old one, and without what it needs."""
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda/__init__.py").touch()
    (tmp_path / "pycuda/driver.py").write_text(f"raise ImportError({words!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pycuda", raising=False)

    with pytest.raises(DeviceError, match=said.replace("[", r"\[").replace("]", r"\]")) as refused:
        import_driver()

    assert refused.value.reason == reason
    monkeypatch.delitem(sys.modules, "pycuda", raising=False)
