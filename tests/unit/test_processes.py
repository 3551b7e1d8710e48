"""What the contract becomes on a host: quoting that systemd undoes, units, health checks, routes; and `<app>-run`."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

contract_filter = load(ROOT / "filter_plugins/app_contract.py", "evk_app_contract")
processes = load(ROOT / "filter_plugins/processes.py", "evk_processes")
run = load(ROOT / "roles/process/files/run.py", "evk_run")
failure = load(ROOT / "roles/base/files/failure.py", "evk_failure")

GROUPS = {"all": ["a", "b", "c"], "web": ["a"], "worker": ["a", "b"], "script": ["c"]}
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
CONTRACT = contract_filter.app_contract(
    {
        "name": "pier",
        "install": {"project": "p", "lock": "l"},
        "packages": ["file"],
        "secrets": {"TOKEN": "t"},
        "processes": {
            "web": {
                "kind": "web",
                "hosts": "web",
                "command": ["gunicorn"],
                "port": 8000,
                "health": {"http": {"path": "/h", "bearer": "TOKEN", "host": "pier.example"}},
            },
            "slow": {
                "kind": "worker",
                "hosts": "worker",
                "command": ["/bin/work"],
                "task_time_limit_seconds": 10,
                "packages": ["latexmk"],
                "health": {"command": ["ping"]},
                "after": ["pier-web"],
            },
            "sweep": {"kind": "timer", "hosts": "worker", "command": ["sweep"], "on_calendar": "hourly"},
            "script": {
                "kind": "service",
                "hosts": "script",
                "command": ["serve", "--key", "{credentials}/tls.key"],
                "port": 4064,
                "environment": {"CERT": "{credentials}/tls.crt", "LEVEL": "own", "MORE": "m"},
                "credentials": {"tls.key": "/etc/k.key", "tls.crt": "/etc/k.crt"},
                "health": {"command": ["log-in"]},
            },
            "secure": {"kind": "service", "hosts": "script", "command": ["s"], "health": {"http": {"path": "/h", "port": 1, "tls": True}}},
            "register": {"kind": "task", "hosts": "script", "command": ["register"]},
        },
        "environment": {"LEVEL": "shared", "CERT": "shared", "OTHER": "o"},
        "bootstrap": {
            "script": [{"name": "10-server", "start": ["register"]}],
            "web": [{"name": "10-web", "directories": [{"path": "/run/pier", "mode": "0755"}]}],
        },
    },
    GROUPS,
)


def test_argv_is_quoted_for_systemd() -> None:
    assert processes.systemd_argv(["a", "b c", "100%", "$X", 'q"', "back\\", ""]) == 'a "b c" 100%% $$X "q\\"" "back\\\\" ""'


@pytest.mark.parametrize("value", ["plain", "with space", 'q"uote', "back\\slash", "$dollar `tick`", "a'b", "two\nlines", "ü#;", " x "])
def test_environment_file_gives_the_value_back(value: str) -> None:
    line = processes.environment_file({"NAME": value})
    assert line.endswith("\n")
    # systemd's rules for double quotes are those of a POSIX shell.
    assert shlex.split(line.replace("\\$", "$").replace("\\`", "`"), posix=True) == [f"NAME={value}"]


def test_a_host_gets_the_units_of_its_groups() -> None:
    names = [unit["name"] for unit in processes.process_units(CONTRACT, ["web", "worker"])]
    assert [name for name in names if "bootstrap-check" not in name] == [
        "pier-slow.service", "pier-sweep.service", "pier-sweep.timer", "pier-web.socket", "pier-web.service",
    ]  # fmt: skip
    assert [name for name in names if "bootstrap-check" in name] == [
        f"pier-{process}-bootstrap-check.service" for process in ("slow", "sweep", "web")
    ]
    names = [unit["name"] for unit in processes.process_units(CONTRACT, ["web"])]
    assert names == ["pier-web-bootstrap-check.service", "pier-web.socket", "pier-web.service"]
    assert processes.host_packages(CONTRACT, ["web"]) == ["file"]
    assert processes.host_packages(CONTRACT, ["worker"]) == ["file", "latexmk"]
    assert processes.host_packages(CONTRACT, ["proxy"]) == []


def test_nothing_runs_before_the_first_deploy() -> None:
    for unit in processes.process_units(CONTRACT, ["web", "worker"]):
        if unit["name"] == "pier-sweep.service" or "bootstrap-check" in unit["name"]:
            assert "state" not in unit, "its timer starts it, and a dry run only a person"
        elif unit["name"].endswith(".socket"):
            assert unit["state"] == "absent", "the process opens its address itself"
        else:
            assert unit["requires_path"] == "/opt/pier/current"


def test_the_lines_of_a_host_s_processes_have_files_of_their_own() -> None:
    table = processes.logs_table(CONTRACT, ["script"], 20, 3)
    assert table == {
        "directory": "/var/log/pier",
        "max_bytes": 20_000_000,
        "backups": 3,
        "units": {"pier-register.service": "register", "pier-script.service": "script", "pier-secure.service": "secure"},
    }
    assert processes.log_directory_mode(CONTRACT) == "0750"
    with pytest.raises(ValueError, match="at least 1"):
        processes.logs_table(CONTRACT, ["script"], 20, 0)


def unit(name: str) -> dict[str, Any]:
    """The entry of a unit on the host of the script processor."""
    units: list[dict[str, Any]] = processes.process_units(CONTRACT, ["script"])
    return next(entry for entry in units if entry["name"] == name)


def test_s3_a_task_is_started_by_the_step_of_its_service_alone() -> None:
    task = unit("pier-register.service")
    assert not {"state", "enabled", "restart_on", "requires_path"} & set(task), "neither at boot, nor by site.yml, nor by a deploy"
    [step] = [step for step in processes.bootstrap_steps(CONTRACT, "script") if step["name"] == "10-server"]
    assert step["start"] == ["pier-register.service"]
    assert "pier-register.timer" not in [entry["name"] for entry in processes.process_units(CONTRACT, ["script"])]


def test_a_task_has_no_health_check_that_could_alarm_while_it_rests() -> None:
    names = [entry["name"] for entry in processes.contract_health_services(CONTRACT, "c", ADDRESSES)]
    assert sorted(names) == ["pier-logs", "pier-script", "pier-secure"]


def test_a_renewed_credential_restarts_the_process_that_has_it() -> None:
    assert {"/etc/k.key", "/etc/k.crt"} <= set(unit("pier-script.service")["restart_on"])
    assert not {"/etc/k.key", "/etc/k.crt"} & set(unit("pier-secure.service")["restart_on"])


def test_a_processes_own_variable_wins_over_the_apps_wherever_it_is_written() -> None:
    [file] = processes.process_files(CONTRACT, ["script"])
    assert (file["dest"], file["mode"], file["group"]) == ("/etc/pier/environment-script", "0640", "pier")
    # systemd lets a file win over the unit: the file must not have what only the unit can say
    assert file["content"] == "LEVEL=own\nMORE=m\nOTHER=o\n"
    item = unit("pier-script.service")["vars"]["__process_item"]
    assert item["environment"] == {"CERT": "{credentials}/tls.crt"}
    assert item["environment_file"] == file["dest"]
    assert file["dest"] in unit("pier-script.service")["restart_on"]
    assert processes.process_files(CONTRACT, ["web", "worker"]) == []
    assert unit("pier-secure.service")["vars"]["__process_item"]["environment_file"] == "/etc/pier/environment"


def test_the_directory_of_the_credentials_is_left_to_systemd_and_nothing_else_is() -> None:
    assert processes.systemd_argv(["a", "{credentials}/k", "%d", "${X}"]) == 'a %d/k %%d "$${X}"'
    values = {"B": "$HOME 5%", "A": "{credentials}/k"}
    assert processes.systemd_environment(values) == ["A=%d/k", '"B=$HOME 5%%"'], "no variable is replaced in Environment="


def test_a_health_command_gets_the_processes_own_variables_but_no_credentials() -> None:
    entries = {entry["name"]: entry for entry in processes.contract_health_services(CONTRACT, "c", ADDRESSES)}
    assert entries["pier-script"]["environment"] == {"LEVEL": "own", "MORE": "m"}
    assert entries["pier-script"]["environment_files"] == ["/etc/pier/environment", "/etc/pier/secrets.env"]


def test_a_health_check_over_tls_is_verified() -> None:
    entries = {entry["name"]: entry for entry in processes.contract_health_services(CONTRACT, "c", ADDRESSES)}
    assert (entries["pier-secure"]["url"], entries["pier-secure"]["ca"]) == ("https://10.0.0.3:1/h", "/etc/evenkeel/pki/ca.crt")


def test_whichever_process_starts_first_makes_the_apps_directories_as_a_step_declares_them() -> None:
    for name in CONTRACT["processes"]:
        first = processes.bootstrap_steps(CONTRACT, name)[0]
        assert [(directory["path"], directory["mode"]) for directory in first["directories"]] == [
            ("/var/lib/pier", "0750"), ("/var/log/pier", "0750"), ("/run/pier", "0755"),
        ]  # fmt: skip


def test_the_data_of_the_app_has_a_place_before_the_first_start_as_the_steps_would_make_it() -> None:
    made = {"dest": "/var/lib/pier", "state": "directory", "owner": "pier", "group": "pier", "mode": "0750"}
    assert processes.state_directory(CONTRACT) == made
    declared = {**CONTRACT, "bootstrap": {"web": [{"name": "10-web", "directories": [{"path": "/var/lib/pier", "mode": "0700"}]}]}}
    assert processes.state_directory(declared) == {**made, "mode": "0700"}, "no fight with a step that declares it"


def test_health_services_of_a_host_and_those_it_waits_for() -> None:
    own = {entry["name"]: entry for entry in processes.contract_health_services(CONTRACT, "a", ADDRESSES)}
    assert set(own) == {"pier-web", "pier-slow", "pier-sweep", "pier-logs"}
    assert own["pier-web"]["url"] == "http://10.0.0.1:8000/h"
    assert own["pier-web"]["headers"] == {"X-Forwarded-Proto": "https", "Host": "pier.example"}
    assert own["pier-slow"]["command"] == ["/opt/pier/current/venv/bin/ping"]
    assert own["pier-slow"]["user"] == "pier"
    other = {entry["name"]: entry for entry in processes.contract_health_services(CONTRACT, "b", ADDRESSES)}
    assert other["pier-web"]["remote"] is True
    assert "alternatives" not in other["pier-web"]
    assert processes.contract_credentials(CONTRACT) == {"TOKEN": "t"}


def rows_with(host: str, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The health rows of a host, with changes to processes of the contract."""
    described = {name: {**process, **changes.get(name, {})} for name, process in CONTRACT["processes"].items()}
    rows = processes.contract_health_services({**CONTRACT, "processes": described}, host, ADDRESSES)
    return {entry["name"]: entry for entry in rows}


