"""Backups and restores on the deployed platform (D6), and one cluster's full disk and restore beside the other (D1)."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import testinfra
from conftest import INVENTORY, ROOT, Run, playbook
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PORTS = {"core": 5432, "plugins": 5433}
LIMIT_SECONDS = 120


@pytest.fixture(autouse=True)
def _once(host: testinfra.host.Host) -> None:
    """What a reboot does not change is not tested twice."""
    if not host.file("/run/converged").exists:
        pytest.skip("tested before the reboot")


def sql(host: testinfra.host.Host, cluster: str, statement: str) -> str:
    """The answer of a cluster's application database to the superuser."""
    return str(
        host.check_output("psql -XAtq -v ON_ERROR_STOP=1 -U postgres -p %s -d drydock -c %s", str(PORTS[cluster]), statement)
    ).strip()


def until(what: str, look: Callable[[], Any], limit_seconds: float = LIMIT_SECONDS) -> Any:
    """Look until something comes of it."""
    deadline = time.monotonic() + limit_seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"still not after {limit_seconds} s: {what}"
        time.sleep(0.5)
    return seen


def held(host: testinfra.host.Host, cluster: str) -> dict[str, dict[str, Any]]:
    """What each repository holds of a cluster."""
    listed = json.loads(host.check_output("evenkeel-backup list %s --json", cluster))
    return {holding["repository"]: holding for holding in listed[cluster]}


def metric(host: testinfra.host.Host, text: str) -> float:
    """The value of the metric that begins so."""
    lines = host.check_output("cat /var/lib/evenkeel/metrics/*.prom").splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(text))


def sentence(run: Run) -> str:
    return " ".join(run.output.split())


# --- archive and repositories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", PORTS)
def test_wal_reaches_both_repositories(host: testinfra.host.Host, cluster: str) -> None:
    wal = sql(host, cluster, "SELECT pg_walfile_name(pg_switch_wal()) FROM pg_create_restore_point('test')")
    until(
        f"{wal} in both",
        lambda: [each for each in held(host, cluster).values() if each["wal_max"] >= wal] == list(held(host, cluster).values()),
    )
    host.check_output(f"systemctl start archive-watch@{cluster}")
    assert metric(host, f'evenkeel_archive_last_archived_timestamp_seconds{{cluster="{cluster}"}}') > time.time() - 600


def test_a_backup_of_each_type_goes_into_both_repositories(host: testinfra.host.Host) -> None:
    for kind in ("full", "diff", "incr"):
        run = playbook("backup", "-e", "action=now", "-e", "cluster=plugins", "-e", f"type={kind}") if kind == "full" else None
        assert run is None or run.code == 0, run.output
        if run is None:
            host.check_output("evenkeel-backup now plugins --type %s", kind)
        newest = {name: each["backups"][-1]["type"] for name, each in held(host, "plugins").items()}
        assert newest == {"host": kind, "s3": kind}
    assert metric(host, 'evenkeel_backup_newest_timestamp_seconds{cluster="plugins",repository="s3",type="incr"}') > time.time() - 600
    shown = playbook("backup")
    assert shown.code == 0, shown.output
    assert re.search(r"plugins in repository s3: restorable from 20\d\d-\d\d-\d\d", shown.output), shown.output


def test_repositories_are_encrypted(host: testinfra.host.Host) -> None:
    """Every file begins as the encryption makes it, and not as a compressed, a WAL or an ini file does."""
    for place in ("/var/lib/pgbackrest", "/var/lib/object-storage/data/*/pgbackrest"):
        plain = f"for f in $(find {place} -type f -size +0); do head -c 8 $f | grep -q ^Salted__ || echo $f; done"
        assert int(host.check_output(f"find {place} -type f | wc -l")) > 20
        assert host.check_output(plain) == ""


