"""Checkpoints: written whole or not at all, read back exactly, and refused in words when damaged or foreign."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edge.errors import TrainingError
from trainer.checkpoint import (
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
    write_atomically,
)


def trained(steps: int, net: nn.Linear, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Run `steps` steps on fixed data and return the weight."""
    data = torch.arange(6.0).view(2, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        net(data).square().sum().backward()
        optimizer.step()
    return net.weight.detach().clone()


def fresh() -> tuple[nn.Linear, torch.optim.Adam]:
    torch.manual_seed(3)
    net = nn.Linear(3, 2)
    return net, torch.optim.Adam(net.parameters(), lr=0.1)


def test_what_is_saved_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    """Tensors of several types and JSON metadata survive the round trip; the digest is that of the file."""
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7), "c": torch.randn(2).half()}

    digest = save_checkpoint(tmp_path / "x.safetensors", tensors, {"step": 5, "config": {"seed": 1}})
    back = load_checkpoint(tmp_path / "x.safetensors")

    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
    assert back.metadata == {"step": 5, "config": {"seed": 1}}
    assert back.sha256 == digest


def test_training_goes_on_after_a_restart_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Ten steps at once equal four, a restart from the file, and six more: Adam's state is in the file too."""
    whole = trained(10, *fresh())
    net, optimizer = fresh()
    trained(4, net, optimizer)
    save_checkpoint(tmp_path / "c", module_tensors("net", net) | optimizer_tensors("optimizer", optimizer), {})

    checkpoint = load_checkpoint(tmp_path / "c")
    again, its_optimizer = fresh()
    restore_module(checkpoint, "net", again)
    restore_optimizer(checkpoint, "optimizer", its_optimizer)

    assert torch.equal(trained(6, again, its_optimizer), whole)


def test_without_the_optimizers_state_the_restart_would_differ(tmp_path: Path) -> None:
    """Control for the test above: weights alone are not enough, so that test can fail."""
    whole = trained(10, *fresh())
    net, optimizer = fresh()
    trained(4, net, optimizer)
    save_checkpoint(tmp_path / "c", module_tensors("net", net), {})

    again, its_optimizer = fresh()
    restore_module(load_checkpoint(tmp_path / "c"), "net", again)

    assert not torch.equal(trained(6, again, its_optimizer), whole)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails at the last moment: the old checkpoint is still whole and no debris stays."""
    path = tmp_path / "c"
    save_checkpoint(path, {"a": torch.zeros(1)}, {"step": 1})

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(TrainingError, match="No space left"):
        save_checkpoint(path, {"a": torch.ones(1)}, {"step": 2})

    assert load_checkpoint(path).metadata == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    """Power fails on a disk without an atomic rename: whatever is left is named, never half read."""
    path = tmp_path / "short.safetensors"
    save_checkpoint(path, {"a": torch.randn(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(TrainingError, match=r"short\.safetensors"):
        load_checkpoint(path)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    """A torch checkpoint given by mistake (or malice) is not opened as one."""
    path = tmp_path / "evil.safetensors"
    torch.save({"a": torch.zeros(1)}, path)

    with pytest.raises(TrainingError, match="not a whole safetensors file"):
        load_checkpoint(path)


def test_someone_elses_safetensors_is_refused(tmp_path: Path) -> None:
    """A weight file is safetensors too, but not a checkpoint of ours."""
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors")

    with pytest.raises(TrainingError, match="not a Kizu checkpoint"):
        load_checkpoint(tmp_path / "theirs.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path is in the message."""
    with pytest.raises(TrainingError, match=r"gone\.safetensors"):
        load_checkpoint(tmp_path / "gone.safetensors")


def test_state_of_another_network_is_refused(tmp_path: Path) -> None:
    """Wrong shapes for the module and a wrong number of parameters for the optimizer are both errors."""
    net, optimizer = fresh()
    trained(1, net, optimizer)
    save_checkpoint(tmp_path / "c", module_tensors("net", net) | optimizer_tensors("optimizer", optimizer), {})
    checkpoint = load_checkpoint(tmp_path / "c")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    with pytest.raises(TrainingError, match="does not fit"):
        restore_module(checkpoint, "net", other)
    with pytest.raises(TrainingError, match="2 parameters, this run has 4"):
        restore_optimizer(checkpoint, "optimizer", torch.optim.Adam(other.parameters()))


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    """The parent is a file."""
    (tmp_path / "file").write_text("x")

    with pytest.raises(TrainingError, match="cannot write there"):
        write_atomically(tmp_path / "file" / "c", b"x")
