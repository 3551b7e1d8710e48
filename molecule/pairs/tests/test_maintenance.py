"""Maintenance follows the primary, and the maintenance page is at every proxy."""

from __future__ import annotations

import pytest
from load.places import CLUSTERS, Platform, until


def vacuum(platform: Platform, host: str, cluster: str) -> str:
    """Run it as the timer does; the last line that it wrote."""
    unit = f"pg-maintenance-vacuum@{cluster}.service"
    platform.ssh(host, f"systemctl start {unit}")
    return platform.ssh(
        host, f"journalctl --sync; journalctl -q -o cat -n 1 _SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID {unit})"
    )


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_d3_after_a_switchover_the_new_primary_is_maintained_and_the_old_one_leaves_it_to_it(platform: Platform, cluster: str) -> None:
    metrics = f"/var/lib/evenkeel/metrics/maintenance-{cluster}.prom"
    old = platform.primary(cluster)
    assert "nothing left undone" in vacuum(platform, old, cluster)
    platform.ssh(old, f"test -s {metrics}")
    platform.playbook("switchover", "-e", f"cluster={cluster}")
    new = platform.primary(cluster)
    assert new != old
    assert vacuum(platform, old, cluster).startswith(f"cluster {cluster}: this member is a standby of ")
    platform.ssh(old, f"test ! -e {metrics}")
    assert "nothing left undone" in vacuum(platform, new, cluster)
    platform.ssh(new, f"grep -q last_success_timestamp_seconds.*vacuum {metrics}")
    shown = platform.playbook("maintenance", "-e", "action=reindex", "-e", f"cluster={cluster}")
    assert f"{new}: cluster {cluster}: " in shown
    assert f"{old}: " not in shown.partition("PLAY RECAP")[0].replace(f"ok: [{old}]", "")


def test_d3_a_run_that_loses_its_primary_says_so_and_the_next_one_mends_what_it_left(platform: Platform) -> None:
    primary = platform.primary("core")
    unit = "pg-maintenance-reindex@core:postgres:public.held.service"
    sql = "runuser -u postgres -- psql -qAtc"
    platform.ssh(primary, f"{sql} 'CREATE TABLE held (id int PRIMARY KEY)'")
    platform.ssh(
        primary,
        f"systemd-run -q --unit=holder --uid=postgres psql -c '{'BEGIN; LOCK TABLE held IN ROW EXCLUSIVE MODE; SELECT pg_sleep(300)'}'",
    )
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    until(
        "the transaction",
        lambda: platform.ssh(primary, f"{sql} \"SELECT count(*) FROM pg_locks WHERE relation = 'held'::regclass\"") != "0",
        30,
    )
    platform.ssh(primary, f"systemctl start --no-block {unit}")
    until("the half-built index", lambda: platform.ssh(primary, f"{sql} '{invalid}'") == "1", 30)
    platform.playbook("switchover", "-e", "cluster=core")
    until("the end of the run", lambda: platform.ssh(primary, f"systemctl is-failed {unit} || true") == "failed", 60)
    said = platform.ssh(primary, f"journalctl -q -o cat -n 20 -u {unit}")
    assert "cluster core has lost its primary on this host, or the connection to it, in the middle of the run" in said
    new = platform.primary("core")
    assert platform.ssh(new, f"{sql} '{invalid}'") == "1", "it came with the data"
    platform.ssh(new, f"systemctl start {unit}")
    assert platform.ssh(new, f"{sql} '{invalid}'") == "0"
    platform.ssh(primary, f"systemctl start {unit}")  # as a standby it ends well, and its failure is forgotten
    platform.ssh(primary, f"test ! -e /var/lib/evenkeel/failures/{unit}; systemctl reset-failed holder 2>/dev/null || true")
    platform.ssh(new, f"{sql} 'DROP TABLE held'")


def test_the_maintenance_page_is_at_every_proxy_and_own_hosts_pass(platform: Platform) -> None:
    places = [f"https://{platform.address(host)}/login" for host in platform.hosts_of("proxy")]
    platform.playbook("maintenance", "-e", "page=on", "-e", "reason='a test'")
    try:
        assert [platform.ask(place).status_code for place in [*places, f"{platform.url}/login"]] == [503] * (len(places) + 1)
        for host in platform.hosts_of("worker"):
            answered = "curl -s -o /dev/null -w '%{http_code}' --cacert /etc/evenkeel/pki/ca.crt https://platform/ready"
            assert platform.ssh(host, answered) == "200", "a worker's call to the platform"
    finally:
        platform.playbook("maintenance", "-e", "page=off")
    assert [platform.ask(place).status_code for place in places] == [200] * len(places)
