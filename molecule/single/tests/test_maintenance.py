"""The quiet work on a host that serves: vacuum, reindex, the maintenance page, pruning (D3, D4, Q4, U1)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
import requests
import testinfra
from conftest import playbook, secret

PROGRAM = "/usr/local/lib/evenkeel/pg_maintenance.py"
CLUSTERS = {"core": 5432, "plugins": 5433}
Host = testinfra.host.Host


@pytest.fixture(autouse=True)
def _once(request: pytest.FixtureRequest, host: Host) -> None:
    """What does not depend on a reboot is not tested again after it."""
    if not host.file("/run/converged").exists and "reboot" not in request.node.name:
        pytest.skip("tested before the reboot")


def sql(host: Host, statement: str, port: int = 5432, database: str = "postgres") -> str:
    return str(host.check_output("runuser -u postgres -- psql -p %s -d %s -qAtc %s", str(port), database, statement))


def metric(host: Host, cluster: str, name: str, action: str) -> float:
    text = host.check_output("cat /var/lib/evenkeel/metrics/maintenance-%s.prom", cluster)
    found = re.search(rf'^evenkeel_maintenance_{name}{{cluster="{cluster}",action="{action}"}} (\S+)$', text, re.MULTILINE)
    assert found, text
    return float(found[1])


# --- D3 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_d3_timers_wait_for_their_sunday_after_a_reboot_too(host: Host, cluster: str) -> None:
    for action, first, hour in (("vacuum", False, "03"), ("reindex", True, "04")):
        timer = f"pg-maintenance-{action}@{cluster}.timer"
        assert host.check_output("systemctl is-active %s; systemctl is-enabled %s", timer, timer).split() == ["active", "enabled"]
        calendar = re.search(r"OnCalendar=(.*?) ;", host.check_output("systemctl show -p TimersCalendar %s", timer))
        assert calendar
        shown = host.check_output("TZ=UTC systemd-analyze calendar --iterations=12 --base-time=2026-11-22 %s", calendar[1])
        days = re.findall(r"(?:Next elapse|Iter\. #\d+): (\w+) \d+-(\d+)-(\d+) (\d+):(\d+):(\d+) UTC", shown)
        assert len(days) == 12, shown
        assert {(name, *clock) for name, _, _, *clock in days} == {("Sun", hour, "00", "00")}
        if first:
            assert all(int(day) <= 7 for _, _, day, *_ in days)
            assert len({month for _, month, *_ in days}) == 12, "once a month"
        else:
            assert [int(day) for _, _, day, *_ in days[:3]] == [22, 29, 6], "every week"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_d3_both_actions_run_on_the_primary_as_the_timers_start_them(host: Host, cluster: str) -> None:
    port = CLUSTERS[cluster]
    file = "SELECT relfilenode FROM pg_class WHERE relname = 'django_migrations_pkey'"
    before = sql(host, file, port, "drydock")
    began = float(host.check_output("date +%s"))
    for action in ("vacuum", "reindex"):
        host.check_output("systemctl start pg-maintenance-%s@%s.service", action, cluster)
        assert metric(host, cluster, "last_success_timestamp_seconds", action) >= began
        assert metric(host, cluster, "relations_failed", action) == 0
        lines = host.check_output("journalctl -u pg-maintenance-%s@%s.service -o cat -n 20", action, cluster)
        assert re.search(rf"cluster {cluster}: \d+ \w+ .* in \d+ s, nothing left undone", lines), lines
    assert sql(host, file, port, "drydock") != before, "its indexes are new files"
    host.check_output("evenkeel-health wait --timeout 60 pg-maintenance-%s", cluster)
    assert host.file(f"/var/lib/evenkeel/metrics/maintenance-{cluster}.prom").mode == 0o644


def test_d3_vacuum_full_is_refused_with_the_reason(host: Host) -> None:
    run = playbook("maintenance", "-e", "action=vacuum_full", "-e", "cluster=core")
    assert (run.code != 0, run.count("changed")) == (True, 0)
    assert "VACUUM FULL is refused: it locks every table against reads and writes" in " ".join(run.output.split())
    refused = host.run(f"{PROGRAM} vacuum_full core")
    assert refused.rc == 2
    assert "VACUUM FULL is refused" in refused.stderr


def test_by_hand_it_is_seen_working_and_check_mode_only_looks(host: Host) -> None:
    before = metric(host, "core", "last_run_timestamp_seconds", "vacuum")
    run = playbook("maintenance", "-e", "action=vacuum", "-e", "cluster=core", "--check")
    assert (run.code, run.count("changed")) == (0, 0), run.output
    assert re.search(r"drydock: \d+ tables would be vacuumed and analyzed", " ".join(run.output.split())), run.output
    assert metric(host, "core", "last_run_timestamp_seconds", "vacuum") == before
    run = playbook("maintenance", "-e", "action=vacuum", "-e", "cluster=core")
    assert (run.code, run.count("changed")) == (0, 1), run.output
    assert re.search(r"^single: cluster core: \d+ tables vacuumed and analyzed in \d+ s, nothing left undone$", run.output, re.MULTILINE)
    assert metric(host, "core", "last_run_timestamp_seconds", "vacuum") > before


def test_what_is_not_there_is_refused_in_one_sentence(host: Host) -> None:
    for words, sentence in (
        (["action=reindex", "cluster=core", "database=nope"], 'cluster core has no database "nope"; it has: drydock, postgres'),
        (["page=on", "reason=a test"], 'Ansible has not taken "test" as part of the value, for a blank stands before it.'),
        (["action=rebuild"], "action=rebuild is none of vacuum, reindex, bloat."),
        (["action=vacuum", "table=public.x"], "A database or table is of one cluster: add -e cluster=core or -e cluster=plugins."),
    ):
        run = playbook("maintenance", *[word for pair in words for word in ("-e", pair)])
        assert (run.code != 0, run.count("changed")) == (True, 0), run.output
        assert sentence in " ".join(run.output.split()), run.output
    assert host.run("systemctl --failed --no-legend --plain").stdout == ""


# --- D4 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def big(host: Host) -> Iterator[str]:
    """A table in the cluster plugins that somebody writes to all the time; the longest wait of a write is in its table `waits`."""
    sql(host, "DROP TABLE IF EXISTS big, waits", 5433)
    sql(host, "CREATE TABLE big AS SELECT n AS id, md5(n::text)::char(32) AS note FROM generate_series(1, 200000) AS n", 5433)
    sql(host, "CREATE INDEX big_note ON big (note); CREATE TABLE waits (seconds float8)", 5433)
    yield "big"
    sql(host, "DROP TABLE IF EXISTS big, waits", 5433)


WRITER = """
import psycopg2, time
c = psycopg2.connect(host="/var/run/postgresql", port=5433, user="postgres", dbname="postgres", application_name="writer")
c.autocommit = True
q = c.cursor()
longest, count, end = 0.0, 0, time.monotonic() + 300
while time.monotonic() < end:
    began = time.monotonic()
    q.execute("INSERT INTO big VALUES (0, md5(random()::text))")
    longest, count = max(longest, time.monotonic() - began), count + 1
    q.execute("SELECT to_regclass('waits_over') IS NOT NULL")
    if q.fetchone()[0]:
        break
    time.sleep(0.01)
