"""Signed bundles: whoever runs a model knows who vouched for it, and a changed or derived one has nobody's word."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner

from edge import cli, daemon, keys, signature
from edge.bundle import ModelBundle, derive_bundle, digests_of, open_bundle
from edge.config import load_config
from edge.demo.line import write_config
from edge.errors import BundleError, ConfigError
from edge.signature import TrustStore

MakeBundle = Callable[..., ModelBundle]


@pytest.fixture
def bundle(tiny_bundle: ModelBundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def signer(tmp_path: Path) -> tuple[Path, Path]:
    """Secret and public key file of `quality`."""
    return keys.make_pair("signing", "quality", tmp_path / "keys")


def kizu(*words: object) -> tuple[int, str]:
    arguments = [str(word) for word in words]
    done = CliRunner().invoke(cli.build(arguments), arguments)
    return done.exit_code, done.output


def sign(bundle: Path, key: Path) -> None:
    (bundle / "signature.json").write_bytes(signature.sign(digests_of(open_bundle(bundle)), key))


def test_a_signed_bundle_names_its_signer(bundle: Path, signer: tuple[Path, Path]) -> None:
    """`kizu sign`, then `kizu verify --signers`: the name is the trusting side's, never the bundle's."""
    assert kizu("sign", bundle, "--key", signer[0])[0] == 0

    code, out = kizu("verify", bundle, "--backend", "onnxruntime", "--signers", signer[1], "--json")
    assert code == 0 and json.loads(out)["signer"] == "quality"
    assert "quality" not in (bundle / "signature.json").read_text()


def test_the_signature_can_be_checked_without_kizu(bundle: Path, signer: tuple[Path, Path]) -> None:
    """By the page: a heading, then every file's digest and size, names sorted."""
    sign(bundle, signer[0])
    found = json.loads((bundle / "signature.json").read_text())
    files = {
        str(path.relative_to(bundle)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "signature.json"
    }
    text = "kizu bundle signature 1\n" + json.dumps(files, sort_keys=True, separators=(",", ":")) + "\n"
    key = Ed25519PublicKey.from_public_bytes(keys.unz85(found["public_key"]))

    key.verify(bytes.fromhex(found["signature"]), text.encode())
    with pytest.raises(InvalidSignature):
        key.verify(bytes.fromhex(found["signature"]), text.replace("model.onnx", "other.onnx").encode())


def test_any_other_content_does_not_bear_the_signature(
    bundle: Path, signer: tuple[Path, Path], make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """Copied to another bundle, even one that differs by its name alone, it is refused at opening."""
    sign(bundle, signer[0])
    other = make_bundle(tmp_path / "other", name="other")
    shutil.copy(bundle / "signature.json", other.path)

    with pytest.raises(BundleError, match="not made for this bundle's content"):
        open_bundle(other.path)


def test_without_verification_it_would_pass(
    bundle: Path, signer: tuple[Path, Path], make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a signature that is made over, and checked against, less than the content goes along with any."""
    monkeypatch.setattr(signature, "signed_text", lambda files: signature._HEADING)
    sign(bundle, signer[0])
    other = make_bundle(tmp_path / "other", name="other")
    shutil.copy(bundle / "signature.json", other.path)

    assert open_bundle(other.path).signed_by


def test_a_derived_bundle_is_not_signed(bundle: Path, signer: tuple[Path, Path], tmp_path: Path) -> None:
    """Whoever signed the source did not see these thresholds; the copied signature says so in words."""
    sign(bundle, signer[0])
    source = open_bundle(bundle)
    calibration = msgspec.structs.replace(source.calibration, threshold=9.0)

    derived = derive_bundle(source, tmp_path / "derived", calibration=calibration, provenance_extra={})

    assert source.signed_by and derived.signed_by is None
    assert open_bundle(derived.path).signed_by is None
    shutil.copy(bundle / "signature.json", derived.path)
    with pytest.raises(BundleError, match="derived or changed must be signed again"):
        open_bundle(derived.path)


@pytest.mark.parametrize(
    "change",
    [
        {"signature": "0" * 128},
        {"signature": "zz"},
        {"public_key": "a" * 40},
        {"public_key": "~" * 40},
        {"algorithm": "none"},
        {"schema_version": 2},
        {"more": 1},
    ],
)
def test_a_changed_signature_is_refused(bundle: Path, signer: tuple[Path, Path], change: dict[str, object]) -> None:
    """Also in a line that requires none: a signature that is wrong is a sign of something."""
    sign(bundle, signer[0])
    path = bundle / "signature.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(BundleError, match=r"signature\.json"):
        open_bundle(bundle)


def test_a_bundle_is_signed_once(bundle: Path, signer: tuple[Path, Path]) -> None:
    """To replace a signature, remove it: nobody's word is overwritten by the way."""
    sign(bundle, signer[0])

    code, out = kizu("sign", bundle, "--key", signer[0])
    assert code == 2 and "signed already" in out


def test_only_a_signing_key_signs(bundle: Path, signer: tuple[Path, Path], tmp_path: Path) -> None:
    """Not the key of a camera, and not the public half."""
    camera, _ = keys.make_pair("camera", "left", tmp_path / "keys")

    for key in (camera, signer[1]):
        code, out = kizu("sign", bundle, "--key", key)
        assert code == 2 and "key" in out
    assert not (bundle / "signature.json").exists()


def test_a_line_that_requires_a_signature_runs_nothing_else(bundle: Path, tmp_path: Path) -> None:
    """Unsigned, signed by a stranger, signed by one of the trusted: the last one alone runs."""
    trusted, stranger = (keys.make_pair("signing", name, tmp_path / "keys")[0] for name in ("quality", "stranger"))
    signers = tmp_path / "signers"
    signers.mkdir()
    shutil.copy(trusted.with_suffix(".pub"), signers)
    security = {"signers": str(signers), "require_signature": True}
    path = write_config(tmp_path / "line.toml", bundle, ["cam"], engine={"backend": "fake"}, security=security)
    config = load_config(path)

    with pytest.raises(BundleError, match=r"line.toml: bundle: .* is not signed, expected .* quality"):
        daemon.check(config, path)
    sign(bundle, stranger)
    with pytest.raises(BundleError, match="signed by the unknown key"):
        daemon.check(config, path)
    with pytest.raises(BundleError, match="signed by the unknown key"):
        daemon.serve(config, path, daemon.StopRequest())
    (bundle / "signature.json").unlink()
    sign(bundle, trusted)
    assert daemon.check(config, path)["model_id"] == open_bundle(bundle).model_id


def test_a_store_without_keys_is_an_error(tmp_path: Path) -> None:
    """It would refuse every bundle for a reason that nobody sees."""
    keys.make_pair("camera", "left", tmp_path / "keys")
    (tmp_path / "empty").mkdir()

    for path, words in ((tmp_path / "empty", "kizu keys signing"), (tmp_path / "keys", "expected signing")):
        with pytest.raises(ConfigError, match=words):
            TrustStore.load(path)
