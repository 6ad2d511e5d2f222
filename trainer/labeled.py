"""What people said at the console, brought into a training: false rejects are good images, real defects are none.

Owns which pictures come to a folder of good images and which leave it. The file and its pictures are
``calib.labels``'; reading and splitting images is ``data``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from calib.dataset import file_sha256
from calib.labels import Labeled
from edge.errors import DataError
from trainer.negatives import bad_images

_NONE: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class LabelChanges:
    """``added`` pictures by name, ``labels/FILE``; ``parts`` is the physical part of each of them.

    ``defects`` are names of files of the folder that are left out.
    """

    added: Mapping[str, Path] = field(default_factory=lambda: _NONE)
    parts: Mapping[str, str] = field(default_factory=dict)
    defects: tuple[str, ...] = ()


NO_CHANGES = LabelChanges()


def label_changes(paths: Mapping[str, Path], labels: Labeled | None) -> LabelChanges:
    """What ``labels`` change in the files ``paths``, by content: a picture that is there already is not added again.

    A false reject's part is its ``part_id``; without one it is a part by itself.
    """
    if labels is None:
        return NO_CHANGES
    digests = {name: file_sha256(path) for name, path in paths.items() if path.is_file()}
    there = set(digests.values())
    new = {f"labels/{path.name}": (path, label) for digest, (path, label) in labels.good.items() if digest not in there}
    return LabelChanges(
        {name: path for name, (path, _) in sorted(new.items())},
        {name: name if label.part_id is None else label.part_id for name, (_, label) in new.items()},
        tuple(name for name, digest in digests.items() if digest in labels.defects),
    )


def require_agreed(labels: Labeled, bad: Path) -> None:
    """Refuse a picture that is a false reject by its label and a bad part by the folder ``bad``.

    Raises:
        DataError: one is; names it.
    """
    if both := [path.name for path in bad_images(bad) if file_sha256(path) in labels.good]:
        raise DataError(
            f"--bad {bad}: {both[0]} is a false reject in {labels.file} ({len(both)} such images); "
            "a part is good or bad: take it out of the folder, or correct the label"
        )