def test_an_unhealthy_process_is_restarted_unless_it_says_otherwise_or_is_only_seen_to_run() -> None:
    own = rows_with("a")
    assert (own["pier-web"]["restart"], own["pier-slow"]["restart"]) == (True, True)
    assert own["pier-slow"]["after"] == ["pier-web"], "while this is not healthy, a restart would not help"
    off = {"kind": "http", "path": "/h", "port": 8000, "status": 200, "restart": False}
    assert rows_with("a", web={"health": off})["pier-web"]["restart"] is False
    assert "restart" not in rows_with("b")["pier-web"], "it is another host's"


def test_a_process_for_which_another_one_answers_is_not_restarted_for_the_others_trouble() -> None:
    at_the_web = {"kind": "http", "path": "/ping/slow", "port": 8000, "status": 200, "restart": True}
    assert rows_with("a", slow={"health": at_the_web, "after": []})["pier-slow"]["after"] == ["pier-web"]
    assert rows_with("a", slow={"health": at_the_web, "after": []})["pier-web"]["after"] == []


def test_every_timer_of_a_host_is_watched_by_its_last_run() -> None:
    assert rows_with("b")["pier-sweep"] == {"name": "pier-sweep", "owner": "pier", "kind": "timer", "timers": ["pier-sweep.timer"]}
    assert "pier-sweep" not in rows_with("c")


