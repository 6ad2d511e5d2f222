"""Which images a certificate may stand on: each content once, none that the model has seen, none under two names.

Owns the refusals. How files become parts is `parts`, what is promised on them is `certificate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.dataset import file_sha256
from calib.parts import NAMED, Grouping, PartImage, find_parts
from edge.bundle import ModelBundle
from edge.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Distinct images with their file digests; `duplicates` maps a name left out to the name with the same bytes.

    `spacing` are frames left out between blocks.
    """

    images: dict[PartImage, str]
    duplicates: dict[str, str]
    spacing: tuple[str, ...]
    warnings: list[str]

    @property
    def parts(self) -> int:
        """How many parts there are, over all cameras: one seen by two is counted by each."""
        return len({(image.camera, image.part) for image in self.images})

    def cameras(self) -> list[str]:
        """Names of the cameras in order; one empty name where they are not told apart."""
        return sorted({image.camera for image in self.images})

    def of_camera(self, camera: str) -> list[PartImage]:
        """Its images."""
        return [image for image in self.images if image.camera == camera]


def choose_sample(source: ModelBundle, good: Path, grouping: Grouping | None = None) -> Sample:
    """Return the images of the folder `good` that count: each content once, none that `source` was made with.

    Raises:
        DataError: the folder is missing or empty, an image was trained on, held out in training or quantized on, or
            one content is given as two parts.
    """
    grouping = grouping or Grouping()
    found = find_parts(good, grouping)
    first: dict[str, PartImage] = {}
    duplicates: dict[str, str] = {}
    for image in found.images:
        digest = file_sha256(image.path)
        if digest not in first:
            first[digest] = image
            continue
        _refuse_two_parts(good, grouping, first[digest], image)
        duplicates[image.name] = first[digest].name
    training = source.provenance.get("training_files")
    seen = known_digests(source)
    _refuse_seen(source, good, [image.name for digest, image in first.items() if digest in seen])
    warnings = []
    if not isinstance(training, list):
        warnings.append(
            f"{source.path} does not say which images it was trained on (provenance has no `training_files`): "
            "make sure that none of these is among them, or the promise is void"
        )
    if duplicates:
        warnings.append(
            f"{len(duplicates)} files have the same bytes as another and are counted once: one part is one part"
        )
    return Sample({image: digest for digest, image in first.items()}, duplicates, found.spacing, warnings)


def known_digests(source: ModelBundle) -> set[str]:
    """File digests of every image that `source` was trained, held out or quantized on."""
    quantization = source.provenance.get("quantization")
    method = source.provenance.get("method")
    learned_from = method.get("bad") if isinstance(method, dict) else None  # what `kizu train --bad` was given
    lists = [source.provenance.get(key) for key in ("training_files", "held_out_files")]
    lists += [made.get("files") for made in (quantization, learned_from) if isinstance(made, dict)]
    return {digest for digests in lists if isinstance(digests, list) for digest in digests}


def choose_bad(source: ModelBundle, bad: Path, sample: Sample, grouping: Grouping) -> dict[PartImage, str]:
    """Return the distinct images of bad parts in the folder `bad` with their digests.

    A pattern or table says which of them show one part; without one, each is a part by itself.

    Raises:
        DataError: the folder cannot be used, an image is among the good ones too, or the model was made with it.
    """
    alone = Grouping() if grouping.unit == "block" else grouping
    chosen: dict[str, PartImage] = {}
    for image in find_parts(bad, alone).images:
        chosen.setdefault(file_sha256(image.path), image)
    good = {digest: image.name for image, digest in sample.images.items()}
    if both := [(image.name, good[digest]) for digest, image in chosen.items() if digest in good]:
        raise DataError(
            f"{bad}: {both[0][0]} has the bytes of the good part {both[0][1]} ({len(both)} such files); "
            "a part is good or bad: take it out of one folder"
        )
    seen = known_digests(source)
    _refuse_seen(source, bad, [image.name for digest, image in chosen.items() if digest in seen])
    return {image: digest for digest, image in chosen.items()}


def require_all_rows(grouping: Grouping, images: Iterable[PartImage]) -> None:
    """Refuse a table that names files which are not there: they were meant to count.

    Raises:
        DataError: names the first few.
    """
    if grouping.rows is None:
        return
    if missing := sorted(grouping.rows.keys() - {image.name for image in images}):
        raise DataError(f"--parts names {_few(missing)}, which {'is' if len(missing) == 1 else 'are'} in no folder")


def _refuse_two_parts(good: Path, grouping: Grouping, one: PartImage, other: PartImage) -> None:
    if grouping.unit == "part" and (one.part, one.camera) != (other.part, other.camera):
        raise DataError(
            f"{good}: {one.name} and {other.name} have the same bytes but are given as the parts {one.part!r} and "
            f"{other.part!r}; correct their parts, or take one out"
        )


def _refuse_seen(source: ModelBundle, folder: Path, names: Sequence[str]) -> None:
    if not names:
        return
    raise DataError(
        f"{folder}: {_few(names)} of the images that {source.path} was trained or quantized on; "
        "a model scores what it has seen too low to promise anything from it: give images of other parts"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
