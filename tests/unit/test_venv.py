"""The `venv` module: what it makes of locks and wheels."""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils import evenkeel_venv, evenkeel_wheelhouse
from ansible.module_utils.evenkeel_venv import LockError, Requirement

HASH = "a" * 64
UV = f"uv==0.9.1 --hash=sha256:{HASH}\n"


def test_reads_a_lock_as_uv_writes_it() -> None:
    text = (
        "# made by uv\n"
        "celery[redis]==5.6.3 \\\n"
        f"    --hash=sha256:{'1' * 64} \\\n"
        f"    --hash=sha256:{'2' * 64}\n"
        "    # via app\n"
        f"Async_Timeout==5.0.1 --hash=sha256:{'3' * 64}  # why\n" + UV
    )
    found = evenkeel_venv.parse_lock(text.encode())
    assert [item.pin for item in found] == ["celery==5.6.3", "async-timeout==5.0.1", "uv==0.9.1"]
    assert found[0].hashes == {"1" * 64, "2" * 64}
    assert evenkeel_venv.parse_lock(evenkeel_venv.format_lock(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no package"),
        (f"celery==5.6.3 --hash=sha256:{HASH}\n", "does not contain uv"),
        (UV + "celery\n", "line 2: celery is not pinned"),
        (UV + "celery>=5 --hash=sha256:" + HASH, "not pinned"),
        (UV + "\ncelery==5.6.3\n", "line 3: celery has no sha256 hash"),
        (UV + "celery==5.6.3 --hash=md5:abc", "no sha256 hash"),
        (UV + f"tomli==2 ; python_version < '3.11' --hash=sha256:{HASH}", "has an environment marker"),
        (UV + "--index-url https://example.invalid/", "options have no place in a lock (--index-url)"),
        (UV + "./app.whl", "./app.whl is not pinned"),
    ],
)
def test_refuses_a_lock(text: str, message: str) -> None:
    with pytest.raises(LockError) as caught:
        evenkeel_venv.parse_lock(text.encode(), "patroni.lock")
    assert message in str(caught.value)
    assert "patroni.lock" in str(caught.value)


