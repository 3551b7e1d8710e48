"""Every template of every role renders with the demo's inventory, and an undefined name in it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import load

ROOT = Path(__file__).resolve().parents[2]
RENDER = Path(__file__).with_name("render_templates.py")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """role -> {template (or `dest`) -> text}, rendered in a process of its own with Ansible's own engine."""
    state = tmp_path_factory.mktemp("state")
    environment = {
        **os.environ,
        "EVENKEEL_STATE": str(state),
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_HOME": str(state / "ansible"),
    }
    done = subprocess.run([sys.executable, str(RENDER)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, dict[str, str]] = json.loads(done.stdout)
    return answer


def test_every_template_renders(rendered: dict[str, dict[str, str]]) -> None:
    for role in (path.name for path in (ROOT / "roles").iterdir()):
        templates = list((ROOT / "roles" / role / "templates").glob("*.j2"))
        parts = {name for template in templates for name in re.findall(r"{% include '(.+?)' %}", template.read_text())}
        for template in templates:
            assert template.name in {*rendered.get(role, {}), *parts}, f"{role}/{template.name} is used by no task"


def test_undefined_names_fail(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(RENDER), "--text", "{{ base_hosts }} {{ base_hosst }}"],
        cwd=ROOT,
        env={**os.environ, "EVENKEEL_STATE": str(tmp_path), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "base_hosst" in done.stderr


def test_rendered_units_run_what_the_contract_says(rendered: dict[str, dict[str, str]]) -> None:
    web = rendered["process"]["process.service.j2"]
    assert "ExecStart=/opt/" in web
    assert "EnvironmentFile=/etc/" in web
    for text in rendered["process"].values():
        assert "{{" not in text


def lines(rendered: dict[str, dict[str, str]], unit: str) -> list[str]:
    """The lines of a rendered unit of role process."""
    return rendered["process"][next(name for name in rendered["process"] if name.endswith(f"-{unit}.service"))].splitlines()


def test_s3_the_start_of_a_service_does_not_wait_for_its_tasks(rendered: dict[str, dict[str, str]]) -> None:
    steps = [line for line in lines(rendered, "speaks-tls") if line.startswith("ExecStartPre=")]
    run, start = steps[-2:]
    assert run.startswith("ExecStartPre=/usr/local/lib/evenkeel/bootstrap.py --run "), "its command first, as the application"
    assert start.startswith("ExecStartPre=+-/usr/local/lib/evenkeel/bootstrap.py --start "), "then as root, and no failure of it counts"
    assert start.endswith(" speaks-tls 10-server")


def test_s3_a_task_is_tried_again_within_bounds_and_then_the_operator_is_told(rendered: dict[str, dict[str, str]]) -> None:
    task = lines(rendered, "register")
    for line in (
        "Type=oneshot",
        "Restart=on-failure",
        "RestartSec=30",
        "StartLimitBurst=5",
        # a window could pass before slow work has failed so often, and then nobody would ever be told
        "StartLimitIntervalSec=infinity",
        "OnFailure=evenkeel-failure@%n.service",
        "ExecStartPost=+-/usr/bin/systemctl reset-failed %n",
        "SuccessExitStatus=SIGTERM",
    ):
        assert line in task
    assert "[Install]" not in task, "nothing but a step or a person starts it"
    assert "Restart=always" not in task
    assert not [line for line in task if line.startswith("ExecStop=")]
    # systemd gives each command of a start the same time, and this one waits for others first (300 s)
    assert "TimeoutStartSec=330" in task
    assert "TimeoutStartSec=3600" in lines(rendered, "nightly")


def test_credentials_are_handed_over_by_systemd(rendered: dict[str, dict[str, str]]) -> None:
    service = lines(rendered, "speaks-tls")
    assert "LoadCredential=tls.key:/etc/probe.key" in service
    assert 'Environment="TLS_DIR=%d/x y"' in service
    assert next(line for line in service if line.startswith("ExecStart=")).endswith("/venv/bin/serve --key %d/tls.key")
    files = [line.rpartition("/")[2] for line in service if line.startswith("EnvironmentFile=")]
    assert files == ["environment-speaks-tls", "secrets.env"], "the file of the whole app would win over the unit"
    assert not [line for line in lines(rendered, "register") if line.startswith("LoadCredential=")]


def test_evenkeel_drain_finds_every_server_of_the_rendered_configuration(rendered: dict[str, dict[str, str]]) -> None:
    """The program reads the lines that the template writes: if one changes, so must the other."""
    drain = load(ROOT / "roles/proxy/files/drain.py", "evk_rendered_drain")
    for name, hosts in (("nginx.conf.j2", ["demo1"]), ("lab/nginx.conf.j2", ["web-1", "web-2"])):
        text = rendered["proxy"][name]
        servers = drain.servers_of(text)
        assert [server.host for server in servers] == hosts
        assert len(servers) == sum(1 for line in text.splitlines() if line.strip().startswith("server ") and ";" in line)
        assert drain.render(text, []) == text, "nothing but `down` is ever added"
        assert drain.render(text, hosts).count(" down;") == len(hosts)
        assert drain.render(text, [], True).count("{ default 0; 00 1; }  # evenkeel-page") == 1, "and the switch of the maintenance page"


def test_keepalived_knows_its_peers_and_holds_the_address_of_the_platform(rendered: dict[str, dict[str, str]]) -> None:
    text = " ".join(rendered["proxy"]["keepalived.conf.j2"].split())
    assert "unicast_src_ip 10.87.3.61 unicast_peer { 10.87.3.62 } virtual_ipaddress { 10.87.3.10 }" in text
    assert "nopreempt" in text


def test_the_dry_run_of_a_start_has_what_the_process_has(rendered: dict[str, dict[str, str]]) -> None:
    """S2: the same user, variables, credentials and walls; otherwise its answer would be about another process."""
    for process in ("web", "speaks-tls", "nightly"):
        own, dry = lines(rendered, process), lines(rendered, f"{process}-bootstrap-check")
        rights = own[own.index("# Who it is and what it is given.") :]
        rights = rights[: rights.index("[Install]")] if "[Install]" in rights else rights
        lenient = [line.replace("EnvironmentFile=-", "EnvironmentFile=").replace("Directory=-", "Directory=") for line in dry]
        assert [line for line in rights if line and line not in lenient] == []
        assert "OnFailure" not in "".join(dry), "what is missing is the answer, and no failure"
    assert "SetCredential=tls.key:not-on-this-host" in lines(rendered, "speaks-tls-bootstrap-check"), (
        "it is to start without its credentials, too"
    )


def test_processes_are_bounded_by_their_contract(rendered: dict[str, dict[str, str]]) -> None:
    for process, bounds in (("web", ["MemoryMax=2048M", "TasksMax=512"]), ("speaks-tls", ["MemoryMax=1024M", "TasksMax=256"])):
        assert {*bounds, "LimitCORE=0", "OOMPolicy=continue", "LogRateLimitBurst=100000000"} <= set(lines(rendered, process))


def test_a_database_host_reaches_its_own_clusters_in_the_repository_and_only_the_repository_host_reads_all(
    rendered: dict[str, dict[str, str]],
) -> None:
    ours = rendered["pgbackrest"]
    for place, doors in (
        ("/etc/pgbackrest/repository.conf", ["demo1=core,plugins"]),
        ("/etc/pgbackrest/member.conf", ["demo1=*"]),
        ("lab//etc/pgbackrest/repository.conf", ["pg-core-1=core", "pg-core-2=core", "pg-plugins-1=plugins", "pg-plugins-2=plugins"]),
        ("/etc/pgbackrest/scratch.conf", []),
    ):
        assert re.findall("^tls-server-auth=(.*)$", ours[place], re.MULTILINE) == doors, place
    assert "pg2-host=pg-core-2" in ours["lab//etc/pgbackrest/repository.conf"]
    assert not re.search("^pg1-host", ours["/etc/pgbackrest/scratch.conf"], re.MULTILINE), "a copy is restored here, and nowhere else"
    assert "repo1-cipher-pass" not in ours["/etc/pgbackrest/member.conf"], "only the repository host knows it"
