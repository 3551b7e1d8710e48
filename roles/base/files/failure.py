#!/usr/bin/python3 -IS
"""Tell the operator that a unit has failed for good: one line in the journal, and a file until it runs again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

FAILURES = Path("/var/lib/evenkeel/failures")
PROPERTIES = ("Result", "ExecMainStatus", "NRestarts", "InvocationID")


def show(unit: str) -> dict[str, str]:
    """What systemd knows about the unit."""
    command = ["systemctl", "show", f"--property={','.join(PROPERTIES)}", unit]
    text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def last_words(unit: str) -> str:
    """The last line that the unit itself wrote."""
    command = ["journalctl", "--unit", unit, "--lines", "40", "--output", "json", "--no-pager", "--quiet"]
    text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    for line in reversed(text.splitlines()):
        entry = json.loads(line)
        message = entry.get("MESSAGE")
        if entry.get("_PID") != "1" and isinstance(message, str) and message.strip():
            return message.strip()[:400]
    return "it wrote nothing"


def absent_credentials(unit: str) -> list[str]:
    """The files that the unit is to be given and that are not there: systemd says that one is missing, but not which."""
    text = subprocess.run(["systemctl", "cat", unit], capture_output=True, text=True, check=False, timeout=20).stdout
    paths = re.findall(r"^LoadCredential=[^:\n]+:(/.+)$", text, re.MULTILINE)
    return [path for path in paths if not Path(path).exists()]


def sentence(unit: str, facts: dict[str, str], words: str) -> str:
    """What happened, and what to type next."""
    restarts = facts.get("NRestarts", "0")
    tries = f" after {restarts} restarts" if restarts != "0" else ""
    how = f"{facts.get('Result', 'failed')}, exit status {facts.get('ExecMainStatus', '?')}"
    return (
        f"{unit} has failed{tries} ({how}): {words.rstrip('.')}. "
        f"Next: journalctl -u {unit} -n 50; when the cause is gone: systemctl reset-failed {unit}; "
        f"systemctl start {unit}"
    )


def main(unit: str) -> int:
    """Write the line and the file."""
    words = last_words(unit)
    absent = absent_credentials(unit) if "credentials" in words.lower() else []
    if absent:
        words += f" (not on this host: {', '.join(absent)}; make it, or correct credentials in app.processes)"
    line = sentence(unit, show(unit), words)
    print(line)
    FAILURES.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = FAILURES / f".{unit}.new"
    temporary.write_text(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n", encoding="utf-8")
    temporary.replace(FAILURES / unit)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
