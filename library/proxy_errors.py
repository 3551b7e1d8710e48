#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Count in the proxy's log how many requests there were since a moment, and how many of them the application failed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: proxy_errors
short_description: Count the failed requests in the proxy's log since a moment
description:
  - Reads the proxy's JSON log from its end. A request has failed when its status is 500 or more and an application server was asked for it;
    the maintenance page is no failure.
options:
  since:
    description: The moment, in seconds since the epoch.
    required: true
    type: float
  log:
    description: The log.
    default: /var/log/nginx/access.log
    type: path
author: Evenkeel contributors
attributes:
  check_mode:
    support: full
    description: It only reads.
"""

EXAMPLES = r"""
- name: Count what failed in the last minute
  proxy_errors:
    since: "{{ now(utc=true).timestamp() - 60 }}"
"""

RETURN = r"""
requests: {description: How many requests were passed to the application., type: int, returned: always}
failures: {description: How many of them failed., type: int, returned: always}
seen: {description: 'What failed most often, as "GET /path answered 500, 12 times".', type: list, returned: always}
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

BLOCK = 1 << 16


def lines_backwards(path: Path) -> Iterator[str]:
    """The lines of a file, the last one first."""
    with path.open("rb") as file:
        position = file.seek(0, 2)
        rest = b""
        while position > 0:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines):
                yield line.decode(errors="replace")
        yield rest.decode(errors="replace")


def since(lines: Iterable[str], moment: float) -> list[dict[str, object]]:
    """The requests that an application server was asked for, from the moment on. Lines come newest first; whole seconds count."""
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
            when = datetime.fromisoformat(entry["time"]).timestamp()
        except (ValueError, KeyError, TypeError):
            continue  # an empty or torn line
        if when < int(moment):
            break
        if entry.get("upstream"):
            found.append(entry)
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={"since": {"type": "float", "required": True}, "log": {"type": "path", "default": "/var/log/nginx/access.log"}},
        supports_check_mode=True,
    )
    log = Path(module.params["log"])
    rotated = log.with_name(f"{log.name}.1")
    asked: list[dict[str, object]] = []
    for path in (log, rotated):
        if path.exists():
            asked += since(lines_backwards(path), module.params["since"])
    bad = [entry for entry in asked if isinstance(entry["status"], int) and entry["status"] >= 500]
    often = Counter(f"{entry['method']} {entry['path']} answered {entry['status']}" for entry in bad).most_common(3)
    module.exit_json(changed=False, requests=len(asked), failures=len(bad), seen=[f"{what}, {count} times" for what, count in often])


if __name__ == "__main__":
    main()
