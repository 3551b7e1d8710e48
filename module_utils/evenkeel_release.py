# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""A release: one signed tar archive with a manifest and a wheelhouse, built once on the controller and verified on every host.

Archive `<id>.tar`, with its signature `<id>.tar.sig` (`ssh-keygen -Y sign`, namespace `evenkeel-release`) beside it:

    <id>/manifest.json              see `Manifest`
    <id>/sbom.cdx.json              what it is made of, as CycloneDX
    <id>/wheelhouse/*.whl           the project and all that it depends on
    <id>/wheelhouse/requirements.lock   every wheel with its hash

What hosts need is here; how one is built is in `evenkeel_build`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")
COMMIT = re.compile(r"[0-9a-f]{7,64}\Z")
NAMESPACE = "evenkeel-release"
BUILD = "build it with playbooks/release.yml"


class ReleaseError(Exception):
    """What is wrong with a release, in one sentence."""


@dataclass(frozen=True)
class Manifest:
    """What a release says of itself. `files`: path below the release -> sha256, for every file but the manifest.

    source: `git` (commit is a commit id) or `index` (commit is the sha256 of the lock).
    """

    app: str
    id: str
    version: str
    commit: str
    committed: str
    python: str
    files: dict[str, str]
    source: str = "git"


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def partial(directory: Path) -> Iterator[Path]:
    """A temporary folder beside what will be made, removed at the end whatever happens."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- who signed it ---------------------------------------------------------------------------------------------------


def ssh_keygen(*arguments: str, signed: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ssh-keygen, which never asks anybody; `signed` is what it reads."""
    environment = {**os.environ, "SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"}
    try:
        with contextlib.ExitStack() as stack:
            stdin: IO[bytes] | int = stack.enter_context(signed.open("rb")) if signed else subprocess.DEVNULL
            return subprocess.run(["ssh-keygen", *arguments], stdin=stdin, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError as error:
        if signed and not signed.exists():
            raise ReleaseError(f"{signed} is missing") from None
        raise ReleaseError(f"ssh-keygen is missing, which signs and verifies releases: apt-get install openssh-client ({error})") from None


def verify(archive: Path, signature: str, signers: Sequence[str]) -> str:
    """The principal that signed the archive. signature: text of the file beside it; signers: lines of an allowed_signers file."""
    name = archive.name.removesuffix(".tar")
    if not [line for line in signers if line.strip() and not line.startswith("#")]:
        raise ReleaseError(f"release {name} cannot be verified: release_signers names nobody who may sign releases (see docs/releases.md)")
    with tempfile.TemporaryDirectory() as folder:
        allowed, written = Path(folder, "allowed_signers"), Path(folder, "signature")
        allowed.write_text("".join(f"{line.strip()}\n" for line in signers))
        written.write_text(f"{signature.strip()}\n")
        found = ssh_keygen("-Y", "find-principals", "-f", str(allowed), "-s", str(written))
        principal = found.stdout.partition("\n")[0].partition(",")[0].strip()
        if found.returncode or not principal:
            own = ssh_keygen("-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(written), signed=archive)
            if own.returncode:
                raise ReleaseError(
                    f"release archive {archive} is corrupt or was altered: its signature is none of these bytes; {BUILD} again"
                )
            key = re.search(r"SHA256:\S+", own.stdout)
            raise ReleaseError(
                f"release {name} is signed by a key that may not sign releases ({key.group() if key else 'unknown'}): "
                "let one of release_signers build it, or add the key there (see docs/releases.md)"
            )
        done = ssh_keygen("-Y", "verify", "-f", str(allowed), "-I", principal, "-n", NAMESPACE, "-s", str(written), signed=archive)
    if done.returncode == 0:
        return principal
    if "incorrect signature" in done.stderr:
        raise ReleaseError(f"release archive {archive} is corrupt or was altered: it is not what {principal} signed; {BUILD} again")
    said = " ".join((done.stderr or done.stdout).split())
    raise ReleaseError(f"release {name} is signed by {principal}, but this signature does not count for releases: {said}")


# --- checking and unpacking, on the controller and on hosts ----------------------------------------------------------


def contents(tar: tarfile.TarFile, folder: Path | None = None) -> dict[str, str]:
    """Path -> sha256 of every file of an archive, written below `folder` when it is given; all but plain files and folders is refused.

    `extractall(filter=)` is not in the hosts' Python 3.11.2.
    """
    found: dict[str, str] = {}
    for member in tar.getmembers():
        parts = Path(member.name).parts
        content = tar.extractfile(member) if member.isreg() else None
        if member.name.startswith("/") or ".." in parts or not (member.isdir() or (member.isreg() and content)):
            raise ReleaseError(f"the archive holds {member.name!r}, which is no plain file or folder below it")
        target = folder.joinpath(*parts) if folder else None
        if content is None:
            if target:
                target.mkdir(parents=True, exist_ok=True)
            continue
        digest = hashlib.sha256()
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") if target else contextlib.nullcontext() as handle:
            while block := content.read(1 << 20):
                digest.update(block)
                if handle:
                    handle.write(block)
        if target:
            target.chmod(0o755 if member.mode & 0o100 else 0o644)
        found["/".join(parts)] = digest.hexdigest()
    for path in folder.rglob("*") if folder else []:
        if path.is_dir():
            path.chmod(0o755)  # whatever root's umask is
    return found


def extract(tar: tarfile.TarFile, folder: Path) -> None:
    contents(tar, folder)


def read_manifest(archive: Path) -> Manifest:
    release = archive.name.removesuffix(".tar")
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"{release}/manifest.json")
            manifest = Manifest(**(json.load(member) if member else {}))
    except (tarfile.TarError, KeyError, ValueError, TypeError, OSError):
        raise ReleaseError(f"{archive} is not a release archive (no readable {release}/manifest.json in it)") from None
    if manifest.id != release or not ID_PATTERN.match(release):
        raise ReleaseError(f"{archive} is not the archive of release {manifest.id!r}: it has been renamed; {BUILD} again")
    return manifest


def differences(manifest: Manifest, present: Mapping[str, str]) -> list[str]:
    """Files that are missing, not named by the manifest, or not as it says. present: path -> sha256."""
    wrong = sorted(set(manifest.files) ^ set(present))
    return wrong or [path for path, digest in manifest.files.items() if present[path] != digest]


def inspect(archive: Path, signature: str, signers: Sequence[str]) -> tuple[Manifest, str]:
    """Verify the signature and then every file of an archive; returns (manifest, who signed it)."""
    signer = verify(archive, signature, signers)
    manifest = read_manifest(archive)
    with tarfile.open(archive) as tar:
        present = {path.removeprefix(f"{manifest.id}/"): digest for path, digest in contents(tar).items()}
    present.pop("manifest.json")
    wrong = differences(manifest, present)
    if wrong:
        raise ReleaseError(f"release {manifest.id} does not match its manifest: {', '.join(wrong[:3])}")
    return manifest, signer


def check(archive: Path, signers: Sequence[str]) -> tuple[Manifest, str]:
    """Verify an archive on the controller, its signature being beside it; returns (manifest, who signed it)."""
    if not archive.is_file():
        raise ReleaseError(f"there is no release archive {archive}: {BUILD}")
    try:
        signature = Path(f"{archive}.sig").read_text(errors="replace")
    except OSError:
        raise ReleaseError(f"release archive {archive} has no signature ({archive.name}.sig is missing): {BUILD} again") from None
    return inspect(archive, signature, signers)


def choose(directory: Path, wanted: str, commit: str | None = None) -> Path:
    """The archive that `wanted` names: a release id, a version, the start of a commit (7 digits), or `latest` (built or named last).

    commit: what `wanted` names in a git repository, when it names anything there.
    """
    archives = sorted(directory.glob("*.tar"))
    if not archives:
        raise ReleaseError(f"no release has been built in {directory}: build one with playbooks/release.yml")
    if wanted == "latest":
        return max(archives, key=lambda path: path.stat().st_mtime)
    names = {archive.name.removesuffix(".tar"): archive for archive in archives}
    ways = [
        [name for name in names if name == wanted],
        [name for name in names if COMMIT.match(wanted) and name.rpartition("-")[2].startswith(wanted[:12])],
        [name for name in names if commit and name.rpartition("-")[2] == commit[:12]],
        [name for name in names if name.rpartition("-")[0] == wanted],
    ]
    found = next((way for way in ways if way), [])
    if len(found) == 1:
        return names[found[0]]
    if commit and not found:
        raise ReleaseError(
            f"'{wanted}' is commit {commit[:12]}, of which there is no release yet: build it with playbooks/release.yml -e ref={wanted}"
        )
    raise ReleaseError(f"'{wanted}' names {len(found)} releases; there are: {', '.join(names)}")


def damage(folder: Path) -> list[str]:
    """What is missing or altered in an unpacked release; nothing when it is whole."""
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError):
        return ["manifest.json"]
    return [path for path, digest in manifest.files.items() if not (folder / path).is_file() or sha256(folder / path) != digest]


def unpack(archive: Path, releases: Path, signature: str, signers: Sequence[str], python: str, app: str = "") -> tuple[Path, bool]:
    """Verify an archive and unpack it below `releases`; returns (folder, unpacked now). Nothing appears before all is verified.

    python: version of the interpreter that will run it, `3.11.2`. app: whose release it must be, empty for any. A damaged release gets
    its files back and keeps what else is in it.
    """
    target = releases / archive.name.removesuffix(".tar")
    if not damage(target):
        return target, False
    manifest, _signer = inspect(archive, signature, signers)
    if app and manifest.app != app:
        raise ReleaseError(f"release {manifest.id} is one of {manifest.app}, not of {app}")
    if python.split(".")[:2] != manifest.python.split("."):
        raise ReleaseError(f"release {manifest.id} is made for Python {manifest.python}, but this host has Python {python}")
    with partial(releases) as folder:
        with tarfile.open(archive) as tar:
            extract(tar, folder)
        if not target.exists():
            (folder / manifest.id).rename(target)
            return target, True
        for part in sorted((folder / manifest.id).iterdir(), key=lambda path: path.name == "manifest.json"):
            if (target / part.name).exists():
                (target / part.name).rename(folder / f"old-{part.name}")
            part.rename(target / part.name)
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


def remove(folder: Path) -> None:
    """Remove a release. At no moment does one with missing parts stand there: what an interruption leaves is swept later."""
    shutil.rmtree(folder if folder.name.startswith(".") else folder.rename(folder.with_name(f".partial-gone-{folder.name}")))


def prune(releases: Path, keep: int, protected: set[str]) -> list[str]:
    """Remove what is superfluous. Returns the releases that were removed."""
    gone = superfluous(releases, keep, protected)
    for folder in gone:
        remove(folder)
    return [folder.name for folder in gone if not folder.name.startswith(".")]
