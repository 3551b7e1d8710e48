"""What is true on the host: services, TLS, isolation, secrets."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import requests
import testinfra
from conftest import ADDRESS, KEPT, secret

SERVICES = {
    "archive-core", "archive-plugins", "backup-agent", "backup-core", "backup-plugins", "backup-repository", "drydock-logs",
    "drydock-prune-uploads", "drydock-recompute-availability", "drydock-relay", "drydock-script-processor", "drydock-web",
    "drydock-worker-export", "drydock-worker-latex", "etcd", "object-storage", "pg-maintenance-core", "pg-maintenance-plugins",
    "postgresql-core", "postgresql-plugins", "proxy", "redis", "restore-drill-core", "restore-drill-plugins",
}  # fmt: skip


def health(host: testinfra.host.Host) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(host.run("evenkeel-health status --json").stdout)}


def test_every_service_becomes_healthy_with_no_hand(host: testinfra.host.Host) -> None:
    """Also after the reboot, when this runs again."""
    deadline = time.monotonic() + 240
    while unwell := {name: row["message"] for name, row in health(host).items() if row["status"] != "healthy"}:
        assert time.monotonic() < deadline, unwell
        time.sleep(1)
    assert set(health(host)) == SERVICES


def test_no_unit_has_failed(host: testinfra.host.Host) -> None:
    assert host.run("systemctl --failed --no-legend --plain").stdout == ""


def test_health_notices_a_dead_service(host: testinfra.host.Host) -> None:
    """A health check that cannot fail proves nothing."""
    host.check_output("systemctl stop redis-server")
    try:
        deadline = time.monotonic() + 60
        while health(host)["redis"]["status"] == "healthy" and health(host)["redis"]["streak"] > 0:
            assert time.monotonic() < deadline, "redis is stopped, and its check still passes"
            time.sleep(1)
    finally:
        host.check_output("systemctl start redis-server")
    host.check_output("evenkeel-health wait --timeout 120 redis drydock-worker-latex drydock-worker-export")


@pytest.mark.parametrize(("cluster", "port"), [("core", 5432), ("plugins", 5433)])
def test_clusters_are_two_with_checksums_below_their_mount(host: testinfra.host.Host, cluster: str, port: int) -> None:
    questions = " ".join(f"-c 'show {name}'" for name in ("cluster_name", "data_directory", "data_checksums"))
    shown = host.check_output(f"runuser -u postgres -- psql -p {port} -At {questions}")
    name, directory, checksums = shown.split()
    assert cluster in name
    assert directory.endswith("/pgdata")
    assert checksums == "on"


def test_one_cluster_down_leaves_the_other_serving(host: testinfra.host.Host) -> None:
    """D1 in its simplest form; the faults come with the pairs."""
    host.check_output("systemctl stop patroni@plugins")
    try:
        assert host.run("runuser -u postgres -- psql -p 5433 -Atc 'select 1'").rc != 0
        assert host.check_output("runuser -u postgres -- psql -p 5432 -Atc 'select 1'") == "1"
    finally:
        host.check_output("systemctl start patroni@plugins")
    host.check_output("evenkeel-health wait --timeout 120 postgresql-plugins")


def psql(host: testinfra.host.Host, password: str, mode: str, root: str = "/etc/evenkeel/pki/ca.crt") -> Any:
    dsn = f"host=single port=5432 user=drydock dbname=drydock sslmode={mode} sslrootcert={root}"
    return host.run("PGPASSWORD=%s psql %s -Atc 'select 1'", password, dsn)


def test_postgresql_speaks_tls_only_and_checks_passwords(host: testinfra.host.Host) -> None:
    right = secret("postgresql_app")
    assert psql(host, right, "verify-full").stdout.strip() == "1"
    assert psql(host, right, "disable").rc != 0
    assert "password authentication failed" in psql(host, "wrong", "verify-full").stderr


def test_redis_speaks_tls_only_and_gives_each_user_its_rights(host: testinfra.host.Host) -> None:
    cli = "redis-cli --no-auth-warning -h single -p 6379"
    tls = "--tls --cacert /etc/evenkeel/pki/ca.crt"
    assert host.run(f"timeout 5 {cli} PING").stdout.strip() != "PONG"
    assert "NOAUTH" in host.run(f"{cli} {tls} PING").stdout
    health_user = f"REDISCLI_AUTH={secret('redis_health')} {cli} {tls} --user health"
    assert host.run(f"{health_user} PING").stdout.strip() == "PONG"
    assert "NOPERM" in host.run(f"{health_user} GET x").stdout
    assert host.run(f"{health_user} CONFIG GET maxmemory-policy").stdout.startswith("NOPERM")
    settings = host.check_output("grep -hE '^(appendonly|maxmemory-policy|port) ' /etc/redis/redis.conf /etc/redis/live.conf").splitlines()
    assert {"appendonly yes", "maxmemory-policy noeviction", "port 0"} <= set(settings)


def test_etcd_refuses_clients_without_a_certificate(host: testinfra.host.Host) -> None:
    ca = "--cacert /etc/evenkeel/pki/ca.crt"
    own = "--cert /etc/evenkeel/pki/host.crt --key /etc/evenkeel/pki/host.key"
    assert host.run(f"curl -s {ca} https://single:2379/version").rc != 0
    assert host.run(f"curl -s {ca} {own} https://single:2379/version").rc == 0


@pytest.mark.parametrize("port", [443, 9000, 8002, 8008])
def test_tls_is_signed_by_the_platform_ca_for_name_and_address(host: testinfra.host.Host, port: int) -> None:
    for name in ("single", ADDRESS):
        done = host.run(f"openssl s_client -connect {ADDRESS}:{port} -CAfile /etc/evenkeel/pki/ca.crt -verify_return_error "
                        f"{'-verify_ip' if name == ADDRESS else '-verify_hostname'} {name} < /dev/null")  # fmt: skip
        assert "Verify return code: 0 (ok)" in done.stdout, done.stdout[-500:]


def test_private_files_are_private(host: testinfra.host.Host) -> None:
    for path, mode, owner in (
        ("/etc/drydock/secrets.env", 0o600, "root"),
        ("/etc/object-storage/server.env", 0o600, "root"),
        ("/etc/evenkeel/pki/host.key", 0o640, "root"),
        ("/etc/patroni/core.yml", 0o600, "postgres"),
        ("/etc/pgbackrest/repository.conf", 0o640, "root"),
        ("/etc/pgbackrest/member.conf", 0o640, "root"),
    ):
        file = host.file(path)
        assert (file.mode, file.user) == (mode, owner), path
    for path in (KEPT / "secrets").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert (KEPT / "pki/ca.key").stat().st_mode & 0o077 == 0


def test_no_secret_in_processes_units_or_journal(host: testinfra.host.Host) -> None:
    places = {
        "process arguments": host.check_output("ps axww -o args"),
        "unit properties": host.check_output("systemctl show '*' --no-pager"),
        "journal": host.check_output("journalctl --no-pager -o cat"),
    }
    for path in (KEPT / "secrets").iterdir():
        value = path.read_text().split()[0]
        lines = {place: [line.replace(value, "…")[:200] for line in text.splitlines() if value in line] for place, text in places.items()}
        found = {place: some[:3] for place, some in lines.items() if some}
        assert not found, f"secret {path.name} stands in {found}"


def test_worker_stops_gently(host: testinfra.host.Host) -> None:
    """P3: the time to stop is derived from the task's time limit, and only the main process gets the signal."""
    for unit, limit in (("drydock-worker-latex", 150), ("drydock-worker-export", 630)):
        shown = dict(line.split("=", 1) for line in host.check_output(f"systemctl show -p TimeoutStopUSec -p KillMode {unit}").splitlines())
        minutes, seconds = divmod(limit + 30, 60)
        assert shown["TimeoutStopUSec"] == " ".join([f"{minutes}min"] + ([f"{seconds}s"] if seconds else []))
        assert shown["KillMode"] == "mixed"


