# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Known weaknesses of a release's packages: advisories in OSV form, from a service or from files. It is never shipped to a host.

HIGH and CRITICAL fail the build unless a dated, reasoned entry allows them. An advisory without a severity counts as HIGH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import requests
from ansible.module_utils.evenkeel_venv import canonical
from cvss import CVSS2, CVSS3, CVSS4
from cvss.exceptions import CVSSError
from packaging.version import InvalidVersion, Version

SERVICE = "https://api.osv.dev"
SEVERITIES = ("NONE", "LOW", "MEDIUM", "UNKNOWN", "HIGH", "CRITICAL")  # the first that fails is UNKNOWN
FAILING = SEVERITIES[3:]
LONGEST_DAYS = 180
BATCH, SECONDS = 500, 30
SCAN_SECONDS = 900

Advisory = Mapping[str, Any]
Pair = tuple[tuple[str, str], Advisory]  # (name, version) of a package, and an advisory that concerns it


class AuditError(Exception):
    """Why a release must not be built, or could not be audited; for people."""


@dataclass(frozen=True)
class Allowed:
    """A finding that a person has looked at and lets pass for a while."""

    id: str
    package: str
    until: date
    reason: str


@dataclass(frozen=True)
class Finding:
    """One weakness of one package. ids: its names, the shortest to say first. fixed: the first version without it."""

    package: str
    version: str
    ids: list[str]
    severity: str
    fixed: str | None
    summary: str
    allowed: str | None = None


@dataclass(frozen=True)
class Audit:
    """What was looked at, and what was found."""

    packages: int
    source: str
    as_of: str
    findings: list[Finding]

    def line(self) -> str:
        """One line for people."""
        counts = Counter(finding.severity for finding in self.findings)
        each = ", ".join(f"{name} {counts[name]}" for name in SEVERITIES if counts[name])
        found = f"{len(self.findings)} finding{'s' * (len(self.findings) != 1)}" + (f" ({each})" if each else "")
        allowed = sum(finding.allowed is not None for finding in self.findings)
        return f"audit: {self.packages} packages, {found}, {allowed} allowed; advisories of {self.source}, {self.as_of}"

    def failing(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity in FAILING and finding.allowed is None]


# --- what an advisory says ---------------------------------------------------------------------------------------------


def concerned(advisory: Advisory, package: str) -> Iterator[Mapping[str, Any]]:
    """The parts of an advisory about a Python package."""
    for part in advisory.get("affected") or []:
        about = part.get("package") or {}
        if str(about.get("ecosystem", "")).partition(":")[0] == "PyPI" and canonical(str(about.get("name", ""))) == package:
            yield part


def parsed(version: str) -> Version | None:
    try:
        return Version(version)
    except InvalidVersion:
        return None


def in_range(version: Version, events: Iterable[Mapping[str, str]]) -> bool:
    """Whether a version lies in a range, as OSV's evaluation says: the last event before it decides."""
    steps: list[tuple[Version, int, bool]] = []
    for event in events:
        for kind, text in event.items():
            at = parsed("0.dev0" if text == "0" else text)
            if at is not None and kind in ("introduced", "fixed", "last_affected"):
                steps.append((at, kind == "last_affected", kind == "introduced"))
    state = False
    for at, after, introduced in sorted(steps):
        if at < version or (at == version and not after):
            state = introduced
    return state


def affects(advisory: Advisory, package: str, version: str) -> bool:
    """Whether an advisory is about this version of a package."""
    found = parsed(version)
    for part in concerned(advisory, package):
        named = [str(each) for each in part.get("versions") or []]
        if version in named or (found and found in [parsed(each) for each in named]):
            return True
        ranges = [each for each in part.get("ranges") or [] if each.get("type") in ("ECOSYSTEM", "SEMVER")]
        if found and any(in_range(found, each.get("events") or []) for each in ranges):
            return True
    return False


def fixed_in(advisory: Advisory, package: str, version: str) -> str | None:
    """The first fixed version above the one that is used."""
    events = [e for part in concerned(advisory, package) for r in part.get("ranges") or [] if r.get("type") != "GIT" for e in r["events"]]
    current = parsed(version)
    later = [at for at in (parsed(event["fixed"]) for event in events if "fixed" in event) if at and (not current or at > current)]
    return str(min(later)) if later else None


def rated(kind: str, vector: str) -> str | None:
    """The severity that a CVSS vector means; None when it cannot be read."""
    try:
        if kind == "CVSS_V4":
            return str(CVSS4(vector).severity).upper()
        if kind == "CVSS_V3":
            return str(CVSS3(vector).severities()[0]).upper()
        return str(CVSS2(vector).severities()[0]).upper() if kind == "CVSS_V2" else None
    except (CVSSError, ValueError, KeyError):
        return None


