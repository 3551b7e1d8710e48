"""What users do, through nginx over TLS, on the deployed platform."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from typing import Any

import requests
import testinfra
from conftest import secret, submit
from pypdf import PdfReader

SOURCE = r"""
\documentclass{article}
\usepackage{fontspec}
\setmainfont{DejaVu Serif}
\begin{document}
Привет, мир! Съешь же ещё этих мягких французских булок.
\end{document}
"""


HOSTILE = {
    "shell escape": r"\immediate\write18{touch escaped.tex}\input{escaped}",
    "a file of the system": r"\input{/etc/passwd}",
    "secrets of the platform": r"\directlua{assert(io.open('/etc/drydock/secrets.env'))}",
    "10 GB of output": r"\directlua{f = io.open('big', 'w') for i = 1, 10000 do assert(f:write(string.rep('x', 1e6))) end}",
}


def finished(ask: Callable[[], dict[str, Any]], limit_seconds: float = 180) -> dict[str, Any]:
    """Poll until the state is no longer pending."""
    deadline = time.monotonic() + limit_seconds
    while (answer := ask())["state"] == "pending":
        assert time.monotonic() < deadline, f"still pending after {limit_seconds} s: {answer}"
        time.sleep(0.5)
    return answer


def test_cyrillic_document_becomes_a_pdf_with_its_text(user: requests.Session, url: str) -> None:
    created = submit(user, f"{url}/api/documents", {"title": "Привет", "source": SOURCE})
    assert created.status_code == 201, created.text
    document = f"{url}/api/documents/{created.json()['id']}"
    answer = finished(lambda: user.get(document, timeout=30).json())
    assert answer["state"] == "compiled", answer
    pdf = PdfReader(io.BytesIO(user.get(f"{document}/pdf", timeout=30).content))
    text = " ".join(pdf.pages[0].extract_text().split())
    assert "Привет, мир! Съешь же ещё этих мягких французских булок." in text


def test_source_that_does_not_compile_says_why(user: requests.Session, url: str) -> None:
    broken = r"\documentclass{article}\begin{document}\nosuchmacro\end{document}"
    created = submit(user, f"{url}/api/documents", {"title": "broken", "source": broken})
    document = f"{url}/api/documents/{created.json()['id']}"
    answer = finished(lambda: user.get(document, timeout=30).json())
    assert answer["state"] == "failed"
    assert "Undefined control sequence" in str(answer)


def test_q2_hostile_sources_fail_and_leave_nothing(host: testinfra.host.Host, user: requests.Session, url: str) -> None:
    """As the worker's own user, under its unit: what the application's tests show on the controller holds here, too."""
    documents = {}
    for what, body in HOSTILE.items():
        source = rf"\documentclass{{article}}\begin{{document}}{body}\end{{document}}"
        documents[what] = submit(user, f"{url}/api/documents", {"title": what, "source": source}).json()["id"]
    for what, document in documents.items():
        answer = finished(lambda document=document: user.get(f"{url}/api/documents/{document}", timeout=30).json())
        assert (answer["state"], answer["job"]["attempt"]) == ("failed", 1), (what, answer)
        assert answer["reason"].startswith("compile error: "), (what, answer["reason"])
        assert "root:" not in str(answer), what
    assert host.run("pgrep --uid drydock --list-full 'latexmk|lualatex|luahbtex'").stdout == ""
    assert host.check_output("find /var/lib/drydock/compile -mindepth 1 -type f -size +0") == ""


def test_export_completes(user: requests.Session, url: str) -> None:
    created = submit(user, f"{url}/api/exports", {"format": "zip"})
    assert created.status_code == 202, created.text
    export = f"{url}/api/exports/{created.json()['id']}"
    answer = finished(lambda: user.get(export, timeout=30).json())
    assert answer["state"] == "ready", answer
    archive = zipfile.ZipFile(io.BytesIO(user.get(f"{export}/download", timeout=30).content))
    assert archive.testzip() is None
    assert archive.namelist()


def test_q8_accepted_exports_outlast_killed_workers_and_a_broker_that_forgets(
    host: testinfra.host.Host, user: requests.Session, url: str
) -> None:
    accepted = []
    for _ in range(4):
        answer = submit(user, f"{url}/api/exports", {"format": "csv"})
        assert answer.status_code == 202, answer.text
        accepted.append(f"{url}/api/exports/{answer.json()['id']}")
        host.check_output("systemctl kill --signal=KILL drydock-worker-export drydock-script-processor")
    host.check_output("systemctl kill --signal=KILL redis-server")
    ended = [finished(lambda export=export: user.get(export, timeout=30).json()) for export in accepted]
    assert [export["state"] for export in ended] == ["ready"] * len(accepted), ended
    host.check_output("evenkeel-health wait --timeout 180 redis drydock-script-processor drydock-worker-export drydock-worker-latex")


def test_metrics_are_for_those_who_hold_the_token(web: requests.Session, url: str) -> None:
    assert web.get(f"{url}/metrics", timeout=30).status_code == 401
    answer = web.get(f"{url}/metrics", headers={"Authorization": f"Bearer {secret('app_internal_token')}"}, timeout=30)
    for name in ("drydock_http_requests_total", "drydock_jobs", "drydock_jobs_late", "drydock_database_up"):
        assert f"\n{name}" in answer.text, name


def test_enqueue_ping_names_each_worker_kind(web: requests.Session, url: str) -> None:
    token = {"Authorization": f"Bearer {secret('app_internal_token')}"}
    answer = web.post(f"{url}/internal/ping", headers=token, timeout=30)
    assert answer.status_code == 200, answer.text
    kinds = answer.json()
    assert set(kinds) == {"latex.compile", "export"}
    assert all(kind["ok"] for kind in kinds.values())


def test_internal_endpoints_need_the_token(web: requests.Session, url: str) -> None:
    assert web.post(f"{url}/internal/ping", timeout=30).status_code in (401, 403)


def test_plain_http_only_redirects(web: requests.Session, url: str) -> None:
    answer = web.get(url.replace("https:", "http:") + "/login", timeout=30, allow_redirects=False)
    assert answer.status_code in (301, 308)
    assert answer.headers["Location"] == f"{url}/login"


def test_wrong_password_does_not_log_in(web: requests.Session, url: str) -> None:
    web.get(f"{url}/login", timeout=30)
    form = {"username": "demo", "password": "wrong", "csrfmiddlewaretoken": web.cookies["csrftoken"]}
    answer = web.post(f"{url}/login", data=form, headers={"Referer": f"{url}/login"}, timeout=30, allow_redirects=False)
    assert answer.status_code == 200
    assert "sessionid" not in web.cookies