def test_s3_slow_work_of_a_start_is_done_by_units_of_its_own(host: testinfra.host.Host) -> None:
    tasks = ("drydock-register-scripts", "drydock-job-service-account")

    def finished() -> list[int]:
        return [host.check_output(f"journalctl --unit={task} --no-pager -o cat").count(f"Finished {task}.service") for task in tasks]

    before = finished()
    host.check_output("systemctl restart drydock-script-processor")
    deadline = time.monotonic() + 120
    while any(now == then for now, then in zip(finished(), before, strict=True)):
        assert time.monotonic() < deadline, host.run(f"systemctl status {' '.join(tasks)}").stdout
        time.sleep(0.5)
    host.check_output("evenkeel-health wait --timeout 120 drydock-script-processor")


@pytest.mark.parametrize("timer", ["drydock-recompute-availability", "drydock-prune-uploads"])
def test_timers_are_active_and_what_they_run_succeeds(host: testinfra.host.Host, timer: str) -> None:
    assert host.check_output(f"systemctl is-active {timer}.timer") == "active"
    host.check_output(f"systemctl start {timer}.service")
    assert host.check_output(f"systemctl show -p Result {timer}.service") == "Result=success"


def test_readiness_names_what_is_missing(host: testinfra.host.Host, web: requests.Session, url: str) -> None:
    assert web.get(f"{url}/ready", timeout=30).status_code == 200
    host.check_output("systemctl stop object-storage")
    try:
        answer = web.get(f"{url}/ready", timeout=60)
        assert answer.status_code == 503
        assert "s3" in answer.text.lower() or "object" in answer.text.lower(), answer.text
    finally:
        host.check_output("systemctl start object-storage")
    host.check_output("evenkeel-health wait --timeout 120 object-storage")


def test_web_keeps_connections_longer_than_the_proxy(host: testinfra.host.Host) -> None:
    """P4: a proxied request never meets a connection that the web process is closing."""
    configuration = host.check_output("cat /etc/nginx/nginx.conf")
    upstream = configuration[configuration.index("upstream ") :]
    proxy_seconds = int(upstream.split("keepalive_timeout ")[1].split("s;")[0])
    assert host.check_output("drydock-run python -c 'from drydock import gunicorn_conf; print(gunicorn_conf.keepalive)'") == "65"
    assert proxy_seconds < 65
