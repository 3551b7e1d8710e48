"""The `files` module: what it refuses, what it plans, and how it places files."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils import evenkeel_files, evenkeel_host

OWNER = {"owner": str(os.getuid()), "group": str(os.getgid())}
DEAD_PROCESS = 2**22 + 1  # above the largest process number of Linux


# What an entry may say


@pytest.mark.parametrize(
    "entry",
    [
        {"dest": "/etc/a", "content": ""},
        {"dest": "/etc/a", "content": "text", "secret": True, "validate": "prog --check %s"},
        {"dest": "/etc/a", "content": 5432},
        {"dest": "/etc/a", "template": "a.j2", "vars": {"item": 1}, "mode": "u=rw,g=r,o="},
        {"dest": "/etc/a", "copy": "a.bin", "owner": 33, "group": "ssl-cert", "mode": "4755"},
        {"dest": "/etc/-a b'c\"d ü", "link": "../b"},
        {"dest": "/etc/a/", "state": "directory", "mode": "a+rX"},
        {"dest": "/etc/a", "state": "absent"},
        {"dest": "/etc/a", "content": "x", "mode": None, "link": None, "state": None},
    ],
)
def test_accepts(entry: dict[str, Any]) -> None:
    assert evenkeel_files.check_entries([entry]) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "must be a mapping"),
        ({}, "needs dest"),
        ({"dest": "etc/a", "content": "x"}, "must be an absolute path"),
        ({"dest": "/", "state": "absent"}, "must not be the root directory"),
        ({"dest": "//", "state": "absent"}, "must not be the root directory"),
        ({"dest": "/etc/../a", "state": "absent"}, "must not contain '..'"),
        ({"dest": "/etc/a\0", "content": "x"}, "NUL"),
        ({"dest": "/etc/a"}, "needs exactly one of template, copy, content, link, state; it has none"),
        ({"dest": "/etc/a", "content": "x", "copy": "a"}, "it has copy and content"),
        ({"dest": "/etc/a", "content": "x", "state": "absent"}, "it has content and state"),
        ({"dest": "/etc/a", "src": "x", "content": "x"}, "unknown key 'src'"),
        ({"dest": "/etc/a", 5: "x", "content": "x"}, "unknown key '5'"),
        ({"dest": "/etc/a", "state": "file"}, "state must be one of directory, absent; it is 'file'"),
        ({"dest": "/etc/a", "content": {"a": 1}}, "content must be text; it is a mapping"),
        ({"dest": "/etc/a", "content": True}, "content must be text; it is a boolean"),
        ({"dest": "/etc/a", "template": ""}, "template must be a non-empty text"),
        ({"dest": "/etc/a/", "content": "x"}, "must not end with /"),
        ({"dest": "/etc/a", "content": "x", "mode": 420}, "mode must be a quoted text"),
        ({"dest": "/etc/a", "content": "x", "mode": "rw-r--r--"}, "mode must be octal"),
        ({"dest": "/etc/a", "content": "x", "mode": "0999"}, "mode must be octal"),
        ({"dest": "/etc/a", "link": "b", "mode": "0644"}, "mode has no meaning for a link"),
        ({"dest": "/etc/a", "state": "absent", "owner": "root"}, "owner has no meaning for state: absent"),
        ({"dest": "/etc/a", "content": "x", "owner": ["a"]}, "owner must be a name or a number; it is a list"),
        ({"dest": "/etc/a", "content": "x", "validate": "prog"}, "must be a command that contains %s"),
        ({"dest": "/etc/a", "state": "directory", "validate": "prog %s"}, "validate is only for files"),
        ({"dest": "/etc/a", "link": "b", "secret": True}, "secret is only for files"),
        ({"dest": "/etc/a", "content": "x", "secret": "yes"}, "secret must be true or false"),
        ({"dest": "/etc/a", "content": "x", "vars": {"a": 1}}, "vars is only for template"),
        ({"dest": "/etc/a", "template": "x", "vars": [1]}, "vars must be a mapping"),
    ],
)
def test_refuses(entry: Any, message: str) -> None:
    problems = evenkeel_files.check_entries([entry])
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("entry 1") for problem in problems)


def test_every_wrong_entry_is_named() -> None:
    problems = evenkeel_files.check_entries([{"dest": "a", "content": "x"}, {"dest": "/ok", "content": "x"}, {"dest": "/b"}])
    assert [problem.split(":")[0] for problem in problems] == ["entry 1 (a)", "entry 3 (/b)"]


@pytest.mark.parametrize("second", ["/etc/a", "/etc//a", "/etc/a/", "/etc/./a"])
def test_two_entries_for_one_path(second: str) -> None:
    entries = [{"dest": "/etc/a", "state": "directory"}, {"dest": second, "state": "directory"}]
    assert "the same dest as entry 1" in evenkeel_files.check_entries(entries)[0]


@pytest.mark.parametrize("upper", [{"content": "x"}, {"state": "absent"}])
def test_entry_below_something_that_is_no_directory(upper: dict[str, str]) -> None:
    problems = evenkeel_files.check_entries([{"dest": "/etc/a/b", "content": "x"}, {"dest": "/etc/a", **upper}])
    assert problems
    assert "lies below /etc/a" in problems[0]


def test_defaults_are_filled_in() -> None:
    defaults = {"owner": "root", "group": "adm"}
    file = evenkeel_files.normalise({"dest": "/a//b", "content": "x", "group": 5}, defaults)
    assert (file["dest"], file["owner"], file["group"], file["mode"]) == ("/a/b", "root", "5", "0644")
    assert evenkeel_files.normalise({"dest": "/a", "state": "directory"}, defaults)["mode"] == "0755"
    assert "owner" not in evenkeel_files.normalise({"dest": "/a", "state": "absent"}, defaults)


def test_payload_comes_back_and_shows_nothing() -> None:
    value = [{"content": "pässword\udcff", "n": 1}]
    packed = evenkeel_files.encode_payload(value)
    assert "password" not in packed
    assert evenkeel_files.decode_payload(packed) == value
    for damaged in (packed[:-8], "!" + packed[1:], ""):
        with pytest.raises(evenkeel_files.PayloadError):
            evenkeel_files.decode_payload(damaged)


# What happens on a host


def raw(path: Path, kind: str = "file", **more: Any) -> dict[str, Any]:
    """An entry as the controller sends it."""
    entry = {"dest": str(path), "kind": kind, "label": f"entry ({path})", "secret": False, "source": str(path)}
    if kind in ("file", "directory"):
        entry["mode"] = "0644" if kind == "file" else "0755"
    if kind != "absent":
        entry.update(OWNER)
    if "text" in more:
        entry["data"] = base64.b64encode(more.pop("text").encode()).decode()
    return {**entry, **more}


class Host:
    """Runs the module's phases in this process."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.ran: list[list[str]] = []
        self.validator_code = 0

    def run_command(self, words: list[str], **_options: Any) -> tuple[int, str, str]:
        self.ran.append(words)
        return self.validator_code, "", "it is wrong: hunter2"

    def run(self, *entries: dict[str, Any], check_mode: bool = False) -> list[str]:
        made = [self.module.Entry(entry, 0o022) for entry in entries]
        problems = self.module.plan_all(made, check_mode=check_mode)
        if problems:
            raise AssertionError(problems)
        changed = [entry.dest for entry in made if entry.changed]
        self.diffs = [diff for entry in made if entry.changed for diff in entry.diffs()]
        if changed and not check_mode:
            self.module.apply_all(self, made, [])
        return changed

    def problems(self, *entries: dict[str, Any], check_mode: bool = False) -> list[str]:
        made = [self.module.Entry(entry, 0o022) for entry in entries]
        return list(self.module.plan_all(made, check_mode=check_mode))