def certificate(name: str, ca_dir: Path | None) -> tuple[str, str]:
    """A certificate and its key as PEM; of the platform's CA when its folder is given, else signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = subject, key
    if ca_dir:
        issuer = x509.load_pem_x509_certificate((ca_dir / "ca.crt").read_bytes()).subject
        signer = serialization.load_pem_private_key((ca_dir / "ca.key").read_bytes(), None)  # type: ignore[assignment]
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now - timedelta(hours=1), now + timedelta(days=1)
    )
    pem = made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, key.private_bytes(*form).decode()


@pytest.mark.parametrize("foreign", [True, False], ids=["of another CA", "of a host that has no cluster"])
def test_a_stranger_reads_nothing(host: testinfra.host.Host, ca: str, foreign: bool) -> None:
    ask = "runuser -u postgres -- pgbackrest --config=/etc/pgbackrest/member.conf --stanza=core --repo=1 {} repo-ls backup/core"
    assert "backup.info" in host.check_output(ask.format(""))
    pem, key = certificate("stranger", None if foreign else Path(ca).parent)
    try:
        host.check_output("install -d -o postgres -m 0700 /tmp/stranger")
        for name, text in (("crt", pem), ("key", key)):
            host.check_output(
                f"printf %s {shlex.quote(text)} >/tmp/stranger/{name}; chown postgres /tmp/stranger/{name}; chmod 600 /tmp/stranger/{name}"
            )
        done = host.run(ask.format("--repo1-host-cert-file=/tmp/stranger/crt --repo1-host-key-file=/tmp/stranger/key"))
        assert done.rc != 0
        assert "backup.info" not in done.stdout
        assert ("TLS error" if foreign else "access denied") in done.stdout + done.stderr
    finally:
        host.check_output("rm -rf /tmp/stranger")


# --- the drill -------------------------------------------------------------------------------------------------------------


def test_a_damaged_backup_turns_drill_metric_and_status_red_until_there_is_a_new_one(host: testinfra.host.Host) -> None:
    state = "/var/lib/evenkeel/backup/drill-plugins.json"
    host.check_output(f"rm -f {state}")  # then it is the first repository's turn
    host.check_output("evenkeel-backup drill plugins")
    assert metric(host, 'evenkeel_restore_drill_success{cluster="plugins"}') == 1
    assert json.loads(host.file(state).content_string)["rows"], "it counted rows"

    host.check_output(f"rm -f {state}")
    newest = held(host, "plugins")["host"]["backups"][-1]["label"]
    damaged = f"/var/lib/pgbackrest/backup/plugins/{newest.split('_')[0]}/bundle/1"
    size = host.file(damaged).size
    host.check_output(f"printf damaged | dd of={damaged} bs=1 seek={size // 2} conv=notrunc status=none")
    drill = host.run("evenkeel-backup drill plugins")
    assert drill.rc != 0
    assert "the newest backup of plugins did not restore from repository host" in drill.stdout
    assert metric(host, 'evenkeel_restore_drill_success{cluster="plugins"}') == 0
    assert not host.file("/var/lib/evenkeel/backup/drill-plugins").exists, "it cleans up after itself"
    assert host.run("evenkeel-backup verify plugins").rc != 0, "the files themselves are looked at, too"
    until("health sees it", lambda: "unhealthy" in host.run("evenkeel-health status | grep restore-drill-plugins").stdout)
    status = playbook("status")
    assert status.code != 0
    assert "restore-drill-plugins" in status.output

    host.check_output("evenkeel-backup now plugins --type full")
    host.check_output("evenkeel-backup drill plugins")
    assert metric(host, 'evenkeel_restore_drill_success{cluster="plugins"}') == 1
    until("health sees that too", lambda: " healthy" in host.run("evenkeel-health status | grep restore-drill-plugins").stdout)
    assert playbook("status").code == 0
    forget = f"--config=/etc/pgbackrest/repository.conf --stanza=plugins --repo=1 --set={newest.split('_')[0]} expire"
    host.check_output(f"runuser -u pgbackrest -- pgbackrest {forget}")


# --- restore -----------------------------------------------------------------------------------------------------------------


def restore(*arguments: str) -> Run:
    return playbook("restore", *(word for argument in arguments for word in ("-e", argument)))


def fingerprint(run: Run) -> str:
    """Of the plan that a run has shown, which refused to carry it out."""
    assert run.code != 0
    assert "Nothing was changed. To do exactly this, type:" in sentence(run), run.output[-3000:]
    found = re.search(r"-e confirm=([0-9a-f]{16})", sentence(run))
    assert found, run.output[-3000:]
    return found.group(1)


@contextmanager
def marked(host: testinfra.host.Host, *clusters: str) -> Iterator[None]:
    """A table of a test's own in the application's databases."""
    for cluster in clusters:
        sql(host, cluster, "CREATE TABLE restored (word text)")
    try:
        yield
    finally:
        for cluster in clusters:
            sql(host, cluster, "DROP TABLE IF EXISTS restored")
        host.check_output("rm -rf /var/lib/postgresql/15/*/pgdata.before-*")


@pytest.mark.parametrize("when", ["2001-01-01 00:00:00+00", "2099-01-01 00:00:00+00"], ids=["past", "future"])
def test_a_time_outside_the_archive_is_refused_with_the_possible_range(when: str) -> None:
    run = restore("cluster=core", f"time='{when}'")
    assert run.code != 0
    assert run.count("changed") == 0
    assert re.search(rf"core cannot be restored to {re.escape(when)}. Possible is: repository host from 20\d\d-", sentence(run)), (
        run.output[-2000:]
    )


def test_a_time_without_zone_is_refused() -> None:
    run = restore("cluster=core", "time='2026-11-22 03:14:00'")
    assert (run.code != 0, run.count("changed")) == (True, 0)
    assert "has no zone" in sentence(run)


def test_restore_between_two_rows_on_both_clusters(host: testinfra.host.Host, ca: str) -> None:
    with marked(host, *PORTS):
        for cluster in PORTS:
            sql(host, cluster, "INSERT INTO restored VALUES ('first')")
        time.sleep(1.5)
        between = str(host.check_output("date -u '+%Y-%m-%d %H:%M:%S+00'"))
        time.sleep(1.5)
        for cluster in PORTS:
            sql(host, cluster, "INSERT INTO restored VALUES ('second')")
        wanted = ("cluster=core,plugins", f"time='{between}'")
        plan = restore(*wanted)
        assert plan.count("changed") == 0
        confirm = fingerprint(plan)
        assert "The application is stopped until both clusters are back" in plan.output
        other = restore(*wanted, "confirm=0123456789abcdef")
        assert f"confirm=0123456789abcdef is of another plan; this one has the fingerprint {confirm}" in sentence(other)
        assert [sql(host, cluster, "SELECT count(*) FROM restored") for cluster in PORTS] == ["2", "2"], "a refusal changes nothing"

        began = time.monotonic()
        done = restore(*wanted, f"confirm={confirm}")
        assert done.code == 0, done.output[-5000:]
        took = time.monotonic() - began
        for cluster in PORTS:
            assert sql(host, cluster, "SELECT string_agg(word, ' ') FROM restored") == "first", cluster
        assert playbook("verify").code == 0
        record = json.loads((Path(ca).parents[1] / f"restores/{confirm}.json").read_text())
        assert record["results"].keys() == PORTS.keys()
        assert restore(*wanted, f"confirm={confirm}").code != 0, "it is not done twice"

        chosen = record["plan"]["clusters"]["core"]
        options = f"--stanza=core --repo={chosen['number']} --set={chosen['backup']} --pg1-path=/var/lib/postgresql/plain --process-max=2"
        host.check_output("install -d -o postgres -m 0700 /var/lib/postgresql/plain")
        began = time.monotonic()
        host.check_output(f"runuser -u postgres -- pgbackrest --config=/etc/pgbackrest/member.conf {options} restore")
        plain = time.monotonic() - began
        host.check_output("rm -rf /var/lib/postgresql/plain")
        core = record["results"]["core"]
        print(
            f"restore of both clusters by the playbook {took:.0f} s; of it core: restore {core['restore_seconds']} s, "
            f"recovery {core['recover_seconds']} s; plain pgbackrest restore of core: {plain:.1f} s"
        )
    site = playbook("site")
    assert (site.code, site.count("changed")) == (0, 0), site.output[-3000:]


# --- one cluster beside the other (D1) ------------------------------------------------------------------------------------


@contextmanager
def writing(host: testinfra.host.Host, cluster: str) -> Iterator[Callable[[], tuple[int, int]]]:
    """Somebody writes to a cluster all the time, with a connection for each row; tells (written, failed)."""
    sql(host, cluster, "CREATE TABLE written (at timestamptz DEFAULT clock_timestamp())")
    insert = f"PGCONNECT_TIMEOUT=5 psql -Xq -U postgres -p {PORTS[cluster]} -d drydock -c 'INSERT INTO written DEFAULT VALUES'"
    loop = f"while :; do {insert} && echo ok || echo failed; sleep 0.1; done >/run/written 2>/dev/null"
    host.check_output("systemd-run --quiet --unit=test-writer bash -c %s", loop)

    def counts() -> tuple[int, int]:
        said = str(host.check_output("cat /run/written")).split()
        return said.count("ok"), said.count("failed")

    try:
        until("it writes", lambda: counts()[0] > 3)
        yield counts
    finally:
        host.check_output("systemctl stop test-writer; rm -f /run/written")
        sql(host, cluster, "DROP TABLE written")


def test_core_in_restore_leaves_plugins_serving_and_an_interrupted_restore_is_finished(host: testinfra.host.Host) -> None:
    with marked(host, "core"), writing(host, "plugins") as counts:
        sql(host, "core", "INSERT INTO restored VALUES ('kept')")
        confirm = fingerprint(restore("cluster=core", "latest=yes"))
        command = [
            "ansible-playbook",
            "-i",
            str(INVENTORY),
            "playbooks/restore.yml",
            "-e",
            "cluster=core",
            "-e",
            "latest=yes",
            "-e",
            f"confirm={confirm}",
        ]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as interrupted:
            note = "/var/lib/postgresql/15/core/restore.json"
            until("the restore is under way", lambda: '"restoring"' in host.run(f"cat {note}").stdout)
            os.killpg(interrupted.pid, signal.SIGKILL)
        assert not host.service("patroni@core").is_running
        host.run("systemctl start patroni@core")
        assert not host.service("patroni@core").is_running, "half a database must not be started"
        before = counts()[0]
        done = restore("cluster=core", "latest=yes", f"confirm={confirm}")
        assert done.code == 0, done.output[-5000:]
        assert sql(host, "core", "SELECT string_agg(word, ' ') FROM restored") == "kept"
        written, failed = counts()
        assert written > before + 20
        assert failed == 0
    assert playbook("verify").code == 0


def test_core_with_a_full_disk_leaves_plugins_serving(host: testinfra.host.Host) -> None:
    """The disk of its WAL: a small file system is mounted there, filled, and taken away again."""
    wal = "/var/lib/postgresql/15/core/pgdata/pg_wal"
    move = "cp -a {0}/. {1}/ && chown -R postgres: {1} && chmod 700 {1}"
    with writing(host, "plugins") as counts:
        host.check_output("systemctl stop patroni@core")
        try:
            size = int(host.check_output(f"du -sm {wal}").split()[0]) + 40
            host.check_output(f"install -d /run/wal && mount -t tmpfs -o size={size}m wal /run/wal && {move.format(wal, '/run/wal')}")
            host.check_output(f"mount --bind /run/wal {wal} && systemctl start patroni@core")
            until("core is up", lambda: host.run("psql -U postgres -p 5432 -c 'SELECT 1/(not pg_is_in_recovery())::int'").rc == 0)
            fill = "CREATE TABLE filling AS SELECT repeat(md5(n::text), 30) FROM generate_series(1, 2000000) n"
            filled = host.run("psql -U postgres -p 5432 -d drydock -c %s", fill)
            assert filled.rc != 0
            assert "No space left on device" in host.check_output("journalctl -u patroni@core -n 400 -o cat")
            time.sleep(3)
            written, failed = counts()
            assert written > 20
            assert failed == 0
        finally:
            host.run("timeout 90 systemctl stop patroni@core || systemctl kill -s KILL patroni@core")
            host.run(f"umount {wal} && find {wal} -mindepth 1 -delete && {move.format('/run/wal', wal)}; umount /run/wal")
            host.check_output("systemctl start patroni@core")
        until("core is back", lambda: host.run("psql -U postgres -p 5432 -c 'SELECT 1/(not pg_is_in_recovery())::int'").rc == 0)
        assert counts()[1] == 0
    assert sql(host, "core", "SELECT to_regclass('filling') IS NULL") == "t"
    host.check_output("evenkeel-health wait --timeout 120 postgresql-core")
