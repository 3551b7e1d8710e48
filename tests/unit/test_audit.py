"""The audit: OSV's rules for ranges, severities, the allow-list, the service that cannot be reached, and trivy.

The service is a small one on the loopback that answers as OSV's does; trivy is a script of that name on PATH that notes its
arguments. Nothing else stands in for anything.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import evenkeel_audit as a
from test_release import wheel

TODAY = date(2026, 11, 22)
ROOT = Path(__file__).resolve().parents[2]
V3_CRITICAL, V3_HIGH, V3_MEDIUM = ("CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/" + rest for rest in ("C:H/I:H/A:H", "C:H/I:N/A:N", "C:L/I:N/A:N"))
V4_HIGH = "CVSS:4.0/AV:N/AC:L/AT:N/PR:L/UI:N/VC:H/VI:H/VA:H/SC:N/SI:N/SA:N"


def advisory(name: str = "GHSA-1", package: str = "Pillow", *events: dict[str, str], **more: Any) -> dict[str, Any]:
    """One advisory; without events about all versions before 2.0."""
    ranges = [{"type": "ECOSYSTEM", "events": list(events) or [{"introduced": "0"}, {"fixed": "2.0"}]}]
    return {"id": name, "affected": [{"package": {"ecosystem": "PyPI", "name": package}, "ranges": ranges}], **more}


def cvss(*vectors: str) -> list[dict[str, str]]:
    return [{"type": f"CVSS_V{vector[5]}", "score": vector} for vector in vectors]


@pytest.mark.parametrize(
    ("events", "inside", "outside"),
    [
        ([{"introduced": "0"}, {"fixed": "1.2"}], ["0.1", "1.1.9", "1.2rc1", "1.2.dev1"], ["1.2", "1.2.post1", "2"]),
        ([{"introduced": "1.0"}, {"last_affected": "1.2"}], ["1.0", "1.2"], ["0.9", "1.2.1", "1.0rc1"]),
        ([{"introduced": "1.0"}], ["1.0", "99"], ["0.9"]),
        ([{"introduced": "1"}, {"fixed": "1.5"}, {"introduced": "2"}, {"fixed": "2.5"}], ["1.4", "2.4"], ["1.5", "1.9", "2.5"]),
        ([{"fixed": "2.5"}, {"introduced": "2"}, {"fixed": "1.5"}, {"introduced": "1"}], ["1.4", "2.4"], ["1.5", "1.9", "2.5"]),
    ],
)
def test_ranges(events: list[dict[str, str]], inside: list[str], outside: list[str]) -> None:
    given = advisory("X", "pillow", *events)
    assert [version for version in inside if not a.affects(given, "pillow", version)] == []
    assert [version for version in outside if a.affects(given, "pillow", version)] == []


def test_versions_are_named_and_names_have_one_spelling() -> None:
    given = {"id": "X", "affected": [{"package": {"ecosystem": "PyPI", "name": "Foo_Bar"}, "versions": ["1.0", "odd-version"]}]}
    assert a.affects(given, "foo-bar", "1.0.0")
    assert a.affects(given, "foo-bar", "odd-version")
    assert not a.affects(given, "foo-bar", "1.1")
    assert not a.affects(given, "foo", "1.0")
    assert not a.affects(
        {**given, "affected": [{**given["affected"][0], "package": {"ecosystem": "npm", "name": "foo-bar"}}]}, "foo-bar", "1.0"
    )


@pytest.mark.parametrize(
    ("more", "severity"),
    [
        ({"severity": cvss(V3_CRITICAL)}, "CRITICAL"),
        ({"severity": cvss(V3_MEDIUM, V4_HIGH)}, "HIGH"),
        ({"severity": cvss(V3_MEDIUM), "database_specific": {"severity": "CRITICAL"}}, "MEDIUM"),
        ({"database_specific": {"severity": "MODERATE"}}, "MEDIUM"),
        ({"severity": [{"type": "CVSS_V3", "score": "nonsense"}]}, "UNKNOWN"),
        ({}, "UNKNOWN"),
    ],
)
def test_severity(more: dict[str, Any], severity: str) -> None:
    assert a.severity(advisory(**more), "pillow") == severity


def place(folder: Path, *advisories: dict[str, Any]) -> str:
    (folder / "one.json").write_text(json.dumps(advisories[0]))
    (folder / "list.json").write_text(json.dumps(list(advisories[1:])))
    return str(folder)


def look(folder: Path, *advisories: dict[str, Any], allowed: list[dict[str, Any]] | None = None) -> a.Audit:
    return a.audit([("pillow", "1.5"), ("idna", "3.10")], place(folder, *advisories), allowed or [], TODAY)


def test_findings_of_several_databases_are_one_and_fail_the_build(tmp_path: Path) -> None:
    result = look(
        tmp_path,
        advisory("PYSEC-1", aliases=["CVE-1"], modified="2025-01-01T00:00:00Z"),
        advisory("GHSA-1", "pillow", aliases=["CVE-1"], severity=cvss(V3_HIGH), summary="It leaks.", modified="2026-02-03T00:00:00Z"),
        advisory("GHSA-2", "pillow", {"introduced": "0"}, severity=cvss(V3_MEDIUM)),
        advisory("GHSA-3", withdrawn="2025-01-01T00:00:00Z"),
        advisory("GHSA-4", "pillow", {"introduced": "1.6"}),
    )
    assert result.line() == f"audit: 2 packages, 2 findings (MEDIUM 1, HIGH 1), 0 allowed; advisories of {tmp_path}, newest 2026-02-03"
    told = a.refusal(result, "1.0-abc", TODAY)
    assert "  pillow 1.5: CVE-1, GHSA-1, PYSEC-1, HIGH; fixed in 2.0. It leaks." in told
    assert '[{id: CVE-1, package: pillow, until: "2026-12-22", reason: …}]' in told
    assert "GHSA-2" not in told
    data = json.loads(a.record(result, "1.0-abc", datetime(2026, 11, 22, tzinfo=UTC), "scanned"))
    assert [(finding["ids"][0], finding["severity"], finding["fixed"]) for finding in data["findings"]] == [
        ("CVE-1", "HIGH", "2.0"),
        ("GHSA-2", "MEDIUM", None),
    ]


def test_unknown_severity_counts_as_high_and_medium_passes(tmp_path: Path) -> None:
    assert "of unknown severity, which counts as HIGH; fixed in 2.0" in a.refusal(look(tmp_path, advisory()), "1.0-abc", TODAY)
    assert a.refusal(look(tmp_path, advisory(severity=cvss(V3_MEDIUM))), "1.0-abc", TODAY) == ""


@pytest.mark.parametrize("name", ["ghsa-1", "CVE-1"])
def test_allowed_finding_passes_by_id_or_alias_and_only_for_its_package(tmp_path: Path, name: str) -> None:
    entry = {"id": name, "package": "PILLOW", "until": "2026-12-31", "reason": "images come from us alone"}
    bad = advisory("GHSA-1", aliases=["CVE-1"], severity=cvss(V3_CRITICAL))
    result = look(tmp_path, bad, allowed=[entry])
    assert a.refusal(result, "1.0-abc", TODAY) == ""
    assert "1 finding (CRITICAL 1), 1 allowed" in result.line()
    assert result.findings[0].allowed == "until 2026-12-31: images come from us alone"
    assert a.refusal(look(tmp_path, bad, allowed=[{**entry, "package": "idna"}]), "1.0-abc", TODAY) != ""
    assert a.refusal(look(tmp_path, bad, allowed=[{**entry, "id": "GHSA-2"}]), "1.0-abc", TODAY) != ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reason": " "}, r"release_allowed_advisories\[0\] \(CVE-1, pillow\): reason is missing"),
        ({"until": None, "id": None}, "id and until is missing"),
        ({"until": "soon"}, "until must be a date like \"2027-02-20\", not 'soon'"),
        ({"until": "2026-11-21"}, "CVE-1, pillow.*: expired on 2026-11-21"),
        ({"until": "2027-05-22"}, "2027-05-22 is more than 180 days ahead; 2027-05-21 at the latest"),
    ],
)
def test_allow_list_without_reason_or_date_or_past_it_fails(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    entry = {"id": "CVE-1", "package": "pillow", "until": "2026-11-22", "reason": "why", **change}
    with pytest.raises(a.AuditError, match=sentence):
        look(tmp_path, advisory(), allowed=[entry])


def test_today_and_the_last_day_are_allowed() -> None:
    for until in ("2026-11-22", "2027-05-21"):
        assert a.read_allowed([{"id": "X", "package": "p", "until": until, "reason": "why"}], TODAY)


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "cannot be read as JSON"), ('{"id": "X"}', "no OSV advisory"), ("[]", "there is no advisory in")]
)
def test_files_that_hold_no_advisories_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(a.AuditError, match=sentence):
        a.audit([], str(tmp_path), [], TODAY)
    with pytest.raises(a.AuditError, match="there is no /nowhere"):
        a.audit([], "/nowhere", [], TODAY)


class Service(BaseHTTPRequestHandler):
    """Answers as api.osv.dev does: two pages for pillow, nothing for others."""

    failures = 0

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        results: list[dict[str, Any]] = []
        for query in queries:
            assert query["package"]["ecosystem"] == "PyPI"
            if query["package"]["name"] != "pillow":
                results.append({})
            elif "page_token" not in query:
                results.append({"vulns": [{"id": "GHSA-1"}], "next_page_token": "more"})
            else:
                results.append({"vulns": [{"id": "GHSA-2"}]})
        self.answer({"results": results})

    def do_GET(self) -> None:
        name = self.path.removeprefix("/v1/vulns/")
        self.answer(advisory(name, severity=cvss(V3_HIGH if name == "GHSA-2" else V3_MEDIUM)))

    def answer(self, body: Any) -> None:
        type(self).failures, failing = max(0, self.failures - 1), self.failures > 0
        self.send_response(503 if failing else 200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_service_is_asked_page_after_page_and_again_when_it_stumbles(service: str) -> None:
    Service.failures = 2
    result = a.audit([("pillow", "1.5"), ("idna", "3.10")], service, [], TODAY)
    assert [finding.ids for finding in result.findings] == [["GHSA-2"], ["GHSA-1"]]
    assert result.line().endswith(f"advisories of {service.removeprefix('http://')}, asked 2026-11-22")


def test_service_out_of_reach_fails_the_build_and_names_the_way_out(service: str) -> None:
    Service.failures = 3
    for url in (service, "http://127.0.0.1:9"):
        with pytest.raises(a.AuditError, match=r"could not be asked .* so the release is refused; .* -e release_advisories=/path"):
            a.audit([("pillow", "1.5")], url, [], TODAY)


def test_snapshot_of_the_demo_finds_old_packages_and_none_of_the_lock() -> None:
    from ansible.module_utils.evenkeel_venv import parse_lock

    source = str(ROOT / "inventories/common/advisories")
    pins = [(pin.name, pin.version) for pin in parse_lock((ROOT / "drydock/requirements.lock").read_bytes())]
    assert a.audit(pins, source, [], TODAY).findings == []
    known = {str(part["package"]["name"]) for each in a.read_file(Path(source, "snapshot.json")) for part in each["affected"]}
    assert known <= {name for name, _version in pins}, "every advisory is about a package of the lock"
    old = a.audit([("django", "4.2.14"), ("gunicorn", "21.2.0"), ("urllib3", "1.26.18"), ("pillow", "10.0.0")], source, [], TODAY)
    found = {(finding.package, finding.ids[0]): finding.severity for finding in old.findings}
    assert found == {
        ("django", "CVE-2024-42005"): "CRITICAL",
        ("gunicorn", "CVE-2024-1135"): "HIGH",
        ("urllib3", "CVE-2024-37891"): "MEDIUM",
        ("pillow", "CVE-2023-4863"): "HIGH",
        ("pillow", "CVE-2023-50447"): "HIGH",
    }


# --- trivy ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "1.0-abc"
    (folder / "wheelhouse").mkdir(parents=True)
    wheel(folder / "wheelhouse", "shop")
    (folder / "wheelhouse/requirements.lock").write_text("shop==1.0\n")
    return folder


def trivy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> Path:
    """A program named trivy that notes what it was asked and what it was shown."""
    (tmp_path / "bin").mkdir()
    program, noted = tmp_path / "bin/trivy", tmp_path / "noted"
    seen = f'for last; do :; done; cd "$last" && find . -type f | sort >>{noted}'
    script = f'#!/bin/sh\necho "$@" >{noted}\n{seen}\necho a secret in x\nexit {code}\n'
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return noted


def test_trivy_sees_wheels_sources_and_lock(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = trivy(tmp_path, monkeypatch, 0)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/settings.py").write_text("")
    assert a.scan(release, tmp_path / "src") == "file-system scan: trivy found nothing HIGH or CRITICAL"
    words, *files = noted.read_text().splitlines()
    assert words.startswith("fs --scanners vuln,secret --severity HIGH,CRITICAL --exit-code 1 --quiet /")
    assert files == ["./requirements.txt", "./sources/settings.py", "./wheels/shop-1.0-py3-none-any.whl/shop-1.0.dist-info/METADATA"]


def test_what_trivy_finds_fails_the_build_with_its_report(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trivy(tmp_path, monkeypatch, 1)
    with pytest.raises(a.AuditError, match=r"the release is refused: the file-system scan by trivy failed \(exit 1\)\na secret in x"):
        a.scan(release, None)


def test_without_trivy_it_is_said(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert a.scan(release, None) == "file-system scan: trivy is not installed"
