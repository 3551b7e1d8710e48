"""The generated map of services keeps H1's numbers and names every service of H3; that it is not stale, test_promises.py sees."""

from __future__ import annotations

from programs import ROOT

HEAD = ["service", "on", "port, protocol", "check", "times", "owner", "unhealthy"]


def rows() -> dict[str, dict[str, str]]:
    """The lines of the first table, by service."""
    page = (ROOT / "docs/reference/service-endpoints.md").read_text()
    first = page[page.index("| service |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in first]
    assert cells[0] == HEAD
    return {line[0].strip("`"): dict(zip(HEAD, line, strict=True)) for line in cells[2:]}


def test_h1_every_service_is_asked_with_the_same_numbers_and_has_the_start_period_of_its_kind() -> None:
    slow = {"drydock-web": 30, "drydock-script-processor": 60}
    for name, row in rows().items():
        retries = 1 if "the last run did not fail" in row["check"] else 30  # the result of a run does not change by asking again
        assert row["times"] == f"10 / 10 / {retries} / {slow.get(name, 10)}", name


def test_h3_every_service_is_asked_in_its_own_way() -> None:
    ways = {
        "postgresql-core": "`pg_isready -h HOST -p 5432 -U drydock -d drydock`",
        "postgresql-plugins": "`pg_isready -h HOST -p 5433 -U drydock -d drydock`",
        "redis": "--user health PING`: `PONG`",
        "drydock-script-processor": "/ping-processor`: 200",
        "drydock-web": "/webgateway/`: 200",
        "drydock-worker-latex": "/ping/latex`: 200",
        "drydock-worker-export": "/ping/export`: 200",
        "drydock-prune-uploads": "the last run did not fail: `drydock-prune-uploads.timer`",
        "drydock-recompute-availability": "the last run did not fail: `drydock-recompute-availability.timer`",
        "etcd": "/health`: 200",
        "proxy": "/nginx-health`: 200",
    }
    found = rows()
    for name, way in ways.items():
        assert way in found[name]["check"], name


def test_h4_every_service_says_where_it_is_and_whose() -> None:
    found = rows()
    assert (found["postgresql-core"]["on"], found["postgresql-core"]["port, protocol"]) == ("pg-core-1, pg-core-2", "5432 PostgreSQL, TLS")
    assert all(row["on"] and row["owner"] in ("platform", "drydock") for row in found.values())


def test_only_processes_of_the_application_are_restarted_for_their_health() -> None:
    restarted = {name for name, row in rows().items() if row["unhealthy"] == "restarted"}
    assert restarted == {f"drydock-{name}" for name in ("web", "relay", "script-processor", "worker-latex", "worker-export")}