q.execute("INSERT INTO waits VALUES (%s), (%s)", [longest, -count])
"""


END_OF_HOLDER = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(300)%' AND pid <> pg_backend_pid()"


def invalid(host: Host) -> str:
    return sql(host, "SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid", 5433)


def wait_for(question: str, look: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not look():  # type: ignore[operator]
        assert time.monotonic() < deadline, question
        time.sleep(0.1)


def test_d4_a_reindex_that_is_killed_leaves_an_invalid_index_which_the_next_run_drops_while_writes_go_on(host: Host, big: str) -> None:
    lock_timeout = json.loads(host.check_output("cat /etc/evenkeel/pg-maintenance-plugins.json"))["lock_timeout_seconds"]
    unit = "pg-maintenance-reindex@plugins:postgres:public.big.service"
    host.check_output("systemd-run -q --unit=writer --uid=postgres python3 -c %s", WRITER)
    holder = "BEGIN; LOCK TABLE big IN ROW EXCLUSIVE MODE; SELECT pg_sleep(300)"  # a long transaction, for which the reindex must wait
    host.check_output("systemd-run -q --unit=holder --uid=postgres psql -p 5433 -c %s", holder)
    try:
        wait_for(
            "the transaction",
            lambda: sql(host, "SELECT count(*) FROM pg_locks WHERE relation = 'big'::regclass AND mode = 'RowExclusiveLock'", 5433) != "0",
        )
        host.check_output("systemctl start --no-block %s", unit)
        wait_for("the new index", lambda: "big_note_ccnew" in invalid(host))
        host.check_output("systemctl kill --signal=KILL %s", unit)
        at_work = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'REINDEX%' AND state = 'active'"
        wait_for("PostgreSQL, to notice that nobody waits for its work", lambda: sql(host, at_work, 5433) == "0")
        sql(host, END_OF_HOLDER, 5433)
        wait_for("the end of the killed run", lambda: host.run("systemctl is-failed %s", unit).stdout.strip() == "failed")
        assert invalid(host) == "big_note_ccnew", "and it stays, and every write keeps it up to date"

        host.check_output("systemctl start %s", unit)  # ends well, or this fails
        assert invalid(host) == ""
        said = host.check_output("journalctl -u %s -o cat -n 30", unit)
        assert "postgres: dropped public.big_note_ccnew, which an interrupted REINDEX CONCURRENTLY had left behind" in said
        assert sql(host, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'writer'", 5433) == "1", "the writer writes"
        assert not host.file(f"/var/lib/evenkeel/failures/{unit}").exists, "the note of the failure is gone"
    finally:
        sql(host, END_OF_HOLDER, 5433)
        sql(host, "CREATE TABLE IF NOT EXISTS waits_over ()", 5433)
        wait_for("the writer", lambda: sql(host, "SELECT count(*) FROM waits", 5433) == "2")
        host.run("systemctl stop %s; systemctl reset-failed %s holder", unit, unit)
        sql(host, "DROP TABLE waits_over", 5433)
    longest = float(sql(host, "SELECT max(seconds) FROM waits", 5433))
    count = -float(sql(host, "SELECT min(seconds) FROM waits", 5433))
    print(f"{count:.0f} writes, the longest took {longest:.3f} s; lock_timeout is {lock_timeout} s")
    assert count > 20
    assert longest < lock_timeout


def test_d4_without_a_database_it_tries_and_then_fails_with_a_clear_message(host: Host) -> None:
    settings = json.loads(host.check_output("cat /etc/evenkeel/pg-maintenance-plugins.json"))
    assert (settings["ready_tries"], settings["ready_pause_seconds"]) == (30, 5)
    quick = json.dumps({**settings, "ready_tries": 3, "ready_pause_seconds": 0.1})
    host.check_output("printf %%s %s > /run/quick.json; systemctl stop patroni@plugins", quick)
    try:
        failed = host.run(f"{PROGRAM} vacuum plugins --settings /run/quick.json")
        assert failed.rc == 1
        assert [line.split(":")[0] for line in failed.stdout.splitlines()] == [f"try {number} of 3" for number in (1, 2, 3)]
        assert failed.stderr.startswith("cluster plugins was not ready within 3 tries, 0.1 s apart, so nothing was done (")
        assert failed.stderr.count("\n") == 1
    finally:
        host.check_output("rm /run/quick.json; systemctl start patroni@plugins")
    host.check_output("evenkeel-health wait --timeout 120 postgresql-plugins")
    wait_for("a run that succeeds", lambda: host.run(f"{PROGRAM} vacuum plugins").rc == 0, 120)


# --- the maintenance page -----------------------------------------------------------------------------------------------


@pytest.fixture
def page(host: Host) -> Iterator[str]:
    """The page is on; the address that the playbook prints for the operator."""
    run = playbook("maintenance", "-e", "page=on", "-e", "reason='a test'")
    assert (run.code, run.count("changed")) == (0, 1), run.output
    address = re.search(r"https://\S+/\.evenkeel/operator\?token=\S+", run.output)
    assert address
    yield address[0]
    host.check_output("evenkeel-page off")


def test_page_on_keeps_users_out_and_lets_the_operator_and_own_hosts_in(host: Host, web: requests.Session, url: str, page: str) -> None:
    for path, accept in (("/login", "text/html"), ("/api/documents", "*/*"), ("/ready", "application/json"), ("/nowhere", "text/html")):
        answer = web.get(f"{url}{path}", headers={"Accept": accept}, timeout=30)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "300"), path
        assert answer.headers["X-Request-ID"]
        if accept == "text/html":
            assert "This service is being maintained" in answer.text
            assert answer.headers["X-Request-ID"] in answer.text
        else:
            assert answer.json()["code"] == "MAINTENANCE"
    assert web.post(f"{url}/api/documents", json={}, timeout=30).status_code == 503
    assert web.get(f"{url}/nginx-health", timeout=30).status_code == 200, "a load balancer sees a proxy that works"
    # the platform's own hosts, as workers call it
    own = host.check_output("curl -s -o /dev/null -w '%{http_code}' --cacert /etc/evenkeel/pki/ca.crt https://platform/ready")
    assert own == "200"
    # a wrong token, and one in the clear
    assert web.get(f"{url}/.evenkeel/operator?token=guess", timeout=30).status_code == 404
    assert web.get(page.replace("https", "http"), timeout=30, allow_redirects=False).status_code == 404
    assert web.get(f"{url}/login", timeout=30).status_code == 503
    opened = web.get(page, timeout=30, allow_redirects=False)
    assert (opened.status_code, opened.headers["Location"].removeprefix(url)) == (303, "/")
    (cookie,) = web.cookies
    assert cookie.secure and cookie.has_nonstandard_attr("HttpOnly")
    assert web.get(f"{url}/login", timeout=30).status_code == 200
    token = secret("proxy_bypass")
    assert token not in host.check_output("cat /var/log/nginx/*.log")
    assert token not in host.check_output("cat /etc/nginx/nginx.conf")
    assert host.file("/etc/nginx/operator.map").mode == 0o600


def test_page_outlasts_converges_and_restarts_verify_works_behind_it_and_status_says_so(
    host: Host, web: requests.Session, url: str, page: str
) -> None:
    assert page
    host.check_output("systemctl restart nginx && systemctl reload nginx")
    assert web.get(f"{url}/login", timeout=30).status_code == 503
    run = playbook("site")
    assert (run.code, run.count("changed")) == (0, 0), run.output[-3000:]
    assert web.get(f"{url}/login", timeout=30).status_code == 503
    assert playbook("verify").code == 0
    status = playbook("status")
    assert status.code != 0
    assert "MAINTENANCE PAGE IS ON: a test (" in status.output
    run = playbook("maintenance", "-e", "page=off")
    assert (run.code, run.count("changed")) == (0, 1), run.output
    assert web.get(f"{url}/login", timeout=30).status_code == 200


# --- pruning ------------------------------------------------------------------------------------------------------------


def test_prune_shows_what_would_go_and_then_removes_exactly_that(host: Host) -> None:
    uploads = "/var/lib/drydock/uploads/photo"
    host.check_output(f"install -d -o drydock -g drydock {uploads} && install -o drydock -g drydock /dev/null {uploads}/{'0' * 32}.part")
    host.check_output(f"touch -d '2 days ago' {uploads}/{'0' * 32}.part")
    host.check_output("echo left > /var/lib/evenkeel/failures/no-such.service")
    host.check_output(
        "for n in 1 2; do install -d /opt/drydock/releases/0.0.$n-test; touch -d 2001-01-01 /opt/drydock/releases/0.0.$n-test; done"
    )
    places = "/opt/drydock/releases/* /var/lib/evenkeel/failures/* /var/cache/apt/archives/*.deb /var/lib/drydock/uploads/*/*"
    there = f"ls -d {places} 2>/dev/null || true"
    kept = len(host.check_output("ls /opt/drydock/releases").split()) - 2
    before = host.check_output(there)
    told = playbook("prune", "--check", "-e", f"releases_kept={kept}")
    assert told.code == 0, told.output
    assert host.check_output(there) == before
    done = playbook("prune", "-e", f"releases_kept={kept}")
    assert done.code == 0, done.output
    assert {"0.0.1-test", "0.0.2-test"} == set(re.findall(r"0\.0\.\d-test", done.output)) == set(re.findall(r"0\.0\.\d-test", told.output))
    gone = set(before.split()) - set(host.check_output(there).split())
    packages = {path for path in gone if path.endswith(".deb")}
    assert gone - packages == {
        "/opt/drydock/releases/0.0.1-test", "/opt/drydock/releases/0.0.2-test", "/var/lib/evenkeel/failures/no-such.service",
        f"{uploads}/{'0' * 32}.part",
    }  # fmt: skip
    assert "uploads would remove 1 temporary file" in " ".join(told.output.split())
    assert "uploads removed 1 temporary file" in " ".join(done.output.split())
    assert re.search(r"jobs\s+(removed \d+ finished jobs|no more than are kept)", done.output), done.output
    again = playbook("prune", "-e", f"releases_kept={kept}")
    assert (again.code, again.count("changed")) == (0, 0), again.output
