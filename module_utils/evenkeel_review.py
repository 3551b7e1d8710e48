# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""What squawk is given of a migration, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: The suite sets both time-outs. A migration runs once, in a transaction. The types of columns are Django's, and a matter of taste.
NOT_ASKED = ("require-lock-timeout", "require-statement-timeout", "prefer-robust-stmts", "prefer-text-field", "prefer-bigint-over-int")
SQUAWK_OPTIONS = ("--reporter", "json", *(f"--exclude={rule}" for rule in NOT_ASKED))


class ReviewError(Exception):
    """The SQL cannot be reviewed; the message is for people."""


def sql_to_review(migration: Mapping[str, Any]) -> str:
    """The statements of a pending migration, one after another; empty when it has only comments (Python code)."""
    texts = [str(text) for text in migration["sql"]]
    if all(line.startswith("--") for text in texts for line in text.splitlines() if line.strip()):
        return ""
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


def read_findings(migration: str, code: int, out: str, err: str) -> list[dict[str, Any]]:
    """The findings of one run of squawk: {migration, rule, level (warning | error), message, line (from 1)}."""
    try:
        said = json.loads(out)
        return [
            {
                "migration": migration,
                "rule": str(each["rule_name"]),
                "level": str(each["level"]).lower(),
                "message": " ".join(part for part in (each["message"], each["help"]) if part),
                "line": int(each["line"]) + 1,
            }
            for each in said
        ]
    except (ValueError, KeyError, TypeError):
        words = " ".join((err or out).split()) or "it said nothing"
        raise ReviewError(f"squawk cannot review {migration} (exit code {code}): {words}") from None
