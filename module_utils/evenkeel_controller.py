# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""What the action plugins of the suite share on the controller. It is never shipped to a host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleError, AnsibleUndefinedVariable
from ansible.module_utils.common.text.converters import to_bytes, to_text
from ansible.plugins.action import ActionBase
from ansible.template import generate_ansible_template_vars, trust_as_template


class SourceError(Exception):
    """A file of the role or playbook that cannot be found, read or rendered; the text is for people."""


class Sources:
    """Finds, reads and renders the files that a task names, the way `template` and `copy` do."""

    def __init__(self, action: ActionBase, task_vars: Mapping[str, Any]) -> None:
        self._action = action
        self._task_vars = dict(task_vars)
        self._templars: dict[str, Any] = {}

    def find(self, folder: str, name: str) -> str:
        """Return the path of a file in the role's or playbook's folder of that kind."""
        try:
            return str(self._action._find_needle(folder, name))
        except AnsibleError:
            raise SourceError(f"there is no {name!r} in the {folder}/ of the role or the playbook") from None

    def read(self, name: str) -> bytes:
        """Return the bytes of a file from `files/`, decrypted when it is in a vault."""
        path = self.find("files", name)
        if os.path.isdir(path):
            raise SourceError(f"{path} is a directory; name a file")
        loader = self._action._loader
        try:
            real = loader.get_real_file(path)
            try:
                with open(real, "rb") as file:
                    return file.read()
            finally:
                loader.cleanup_tmp_file(real)
        except (AnsibleError, OSError) as error:
            raise SourceError(f"cannot read {path}: {error}") from None

    def render(self, name: str, dest: str, variables: Mapping[str, Any], *, secret: bool = False) -> bytes:
        """Return a rendered template from `templates/`; undefined names are errors."""
        path = self.find("templates", name)
        if os.path.isdir(path):
            raise SourceError(f"{path} is a directory; name a template")
        try:
            text = trust_as_template(self._action._loader.get_text_file_contents(path))
        except (AnsibleError, OSError) as error:
            raise SourceError(f"cannot read {path}: {error}") from None
        scope = {**self._task_vars, **self._about(name, path, dest), **variables}
        templar = self._templar(os.path.dirname(path))
        templar.available_variables = scope
        try:
            result = templar.template(text, escape_backslashes=False, overrides={"trim_blocks": True})
        except AnsibleUndefinedVariable as error:
            raise SourceError(f"template {name}: {_one_line(error)}") from None
        except Exception as error:  # a filter or test may raise anything at all
            reason = f"{type(error).__name__} ({_hidden(secret)})" if secret else _one_line(error)
            raise SourceError(f"template {name}: {reason}") from None
        return bytes(to_bytes("" if result is None else result, errors="surrogate_or_strict"))

    def _about(self, name: str, path: str, dest: str) -> dict[str, Any]:
        about = dict(generate_ansible_template_vars(path=name, fullpath=path, dest_path=dest))
        if "ansible_managed" in self._task_vars:  # a user's own text stays, as with `template`
            about.pop("ansible_managed", None)
        return about

    def _templar(self, directory: str) -> Any:
        if directory not in self._templars:
            bases = [*self._task_vars.get("ansible_search_path", []), self._action._loader.get_basedir(), directory]
            search = [path for base in bases for path in (os.path.join(base, "templates"), base)]
            self._templars[directory] = self._action._templar.copy_with_new_env(searchpath=search)
        return self._templars[directory]


def _hidden(secret: bool) -> str:
    return "details hidden: the entry is secret" if secret else ""


def _one_line(error: Exception) -> str:
    return " ".join(to_text(str(error)).split())