def wheel(directory: Path, name: str, data: bytes = b"wheel") -> str:
    (directory / name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_wheels_are_chosen_by_their_hash(tmp_path: Path) -> None:
    good = wheel(tmp_path, "psycopg2_binary-2.9.13-cp311-cp311-manylinux_2_17_x86_64.whl", b"right")
    wheel(tmp_path, "psycopg2_binary-2.9.12-cp311-cp311-manylinux_2_17_x86_64.whl", b"older")
    chosen = evenkeel_venv.check_wheels([Requirement("psycopg2-binary", "2.9.13", frozenset([good]))], str(tmp_path))
    assert chosen == ["psycopg2_binary-2.9.13-cp311-cp311-manylinux_2_17_x86_64.whl"]


def test_missing_and_corrupt_wheels_are_named_in_one_line(tmp_path: Path) -> None:
    wheel(tmp_path, "celery-5.6.3-py3-none-any.whl")
    wanted = [
        Requirement("celery", "5.6.3", frozenset([HASH])),
        Requirement("kombu", "5.6.2", frozenset([HASH])),
    ]
    with pytest.raises(LockError) as caught:
        evenkeel_venv.check_wheels(wanted, str(tmp_path))
    text = str(caught.value)
    assert "celery-5.6.3-py3-none-any.whl is corrupt" in text
    assert "the wheel of kombu==5.6.2 is missing" in text
    assert "\n" not in text


def test_platforms_reach_debian_12_and_no_further() -> None:
    tags = evenkeel_venv.platform_tags("x86_64")
    assert tags[0] == "manylinux_2_36_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(tags)
    assert not any("2_37" in tag for tag in tags)
    assert "manylinux1_aarch64" not in evenkeel_venv.platform_tags("aarch64")
    command = evenkeel_venv.pip_command("python", "l", "d", python_version="3.11", architecture="x86_64")
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version=3.11"} <= set(command)


def test_packages_built_from_source(tmp_path: Path) -> None:
    items = [Requirement("uv", "1", frozenset([HASH])), Requirement("python-etcd", "0.4.5", frozenset([HASH]))]
    binary, source = evenkeel_venv.split_built(items, ["python_etcd"])
    assert ([item.name for item in binary], [item.name for item in source]) == (["uv"], ["python-etcd"])
    with pytest.raises(LockError, match="build names ydiff"):
        evenkeel_venv.split_built(items, ["ydiff"])
    with pytest.raises(LockError, match="made no wheel"):
        evenkeel_venv.with_built(source[0], str(tmp_path))
    digest = wheel(tmp_path, "python_etcd-0.4.5-py3-none-any.whl")
    assert evenkeel_venv.with_built(source[0], str(tmp_path)).hashes == {digest}
    (tmp_path / "python_etcd-0.4.5-py3-none-any.whl").rename(tmp_path / "python_etcd-0.4.5-cp311-cp311-linux_x86_64.whl")
    with pytest.raises(LockError, match="not pure Python"):
        evenkeel_venv.with_built(source[0], str(tmp_path))


# On the host


def test_another_python_is_refused(library: dict[str, ModuleType]) -> None:
    venv = library["venv"]
    venv.check_python(sys.executable, "{}.{}".format(*sys.version_info[:2]))
    with pytest.raises(LockError, match=r"but the lock is for 3\.9"):
        venv.check_python(sys.executable, "3.9")
    with pytest.raises(LockError, match="does not run on this host"):
        venv.check_python("/not/there/python", "3.11")


def test_only_an_environment_is_replaced(library: dict[str, ModuleType], tmp_path: Path) -> None:
    check = library["venv"].check_place
    check(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    check(str(tmp_path / "empty"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("x")
    with pytest.raises(LockError, match="is not a virtual environment"):
        check(str(tmp_path / "data"))
    (tmp_path / "link").symlink_to("data")
    with pytest.raises(LockError, match="is a symbolic link"):
        check(str(tmp_path / "link"))
    (tmp_path / "data/pyvenv.cfg").write_text("")
    check(str(tmp_path / "data"))


def test_stamp_decides(library: dict[str, ModuleType], tmp_path: Path) -> None:
    venv = library["venv"]
    wanted = {"requirements": "d", "python": "/usr/bin/python3", "python_version": "3.11"}
    (tmp_path / "bin").mkdir()
    stamp = tmp_path / evenkeel_venv.STAMP_NAME
    for text in ("", "[]", "{}", json.dumps({**wanted, "requirements": "other"})):
        stamp.write_text(text)
        assert not venv.is_current(str(tmp_path), wanted)
    stamp.write_text(json.dumps({**wanted, "packages": ["uv==1"]}))
    assert not venv.is_current(str(tmp_path), wanted), "its python is gone"
    (tmp_path / "bin/python").symlink_to("/bin/sh")
    assert venv.is_current(str(tmp_path), wanted)


def test_exchange_puts_the_old_one_aside(library: dict[str, ModuleType], tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    library["venv"].exchange(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "old/who").read_text() == "new"


def test_uv_comes_out_of_its_wheel(library: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "uv-0.9.1-py3-none-manylinux_2_17_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("uv-0.9.1.data/scripts/uv", "#!/bin/sh\n")
        archive.writestr("uv-0.9.1.data/scripts/uvx", "")
    program = Path(library["venv"].unpack_uv(str(path), str(tmp_path)))
    assert program.stat().st_mode & 0o777 == 0o755
    path.write_bytes(b"no zip")
    with pytest.raises(LockError, match="is corrupt"):
        library["venv"].unpack_uv(str(path), str(tmp_path))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", ".hidden", "a/b"])
def test_archive_with_strange_names_is_refused(library: dict[str, ModuleType], tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "x", arcname=name)
    with pytest.raises(LockError, match="unexpected"):
        library["venv"].unpack(str(tmp_path / "t.tar"), str(tmp_path / "out"))


# On the controller


def args(**more: Any) -> dict[str, Any]:
    return {"build": [], "architecture": "x86_64", "python_version": "3.11", **more}


def fake_pip(monkeypatch: pytest.MonkeyPatch, data: bytes) -> list[list[str]]:
    """Let `pip download` deliver one wheel of uv with these bytes."""
    ran: list[list[str]] = []

    def run_pip(_name: str, command: list[str]) -> None:
        ran.append(command)
        destination = next(word.partition("=")[2] for word in command if word.startswith("--dest="))
        wheel(Path(destination), "uv-0.9.1-py3-none-manylinux_2_17_x86_64.whl", data)

    monkeypatch.setattr(evenkeel_wheelhouse, "run_pip", run_pip)
    return ran


def test_wheels_are_downloaded_once_and_again_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = evenkeel_wheelhouse.fetch
    lock = f"uv==0.9.1 --hash=sha256:{hashlib.sha256(b'right').hexdigest()}\n".encode()
    ran = fake_pip(monkeypatch, b"right")
    archive, _house = fetch(tmp_path, lock, "a.lock", args())
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == ["requirements.lock", "uv-0.9.1-py3-none-manylinux_2_17_x86_64.whl"]
    assert fetch(tmp_path, lock, "a.lock", args())[0] == archive
    assert len(ran) == 1
    wheel(archive.with_suffix(""), "uv-0.9.1-py3-none-manylinux_2_17_x86_64.whl", b"bit rot")
    fetch(tmp_path, lock, "a.lock", args())
    assert len(ran) == 2
    assert not list(tmp_path.glob("*.part*"))


def test_an_incomplete_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = evenkeel_wheelhouse.fetch
    fake_pip(monkeypatch, b"wrong")
    with pytest.raises(LockError, match="is corrupt"):
        fetch(tmp_path, UV.encode(), "a.lock", args())
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
