# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""A release: one tar archive with a manifest and a wheelhouse, built once on the controller and verified on every host.

Archive `<id>.tar`, with `<id>.tar.sha256` (sha256sum format) beside it:

    <id>/manifest.json              see `Manifest`
    <id>/wheelhouse/*.whl           the project and all that it depends on
    <id>/wheelhouse/requirements.lock   every wheel with its hash

The same commit gives the same bytes: entries are sorted, times are the commit's, owners are root.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")


class ReleaseError(Exception):
    """What is wrong with a release, in one sentence."""


@dataclass(frozen=True)
class Manifest:
    """What a release says of itself. `files`: path below the release -> sha256, for every file but the manifest."""

    app: str
    id: str
    version: str
    commit: str
    committed: str
    python: str
    files: dict[str, str]


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack plain files and folders, and refuse all else (`extractall(filter=)` is not in the hosts' Python 3.11.2)."""
    for member in tar.getmembers():
        parts = Path(member.name).parts
        content = tar.extractfile(member) if member.isreg() else None
        if member.name.startswith("/") or ".." in parts or not (member.isdir() or (member.isreg() and content)):
            raise ReleaseError(f"the archive holds {member.name!r}, which is no plain file or folder below it")
        target = folder.joinpath(*parts)
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as handle:
            shutil.copyfileobj(content, handle)
        target.chmod(0o755 if member.mode & 0o100 else 0o644)


# --- building, on the controller -----------------------------------------------------------------------------------


def git(repository: Path, *arguments: str) -> str:
    """Run git in the repository; its error becomes a ReleaseError."""
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return done.stdout.strip()


def resolve(repository: Path, ref: str) -> str:
    """The full commit id that a branch, tag or commit names."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except ReleaseError:
        raise ReleaseError(f"'{ref}' is no commit, tag or branch of {repository}: see `git tag` and `git log --oneline`") from None


def file_at(repository: Path, commit: str, path: str) -> str:
    try:
        return git(repository, "show", f"{commit}:{path}") + "\n"
    except ReleaseError:
        raise ReleaseError(f"commit {commit[:12]} has no file {path}: check app.install in the app contract") from None


@contextlib.contextmanager
def partial(directory: Path) -> Iterator[Path]:
    """A temporary folder beside what will be made, removed at the end whatever happens."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_wheel(repository: Path, commit: str, project: str, target: Path, epoch: str) -> Path:
    """The wheel of the project as it stands in that commit."""
    with partial(target) as folder:
        archive = subprocess.run(
            ["git", "-C", str(repository), "archive", "--format=tar", commit, project], capture_output=True, check=False
        )
        if archive.returncode:
            raise ReleaseError(f"commit {commit[:12]} has no folder {project}: check app.install.project in the app contract")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            extract(tar, folder)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-qq",
            "--no-deps",
            "--no-cache-dir",
            "--wheel-dir",
            str(folder / "out"),
            str(folder / project),
        ]
        built = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "SOURCE_DATE_EPOCH": epoch})
        if built.returncode:
            raise ReleaseError(f"building {project} failed: {' / '.join(built.stderr.strip().splitlines()[-3:])}")
        (wheel,) = (folder / "out").glob("*.whl")
        return wheel.rename(target / wheel.name)


def build(
    repository: Path,
    ref: str,
    app: str,
    project: str,
    lock: str,
    directory: Path,
    python: str,
    download: Callable[[Path], Path],
) -> tuple[Path, bool]:
    """Build the release of `ref` unless it is there already; returns (archive, built now).

    repository: a git checkout. project, lock: paths below it. directory: where releases are kept. python: the hosts' Python
    ("3.11"). download: gives a folder with the wheels of a lock file.
    """
    commit = resolve(repository, ref)
    for archive in directory.glob(f"*-{commit[:12]}.tar"):
        if problem(archive) is None:
            return archive, False
    epoch = git(repository, "show", "--no-patch", "--format=%ct", commit)
    with partial(directory) as folder:
        lock_text = file_at(repository, commit, lock)
        lock_file = folder / "requirements.lock"
        lock_file.write_text(lock_text)
        own = build_wheel(repository, commit, project, folder, epoch)
        name, version = own.name.split("-")[:2]
        release = f"{version}-{commit[:12]}"
        archive = directory / f"{release}.tar"
        wheelhouse = folder / release / "wheelhouse"
        wheelhouse.mkdir(parents=True)
        for wheel in [*download(lock_file).glob("*.whl"), own]:
            shutil.copy(wheel, wheelhouse)
        (wheelhouse / "requirements.lock").write_text(f"{lock_text}\n{name}=={version} --hash=sha256:{sha256(own)}\n")
        files = {f"wheelhouse/{path.name}": sha256(path) for path in sorted(wheelhouse.iterdir())}
        committed = git(repository, "show", "--no-patch", "--format=%cI", commit)
        manifest = Manifest(app, release, version, commit, committed, python, files)
        (folder / release / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")
        pack(folder / release, folder / archive.name, int(epoch))
        (folder / f"{archive.name}.sha256").write_text(f"{sha256(folder / archive.name)}  {archive.name}\n")
        (folder / f"{archive.name}.sha256").rename(f"{archive}.sha256")
        (folder / archive.name).rename(archive)
    return archive, True


def pack(folder: Path, archive: Path, epoch: int) -> None:
    """A tar whose bytes depend on the content alone."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        entry.mtime = epoch
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in [folder, *sorted(folder.rglob("*"))]:
            tar.add(path, arcname=str(path.relative_to(folder.parent)), recursive=False, filter=plain)


# --- checking and unpacking, on the controller and on hosts ----------------------------------------------------------


def expected_sha256(archive: Path) -> str:
    """The hash that was written beside the archive when it was built."""
    try:
        return Path(f"{archive}.sha256").read_text().split()[0]
    except (OSError, IndexError):
        raise ReleaseError(f"{archive}.sha256 is missing or empty: build the release again with playbooks/release.yml") from None


def problem(archive: Path) -> str | None:
    """What is wrong with an archive on the controller, in one sentence; None when it is whole."""
    try:
        if not archive.is_file():
            return f"there is no release archive {archive}: build it with playbooks/release.yml"
        if sha256(archive) != expected_sha256(archive):
            return (
                f"release archive {archive} is corrupt (its sha256 is not the one recorded when it was built): "
                f"delete it and build it again with playbooks/release.yml"
            )
        read_manifest(archive)
    except ReleaseError as error:
        return str(error)
    return None


def read_manifest(archive: Path) -> Manifest:
    release = archive.name.removesuffix(".tar")
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"{release}/manifest.json")
            data = json.load(member) if member else {}
        return Manifest(**data)
    except (tarfile.TarError, KeyError, ValueError, TypeError, OSError):
        raise ReleaseError(f"{archive} is not a release archive (no readable {release}/manifest.json in it)") from None


def choose(directory: Path, wanted: str) -> Path:
    """The archive that `wanted` names: a release id, the start of a commit, or `latest` (newest by commit time)."""
    archives = sorted(directory.glob("*.tar"))
    if not archives:
        raise ReleaseError(f"no release has been built in {directory}: build one with playbooks/release.yml")
    if wanted == "latest":
        return max(archives, key=lambda path: path.stat().st_mtime)
    found = [a for a in archives if a.name == f"{wanted}.tar" or a.name.removesuffix(".tar").rpartition("-")[2].startswith(wanted[:12])]
    if len(found) == 1:
        return found[0]
    known = ", ".join(archive.name.removesuffix(".tar") for archive in archives)
    raise ReleaseError(f"'{wanted}' names {len(found)} releases; there are: {known}")


def unpack(archive: Path, digest: str, releases: Path) -> tuple[Path, bool]:
    """Verify an archive and unpack it below `releases`; returns (folder, unpacked now). Nothing appears before all is verified."""
    release = archive.name.removesuffix(".tar")
    if not ID_PATTERN.match(release):
        raise ReleaseError(f"'{release}' cannot be the name of a release")
    target = releases / release
    if (target / "manifest.json").exists():
        return target, False
    if sha256(archive) != digest:
        raise ReleaseError(f"{archive} is corrupt on this host: its sha256 is not {digest}; run the deploy again to send it anew")
    manifest = read_manifest(archive)
    with partial(releases) as folder:
        with tarfile.open(archive) as tar:
            extract(tar, folder)
        unpacked = folder / release
        present = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()} - {"manifest.json"}
        wrong = sorted(set(manifest.files) ^ present) or [f for f, d in manifest.files.items() if sha256(unpacked / f) != d]
        if wrong:
            raise ReleaseError(f"release {release} does not match its manifest: {', '.join(wrong[:3])}")
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target, True


def superfluous(releases: Path, keep: int, protected: set[str]) -> list[Path]:
    """What `prune` removes: leftovers of interrupted runs, and all but the newest `keep` releases; never a protected one, or the one that
    runs (which a link beside the folder leads to)."""
    if not releases.is_dir():
        return []
    running = {link.resolve().name for link in releases.parent.iterdir() if link.is_symlink()}
    folders = sorted((p for p in releases.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    old = [folder for folder in folders[::-1][keep:] if folder.name not in protected | running]
    return [*sorted(releases.glob(".partial-*")), *old]


def prune(releases: Path, keep: int, protected: set[str]) -> list[str]:
    """Remove what is superfluous. Returns the releases that were removed."""
    gone = superfluous(releases, keep, protected)
    for folder in gone:
        shutil.rmtree(folder)
    return [folder.name for folder in gone if not folder.name.startswith(".")]
