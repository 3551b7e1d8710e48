"""The `venv` module on a real host: offline, whole or not at all, and clear about damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Play

LOCK = Path(__file__).resolve().parents[1] / "files/tool.lock"
PATH = "/opt/evk tests/tool"
CHECK = "'/opt/evk tests/tool/bin/python' -c 'import idna; print(idna.__version__)'"
HOUSE = "/opt/evk-tests-house"


def venv(play: Play, *, fails: bool = False, check: bool = False, **options: Any) -> dict[str, Any]:
    return play.run({"venv": {"path": PATH, **options}}, fails=fails, check=check).last


def prepare(play: Play) -> None:
    play.source("files", "tool.lock", LOCK.read_bytes())
    play.shell(f"rm -rf '/opt/evk tests' {HOUSE}")


def test_installed_once_and_rebuilt_after_an_interruption(play: Play) -> None:
    prepare(play)
    assert venv(play, lock="tool.lock", check=True)["changed"] is True
    assert play.shell("ls /opt | grep -c 'evk tests' || true") == "0"
    first = venv(play, lock="tool.lock")
    assert first["changed"] is True
    assert "idna==" in first["diff"]["after"]
    assert play.shell(CHECK) in " ".join(first["packages"])
    assert play.shell("ls -A '/opt/evk tests'") == "tool", "nothing is left over"
    assert play.shell(f"find '{PATH}' ! -user root | wc -l") == "0"
    assert play.shell(f"setpriv --reuid=nobody --clear-groups {CHECK}")
    assert venv(play, lock="tool.lock")["changed"] is False
    assert venv(play, lock="tool.lock", check=True)["changed"] is False
    # killed before the exchange: the old one serves on, the work folder is swept by the next build
    play.shell(f"mkdir -p '/opt/evk tests/.tool.evenkeel/wheelhouse'; rm '{PATH}/.evenkeel-venv.json'")
    assert play.shell(CHECK)
    assert venv(play, lock="tool.lock")["changed"] is True
    assert play.shell("ls -A '/opt/evk tests'") == "tool"
    assert venv(play, lock="tool.lock")["changed"] is False


def test_wheelhouse_on_the_host_and_its_damages(play: Play) -> None:
    prepare(play)
    assert venv(play, wheelhouse=HOUSE, check=True)["changed"] is True
    assert f"there is no requirements.lock in {HOUSE}" in venv(play, wheelhouse=HOUSE, fails=True)["msg"]
    state = play.run(
        {"ansible.builtin.debug": {"msg": "{{ state_dir }}"}},
        {"venv": {"path": PATH, "lock": "tool.lock"}},
    ).results[0]["msg"]
    tars = sorted(Path(state, "wheelhouses").glob("*.tar"))
    houses = [tar for tar in tars if "idna" in " ".join(path.name for path in tar.with_suffix("").iterdir())]
    small = min(houses, key=lambda tar: len(list(tar.with_suffix("").iterdir())))
    play.run(
        {"ansible.builtin.file": {"path": HOUSE, "state": "directory", "mode": "0755"}},
        {"ansible.builtin.unarchive": {"src": str(small), "dest": HOUSE}},
    )
    assert venv(play, wheelhouse=HOUSE)["changed"] is True
    assert venv(play, wheelhouse=HOUSE)["changed"] is False
    play.shell(f"rm '{PATH}/.evenkeel-venv.json'; echo x >> $(echo {HOUSE}/idna*)")
    corrupt = venv(play, wheelhouse=HOUSE, fails=True)["msg"]
    assert "idna-" in corrupt
    assert "is corrupt" in corrupt
    assert "\n" not in corrupt
    play.shell(f"rm {HOUSE}/idna*")
    assert "the wheel of idna==" in venv(play, wheelhouse=HOUSE, fails=True)["msg"]
    assert play.shell(CHECK), "the old environment serves on"


def test_wrong_input(play: Play) -> None:
    prepare(play)
    assert "but the lock is for 3.12" in venv(play, lock="tool.lock", python_version="3.12", fails=True)["msg"]
    play.shell(f"mkdir -p '{PATH}'; echo precious > '{PATH}/data'")
    assert "exists and is not a virtual environment" in venv(play, lock="tool.lock", fails=True)["msg"]
    assert play.shell(f"cat '{PATH}/data'") == "precious"
    assert "there is no 'none.lock'" in venv(play, lock="none.lock", fails=True)["msg"]
    assert "needs lock or wheelhouse" in venv(play, fails=True)["msg"]
    play.source("files", "wrong.lock", LOCK.read_text().replace("a7db85", "000000").replace("ab7ae7", "000000"))
    assert "idna" in venv(play, lock="wrong.lock", fails=True, path="/opt/evk tests/other")["msg"]
