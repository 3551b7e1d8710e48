"""The pipelines that users copy are held to the playbooks, variables and make targets that are here."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from programs import ROOT

EXAMPLES = ROOT / "docs/examples"
PAGE = ROOT / "docs/ci.md"
#: Where a person's word is typed, and what it may be called.
TYPED = {"deploy.yml": "migrations_approved", "rollback.yml": "reversal_approved"}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return loaded


GITHUB = load("github-actions.yml")
GITLAB = load("gitlab-ci.yml")
CHECKS = ("check", "security")
DELIVERIES = ("release", "plan", "deploy", "rollback")


def github_scripts(job: str) -> list[str]:
    return [step["run"] for step in GITHUB["jobs"][job]["steps"] if "run" in step]


def gitlab_job(name: str) -> dict[str, Any]:
    """A job with what it extends; keys are replaced as GitLab does, variables too."""
    job = GITLAB[name]
    return {**(gitlab_job(job["extends"]) if "extends" in job else {}), **job}


def gitlab_scripts(job: str) -> list[str]:
    merged = gitlab_job(job)
    return [*merged.get("before_script", []), *merged["script"]]


def scripts() -> Iterator[tuple[str, str]]:
    """Where, and what a shell would get."""
    for job in (*CHECKS, *DELIVERIES):
        yield f"github {job}", "\n".join(github_scripts(job))
        yield f"gitlab {job}", "\n".join(gitlab_scripts(job))
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL):
        yield "ci.md", "\n".join(line.removeprefix("$ ") for line in block.splitlines())


def playbook_calls() -> list[tuple[str, list[str]]]:
    """Each call of ansible-playbook as its words, with `${X:+words}` as if X were set."""
    calls = []
    for place, script in scripts():
        whole = re.sub(r"\$\{\w+:\+([^}]*)\}", r"\1", script.replace("\\\n", " "))
        for line in whole.splitlines():
            if line.startswith("ansible-playbook"):
                calls.append((place, shlex.split(line)[1:]))
    return calls


CALLS = playbook_calls()


@cache
def documented(playbook: str) -> set[str]:
    """The variables that the header of a playbook explains."""
    header = re.match(r"---\n((?:#.*\n)+)", (ROOT / "playbooks" / playbook).read_text())
    assert header, f"{playbook} has no header"
    return set(re.findall(r"^#   (\w+)(?:=\w+)?  +\S", header[1], re.MULTILINE))


def parts(words: list[str]) -> tuple[str, str, list[str]]:
    """Inventory, playbook and extra variables of a call; nothing else is in it."""
    assert words[0] == "-i", words
    assert words[2].startswith("playbooks/"), words
    rest = words[3:]
    assert rest[::2] == ["-e"] * (len(rest) // 2), f"something else than -e: {words}"
    return words[1], words[2].removeprefix("playbooks/"), rest[1::2]


def test_v1_v2_the_calls_were_found() -> None:
    assert len(CALLS) == 14
    assert {parts(words)[1] for _, words in CALLS} == {"release.yml", "deploy.yml", "rollback.yml"}


@pytest.mark.parametrize(("place", "words"), CALLS, ids=[f"{place}-{index}" for index, (place, _) in enumerate(CALLS)])
def test_v2_every_playbook_variable_and_inventory_exists(place: str, words: list[str]) -> None:
    inventory, playbook, variables = parts(words)
    assert (ROOT / "playbooks" / playbook).is_file()
    assert {variable.partition("=")[0] for variable in variables} <= documented(playbook)
    assert inventory in ("inventories/production", "$INVENTORY")


def test_v2_ansible_takes_the_calls() -> None:
    """As Ansible parses them: the playbook and all that it imports are there, and so are the options."""
    for playbook in sorted({parts(words)[1] for _, words in CALLS}):
        words = next(words for _, words in CALLS if parts(words)[1] == playbook)
        call = ["ansible-playbook", "--syntax-check", "-i", "inventories/production.example", *words[2:]]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_v1_v2_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for _, script in scripts() for name in re.findall(r"^\s*make ([a-z-]+)", script, re.MULTILINE)}
    assert named == {"setup"}
    assert named | set(re.findall(r"`make ([a-z-]+)`", PAGE.read_text())) <= targets


@pytest.mark.parametrize("scripts_of", [github_scripts, gitlab_scripts])
def test_v1_a_change_is_installed_built_type_checked_linted_tested_and_audited(scripts_of: Any) -> None:
    check = "\n".join(scripts_of("check"))
    assert [word for word in ("pip install --require-hashes", "python -m build", "mypy", "ruff check", "pytest") if word not in check] == []
    security = "\n".join(scripts_of("security"))
    assert security.index("trivy") < security.index("playbooks/release.yml"), "the scan needs Trivy"


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_v1_v2_no_error_is_hidden_and_no_part_of_the_platform_named(name: str) -> None:
    hiding = [r"\|\|", "continue-on-error", r"set \+e", r"\| tee", "--limit", "in-progress: true", "retry:", "HostKeyChecking=no"]
    text = re.sub(r"(group|token): .*", "", (EXAMPLES / name).read_text())  # expressions of GitHub, not of a shell
    assert [each for each in hiding if re.search(each, text)] == []


@pytest.mark.parametrize("scripts_of", [github_scripts, gitlab_scripts])
def test_v2_the_stages_do_what_they_are_named_after(scripts_of: Any) -> None:
    release, plan, deploy, rollback = (scripts_of(job)[-1] for job in DELIVERIES)
    assert "playbooks/release.yml" in release
    assert "playbooks/deploy.yml" in plan
    assert "-e gate=plan" in plan
    assert "playbooks/deploy.yml" in deploy
    assert "gate" not in deploy
    assert "playbooks/rollback.yml" in rollback
    for script in (deploy, rollback):
        playbook = re.search(r"playbooks/(\w+\.yml)", script)
        assert playbook
        assert re.search(rf'\$\{{(\w+):\+-e "{TYPED[playbook[1]]}=\$\1"\}}', script), "the approval is typed by a person, and may be absent"


def test_v1_github_checks_every_change_without_a_secret_of_the_platform() -> None:
    assert GITHUB["on"]["pull_request"] is None
    assert GITHUB["on"]["push"] == {"branches": ["main"]}
    assert GITHUB["permissions"] == {"contents": "read"}
    for job in CHECKS:
        given = GITHUB["jobs"][job]
        assert given["if"] == "github.event_name != 'workflow_dispatch'"
        assert set(re.findall(r"secrets\.(\w+)", str(given))) <= {"SUITE_TOKEN"}
        assert "environment" not in given
        assert given["timeout-minutes"] <= 60
        assert "self-hosted" not in given["runs-on"]


def test_v2_github_delivers_for_a_person_in_a_named_environment() -> None:
    inputs = GITHUB["on"]["workflow_dispatch"]["inputs"]
    assert inputs["environment"]["required"] is True
    assert inputs["action"]["options"] == ["plan", "deploy", "rollback"]
    assert GITHUB["concurrency"]["cancel-in-progress"] is False
    assert "inputs.environment" in GITHUB["concurrency"]["group"]
    for job in DELIVERIES:
        given = GITHUB["jobs"][job]
        assert given["environment"] == "${{ inputs.environment }}"
        assert given["timeout-minutes"] > 0
        assert given["runs-on"] == ["self-hosted", "controller"]
        assert given["env"]["INVENTORY"] == "inventories/${{ inputs.environment }}"
        assert any(step.get("if") == "always()" and "upload-artifact" in step["uses"] for step in given["steps"])
    jobs = GITHUB["jobs"]
    assert jobs["release"]["if"] == "github.event_name == 'workflow_dispatch' && inputs.action != 'rollback'"
    assert jobs["rollback"]["if"] == "github.event_name == 'workflow_dispatch' && inputs.action == 'rollback'"
    assert jobs["deploy"]["if"] == "inputs.action == 'deploy'"
    assert (jobs["plan"]["needs"], jobs["deploy"]["needs"], jobs["rollback"].get("needs")) == ("release", "plan", None)


def test_v2_github_names_only_inputs_that_exist_and_puts_none_into_a_script() -> None:
    text = (EXAMPLES / "github-actions.yml").read_text()
    assert set(re.findall(r"\binputs\.(\w+)", text)) == set(GITHUB["on"]["workflow_dispatch"]["inputs"])
    assert [script for job in GITHUB["jobs"] for script in github_scripts(job) if "${{" in script] == []


def test_v1_gitlab_checks_every_change_on_any_runner() -> None:
    for job in CHECKS:
        given = gitlab_job(job)
        assert not {"rules", "when", "environment", "tags", "allow_failure"} & set(given)
        assert given["timeout"]


def test_v2_gitlab_delivers_for_a_person_in_a_named_environment() -> None:
    for job in DELIVERIES:
        given = gitlab_job(job)
        assert given["environment"]["name"] == "production"
        assert given["resource_group"] == "production"
        assert given["interruptible"] is False
        assert given["timeout"]
        assert given["artifacts"]["when"] == "always"
        assert given["variables"]["ANSIBLE_LOG_PATH"].endswith("/$CI_JOB_NAME.log")
        # never on a merge request
        first = given["rules"][0]
        assert first.get("when") == "never" if "==" in first["if"] else "!=" in first["if"]
    for job in ("release", "deploy", "rollback"):
        assert gitlab_job(job)["rules"][-1]["when"] == "manual"
    assert [gitlab_job(job)["needs"] for job in ("plan", "deploy", "rollback")] == [["release"], ["plan"], []]
    assert gitlab_job("deploy")["rules"][-1].get("allow_failure") is None


def test_v1_v2_gitlab_runs_its_stages_in_order() -> None:
    assert GITLAB["stages"] == [*CHECKS, *DELIVERIES]
    assert [gitlab_job(job)["stage"] for job in GITLAB["stages"]] == GITLAB["stages"]


def test_v2_every_secret_and_variable_of_the_examples_is_explained() -> None:
    text = "".join((EXAMPLES / name).read_text() for name in ("github-actions.yml", "gitlab-ci.yml"))
    named = set(re.findall(r"(?:secrets|vars)\.([A-Z_]+)", text)) | set(re.findall(r"\$(S(?:SH|UITE)_\w+|VAULT_\w+)", text))
    explained = set(re.findall(r"`([A-Z_]+)`", PAGE.read_text()))
    assert {"SSH_PRIVATE_KEY", "SSH_KNOWN_HOSTS", "VAULT_PASSWORD", "SUITE_REPOSITORY", "SUITE_VERSION", "EVENKEEL_STATE"} <= named
    assert named <= explained