def severity(advisory: Advisory, package: str) -> str:
    """The highest severity that its CVSS vectors give, else its database's word, else UNKNOWN."""
    parts = [advisory, *concerned(advisory, package)]
    vectors = [entry for part in parts for entry in part.get("severity") or []]
    ratings = [rating for rating in (rated(str(v.get("type")), str(v.get("score"))) for v in vectors) if rating in SEVERITIES]
    if not ratings:
        said = [
            str((part.get(key) or {}).get("severity", "")).upper() for part in parts for key in ("database_specific", "ecosystem_specific")
        ]
        ratings = [word for word in ("MEDIUM" if word == "MODERATE" else word for word in said) if word in SEVERITIES]
    return max(ratings, key=SEVERITIES.index, default="UNKNOWN")


# --- where advisories come from ------------------------------------------------------------------------------------------


def newest_of(advisories: Iterable[Advisory]) -> str:
    return max((str(advisory.get("modified") or advisory.get("published") or "")[:10] for advisory in advisories), default="")


def read_file(path: Path) -> list[Advisory]:
    """The advisories of one JSON file: one, or a list."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AuditError(f"release_advisories: {path} cannot be read as JSON: {error}") from None
    found = data if isinstance(data, list) else [data]
    for each in found:
        if not isinstance(each, dict) or "id" not in each or "affected" not in each:
            raise AuditError(f"release_advisories: {path} holds something that is no OSV advisory (id and affected are missing)")
    return found


def from_files(place: Path, packages: Sequence[tuple[str, str]]) -> tuple[list[Pair], str]:
    """The advisories of a file or folder that concern the packages, and how new they are."""
    files = sorted(place.rglob("*.json")) if place.is_dir() else [place]
    advisories = [advisory for file in files for advisory in read_file(file)]
    if not advisories:
        raise AuditError(f"release_advisories: there is no advisory in {place} (files *.json in OSV form)")
    live = [advisory for advisory in advisories if not advisory.get("withdrawn")]
    by_name: dict[str, list[Advisory]] = {}
    for advisory in live:
        for name in {canonical(str((part.get("package") or {}).get("name", ""))) for part in advisory["affected"]}:
            by_name.setdefault(name, []).append(advisory)
    pairs = [(package, each) for package in packages for each in by_name.get(package[0], []) if affects(each, *package)]
    return pairs, f"newest {newest_of(advisories)}"


def ask(session: requests.Session, url: str, body: Any = None) -> Any:
    """One question to the service, tried three times."""
    for tries_left in (2, 1, 0):
        try:
            reply = session.post(url, json=body, timeout=SECONDS) if body is not None else session.get(url, timeout=SECONDS)
            reply.raise_for_status()
            return reply.json()
        except (requests.RequestException, ValueError) as error:
            if not tries_left:
                raise AuditError(
                    f"the advisory service {url.partition('/v1')[0]} could not be asked ({type(error).__name__}), so the release is "
                    "refused; where there is no network, give a file or folder of OSV advisories: -e release_advisories=/path "
                    "(see docs/releases.md)"
                ) from None
    raise AssertionError


def from_service(url: str, packages: Sequence[tuple[str, str]], today: date) -> tuple[list[Pair], str]:
    """The advisories that a service with OSV's interface knows for the packages."""
    session, named, known = requests.Session(), list[tuple[tuple[str, str], str]](), dict[str, Advisory]()
    asked = [(package, "") for package in packages]
    while asked:
        batch, asked = asked[:BATCH], asked[BATCH:]
        queries = [
            {"package": {"name": name, "ecosystem": "PyPI"}, "version": version, **({"page_token": token} if token else {})}
            for (name, version), token in batch
        ]
        results = ask(session, f"{url}/v1/querybatch", {"queries": queries})["results"]
        for (package, _token), result in zip(batch, results, strict=True):
            named += [(package, str(vulnerability["id"])) for vulnerability in result.get("vulns") or []]
            if result.get("next_page_token"):
                asked.append((package, result["next_page_token"]))
    for _package, name in named:
        known[name] = known.get(name) or ask(session, f"{url}/v1/vulns/{name}")
    return [(package, known[name]) for package, name in named if not known[name].get("withdrawn")], f"asked {today.isoformat()}"


# --- the verdict ---------------------------------------------------------------------------------------------------------


def read_allowed(entries: Sequence[Mapping[str, Any]], today: date) -> list[Allowed]:
    """Check the allow-list; all that is wrong with it is one message."""
    wrong, allowed = [], []
    for number, entry in enumerate(entries):
        place = f"release_allowed_advisories[{number}] ({entry.get('id') or 'without id'}, {entry.get('package') or 'without package'})"
        missing = [name for name in ("id", "package", "until", "reason") if not str(entry.get(name) or "").strip()]
        if missing:
            wrong.append(f"{place}: {' and '.join(missing)} is missing")
            continue
        try:
            until = date.fromisoformat(str(entry["until"]))
        except ValueError:
            wrong.append(f'{place}: until must be a date like "{today + timedelta(days=90)}", not {entry["until"]!r}')
            continue
        if until < today:
            wrong.append(f"{place}: expired on {until}; mend the package, or look again and give a new date")
        elif until > today + timedelta(days=LONGEST_DAYS):
            wrong.append(f"{place}: {until} is more than {LONGEST_DAYS} days ahead; {today + timedelta(days=LONGEST_DAYS)} at the latest")
        allowed.append(Allowed(str(entry["id"]).upper(), canonical(str(entry["package"])), until, str(entry["reason"])))
    if wrong:
        raise AuditError("; ".join(wrong))
    return allowed


