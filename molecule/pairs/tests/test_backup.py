"""A restore in place on pairs: the leading member is restored and verified, and the other copies it (D6).

That `site.yml` has nothing to change then is seen by the last tests of test_pairs.py.
"""

from __future__ import annotations

import re
import subprocess

from load.places import ROOT, Platform, until


def sql(platform: Platform, cluster: str, statement: str) -> str:
    """The answer of the primary, wherever it is, to its superuser."""
    port = platform.topology["postgresql"][cluster]["port"]
    database = platform.app["databases"][cluster]["name"]
    return platform.ssh(platform.primary(cluster), f'psql -XAtq -v ON_ERROR_STOP=1 -U postgres -p {port} -d {database} -c "{statement}"')


def timeline(platform: Platform, host: str) -> int:
    return int(platform.member("core", host)["timeline"])


def test_restored_member_leads_and_the_standby_copies_it(platform: Platform) -> None:
    before = {host: timeline(platform, host) for host in platform.hosts_of("core")}
    platform.playbook("backup", "-e", "action=now", "-e", "cluster=core", "-e", "type=incr")
    sql(platform, "core", "CREATE TABLE restored (word text); INSERT INTO restored VALUES ('first')")
    between = platform.ssh("ops-1", "sleep 1.5; date -u '+%Y-%m-%d %H:%M:%S+00'; sleep 1.5").splitlines()[-1]
    sql(platform, "core", "INSERT INTO restored VALUES ('second')")
    leader = platform.primary("core")
    wanted = ["-e", "cluster=core", "-e", f"time='{between}'"]
    shown = subprocess.run(
        ["ansible-playbook", "-i", str(platform.inventory), "playbooks/restore.yml", *wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    confirm = re.search(r"-e\s+confirm=([0-9a-f]{16})", shown)
    assert confirm, shown[-3000:]
    platform.playbook("restore", *wanted, "-e", f"confirm={confirm.group(1)}")
    try:
        assert platform.primary("core") == leader
        assert sql(platform, "core", "SELECT string_agg(word, ' ') FROM restored") == "first"
        until("both members are of the new timeline", lambda: all(timeline(platform, host) > line for host, line in before.items()), 60)
        until("the standby is synchronous", lambda: not platform.unwell(), 120)
        standby = platform.standby("core")
        port = platform.topology["postgresql"]["core"]["port"]
        copied = platform.ssh(
            standby, f"psql -XAtq -U postgres -p {port} -d {platform.app['databases']['core']['name']} -c 'SELECT word FROM restored'"
        )
        assert copied == "first"
    finally:
        sql(platform, "core", "DROP TABLE IF EXISTS restored")
        platform.ssh(leader, "rm -rf /var/lib/postgresql/15/core/pgdata.before-*")