def test_any_host_of_a_process_may_answer_for_it_elsewhere() -> None:
    web = {**CONTRACT["processes"]["web"], "members": ["a", "c"]}
    contract = {**CONTRACT, "processes": {**CONTRACT["processes"], "web": web}}
    other = {entry["name"]: entry for entry in processes.contract_health_services(contract, "b", ADDRESSES)}
    assert other["pier-web"]["url"] == "http://10.0.0.1:8000/h"
    assert other["pier-web"]["alternatives"] == [{"url": "http://10.0.0.3:8000/h"}]
    assert (
        "alternatives" not in {entry["name"]: entry for entry in processes.contract_health_services(contract, "c", ADDRESSES)}["pier-web"]
    )


def test_routes() -> None:
    server = {"name": "a", "address": "10.0.0.1", "port": 8000}
    assert processes.contract_routes(CONTRACT, ADDRESSES) == [{"name": "pier-web", "path": "/", "servers": [server]}]


SETTINGS: dict[str, Any] = {
    "user": "pier",
    "group": "pier",
    "environment_files": ["/etc/pier/environment", "/etc/pier/secrets.env"],
    "environment": {"LANG": "C.UTF-8"},
    "properties": ["NoNewPrivileges=yes"],
}


def test_run_finds_the_release_and_its_program(tmp_path: Path) -> None:
    program = tmp_path / "releases/r1/venv/bin/tool"
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o755)
    settings = {**SETTINGS, "releases": str(tmp_path / "releases"), "current": str(tmp_path / "current")}
    with pytest.raises(run.RunError, match="nothing is deployed here yet"):
        run.release_directory(settings, "current")
    with pytest.raises(run.RunError, match="release r2 is not on this host; here are: r1"):
        run.release_directory(settings, "r2")
    with pytest.raises(run.RunError, match="is not the id of a release"):
        run.release_directory(settings, "../etc")
    (tmp_path / "current").symlink_to("releases/r1")
    release = run.release_directory(settings, "current")
    assert release == tmp_path / "releases/r1"
    argv = run.systemd_run(settings, release, ["tool", "$HOME"], 60)
    assert argv[-3:] == ["--", str(program), "$$HOME"]
    assert "--property=EnvironmentFile=/etc/pier/secrets.env" in argv
    with pytest.raises(run.RunError, match="none-such is neither in"):
        run.systemd_run(settings, release, ["none-such"], 60)


def test_failure_says_what_happened_and_what_to_type() -> None:
    facts = {"Result": "exit-code", "ExecMainStatus": "3", "NRestarts": "20"}
    line = failure.sentence("pier-web.service", facts, "no database.")
    assert line.startswith("pier-web.service has failed after 20 restarts (exit-code, exit status 3): no database. Next: ")
    assert "journalctl -u pier-web.service" in line


def test_failure_names_the_credential_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.key").write_text("")
    unit_file = f"[Service]\nLoadCredential=a:{tmp_path}/there.key\nLoadCredential=tls.key:{tmp_path}/gone.key\n"
    said = {"_PID": "7", "MESSAGE": "pier-web.service: Failed to set up credentials: No such file or directory"}
    answers = {"cat": unit_file, "show": "Result=exit-code\nNRestarts=19", "--unit": json.dumps(said)}

    def answer(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, answers[command[1]])

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(failure, "FAILURES", tmp_path / "failures")
    assert failure.main("pier-web.service") == 0
    line = (tmp_path / "failures/pier-web.service").read_text()
    assert f"(not on this host: {tmp_path}/gone.key; make it, or correct credentials in app.processes)" in line
    assert "there.key" not in line
