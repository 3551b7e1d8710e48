# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""How a release is built and signed, on the controller. It is never shipped to a host.

The same commit gives the same bytes: entries are sorted, times are the commit's, owners are root. The signature is beside them.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ansible.module_utils.evenkeel_release import (
    NAMESPACE,
    Manifest,
    ReleaseError,
    check,
    extract,
    partial,
    sha256,
    ssh_keygen,
)
from ansible.module_utils.evenkeel_sbom import sbom
from ansible.module_utils.evenkeel_venv import (
    LOCK_NAME,
    canonical,
    digest_of,
    format_lock,
    parse_lock,
    parse_pins,
    wheel_identity,
)

SOURCE_EPOCH = "315532800"  # 1980: the first day that a zip file can name; for wheels built from published sources

# --- where it comes from ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a release is built from: a commit of a git repository, or a lock that pins a package of an index."""

    source: str
    commit: str
    lock: bytes
    lock_name: str
    name: str | None = None  # of the package, for an index
    repository: Path = Path()
    project: str = ""


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


def named_commit(repository: Path | None, ref: str) -> str | None:
    """The commit that a ref names, if it names one."""
    with contextlib.suppress(ReleaseError):
        return resolve(repository, ref) if repository else None
    return None


def file_at(repository: Path, commit: str, path: str) -> str:
    try:
        return git(repository, "show", f"{commit}:{path}") + "\n"
    except ReleaseError:
        raise ReleaseError(f"commit {commit[:12]} has no file {path}: check app.install in the app contract") from None


def from_git(repository: Path, ref: str, project: str, lock: str) -> Origin:
    """A commit, tag or branch. project, lock: paths below the repository."""
    commit = resolve(repository, ref)
    return Origin("git", commit, file_at(repository, commit, lock).encode(), lock, repository=repository, project=project)


def from_index(requirement: str, locks: Path, ref: str) -> Origin:
    """The package that `<locks>/<ref>.lock` pins."""
    known = sorted((path.name.removesuffix(".lock") for path in locks.glob("*.lock")), reverse=True)
    path = locks / f"{ref}.lock"
    if ref not in known:
        raise ReleaseError(f"there is no {path}; say which release with -e ref=…, there are: {', '.join(known) or 'none'}")
    lock = path.read_bytes()
    name = canonical(requirement)
    if name not in {pin.name for pin in parse_pins(lock, str(path))}:
        raise ReleaseError(f"{path} does not pin {requirement}, which app.install.requirement names")
    return Origin("index", digest_of(lock), lock, str(path), name)


def source_only(build: Sequence[str], lock: bytes, locks: Path) -> list[str]:
    """What of `build` concerns this lock. A name that only another release pins is left out; one that none pins is a mistake, and stays."""
    pinned = {pin.name for pin in parse_pins(lock, str(locks))}
    others = {pin.name for path in locks.glob("*.lock") for pin in parse_pins(path.read_bytes(), str(path))} - pinned
    return [name for name in build if canonical(name) not in others]


def unpack_project(origin: Origin, folder: Path) -> Path:
    """The project as it stands in the commit, below `folder`."""
    command = ["git", "-C", str(origin.repository), "-c", "tar.umask=0022", "archive", "--format=tar", origin.commit, origin.project]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        raise ReleaseError(f"commit {origin.commit[:12]} has no folder {origin.project}: check app.install.project in the app contract")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        extract(tar, folder)
    return folder / origin.project


def build_wheel(origin: Origin, folder: Path, epoch: int) -> Path:
    """The wheel of the project as it stands in that commit; `folder` is empty."""
    project, out = unpack_project(origin, folder / "source"), folder / "out"
    words = ["wheel", "-qq", "--no-deps", "--no-cache-dir", "--wheel-dir", str(out), str(project)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    # the modes of files are in the wheel
    built = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False, env=environment, umask=0o022)
    if built.returncode:
        raise ReleaseError(f"building {origin.project} failed: {' / '.join(built.stderr.strip().splitlines()[-3:])}")
    (wheel,) = out.glob("*.whl")
    return wheel


def sources(origin: Origin, folder: Path) -> Path | None:
    """The project's sources, unpacked below `folder`; None for a package of an index, whose wheel is all there is."""
    return unpack_project(origin, folder) if origin.source == "git" else None


def with_installer(lock: bytes, name: str, installer: str | None) -> bytes:
    """The lock, and when it has none itself the pin of uv, which installs it on hosts, from another lock."""
    if any(pin.name == "uv" for pin in parse_pins(lock, name)):
        return lock
    if installer is None:
        raise ReleaseError(f"{name} does not contain uv, which installs it on the host; add uv and resolve it again")
    complete: bytes = format_lock([*parse_pins(lock, name), *parse_pins(Path(installer).read_bytes(), installer, only="uv")])
    return complete


# --- the key -----------------------------------------------------------------------------------------------------------


