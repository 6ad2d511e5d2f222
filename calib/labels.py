"""What people said at the console, brought into a calibration: false rejects are good parts, real defects are not.

Owns that choice. The file and its lines are `edge.labels`; which other images count is `sample`. A false reject was
chosen for its high score by this model, so it scores no less than a good part drawn at random: the threshold can only
rise by it, and what is promised about false rejects holds. How many bad parts pass may rise with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from calib.dataset import file_sha256
from calib.parts import Grouping, PartImage
from calib.sample import Sample, known_digests
from edge.bundle import ModelBundle
from edge.errors import CommandError, DataError
from edge.labels import Label, pictures_folder, read_labels


@dataclass(frozen=True, slots=True, eq=False)
class Labeled:
    """The labels that concern a calibration: pictures of false rejects by digest, digests of real defects' pictures.

    `pictureless` are labels of either kind whose picture was not at hand when they were made.
    """

    file: Path
    good: dict[str, tuple[Path, Label]]
    defects: frozenset[str]
    pictureless: int


def open_labels(file: Path) -> Labeled:
    """Read `file` and check every picture that it names.

    Raises:
        DataError: the file or a picture is missing, or is not what was labeled.
    """
    good: dict[str, tuple[Path, Label]] = {}
    defects: set[str] = set()
    pictureless = 0
    for label in read_labels(file).values():
        if label.label not in ("false_reject", "real_defect"):
            continue
        if label.picture is None or label.picture_sha256 is None:
            pictureless += 1
        elif label.label == "real_defect":
            defects.add(label.picture_sha256)
        else:
            good[label.picture_sha256] = (_picture(file, label, label.picture), label)
    return Labeled(file, good, frozenset(defects), pictureless)


def with_labels(source: ModelBundle, sample: Sample, labeled: Labeled, grouping: Grouping) -> Sample:
    """`sample` with the false rejects as further good parts and without the real defects.

    A false reject's part is its `part_id`; without one each is a part by itself.

    Raises:
        CommandError: parts are blocks of frames, of which a single picture is none.
        DataError: the model was made with one of the pictures.
    """
    if grouping.unit == "block":
        raise CommandError("--labels: a label is about one picture, and --block counts several as one part")
    if seen := known_digests(source) & labeled.good.keys():
        names = ", ".join(sorted(labeled.good[digest][0].name for digest in seen)[:3])
        raise DataError(f"{labeled.file}: {source.path} was trained or quantized on {names}; take these labels out")
    kept = {image: digest for image, digest in sample.images.items() if digest not in labeled.defects}
    left_out = len(sample.images) - len(kept)
    known = set(kept.values())
    one_camera = sample.cameras() == [""]
    added = {
        _image(path, label, grouping, one_camera): digest
        for digest, (path, label) in labeled.good.items()
        if digest not in known
    }
    return replace(sample, images=kept | added, warnings=[*sample.warnings, *_notes(labeled, len(added), left_out)])


def _image(path: Path, label: Label, grouping: Grouping, one_camera: bool) -> PartImage:
    name = f"labels/{path.name}"
    part = label.part_id if grouping.unit == "part" and label.part_id is not None else name
    return PartImage(path, name, part, "" if one_camera else label.camera)


def _picture(file: Path, label: Label, name: str) -> Path:
    path = pictures_folder(file) / name
    if not path.is_file():
        raise DataError(f"{file}: {path} is missing, the picture of {label.id}; keep that folder beside the file")
    if file_sha256(path) != label.picture_sha256:
        raise DataError(f"{file}: {path} is not the picture that was labeled for {label.id}; restore it")
    return path


def _notes(labeled: Labeled, added: int, left_out: int) -> list[str]:
    notes = []
    if added:
        notes.append(
            f"{added} good parts are false rejects from {labeled.file}: they were chosen for their high scores, so the "
            "promise holds, and the threshold may be higher than a sample drawn at random would set it"
        )
    if left_out:
        notes.append(f"{left_out} images were left out: {labeled.file} calls them real defects")
    if labeled.pictureless:
        notes.append(f"{labeled.pictureless} labels of {labeled.file} have no picture and count for nothing here")
    return notes
