# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Who has signed an approval."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

NAMESPACE = "evenkeel-approval"


class ApprovalError(Exception):
    """The signature cannot be examined; the message is for people."""


def ssh_keygen(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run ssh-keygen, which never asks anybody."""
    command = ["ssh-keygen", *arguments]
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    except OSError as error:
        raise ApprovalError(f"ssh-keygen is missing, which verifies approvals: apt-get install openssh-client ({error})") from None


def same_person(principal: str, deployer: str) -> bool:
    """Whether an approver's name (as `ann@example.org`) is that of who deploys (as `ann@controller`): by what stands before the @."""
    return bool(deployer) and principal.split("@")[0].lower() == deployer.split("@")[0].lower()


def examine(statement: str, signature: Path, signers: Sequence[str], deployer: str) -> tuple[str, str]:
    """(who signed, what is wrong with it); who is empty unless the signature is good, what is wrong is empty when nothing is."""
    if not signature.is_file():
        return "", f"there is no signature {signature}"
    if "BEGIN SSH SIGNATURE" not in signature.read_text(encoding="utf-8", errors="replace"):
        return "", f"{signature} is no signature of ssh-keygen"
    with tempfile.TemporaryDirectory(prefix="evenkeel-approval-") as folder:
        allowed = Path(folder) / "allowed_signers"
        allowed.write_text("".join(f"{line}\n" for line in signers), encoding="utf-8")
        found = ssh_keygen("-Y", "find-principals", "-s", str(signature), "-f", str(allowed))
        names = found.stdout.replace(",", " ").split()
        if found.returncode != 0 or not names:
            return "", "it was signed with a key that is not on the list of approvers (deploy_approvers)"
        name = names[0]
        options = ("-f", str(allowed), "-I", name, "-n", NAMESPACE, "-s", str(signature))
        verified = ssh_keygen("-Y", "verify", *options, text=statement)
    if verified.returncode != 0:
        why = " ".join(verified.stderr.split()) or "it does not fit"
        return "", f"the signature of {name} is not for this plan ({why}): it must be of exactly the text that the refusal shows"
    if set(name) & set("*?!"):
        return "", f"deploy_approvers names no person with {name}: write the whole name"
    themselves = [each for each in names if same_person(each, deployer)]
    if themselves:
        return name, f"{themselves[0]}, who deploys, signed it: a second person must"
    return name, ""