@pytest.fixture
def host(library: dict[str, ModuleType]) -> Host:
    return Host(library["files"])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_second_run_changes_nothing(host: Host, tmp_path: Path) -> None:
    entries = [
        raw(tmp_path / "d", "directory", mode="0750"),
        raw(tmp_path / "d/-odd 'name\" ü", text="x\n", mode="u=rw,g=r,o="),
        raw(tmp_path / "d/link", "link", link="nowhere"),
    ]
    assert host.run(*entries, check_mode=True) == [entry["dest"] for entry in entries]
    assert not (tmp_path / "d").exists()
    assert host.run(*entries) == [entry["dest"] for entry in entries]
    assert host.run(*entries) == []
    assert host.run(*entries, check_mode=True) == []
    assert (mode(tmp_path / "d"), mode(tmp_path / "d/-odd 'name\" ü")) == (0o750, 0o640)
    assert sorted(os.listdir(tmp_path / "d")) == ["-odd 'name\" ü", "link"]


def test_attributes_alone_change_in_place(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    path.chmod(0o600)
    inode = path.stat().st_ino
    assert host.run(raw(path, text="x")) == [str(path)]
    assert (mode(path), path.stat().st_ino) == (0o644, inode)
    assert host.diffs[0]["before"]["mode"] == "0600"
    assert host.diffs[0]["after"]["mode"] == "0644"


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_file_replaces_a_link_and_spares_its_target(host: Host, tmp_path: Path, target: str) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "a").symlink_to(target)
    assert host.run(raw(tmp_path / "a", text="new")) == [str(tmp_path / "a")]
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_link_is_replaced_but_a_file_is_not(host: Host, tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to("old")
    assert host.run(raw(tmp_path / "l", "link", link="new")) == [str(tmp_path / "l")]
    assert os.readlink(tmp_path / "l") == "new"
    (tmp_path / "f").write_text("x")
    (tmp_path / "d").mkdir()
    assert "is not a symbolic link" in host.problems(raw(tmp_path / "f", "link", link="new"))[0]
    assert "is a directory" in host.problems(raw(tmp_path / "d", "link", link="new"))[0]


def test_what_stands_in_the_way_is_an_error(host: Host, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("x")
    (tmp_path / "to_d").symlink_to("d")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "is a directory": raw(tmp_path / "d", text="x"),
        "is a symbolic link to the directory": raw(tmp_path / "to_d", text="x"),
        "is neither a file nor": raw(tmp_path / "pipe", text="x"),
        "exists and is not a directory": raw(tmp_path / "f", "directory"),
        "f exists and is not a directory": raw(tmp_path / "f/below", "directory"),
        "which does not exist": raw(tmp_path / "dangling", "directory"),
        "does not exist; add an entry with state: directory": raw(tmp_path / "none/a", text="x"),
        "there is no user 'nobody-at-all'": raw(tmp_path / "a", text="x", owner="nobody-at-all"),
        "there is no group 'nothing-at-all'": raw(tmp_path / "a", text="x", group="nothing-at-all"),
    }
    for message, entry in cases.items():
        problems = host.problems(entry)
        assert problems, message
        assert message in problems[0]


def test_check_mode_predicts_on_a_fresh_host(host: Host, tmp_path: Path) -> None:
    entries = [
        raw(tmp_path / "none/a", text="x"),
        raw(tmp_path / "b", text="x", owner="nobody-at-all"),
        raw(tmp_path / "c", text="x", group="nothing-at-all", validate="/not/there %s"),
    ]
    assert host.run(*entries, check_mode=True) == [entry["dest"] for entry in entries]
    assert os.listdir(tmp_path) == []


def test_directory_through_a_link(host: Host, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "to").symlink_to("real")
    assert host.run(raw(tmp_path / "to", "directory")) == [str(tmp_path / "to")]
    assert mode(tmp_path / "real") == 0o755
    assert (tmp_path / "to").is_symlink()


def test_absent_removes_the_link_and_not_its_target(host: Host, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_text("x")
    (tmp_path / "to").symlink_to("real")
    assert host.run(raw(tmp_path / "to", "absent")) == [str(tmp_path / "to")]
    assert (tmp_path / "real/a").exists()
    assert host.run(raw(tmp_path / "real", "absent")) == [str(tmp_path / "real")]
    assert host.run(raw(tmp_path / "real", "absent")) == []


def test_failed_validation_leaves_every_file_alone(host: Host, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    host.validator_code = 1
    entries = [raw(tmp_path / "a", text="new"), raw(tmp_path / "b", text="new", validate="prog -c %s 'two words'")]
    with pytest.raises(host.module.EntryError, match=r"did not pass.*exit 1.*it is wrong"):
        host.run(*entries)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    assert host.ran[0][0:2] == ["prog", "-c"]
    assert host.ran[0][3] == "two words"
    assert os.path.dirname(host.ran[0][2]) == str(tmp_path)


def test_secret_shows_nowhere(host: Host, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hunter1")
    entry = raw(tmp_path / "a", text="hunter2", secret=True, validate="prog %s")
    host.validator_code = 1
    with pytest.raises(host.module.EntryError) as caught:
        host.run(entry)
    assert "hunter" not in str(caught.value)
    assert "hunter" not in str(host.diffs)


def test_staged_file_is_never_readable_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file is open to all; the new content is not, not even for a moment."""
    seen: list[tuple[int, int]] = []
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o666)

    def look(descriptor: int, *_owner: int) -> None:
        found = os.fstat(descriptor)
        seen.append((stat.S_IMODE(found.st_mode), found.st_size))

    monkeypatch.setattr(os, "chown", look)
    staged = evenkeel_host.stage(str(path), b"secret", evenkeel_host.Attributes(os.getuid(), os.getgid(), 0o640))
    assert seen == [(0o600, 6)]
    assert mode(Path(staged)) == 0o640
    assert path.read_text() == "old"


def test_sweep_removes_only_what_dead_processes_left(tmp_path: Path) -> None:
    kept = [f".evenkeel-{'0' * 16}-{os.getpid()}-00000000", ".evenkeel-notes", "x"]
    for name in [*kept, f".evenkeel-{'0' * 16}-{DEAD_PROCESS}-00000000"]:
        (tmp_path / name).write_text("x")
    evenkeel_host.sweep([str(tmp_path), str(tmp_path / "none")])
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_killed_while_writing_leaves_old_or_new(tmp_path: Path) -> None:
    """Kill writers of a large file at random moments; readers never see half of it."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import evenkeel_host as h, os\n"
        "a = h.Attributes(os.getuid(), os.getgid(), 0o644)\n"
        "while True: h.write_file(sys.argv[2], b'a' * 2**21, a); h.write_file(sys.argv[2], b'b' * 2**21, a)\n"
    )
    path = tmp_path / "big"
    path.write_bytes(b"a" * 2**21)
    for pause in (0.05, 0.11, 0.17, 0.23):
        utils = str(Path(evenkeel_host.__file__).parent)
        with subprocess.Popen([sys.executable, "-c", program, utils, str(path)]) as writer:
            try:
                writer.wait(pause)
            except subprocess.TimeoutExpired:
                writer.kill()
        data = path.read_bytes()
        assert len(data) == 2**21
        assert len(set(data)) == 1
    evenkeel_host.sweep([str(tmp_path)])
    assert os.listdir(tmp_path) == ["big"]


def test_content_diff_forms() -> None:
    text = evenkeel_host.content_diff("/a", "/a (copy x)", b"old", b"new", secret=False)
    assert (text["before"], text["after"], text["before_header"]) == ("old", "new", "/a")
    binary = evenkeel_host.content_diff("/a", "/a", None, b"\0", secret=False)
    assert binary["src_binary"] == 1
    assert "after" not in binary
    large = evenkeel_host.content_diff("/a", "/a", b"", b"x" * 200_000, secret=False)
    assert large["src_larger"] == evenkeel_host.DIFF_LIMIT_BYTES


def test_symbolic_mode_starts_from_the_present_one(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    path.chmod(0o604)
    host.run(raw(path, text="x", mode="g+w"))
    assert mode(path) == 0o624
    host.run(raw(tmp_path / "new", text="x", mode="g+w"))
    assert mode(tmp_path / "new") == 0o664


# The controller


def test_public_invocation_hides_secrets(actions: dict[str, ModuleType]) -> None:
    shown = actions["files"]._public({"dest": "/a", "content": "hunter2", "secret": True})
    assert shown == {"dest": "/a", "content": "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER", "secret": True}
    assert actions["files"]._public({"dest": "/a", "content": "text"})["content"] == "text"


def test_documented_options_are_the_accepted_ones(library: dict[str, ModuleType]) -> None:
    import yaml

    for name, module in library.items():
        documented = yaml.safe_load(module.DOCUMENTATION)["options"]
        spec = SimpleNamespace(**module.ARGUMENT_SPEC)
        private = {"payload", "digest", "packages", "archive"}
        assert set(documented) == set(vars(spec)) - private, name
        for option, described in documented.items():
            inner = described.get("suboptions")
            if inner:
                assert set(inner) == set(module.ARGUMENT_SPEC[option]["options"]), (name, option)
            assert described.get("default") == module.ARGUMENT_SPEC[option].get("default"), (name, option)
    assert set(library["files"].ENTRY_SPEC) == set(evenkeel_files.KEYS)
