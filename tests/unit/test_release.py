"""Releases: the same bytes from the same commit, and nothing that is damaged ever unpacked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from ansible.module_utils import evenkeel_release as r


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with a small project that builds with the tools at hand, without the network."""
    folder = tmp_path / "repository"
    (folder / "shop").mkdir(parents=True)
    (folder / "shop/lock").write_text("# nothing\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    commit(folder, "First")
    return folder


def commit(folder: Path, message: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), "add", "."], check=True)
    subprocess.run(["git", "-C", str(folder), *identity, "commit", "-q", "-m", message], check=True)


def build(repository: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, ref: str = "HEAD") -> tuple[Path, bool]:
    def wheel(_repository: Path, _commit: str, _project: str, target: Path, _epoch: str) -> Path:
        path = target / "shop-1.0-py3-none-any.whl"
        path.write_text("the wheel")
        return path

    monkeypatch.setattr(r, "build_wheel", wheel)  # pip and the index are tried on real hosts
    directory.mkdir(exist_ok=True)
    return r.build(repository, ref, "shop", "shop", "shop/lock", directory, "3.11", lambda lock: lock.parent)


def test_same_commit_same_bytes(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, built = build(repository, tmp_path / "a", monkeypatch)
    second, _ = build(repository, tmp_path / "b", monkeypatch)
    assert built
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert build(repository, tmp_path / "a", monkeypatch) == (first, False)
    assert not list((tmp_path / "a").glob(".partial*"))


def test_unpack_verifies_and_is_idempotent(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _ = build(repository, tmp_path / "a", monkeypatch)
    releases = tmp_path / "releases"
    releases.mkdir()
    folder, unpacked = r.unpack(archive, r.expected_sha256(archive), releases)
    assert unpacked
    assert (folder / "wheelhouse/shop-1.0-py3-none-any.whl").read_text() == "the wheel"
    own = hashlib.sha256(b"the wheel").hexdigest()
    assert f"shop==1.0 --hash=sha256:{own}" in (folder / "wheelhouse/requirements.lock").read_text()
    assert r.unpack(archive, r.expected_sha256(archive), releases) == (folder, False)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_archives_are_refused_and_leave_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    archive, _ = build(repository, tmp_path / "a", monkeypatch)
    digest = r.expected_sha256(archive)
    data = bytearray(archive.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    archive.write_bytes({"flip": bytes(data), "truncate": bytes(data[: len(data) // 2]), "empty": b""}[damage])
    assert "is corrupt" in str(r.problem(archive))
    releases = tmp_path / "releases"
    releases.mkdir()
    with pytest.raises(r.ReleaseError, match="corrupt"):
        r.unpack(archive, digest, releases)
    assert list(releases.iterdir()) == []


def archive_with(tmp_path: Path, name: str, link: bool = False) -> Path:
    path = tmp_path / "1.0-abc.tar"
    manifest = tmp_path / "manifest.json"
    fields = {"app": "a", "id": "1.0-abc", "version": "1", "commit": "c", "committed": "t", "python": "3.11", "files": {}}
    manifest.write_text(json.dumps(fields))
    with tarfile.open(path, "w") as tar:
        tar.add(manifest, "1.0-abc/manifest.json")
        entry = tarfile.TarInfo(name)
        if link:
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    return path


@pytest.mark.parametrize(("name", "link"), [("../evil", False), ("/evil", False), ("1.0-abc/evil", True)])
def test_entries_that_leave_the_release_are_refused(tmp_path: Path, name: str, link: bool) -> None:
    archive = archive_with(tmp_path, name, link)
    releases = tmp_path / "releases"
    releases.mkdir()
    with pytest.raises(r.ReleaseError, match="no plain file or folder"):
        r.unpack(archive, r.sha256(archive), releases)
    assert list(releases.iterdir()) == []


def test_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    archive = archive_with(tmp_path, "1.0-abc/extra")
    releases = tmp_path / "releases"
    releases.mkdir()
    with pytest.raises(r.ReleaseError, match="does not match its manifest: extra"):
        r.unpack(archive, r.sha256(archive), releases)


def test_choose_by_id_by_commit_and_latest(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "a"
    first, _ = build(repository, directory, monkeypatch)
    (repository / "shop/more").write_text("x")
    commit(repository, "Second")
    second, _ = build(repository, directory, monkeypatch)
    assert r.choose(directory, first.name.removesuffix(".tar")) == first
    assert r.choose(directory, r.resolve(repository, "HEAD~1")[:8]) == first
    assert r.choose(directory, "latest") == max((first, second), key=lambda path: path.stat().st_mtime)
    with pytest.raises(r.ReleaseError, match="'nope' names 0 releases; there are: "):
        r.choose(directory, "nope")
    with pytest.raises(r.ReleaseError, match="no release has been built"):
        r.choose(tmp_path, "latest")


def test_unknown_refs_and_files_are_named(repository: Path) -> None:
    with pytest.raises(r.ReleaseError, match="'v9' is no commit, tag or branch"):
        r.resolve(repository, "v9")
    with pytest.raises(r.ReleaseError, match="'--help' is no commit"):
        r.resolve(repository, "--help")
    with pytest.raises(r.ReleaseError, match="has no file nowhere"):
        r.file_at(repository, "HEAD", "nowhere")


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(["e", "d", "c", "b", "a"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (age, age))
    assert sorted(r.prune(tmp_path, 2, {"e"})) == ["c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "e"]