def names_of(advisory: Advisory) -> set[str]:
    return {str(name) for name in [advisory["id"], *(advisory.get("aliases") or [])]}


def findings(pairs: Iterable[Pair], allowed: Sequence[Allowed]) -> list[Finding]:
    """One finding for each weakness of each package, whichever databases know it; the worst first."""
    groups: list[tuple[tuple[str, str], set[str], list[Advisory]]] = []
    for package, advisory in pairs:
        names, same = names_of(advisory), [group for group in groups if group[0] == package and group[1] & names_of(advisory)]
        for group in same:
            groups.remove(group)
        groups.append((package, names.union(*(group[1] for group in same)), [advisory, *(each for group in same for each in group[2])]))
    result = []
    for (name, version), ids, advisories in groups:
        ratings = [rating for rating in (severity(each, name) for each in advisories) if rating != "UNKNOWN"]
        fixes = [fix for fix in (fixed_in(each, name, version) for each in advisories) if fix]
        entry = next((a for a in allowed if a.package == name and a.id in {each.upper() for each in ids}), None)
        result.append(
            Finding(
                package=name,
                version=version,
                ids=sorted(ids, key=lambda each: (not each.startswith("CVE-"), not each.startswith("GHSA-"), each)),
                severity=max(ratings, key=SEVERITIES.index, default="UNKNOWN"),
                fixed=str(max(map(Version, fixes))) if fixes else None,
                summary=next((str(each["summary"]) for each in advisories if each.get("summary")), ""),
                allowed=f"until {entry.until}: {entry.reason}" if entry else None,
            )
        )
    return sorted(result, key=lambda finding: (-SEVERITIES.index(finding.severity), finding.package, finding.ids))


def audit(packages: Sequence[tuple[str, str]], source: str, allowed: Sequence[Mapping[str, Any]], today: date) -> Audit:
    """Look for weaknesses of (name, version). source: a file or folder with advisories, or the address of a service; empty: OSV's."""
    entries = read_allowed(allowed, today)
    if not source or re.match(r"https?://", source):
        url = (source or SERVICE).rstrip("/")
        pairs, as_of = from_service(url, packages, today)
        return Audit(len(packages), url.partition("://")[2], as_of, findings(pairs, entries))
    place = Path(source)
    if not place.exists():
        raise AuditError(f"release_advisories: there is no {source}; give a file or folder of OSV advisories, or nothing to ask {SERVICE}")
    pairs, as_of = from_files(place, packages)
    return Audit(len(packages), source, as_of, findings(pairs, entries))


def refusal(result: Audit, release: str, today: date) -> str:
    """What to tell when findings fail the build; empty when none does."""
    bad = result.failing()
    if not bad:
        return ""
    lines = []
    for finding in bad:
        rating = "of unknown severity, which counts as HIGH" if finding.severity == "UNKNOWN" else finding.severity
        cure = f"fixed in {finding.fixed}" if finding.fixed else "no fixed version is known"
        lines.append(f"  {finding.package} {finding.version}: {', '.join(finding.ids[:3])}, {rating}; {cure}. {finding.summary}".rstrip())
    entry = f'{{id: {bad[0].ids[0]}, package: {bad[0].package}, until: "{today + timedelta(days=30)}", reason: …}}'
    return "\n".join(
        [
            f"release {release} is refused: {len(bad)} known weaknesses of its packages are HIGH or CRITICAL",
            *lines,
            "Raise the packages in the lock and build again. What does not concern this application can be let pass for a while, in the",
            f"inventory: release_allowed_advisories: [{entry}]",
        ]
    )


def record(result: Audit, release: str, at: datetime, scan: str) -> str:
    """The result as JSON, to be kept beside the archive."""
    data = {"release": release, "at": at.isoformat(timespec="seconds"), **asdict(result), "scan": scan}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


# --- the file-system scan ------------------------------------------------------------------------------------------------


def scan(release: Path, sources: Path | None) -> str:
    """Let trivy look through wheels and sources, where it is installed; returns one line, raises with its report."""
    program = shutil.which("trivy")
    if program is None:
        return "file-system scan: trivy is not installed"
    with tempfile.TemporaryDirectory() as folder:
        for wheel in (release / "wheelhouse").glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(folder, "wheels", wheel.name))
        shutil.copy(release / "wheelhouse/requirements.lock", Path(folder, "requirements.txt"))
        if sources:
            shutil.copytree(sources, Path(folder, "sources"))
        words = ["fs", "--scanners", "vuln,secret", "--severity", "HIGH,CRITICAL", "--exit-code", "1", "--quiet", folder]
        try:
            done = subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=SCAN_SECONDS)
        except subprocess.TimeoutExpired:
            raise AuditError(f"the release is refused: trivy did not finish within {SCAN_SECONDS} s") from None
    if done.returncode:
        raise AuditError(
            f"the release is refused: the file-system scan by trivy failed (exit {done.returncode})\n{done.stdout}{done.stderr}"
        )
    return "file-system scan: trivy found nothing HIGH or CRITICAL"
