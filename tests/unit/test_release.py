"""Releases: the same bytes from the same commit, and nothing that is damaged, altered or signed by a stranger ever unpacked."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible.module_utils import evenkeel_build as b
from ansible.module_utils import evenkeel_release as r
from ansible.module_utils.evenkeel_venv import LOCK_NAME, digest_of
from programs import ROOT, load

PYTHON = "3.11.2"


def wheel(folder: Path, name: str, version: str = "1.0", licence: str = "License-Expression: MIT") -> Path:
    """A wheel that says as much as a bill of materials asks for."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{licence}\n"
        archive.writestr(zipfile.ZipInfo(f"{name}-{version}.dist-info/METADATA", (2024, 5, 6, 7, 8, 10)), text)
    return path


def pin(path: Path) -> str:
    name, version = path.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{r.sha256(path)}\n"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """What the download gives: a dependency and uv, and the lock that names them."""
    folder = tmp_path / "house"
    folder.mkdir()
    wheels = [
        wheel(folder, "uv", "0.9.1", "License: MIT OR Apache-2.0"),
        wheel(folder, "idna", "3.10", "Classifier: License :: OSI Approved :: BSD License"),
    ]
    (folder / "requirements.lock").write_text("".join(map(pin, wheels)))
    return folder


@pytest.fixture
def repository(tmp_path: Path, house: Path) -> Path:
    """A git repository with a project, two commits and a tag on the first."""
    folder = tmp_path / "repository"
    (folder / "shop").mkdir(parents=True)
    (folder / "shop/lock").write_text((house / "requirements.lock").read_text())
    subprocess.run(["git", "init", "-q", "-b", "main", str(folder)], check=True)
    commit(folder, "First")
    subprocess.run(["git", "-C", str(folder), "tag", "v1"], check=True)
    return folder


def commit(folder: Path, message: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), "add", "."], check=True)
    subprocess.run(["git", "-C", str(folder), *identity, "commit", "-q", "-m", message], check=True)


Build = Callable[..., tuple[Path, bool]]


@pytest.fixture
def build(repository: Path, house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds the release of a commit into a folder. pip and the index are tried on real hosts."""

    def own(_origin: b.Origin, folder: Path, _epoch: int) -> Path:
        folder.mkdir()
        return wheel(folder, "shop")

    monkeypatch.setattr(b, "build_wheel", own)

    def run(directory: Path, ref: str = "HEAD", key: Path = tmp_path / "keys/release", **more: Callable[[Path], None]) -> tuple[Path, bool]:
        origin = b.from_git(repository, ref, "shop", "shop/lock")
        return b.build(origin, "shop", directory, "3.11", lambda lock, name: house, key, more.get("gate", lambda release: None))

    return run


def signers(tmp_path: Path) -> list[str]:
    return [f"release {b.public_key(tmp_path / 'keys/release')}"]


def signature(archive: Path) -> str:
    return Path(f"{archive}.sig").read_text()


def test_same_commit_same_bytes(build: Build, tmp_path: Path) -> None:
    first, built = build(tmp_path / "a")
    second, _ = build(tmp_path / "b")
    assert built
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert build(tmp_path / "a") == (first, False)
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".sig", ".tar"]


