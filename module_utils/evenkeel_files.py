# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""What an entry of the `files` module may say, and the form in which it travels to the host.

Nothing here imports Ansible and nothing here looks at a host: the action plugin calls it before anything is rendered,
and the unit tests call it directly.
"""

from __future__ import annotations

import base64
import binascii
import json
import os.path
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

SOURCES = ("template", "copy", "content", "link", "state")
STATES = ("directory", "absent")
FILE_SOURCES = ("template", "copy", "content")
KEYS = ("dest", *SOURCES, "owner", "group", "mode", "validate", "secret", "vars")

DEFAULT_FILE_MODE = "0644"
DEFAULT_DIRECTORY_MODE = "0755"

_OCTAL = re.compile(r"[0-7]{3,4}|0[0-7]{3,4}")
_SYMBOLIC = re.compile(r"(?:a|[ugo]*)(?:[-+=](?:[rwxXst]*|[ugo]))+")


class PayloadError(ValueError):
    """The data that reached the host is not what the controller sent."""


def encode_payload(value: Any) -> str:
    """Pack a value into one opaque ASCII word, so that file contents appear in no log and in no `-vvv` output."""
    return base64.b64encode(zlib.compress(json.dumps(value).encode("utf-8"), 6)).decode("ascii")


def decode_payload(payload: str) -> Any:
    """Unpack what `encode_payload` packed."""
    try:
        return json.loads(zlib.decompress(base64.b64decode(payload, validate=True)))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise PayloadError(f"the data from the controller is damaged ({error})") from None


def kind_of(entry: Mapping[str, Any]) -> str:
    """Say what a checked entry makes: file, link, directory or absent."""
    if entry.get("state") is not None:
        return str(entry["state"])
    return "link" if entry.get("link") is not None else "file"


def is_mode(value: str) -> bool:
    """Say whether a text is a mode: octal digits, or the symbolic form of chmod."""
    return bool(_OCTAL.fullmatch(value)) or all(_SYMBOLIC.fullmatch(part) for part in value.split(","))


def label_of(index: int, entry: Any) -> str:
    """Name an entry for a message: its place in the list and its dest."""
    dest = entry.get("dest") if isinstance(entry, Mapping) else None
    return f"entry {index + 1} ({dest})" if isinstance(dest, str) and dest else f"entry {index + 1}"


def normalise(entry: Mapping[Any, Any], defaults: Mapping[str, str]) -> dict[str, Any]:
    """Fill in what a valid entry leaves to the defaults."""
    given = {str(key): value for key, value in entry.items() if value is not None}
    kind = kind_of(given)
    given["dest"] = os.path.normpath(given["dest"])
    given["kind"] = kind
    given["secret"] = bool(given.get("secret", False))
    if kind != "absent":
        given["owner"] = str(given.get("owner", defaults["owner"]))
        given["group"] = str(given.get("group", defaults["group"]))
    if kind in ("file", "directory"):
        given.setdefault("mode", DEFAULT_DIRECTORY_MODE if kind == "directory" else DEFAULT_FILE_MODE)
    return given


def check_entries(entries: Sequence[Any]) -> list[str]:
    """Return what is wrong with the entries, a line each; an empty list when all are right."""
    problems: list[str] = []
    owners: dict[str, tuple[int, str]] = {}
    for index, entry in enumerate(entries):
        found = [f"{label_of(index, entry)}: {problem}" for problem in check_entry(entry)]
        problems += found
        if not found:
            dest = os.path.normpath(entry["dest"])
            if dest in owners:
                problems.append(f"{label_of(index, entry)}: the same dest as entry {owners[dest][0] + 1}")
            owners.setdefault(dest, (index, kind_of({k: v for k, v in entry.items() if v is not None})))
    for dest, (index, _kind) in owners.items():
        for parent in _parents(dest):
            if parent in owners and owners[parent][1] in ("file", "absent"):
                at, kind = owners[parent]
                what = "removes" if kind == "absent" else "writes as a file"
                problems.append(f"entry {index + 1} ({dest}): lies below {parent}, which entry {at + 1} {what}")
    return problems


def check_entry(entry: Any) -> list[str]:
    """Return what is wrong with one entry."""
    if not isinstance(entry, Mapping):
        return [f"must be a mapping with dest and one of {', '.join(SOURCES)}; it is {_type_name(entry)}"]
    problems = _check_keys(entry)
    given = {str(key): value for key, value in entry.items() if value is not None}
    problems += _check_dest(given.get("dest"))
    sources = [key for key in SOURCES if key in given]
    if len(sources) != 1:
        said = f"it has {' and '.join(sources)}" if sources else "it has none"
        problems.append(f"needs exactly one of {', '.join(SOURCES)}; {said}")
        return problems
    source = sources[0]
    problems += _check_source(source, given[source])
    if source in FILE_SOURCES and isinstance(given.get("dest"), str) and given["dest"].endswith("/"):
        problems.append("dest of a file must not end with /: give the whole path of the file")
    problems += _check_attributes(given, "file" if source in FILE_SOURCES else kind_of(given), source)
    return problems


def _check_keys(entry: Mapping[Any, Any]) -> list[str]:
    unknown = sorted(str(key) for key in entry if key not in KEYS)
    return [f"unknown key {key!r}; known are {', '.join(KEYS)}" for key in unknown]


def _check_dest(dest: Any) -> list[str]:
    if not isinstance(dest, str) or not dest:
        return ["needs dest, the absolute path on the host"]
    if "\0" in dest:
        return ["dest contains a NUL character"]
    if not dest.startswith("/"):
        return ["dest must be an absolute path"]
    if ".." in dest.split("/"):
        return ["dest must not contain '..'"]
    return ["dest must not be the root directory"] if os.path.normpath(dest) in ("/", "//") else []


def _check_source(source: str, value: Any) -> list[str]:
    if source == "state":
        return [] if value in STATES else [f"state must be one of {', '.join(STATES)}; it is {value!r}"]
    if source == "content":
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return [f"content must be text; it is {_type_name(value)} (write it with | to_json or | to_nice_yaml)"]
        return []
    if not isinstance(value, str) or not value:
        return [f"{source} must be a non-empty text; it is {_type_name(value)}"]
    return [f"{source} contains a NUL character"] if "\0" in value else []


def _check_attributes(given: Mapping[str, Any], kind: str, source: str) -> list[str]:
    problems: list[str] = []
    for key in ("owner", "group"):
        problems += check_account(key, given.get(key), allowed=kind != "absent")
    mode = given.get("mode")
    if mode is not None:
        if kind in ("link", "absent"):
            problems.append(f"mode has no meaning for {'a link' if kind == 'link' else 'state: absent'}")
        elif not isinstance(mode, str):
            problems.append(f'mode must be a quoted text such as "0644"; it is {_type_name(mode)}')
        elif not is_mode(mode):
            problems.append(f'mode must be octal ("0644") or symbolic ("u=rw,g=r"); it is {mode!r}')
    validate = given.get("validate")
    if validate is not None:
        if kind != "file":
            problems.append("validate is only for files (template, copy, content)")
        elif not isinstance(validate, str) or "%s" not in validate:
            problems.append("validate must be a command that contains %s, the path of the file to check")
    secret = given.get("secret")
    if secret is not None:
        if kind != "file":
            problems.append("secret is only for files (template, copy, content)")
        elif not isinstance(secret, bool):
            problems.append(f"secret must be true or false; it is {_type_name(secret)}")
    variables = given.get("vars")
    if variables is not None:
        if source != "template":
            problems.append("vars is only for template")
        elif not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
            problems.append(f"vars must be a mapping of variable names to values; it is {_type_name(variables)}")
    return problems


def check_account(key: str, value: Any, *, allowed: bool = True) -> list[str]:
    """Return what is wrong with an owner or group."""
    if value is None:
        return []
    if not allowed:
        return [f"{key} has no meaning for state: absent"]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return [f"{key} must be a name or a number; it is {_type_name(value)}"]
    return []


def _parents(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/" + "/".join(parts[:end]) for end in range(1, len(parts))]


def _type_name(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, str):
        return "a text" if value else "an empty text"
    if isinstance(value, Sequence):
        return "a list"
    if isinstance(value, (int, float)):
        return "a number"
    return f"a {type(value).__name__}"
