# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""HTTP checks of a platform: one request each, tried again for a while, judged by status and content."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer, not a way to another one."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(url: str, check: Mapping[str, Any], headers: Mapping[str, str], ca_file: str, timeout: float) -> tuple[int, str]:
    """One request: (status, body), or (0, why there was no answer)."""
    request = urllib.request.Request(url + check["path"], method=check.get("method", "GET"))
    for name, value in headers.items():
        request.add_header(name, value)
    if check.get("token"):
        request.add_header("Authorization", f"Bearer {check['token']}")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect(), urllib.request.ProxyHandler({})]
    try:
        if url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file or None)))
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            return answer.status, answer.read(1 << 20).decode(errors="replace")
    except urllib.error.HTTPError as error:
        try:
            return error.code, error.read(1 << 20).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return error.code, ""
    except urllib.error.URLError as error:
        return 0, str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error) or type(error).__name__


def judge(check: Mapping[str, Any], status: int, body: str) -> str:
    """What is wrong with an answer, in one sentence; empty when nothing is."""
    request = f"{check['name']}: {check.get('method', 'GET')} {check['path']}"
    words = " ".join(body.split())[:300]
    missing = [text for text in check.get("contains") or [] if text not in body]
    if status == 0:
        return f"{request} got no answer: {words}"
    if status != check.get("status", 200):
        return f"{request} answered {status}, not {check.get('status', 200)}: {words}"
    if missing:
        return f"{request} answered {status} without {', '.join(map(repr, missing))}: {words}"
    return ""


def run(
    url: str, checks: Sequence[Mapping[str, Any]], headers: Mapping[str, str], ca_file: str, tries: int, pause: float, timeout: float
) -> list[str]:
    """Ask all checks; those that fail are asked again, `tries` times in all, `pause` seconds apart. Returns what is wrong at the end."""
    left = list(checks)
    wrong: list[str] = []
    for turn in range(tries):
        if turn:
            time.sleep(pause)
        judged = [(check, judge(check, *ask(url, check, headers, ca_file, timeout))) for check in left]
        wrong = [problem for _, problem in judged if problem]
        left = [check for check, problem in judged if problem]
        if not left:
            break
    return wrong