def make_key(key: Path) -> bool:
    """Make the signing key unless it is there; returns whether it was made now."""
    if key.exists():
        return False
    key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (key.parent / f".{key.name}.lock").open("a") as lock, tempfile.TemporaryDirectory(dir=key.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if key.exists():
            return False
        new = Path(folder, "key")
        done = ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", NAMESPACE, "-f", str(new))
        if done.returncode:
            raise ReleaseError(f"making the signing key {key} failed: {' '.join(done.stderr.split())}")
        new.with_suffix(".pub").rename(f"{key}.pub")
        new.rename(key)
    return True


def public_key(key: Path) -> str:
    """The public half, one line. key: a private key, or the .pub file of one that an SSH agent holds."""
    public = key if key.suffix == ".pub" else Path(f"{key}.pub")
    with contextlib.suppress(OSError):
        return public.read_text().strip()
    done = ssh_keygen("-y", "-f", str(key))
    if done.returncode:
        raise ReleaseError(f"release_signing_key {key} is no key that can be used: {' '.join(done.stderr.split())}")
    return str(done.stdout).strip()


def sign(archive: Path, key: Path) -> Path:
    """Write the archive's signature beside it."""
    done = ssh_keygen("-q", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(archive))
    if done.returncode:
        raise ReleaseError(
            f"signing with {key} failed: {' '.join(done.stderr.split())}; a key with a passphrase signs through an SSH agent: "
            "ssh-add it, and set release_signing_key to its .pub file"
        )
    return Path(f"{archive}.sig")


# --- building ----------------------------------------------------------------------------------------------------------


def own_time(wheel: Path) -> datetime:
    """The newest date inside a wheel: what stands for the time of a commit, where there is none."""
    with zipfile.ZipFile(wheel) as archive:
        return datetime(*max(entry.date_time for entry in archive.infolist()), tzinfo=UTC)


def pin_own(wheel: Path) -> str:
    name, version = wheel_identity(wheel.name)
    return f"{name}=={version} --hash=sha256:{sha256(wheel)}\n"


def assemble(origin: Origin, app: str, folder: Path, python: str, house: Path) -> tuple[Path, int]:
    """Lay out the release below `folder`; returns (its folder, its time in seconds since 1970). house: its dependencies' wheels."""
    wheels, lock = sorted(house.glob("*.whl")), (house / LOCK_NAME).read_text()
    if origin.source == "git":
        committed = git(origin.repository, "show", "--no-patch", "--format=%cI", origin.commit)
        own = build_wheel(origin, folder / "build", int(datetime.fromisoformat(committed).timestamp()))
        wheels, lock = [*wheels, own], lock + pin_own(own)
    else:
        own = next(wheel for wheel in wheels if wheel_identity(wheel.name)[0] == origin.name)
        committed = own_time(own).isoformat()
    epoch = int(datetime.fromisoformat(committed).timestamp())
    version = wheel_identity(own.name)[1]
    release = folder / f"{version}-{origin.commit[:12]}"
    wheelhouse = release / "wheelhouse"
    wheelhouse.mkdir(parents=True)
    for wheel in wheels:
        shutil.copy(wheel, wheelhouse)
    (wheelhouse / LOCK_NAME).write_text(lock)
    (release / "sbom.cdx.json").write_text(sbom(app, release.name, own.name, epoch, sorted(wheelhouse.glob("*.whl"))))
    files = {str(path.relative_to(release)): sha256(path) for path in sorted(release.rglob("*")) if path.is_file()}
    manifest = Manifest(app, release.name, version, origin.commit, committed, python, files, origin.source)
    (release / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")
    return release, epoch


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


def existing(origin: Origin, directory: Path, signer: str) -> Path | None:
    """The whole archive of this origin that this signer signed, if there is one."""
    for archive in directory.glob(f"*-{origin.commit[:12]}.tar"):
        with contextlib.suppress(ReleaseError):
            check(archive, [signer])
            return archive
    return None


def build(
    origin: Origin,
    app: str,
    directory: Path,
    python: str,
    download: Callable[[bytes, str], Path],
    key: Path,
    gate: Callable[[Path], None],
) -> tuple[Path, bool]:
    """Build and sign the release unless it is there already; returns (archive, built now).

    directory: where releases are kept. python: the hosts' Python ("3.11"). download: gives a folder with the wheels of a lock, from its
    text and name. gate: raises for a release, as a folder, that must not be built; one that is there already is shown to it again.
    """
    make_key(key)
    there = existing(origin, directory, f"release {public_key(key)}")
    with partial(directory) as folder:
        if there:
            with tarfile.open(there) as tar:
                extract(tar, folder)
            gate(folder / there.name.removesuffix(".tar"))
            return there, False
        release, epoch = assemble(origin, app, folder, python, download(origin.lock, origin.lock_name))
        gate(release)
        archive = folder / f"{release.name}.tar"
        pack(release, archive, epoch)
        sign(archive, key).rename(directory / f"{archive.name}.sig")
        return archive.rename(directory / archive.name), True


def packages(release: Path) -> list[tuple[str, str]]:
    """Name and version of each package of an unpacked release, without the project of a repository: an index knows at most its namesake."""
    manifest = json.loads((release / "manifest.json").read_text())
    names = [pin.name for pin in parse_lock((release / "wheelhouse" / LOCK_NAME).read_bytes())]
    own = names[-1] if manifest["source"] == "git" else ""
    # of the wheels, for a lock can say `==2.*`; a local version (2.1.0+cpu) is known to no advisory
    wheels = [wheel_identity(path.name) for path in sorted((release / "wheelhouse").glob("*.whl"))]
    return [(name, version.partition("+")[0]) for name, version in wheels if name != own]
