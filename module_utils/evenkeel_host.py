# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""What the modules do to a host's file system: compare, stage, place, describe. Standard library only."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STAGE_PREFIX = ".evenkeel-"
DIFF_LIMIT_BYTES = 104448
HIDDEN = "content hidden: the entry is secret"

_STAGED = re.compile(re.escape(STAGE_PREFIX) + r"[0-9a-f]{16}-(\d+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Attributes:
    """Owner, group and mode that a path has or shall have."""

    uid: int
    gid: int
    mode: int


def uid_of(owner: str) -> int | None:
    """Return the number of a user, or None when the host does not know it."""
    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError:
        return int(owner) if owner.isdecimal() else None


def gid_of(group: str) -> int | None:
    """Return the number of a group, or None when the host does not know it."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return int(group) if group.isdecimal() else None


def user_name(uid: int) -> str:
    """Return a user's name, or its number when it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Return a group's name, or its number when it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def lstat(path: str) -> os.stat_result | None:
    """Return what is at a path, links not followed, or None."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def attributes_of(found: os.stat_result) -> Attributes:
    """Return the attributes in a stat result."""
    return Attributes(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))


def content_hash(path: str) -> str:
    """Return the SHA-256 of the file that a path leads to, `absent` when there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    except IsADirectoryError:
        return "directory"
    return digest.hexdigest()


def set_attributes(path: str, wanted: Attributes) -> bool:
    """Give a file or directory its owner, group and mode; say whether anything changed."""
    found = attributes_of(os.stat(path))
    if (found.uid, found.gid) != (wanted.uid, wanted.gid):
        os.chown(path, wanted.uid, wanted.gid)
    if found != wanted:
        os.chmod(path, wanted.mode)  # after chown, which clears the set-id bits
    return found != wanted


def make_directory(path: str, wanted: Attributes) -> None:
    """Create a directory and the missing ones above it, all with the wanted attributes, as `file` does."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        make_directory(parent, wanted)
    os.mkdir(path, 0o700)
    set_attributes(path, wanted)


def stage(dest: str, data: bytes, wanted: Attributes) -> str:
    """Write the future content of dest beside it, complete, with its final attributes and on the disk; return its path.

    The name tells which process wrote it, so that `sweep` can remove what an interrupted run left behind.
    """
    directory, name = os.path.split(dest)
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    path = os.path.join(directory, f"{STAGE_PREFIX}{digest}-{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if _is_regular(dest):
                shutil.copystat(dest, path)  # access lists and other extended attributes stay, as with `copy`
                os.chmod(path, 0o600)
            file.write(data)
            file.flush()
            os.chown(file.fileno(), wanted.uid, wanted.gid)
            os.chmod(file.fileno(), wanted.mode)
            os.utime(file.fileno())
            os.fsync(file.fileno())
    except BaseException:
        discard(path)
        raise
    return path


def place(staged: str, dest: str) -> None:
    """Put a staged file in its place, in one step that no reader and no power cut can see half done."""
    os.rename(staged, dest)
    sync_directory(os.path.dirname(dest))


def place_link(target: str, dest: str, uid: int, gid: int) -> None:
    """Make dest a symbolic link to target, replacing an older link in one step."""
    digest = hashlib.sha256(os.fsencode(os.path.basename(dest))).hexdigest()[:16]
    staged = os.path.join(os.path.dirname(dest), f"{STAGE_PREFIX}{digest}-{os.getpid()}-{secrets.token_hex(4)}")
    os.symlink(target, staged)
    try:
        os.lchown(staged, uid, gid)
        place(staged, dest)
    except BaseException:
        discard(staged)
        raise


def write_file(dest: str, data: bytes, wanted: Attributes) -> None:
    """Replace a file's content atomically."""
    place(stage(dest, data, wanted), dest)


def discard(path: str) -> None:
    """Remove a staged file if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove(path: str) -> None:
    """Remove whatever is at a path; a link, not what it leads to."""
    found = lstat(path)
    if found is None:
        return
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)
    sync_directory(os.path.dirname(path))


def sweep(directories: Iterable[str]) -> None:
    """Remove staged files whose process is gone: what an interrupted run left behind."""
    for directory in sorted(set(directories)):
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            match = _STAGED.fullmatch(name)
            if match and not os.path.exists(f"/proc/{match.group(1)}"):
                discard(os.path.join(directory, name))


def sync_directory(path: str) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems know no fsync of directories
        pass
    finally:
        os.close(descriptor)


def _is_regular(path: str) -> bool:
    found = lstat(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def content_diff(dest: str, source: str, before: bytes | None, after: bytes, *, secret: bool) -> dict[str, Any]:
    """Describe a change of content in the form that Ansible's callbacks print."""
    diff: dict[str, Any] = {"before_header": dest, "after_header": source}
    if secret:
        return {"prepared": f"--- before: {dest}\n+++ after: {source}\n({HIDDEN})\n"}
    for side, prefix, data in (("before", "dst", before or b""), ("after", "src", after)):
        if len(data) > DIFF_LIMIT_BYTES:
            diff[f"{prefix}_larger"] = DIFF_LIMIT_BYTES
        elif b"\0" in data:
            diff[f"{prefix}_binary"] = 1
        else:
            diff[side] = data.decode("utf-8", "replace")
    return diff


def state_diff(dest: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Describe a change of anything but content: only what differs is shown."""
    keys = [key for key in after if before.get(key) != after[key]]
    return {
        "before_header": dest,
        "after_header": dest,
        "before": {"path": dest, **{key: before[key] for key in keys if key in before}},
        "after": {"path": dest, **{key: after[key] for key in keys}},
    }


def describe(attributes: Attributes) -> dict[str, str]:
    """Return attributes as people write them."""
    return {
        "owner": user_name(attributes.uid),
        "group": group_name(attributes.gid),
        "mode": f"{attributes.mode:04o}",
    }
