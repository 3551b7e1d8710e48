"""The program that runs an application's start-up steps."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

bootstrap = load(ROOT / "roles/bootstrap/files/bootstrap.py", "evk_bootstrap")

STEPS: list[dict[str, Any]] = [
    {"name": "20-more", "environment": {}, "directories": [], "writable": [], "command": ["false"]},
    {
        "name": "10-web",
        "environment": {"PIER_KEY": "signs sessions; set app.secrets.PIER_KEY"},
        "directories": [],
        "writable": [],
        "command": [],
    },
]


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The steps of process web; `save` writes them."""
    monkeypatch.setattr(bootstrap, "CONFIGURATION", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("PIER_KEY", raising=False)
    copied: list[dict[str, Any]] = json.loads(json.dumps(STEPS))
    return copied


def save(steps: list[dict[str, Any]], **more: Any) -> None:
    folder = bootstrap.CONFIGURATION / "pier/bootstrap"
    folder.mkdir(parents=True, exist_ok=True)
    table = {"app": "pier", "process": "web", "user": "root", "group": "root", "steps": steps, **more}
    (folder / "web.json").write_text(json.dumps(table))


def test_steps_run_in_the_order_of_their_names_and_the_first_failure_ends_it(
    steps: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    save(steps)
    assert bootstrap.main(["--run", "pier", "web"]) == 1
    assert capfd.readouterr().err == ("pier web: step 10-web: variable PIER_KEY is not set: signs sessions; set app.secrets.PIER_KEY\n")


def test_an_empty_variable_counts_as_missing(
    steps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIER_KEY", "")
    save(steps)
    assert bootstrap.main(["--run", "pier", "web", "10-web"]) == 1
    assert "PIER_KEY is not set" in capfd.readouterr().err


def test_a_command_that_fails_or_is_absent_is_named(
    steps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIER_KEY", "k")
    steps[0]["command"] = ["/bin/sh", "-c", "exit 3"]
    save(steps)
    assert bootstrap.main(["--run", "pier", "web"]) == 1
    assert "step 20-more: /bin/sh -c 'exit 3' ended with exit code 3" in capfd.readouterr().err
    steps[0]["command"] = ["none-such"]
    save(steps)
    assert bootstrap.main(["--run", "pier", "web"]) == 1
    assert "step 20-more: none-such cannot be run" in capfd.readouterr().err


def test_the_dry_run_tells_all_that_is_missing_and_runs_nothing(
    steps: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    steps[0]["writable"] = [str(tmp_path / "none"), str(tmp_path / "file"), str(tmp_path)]
    steps[0]["command"] = ["/bin/sh", "-c", f"touch {tmp_path}/ran"]
    save(steps)
    save(steps, credentials={"tls.key": "/etc/pier.key"})
    assert bootstrap.main(["--check", "pier", "web"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "credential tls.key is not there: /etc/pier.key does not exist" in lines[0]
    assert "PIER_KEY" in lines[1]
    assert f"directory {tmp_path}/none does not exist" in lines[2]
    assert "file is not a directory" in lines[3]
    assert "no release is deployed" in lines[4]
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pier"], "no probe is left behind"


def test_root_is_told_that_its_answer_would_mean_nothing(
    steps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save(steps)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert bootstrap.main(["--check", "pier", "web"]) == 1
    assert "type: systemctl start pier-web-bootstrap-check" in capfd.readouterr().err


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that writes down how it was called, and fails when there is a file `broken`."""
    program = tmp_path / "systemctl"
    program.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
test ! -e {tmp_path}/broken || {{ echo "Unit $4 is masked." >&2; exit 5; }}
""")
    program.chmod(0o755)
    monkeypatch.setattr(bootstrap, "SYSTEMCTL", (str(program),))
    return tmp_path / "calls"


def test_s3_a_step_starts_its_tasks_afresh_and_waits_for_none(
    steps: list[dict[str, Any]], systemctl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps[0]["start"] = ["pier-account.service", "pier-register.service"]
    save(steps)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert bootstrap.main(["--start", "pier", "web", "20-more"]) == 0
    assert systemctl.read_text().splitlines() == [
        "reset-failed -- pier-account.service",
        "--no-block restart -- pier-account.service",
        "reset-failed -- pier-register.service",
        "--no-block restart -- pier-register.service",
    ]
    assert bootstrap.main(["--start", "pier", "web", "10-web"]) == 0
    assert len(systemctl.read_text().splitlines()) == 4, "a step without tasks starts nothing"


def test_s3_a_task_that_cannot_be_started_does_not_hold_the_service_up(
    steps: list[dict[str, Any]], systemctl: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps[0]["start"] = ["pier-register.service"]
    save(steps)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    systemctl.with_name("broken").touch()
    assert bootstrap.main(["--start", "pier", "web", "20-more"]) == 0
    line = "pier web: step 20-more: pier-register.service was not started (Unit pier-register.service is masked); web starts without it. "
    assert capfd.readouterr().err == line + "When the cause is gone: systemctl start pier-register.service\n"


def test_a_step_reads_the_credentials_of_its_process(steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tls.key").write_text("key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    steps[0]["command"] = ["/usr/bin/cp", "{credentials}/tls.key", str(tmp_path / "copy")]
    save(steps)
    assert bootstrap.main(["--run", "pier", "web", "20-more"]) == 0
    assert (tmp_path / "copy").read_text() == "key"


def test_the_dry_run_knows_a_release_and_its_programs(
    steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "key").write_text("key")
    (tmp_path / "absent").write_text("not-on-this-host")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIER_KEY", "k")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    save(steps, program=f"{tmp_path}/venv/bin/gunicorn", credentials={"key": "/etc/key", "absent": "/etc/absent"})
    assert bootstrap.main(["--check", "pier", "web"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines.pop(0).startswith("pier web: credential absent is not there: /etc/absent does not exist")
    assert [line.partition(" cannot be run: ")[0] for line in lines] == [
        f"pier web: step 20-more: program {tmp_path}/venv/bin/false",
        f"pier web: program {tmp_path}/venv/bin/gunicorn",
    ]
    for name in ("false", "gunicorn"):
        (tmp_path / "venv/bin" / name).symlink_to("/usr/bin/true")
    (tmp_path / "absent").write_text("now it is")
    assert bootstrap.main(["--check", "pier", "web"]) == 0
    assert capfd.readouterr().out == "pier web: nothing is missing\n"


def test_the_dry_run_of_a_playbook_names_what_the_playbook_will_not_bring(
    steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, wrong = tmp_path / "made", tmp_path / "wrong"
    wrong.mkdir(mode=0o700)
    steps[0]["directories"] = [{"path": str(path), "mode": "0750"} for path in (made, wrong)]
    steps[0]["writable"] = [str(made), str(wrong), str(tmp_path / "none")]
    credentials = {"a": "/etc/evenkeel/pki/none.key", "b": "/etc/none.key"}
    table = {"app": "pier", "process": "web", "user": "root", "group": "root", "steps": steps, "credentials": credentials}
    became: list[tuple[str, str]] = []
    monkeypatch.setattr(bootstrap, "become", lambda *names: became.append(names))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([table, table])))
    assert bootstrap.main(["--paths", "pier"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert became == [("root", "root")]
    assert len(lines) == 2, "not what the start makes, not what the suite makes, and each once"
    assert lines[0].startswith("pier web: credential b is not there: /etc/none.key does not exist")
    assert lines[1].startswith(f"pier web: step 20-more: directory {tmp_path}/none does not exist")

    table["user"] = "nobody-of-this-name"
    table["credentials"] = {}
    monkeypatch.setattr(bootstrap, "become", lambda *_names: {}["no such user"])
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([table])))
    assert bootstrap.main(["--paths", "pier"]) == 0, "a host that has not been converged cannot be asked"


def test_an_unknown_process_or_step_is_named(steps: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]) -> None:
    save(steps)
    assert bootstrap.main(["--run", "pier", "none"]) == 1
    assert "run playbooks/site.yml" in capfd.readouterr().err
    assert bootstrap.main(["--run", "pier", "web", "30-x"]) == 1
    assert "there is no step 30-x; known are 10-web, 20-more" in capfd.readouterr().err


def test_directories_are_made_right_twice(tmp_path: Path) -> None:
    directory = bootstrap.Directory(str(tmp_path / "deep/er"), 0o700)
    old = os.umask(0o077)
    try:
        for _ in range(2):
            bootstrap.make_directory(directory, os.getuid(), os.getgid())
            assert (tmp_path / "deep/er").stat().st_mode & 0o7777 == 0o700
            assert (tmp_path / "deep").stat().st_mode & 0o7777 == 0o755
    finally:
        os.umask(old)
    (tmp_path / "deep/er").chmod(0o755)
    bootstrap.make_directory(directory, os.getuid(), os.getgid())
    assert (tmp_path / "deep/er").stat().st_mode & 0o7777 == 0o700


def test_processes_that_start_at_the_same_time_make_the_same_directories(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(200):
            directory = bootstrap.Directory(str(tmp_path / f"{number}/deep"), 0o700)
            made = [pool.submit(bootstrap.make_directory, directory, os.getuid(), os.getgid()) for _ in range(8)]
            for each in made:
                each.result()


def test_a_link_on_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match=r"link|directory"):
        bootstrap.make_directory(bootstrap.Directory(str(tmp_path / "link"), 0o700), os.getuid(), os.getgid())
    assert (tmp_path / "target").stat().st_mode & 0o7777 == 0o755