def test_gate_is_asked_for_new_and_for_old_releases_and_stops_the_build(build: Build, tmp_path: Path) -> None:
    seen: list[list[tuple[str, str]]] = []

    def look(release: Path) -> None:
        seen.append(b.packages(release))

    def refuse(release: Path) -> None:
        raise r.ReleaseError("no")

    with pytest.raises(r.ReleaseError, match="no"):
        build(tmp_path / "a", gate=refuse)
    assert list((tmp_path / "a").iterdir()) == []
    build(tmp_path / "a", gate=look)
    build(tmp_path / "a", gate=look)
    assert seen == [[("idna", "3.10"), ("uv", "0.9.1")]] * 2, "the project itself is nobody's business"
    with pytest.raises(r.ReleaseError, match="no"):
        build(tmp_path / "a", gate=refuse)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_bill_of_materials_names_every_wheel_and_is_valid(build: Build, tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    archive, _ = build(tmp_path / "a")
    manifest, _signer = r.check(archive, signers(tmp_path))
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(f"{manifest.id}/sbom.cdx.json")
        assert stream
        text = stream.read().decode()
    bom = json.loads(text)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert bom["metadata"]["timestamp"][:19] == manifest.committed.replace("Z", "")[:19]
    parts = {part["purl"]: part for part in bom["components"]}
    assert set(parts) == {"pkg:pypi/shop@1.0", "pkg:pypi/uv@0.9.1", "pkg:pypi/idna@3.10"}
    for path, digest in manifest.files.items():
        if path.endswith(".whl"):
            name, version = path.removeprefix("wheelhouse/").split("-")[:2]
            assert parts[f"pkg:pypi/{name}@{version}"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    said = {purl: part["licenses"][0] for purl, part in parts.items()}
    assert said["pkg:pypi/shop@1.0"]["license"]["id"] == "MIT"
    assert said["pkg:pypi/uv@0.9.1"]["expression"] == "MIT OR Apache-2.0"
    assert said["pkg:pypi/idna@3.10"]["license"]["name"] == "BSD License"


def test_a_release_of_another_application_is_refused(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    with pytest.raises(r.ReleaseError, match="is one of shop, not of bakery"):
        r.unpack(archive, tmp_path / "releases", signature(archive), signers(tmp_path), PYTHON, "bakery")
    assert not (tmp_path / "releases").exists()


def test_unpack_verifies_and_is_idempotent(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    releases = tmp_path / "releases"
    folder, unpacked = r.unpack(archive, releases, signature(archive), signers(tmp_path), PYTHON)
    assert unpacked
    own = r.sha256(folder / "wheelhouse/shop-1.0-py3-none-any.whl")
    assert f"shop==1.0 --hash=sha256:{own}" in (folder / "wheelhouse/requirements.lock").read_text()
    assert r.unpack(archive, releases, signature(archive), signers(tmp_path), PYTHON) == (folder, False)


def test_damaged_release_on_a_host_gets_its_files_back_and_keeps_its_environment(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    folder, _ = r.unpack(archive, tmp_path / "releases", signature(archive), signers(tmp_path), PYTHON)
    (folder / "venv").mkdir()
    own = folder / "wheelhouse/shop-1.0-py3-none-any.whl"
    whole = own.read_bytes()
    own.write_bytes(whole[:-1])
    assert r.damage(folder) == ["wheelhouse/shop-1.0-py3-none-any.whl"]
    assert r.unpack(archive, tmp_path / "releases", signature(archive), signers(tmp_path), PYTHON) == (folder, True)
    assert own.read_bytes() == whole
    assert r.damage(folder) == []
    assert (folder / "venv").is_dir()
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [folder.name]
    (folder / "manifest.json").unlink()
    assert r.damage(folder) == ["manifest.json"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_archives_are_refused_and_leave_nothing(build: Build, tmp_path: Path, damage: str) -> None:
    archive, _ = build(tmp_path / "a")
    data = bytearray(archive.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    archive.write_bytes({"flip": bytes(data), "truncate": bytes(data[: len(data) // 2]), "empty": b""}[damage])
    refused(archive, tmp_path, "is corrupt or was altered: it is not what release signed", signature(archive))


def refused(archive: Path, tmp_path: Path, sentence: str, signed: str, allowed: list[str] | None = None, python: str = PYTHON) -> None:
    """On the host nothing has appeared."""
    releases = tmp_path / "releases"
    releases.mkdir()
    with pytest.raises(r.ReleaseError, match=sentence) as error:
        r.unpack(archive, releases, signed, signers(tmp_path) if allowed is None else allowed, python)
    assert "\n" not in str(error.value)
    assert list(releases.iterdir()) == []


def test_release_of_a_stranger_is_refused(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "a")
    strange, _ = build(tmp_path / "b", key=tmp_path / "stranger")
    refused(strange, tmp_path, r"signed by a key that may not sign releases \(SHA256:\S+\)", signature(strange))
    with pytest.raises(r.ReleaseError, match="may not sign releases"):
        r.check(strange, signers(tmp_path))
    assert r.check(strange, [f"bob@example.org {b.public_key(tmp_path / 'stranger')}"])[1] == "bob@example.org"


def test_signature_for_another_purpose_or_another_time_does_not_count(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    Path(f"{archive}.sig").unlink()
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", tmp_path / "keys/release", "-n", "file", archive], check=True)
    other = signature(archive)
    b.sign(archive.rename(tmp_path / archive.name), tmp_path / "keys/release")
    moved = tmp_path / archive.name
    refused(moved, tmp_path, "does not count for releases", other)
    key = b.public_key(tmp_path / "keys/release")
    for options in ('namespaces="file"', 'valid-before="20200101"'):
        with pytest.raises(r.ReleaseError, match=r"is signed by (a key that may not sign|release, but this signature does not count)"):
            r.check(moved, [f"release {options} {key}"])
    assert r.check(moved, [f'release namespaces="{r.NAMESPACE}" {key}'])[1] == "release"


@pytest.mark.parametrize("signed", ["", "no signature at all"])
def test_what_is_no_signature_is_refused(build: Build, tmp_path: Path, signed: str) -> None:
    archive, _ = build(tmp_path / "a")
    refused(archive, tmp_path, "its signature is none of these bytes", signed)


def test_nobody_may_sign_unless_somebody_is_named(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    refused(archive, tmp_path, "release_signers names nobody", signature(archive), allowed=["", "# nobody"])


def test_another_python_is_refused(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    refused(archive, tmp_path, "is made for Python 3.11, but this host has Python 3.13.5", signature(archive), python="3.13.5")


def test_archive_without_signature_is_built_again(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    Path(f"{archive}.sig").unlink()
    with pytest.raises(r.ReleaseError, match="has no signature"):
        r.check(archive, signers(tmp_path))
    assert build(tmp_path / "a") == (archive, True)
    assert r.check(archive, signers(tmp_path))[1] == "release"


def test_renamed_archive_is_refused(build: Build, tmp_path: Path) -> None:
    archive, _ = build(tmp_path / "a")
    archive.rename(tmp_path / "9.9-0123456789ab.tar")
    refused(tmp_path / "9.9-0123456789ab.tar", tmp_path, "is not a release archive", Path(f"{archive}.sig").read_text())


def test_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    key = tmp_path / "keys/release"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(b.make_key, [key] * 8))
    assert sorted(made) == [False] * 7 + [True]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in key.parent.iterdir()) == [".release.lock", "release", "release.pub"]
    derived = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True).stdout
    assert derived.split()[:2] == b.public_key(key).split()[:2]


def test_missing_ssh_keygen_is_named(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _ = build(tmp_path / "a")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(r.ReleaseError, match=r"ssh-keygen is missing.*apt-get install openssh-client"):
        r.check(archive, ["release ssh-ed25519 AAAA"])


def archive_with(tmp_path: Path, name: str, link: bool = False, called: str = "1.0-abc") -> Path:
    path = tmp_path / "1.0-abc.tar"
    manifest = tmp_path / "manifest.json"
    fields = {"app": "a", "id": called, "version": "1", "commit": "c", "committed": "t", "python": "3.11", "files": {}}
    manifest.write_text(json.dumps(fields))
    with tarfile.open(path, "w") as tar:
        tar.add(manifest, "1.0-abc/manifest.json")
        entry = tarfile.TarInfo(name)
        if link:
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    b.make_key(tmp_path / "keys/release")
    b.sign(path, tmp_path / "keys/release")
    return path


@pytest.mark.parametrize(("name", "link"), [("../evil", False), ("/evil", False), ("1.0-abc/evil", True)])
def test_entries_that_leave_the_release_are_refused(tmp_path: Path, name: str, link: bool) -> None:
    archive = archive_with(tmp_path, name, link)
    refused(archive, tmp_path, "no plain file or folder", signature(archive))


def test_archive_that_says_it_is_another_release_is_refused(tmp_path: Path) -> None:
    archive = archive_with(tmp_path, "1.0-abc/extra", called="../1.0-abc")
    refused(archive, tmp_path, "is not the archive of release '../1.0-abc'", signature(archive))


def test_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    archive = archive_with(tmp_path, "1.0-abc/extra")
    refused(archive, tmp_path, "does not match its manifest: extra", signature(archive))


def test_choose_by_id_commit_tag_version_and_latest(repository: Path, build: Build, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    first, _ = build(directory)
    (repository / "shop/more").write_text("x")
    commit(repository, "Second")
    second, _ = build(directory)
    assert r.choose(directory, first.name.removesuffix(".tar")) == first
    assert r.choose(directory, b.resolve(repository, "HEAD~1")[:8]) == first
    assert r.choose(directory, b.resolve(repository, "HEAD")) == second
    assert r.choose(directory, "v1", b.named_commit(repository, "v1")) == first
    assert r.choose(directory, "main", b.named_commit(repository, "main")) == second
    assert r.choose(directory, "latest") == max((first, second), key=lambda path: path.stat().st_mtime)
    with pytest.raises(r.ReleaseError, match=r"'1.0' names 2 releases; there are: "):
        r.choose(directory, "1.0")
    (repository / "shop/more").write_text("y")
    commit(repository, "Third")
    with pytest.raises(r.ReleaseError, match=r"'main' is commit \w{12}, of which there is no release yet: .* -e ref=main"):
        r.choose(directory, "main", b.named_commit(repository, "main"))
    with pytest.raises(r.ReleaseError, match="'nope' names 0 releases; there are: "):
        r.choose(directory, "nope", b.named_commit(repository, "nope"))
    with pytest.raises(r.ReleaseError, match="no release has been built"):
        r.choose(tmp_path, "latest")


def test_unknown_refs_and_files_are_named(repository: Path) -> None:
    with pytest.raises(r.ReleaseError, match="'v9' is no commit, tag or branch"):
        b.resolve(repository, "v9")
    with pytest.raises(r.ReleaseError, match="'--help' is no commit"):
        b.resolve(repository, "--help")
    with pytest.raises(r.ReleaseError, match="has no file nowhere"):
        b.file_at(repository, "HEAD", "nowhere")


def test_release_of_a_package_of_an_index(house: Path, tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    lock = (house / "requirements.lock").read_text()
    (locks / "3.10.lock").write_text(lock)
    origin = b.from_index("IDNA", locks, "3.10")
    made = b.build(origin, "names", tmp_path / "a", "3.11", lambda lock, name: house, tmp_path / "keys/release", lambda release: None)[0]
    manifest, _ = r.check(made, signers(tmp_path))
    assert (manifest.id, manifest.commit) == (f"3.10-{digest_of(lock.encode())[:12]}", digest_of(lock.encode()))
    assert (manifest.source, manifest.committed) == ("index", "2024-05-06T07:08:10+00:00")
    assert r.choose(tmp_path / "a", "3.10") == made
    folder, _ = r.unpack(made, tmp_path / "releases", signature(made), signers(tmp_path), PYTHON)
    assert ("idna", "3.10") in b.packages(folder), "a package of an index is looked up, too"
    pins = folder / "wheelhouse" / LOCK_NAME
    pins.write_text(pins.read_text().replace("idna==3.10", "idna==3.*"))
    assert ("idna", "3.10") in b.packages(folder), "by what would be installed, whatever the lock calls it"
    with pytest.raises(r.ReleaseError, match=r"there is no .*/HEAD.lock; say which release with -e ref=…, there are: 3.10"):
        b.from_index("idna", locks, "HEAD")
    with pytest.raises(r.ReleaseError, match=r"does not pin paperless, which app.install.requirement names"):
        b.from_index("paperless", locks, "3.10")


def test_a_name_that_another_release_builds_from_source_is_no_mistake(tmp_path: Path) -> None:
    sha = " --hash=sha256:" + "a" * 64 + "\n"
    (tmp_path / "1.lock").write_text(f"shop==1{sha}old-one==1{sha}")
    (tmp_path / "2.lock").write_text(f"shop==2{sha}new-one==1{sha}")
    build = ["old_one", "new-one", "mistyped"]
    assert b.source_only(build, (tmp_path / "1.lock").read_bytes(), tmp_path) == ["old_one", "mistyped"]
    assert b.source_only(build, (tmp_path / "2.lock").read_bytes(), tmp_path) == ["new-one", "mistyped"]


def test_lock_without_uv_gets_the_suites(tmp_path: Path) -> None:
    lock = b"idna==3.10 --hash=sha256:" + b"a" * 64 + b"\n"
    suite = tmp_path / "suite.lock"
    suite.write_text(
        "pywin32==1 ; sys_platform == 'win32' \\\n    --hash=sha256:" + "b" * 64 + "\nuv==0.9.1 --hash=sha256:" + "c" * 64 + "\n"
    )
    complete = b.with_installer(lock, "lock", str(suite))
    assert complete.decode().splitlines() == [lock.decode().strip(), f"uv==0.9.1 --hash=sha256:{'c' * 64}"]
    assert b.with_installer(complete, "lock", None) == complete
    with pytest.raises(r.ReleaseError, match="does not contain uv"):
        b.with_installer(lock, "lock", None)


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for age, name in enumerate(["e", "d", "c", "b", "a"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (age, age))
    assert sorted(r.prune(tmp_path, 2, {"e"})) == ["c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "e"]


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_like_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old/venv").mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(r.shutil, "rmtree", lambda _folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            r.prune(tmp_path, 0, set())
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    r.prune(tmp_path, 0, set())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("install", "sentence"),
    [
        ({"project": "shop"}, "app.install.lock: is missing"),
        ({"locks": "locks"}, "app.install.requirement: is missing"),
        ({}, "app.install: give project and lock (a git repository), or requirement and locks (a package of an index)"),
        ({"project": "shop", "lock": "l", "requirement": "shop"}, "app.install.requirement: project is there, too; give project and lock"),
        ({"requirement": "shop==1.0", "locks": "l"}, "app.install.requirement: must be the name of a package, without a version"),
    ],
)
def test_contract_names_one_way_to_install(install: dict[str, str], sentence: str) -> None:
    contract = load(ROOT / "filter_plugins/app_contract.py", "evk_app_contract_of_installs")
    with pytest.raises(contract.ContractError) as error:
        contract.install_contract(install)
    assert str(error.value).startswith(sentence)
    assert contract.install_contract({"requirement": "shop", "locks": "locks"})["build"] == []
