"""The `files` module on a real host: like the builtin modules, and whole whatever happens to it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from conftest import Play

TEMPLATE = """{{ ansible_managed | comment }}
{% if true %}
    name = {{ name }} {{ template_path | basename }}
{% endif %}
{% for item in things %}
{{ item }}
{% endfor %}
{% include 'part.j2' %}

"""

# What is there before, in a shell on the host with the folder as working directory.
BEFORE = """
umask 022
echo old > changed; chmod 0600 changed; chown daemon:daemon changed
printf same > same
printf same > attributes; chmod 0600 attributes
echo target > target; ln -s target to_file; ln -s nowhere dangling; ln -s target replaced_link
printf same > target_same; ln -s target_same to_same
mkdir directory; mkdir -m 0700 private; mkdir real; ln -s real to_directory
mkdir -p tree/below; echo x > tree/below/x; ln -s tree to_tree; ln -s nowhere broken; echo x > doomed
printf same > hard; ln hard hard2
printf x > relative; chmod 0604 relative
"""

# dest, the entry of `files`, and the builtin task that does the same.
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("new", {"template": "t.j2", "mode": "0640"}, "template", {"src": "t.j2", "mode": "0640"}),
    ("a name 'with\" $ü", {"template": "t.j2"}, "template", {"src": "t.j2", "mode": "0644"}),
    ("-leading", {"content": "x", "mode": "u=rw,g=r"}, "copy", {"content": "x", "mode": "u=rw,g=r"}),
    ("settings", {"template": "header.j2"}, "template", {"src": "header.j2", "mode": "0644"}),
    ("changed", {"content": "neu ü\n", "owner": "daemon"}, "copy", {"content": "neu ü\n", "owner": "daemon", "mode": "0644"}),
    ("same", {"content": "same"}, "copy", {"content": "same", "mode": "0644"}),
    ("empty", {"content": ""}, "copy", {"content": "", "mode": "0644"}),
    ("attributes", {"content": "same", "group": "adm"}, "copy", {"content": "same", "group": "adm", "mode": "0644"}),
    ("binary", {"copy": "binary", "mode": "4755"}, "copy", {"src": "binary", "mode": "4755"}),
    ("to_file", {"content": "new"}, "copy", {"content": "new", "mode": "0644", "follow": False}),
    ("to_same", {"content": "same"}, "copy", {"content": "same", "mode": "0644", "follow": False}),
    ("dangling", {"content": "new"}, "copy", {"content": "new", "mode": "0644", "follow": False}),
    ("hard", {"content": "other"}, "copy", {"content": "other", "mode": "0644"}),
    ("relative", {"content": "x", "mode": "g+w"}, "copy", {"content": "x", "mode": "g+w"}),
    ("new_relative", {"content": "x", "mode": "g+w"}, "copy", {"content": "x", "mode": "g+w"}),
    ("directory", {"state": "directory"}, "file", {"state": "directory", "mode": "0755"}),
    ("private", {"state": "directory", "mode": "1777"}, "file", {"state": "directory", "mode": "1777"}),
    ("fresh/deep/er", {"state": "directory", "mode": "0750"}, "file", {"state": "directory", "mode": "0750"}),
    ("to_directory", {"state": "directory", "mode": "0711"}, "file", {"state": "directory", "mode": "0711"}),
    ("new_directory", {"state": "directory", "mode": "a+rwX"}, "file", {"state": "directory", "mode": "a+rwX"}),
    ("link", {"link": "target"}, "file", {"state": "link", "src": "target", "follow": False}),
    ("replaced_link", {"link": "no such"}, "file", {"state": "link", "src": "no such", "force": True, "follow": False}),
    ("to_tree", {"state": "absent"}, "file", {"state": "absent"}),
    ("tree", {"state": "absent"}, "file", {"state": "absent"}),
    ("broken", {"state": "absent"}, "file", {"state": "absent"}),
    ("doomed", {"state": "absent"}, "file", {"state": "absent"}),
    ("never_was", {"state": "absent"}, "file", {"state": "absent"}),
]

LOOK = """
import hashlib, json, os, stat
found = {}
for base, folders, names in os.walk('.'):
    for name in folders + names:
        path = os.path.join(base, name)
        s = os.lstat(path)
        what = [stat.S_IFMT(s.st_mode), s.st_uid, s.st_gid, s.st_nlink if stat.S_ISREG(s.st_mode) else 0]
        if stat.S_ISLNK(s.st_mode):
            what.append(os.readlink(path))
        else:
            what.append(oct(s.st_mode))
        if stat.S_ISREG(s.st_mode):
            what.append(hashlib.sha256(open(path, 'rb').read()).hexdigest())
        found[path] = what
print(json.dumps(found, sort_keys=True))
"""


def look(play: Play, *folders: str) -> list[dict[str, Any]]:
    """Tell what is in some folders: kind, owner, mode, target, content."""
    tasks = [{"ansible.builtin.command": {"argv": ["python3", "-c", LOOK], "chdir": folder}, "changed_when": False} for folder in folders]
    return [json.loads(result["stdout"]) for result in play.run(*tasks).results]


def test_the_same_as_the_builtin_modules(play: Play, place: str) -> None:
    play.source("templates", "t.j2", TEMPLATE)
    play.source("templates", "part.j2", "part of {{ name }}")
    play.source("templates", "header.j2", "#jinja2: trim_blocks: False, variable_start_string: '[['\n[[ name }}\n{% if 1 %}\n{% endif %}\n")
    play.source("files", "binary", bytes(range(256)) * 100)
    variables = {"name": "süß", "things": ["a", "b"]}
    ours, theirs = f"{place}/ours", f"{place}/theirs"
    for folder in (ours, theirs):
        play.shell(f"mkdir {shlex.quote(folder)} && cd {shlex.quote(folder)} && {{ {BEFORE} }}")
    entries = [{"dest": f"{ours}/{dest}", **entry} for dest, entry, _module, _options in CASES]
    bulk = {"files": {"files": entries}}
    builtin = []
    for dest, _entry, module, options in CASES:
        where = {"path" if module == "file" else "dest": f"{theirs}/{dest}"}
        owner = {} if options.get("state") == "absent" else {"owner": "root", "group": "root"}
        builtin.append({f"ansible.builtin.{module}": {**owner, **options, **where}})

    # what check mode and the diff say before anything is done
    predicted = play.run(bulk, check=True, variables=variables).last
    reference = play.run(*builtin, check=True, variables=variables).results
    expected = [dest for (dest, *_rest), result in zip(CASES, reference, strict=True) if result["changed"]]
    assert [path.removeprefix(f"{ours}/") for path in predicted["changed_files"]] == expected
    assert look(play, ours, theirs)[0] == look(play, theirs)[0], "check mode changed something"

    # what is really done
    done = play.run(bulk, variables=variables).last
    results = play.run(*builtin, variables=variables).results
    changed = [dest for (dest, *_rest), result in zip(CASES, results, strict=True) if result["changed"]]
    assert done["changed_files"] == predicted["changed_files"]
    assert [path.removeprefix(f"{ours}/") for path in done["changed_files"]] == changed
    mine, other = look(play, ours, theirs)
    assert mine == other
    assert "süß" in play.shell(f"cat {shlex.quote(ours)}/new")

    # the second time nothing
    assert play.run(bulk, variables=variables).last["changed_files"] == []
    assert play.run(bulk, variables=variables, check=True).last["changed"] is False
    assert not any(result["changed"] for result in play.run(*builtin, variables=variables).results)


def test_diff_of_content_is_that_of_copy(play: Play, place: str) -> None:
    play.shell(f"echo old > {shlex.quote(place)}/a")
    reference = play.run({"ansible.builtin.copy": {"dest": f"{place}/a", "content": "new\n", "mode": "0644"}}, check=True).last["diff"][0]
    ours = play.files({"dest": f"{place}/a", "content": "new\n"})["diff"]
    assert len(ours) == 1
    assert (ours[0]["before"], ours[0]["after"]) == (reference["before"], reference["after"]) == ("old\n", "new\n")
    assert ours[0]["before_header"] == reference["before_header"] == f"{place}/a"
    assert play.files({"dest": f"{place}/a", "content": "new\n"})["diff"] == []


def test_wrong_entries_are_told_at_once_before_anything_changes(play: Play, place: str) -> None:
    play.source("templates", "bad.j2", "{{ nobody_defined_this }}")
    play.source("templates", "worse.j2", "{% if %}")
    good = {"dest": f"{place}/good", "content": "x"}
    wrong = play.files(good, {"dest": "relative", "content": "x"}, {"dest": "/a", "mode": "1"}, {**good}, fails=True)
    for part in ("entry 2 (relative)", "entry 3 (/a)", "entry 4", "the same dest as entry 1"):
        assert part in wrong["msg"]
    entries = [{"dest": f"/{name}", "template": f"{name}.j2"} for name in ("bad", "worse", "none")]
    sources = play.files(good, *entries, {"dest": "/c", "copy": "none"}, fails=True)["msg"]
    assert "entry 2 (/bad): template bad.j2: 'nobody_defined_this' is undefined" in sources
    for part in ("entry 3 (/worse): template worse.j2", "entry 4 (/none): there is no 'none.j2'", "entry 5 (/c)"):
        assert part in sources
    missing = play.files(good, {"dest": f"{place}/no/a", "content": "x", "owner": "daemon"}, fails=True)["msg"]
    assert "entry 2" in missing
    assert "does not exist; add an entry with state: directory" in missing
    assert "no user 'nobody-here'" in play.files(good, {**good, "dest": "/a", "owner": "nobody-here"}, fails=True)["msg"]
    assert look(play, place)[0] == {}


def test_a_failed_check_leaves_every_file_untouched(play: Play, place: str) -> None:
    play.shell(f"cd {shlex.quote(place)}; echo old > a; echo old > c")
    before = look(play, place)[0]
    entries = [{"dest": f"{place}/{name}", "content": "new\n", "validate": f"grep -v new-{name} %s"} for name in "ab"]
    entries.append({"dest": f"{place}/c", "content": "new\n", "validate": "grep old %s"})
    failed = play.files(*entries, fails=True)
    assert f"entry 3 ({place}/c): the new content did not pass 'grep old %s' (exit 1)" in failed["msg"]
    assert failed["changed_files"] == []
    assert look(play, place)[0] == before
    assert play.files(*entries, check=True)["changed_files"] == [f"{place}/{name}" for name in "abc"]


def test_a_validator_sees_the_final_owner_and_mode(play: Play, place: str) -> None:
    check = 'sh -c \'test "$(stat -c %U:%G:%a "$0")" = daemon:adm:640\' %s'
    entry = {"dest": f"{place}/a", "content": "x", "owner": "daemon", "group": "adm", "mode": "0640", "validate": check}
    assert play.files(entry)["changed_files"] == [f"{place}/a"]


def test_secrets_show_nowhere(play: Play, place: str) -> None:
    play.source("templates", "s.j2", "password={{ pw }}\n")
    play.source("templates", "f.j2", "{{ pw | from_json }}")
    variables = {"pw": "hunter2-{{ 'x' * 3 }}"}
    entry = {"dest": f"{place}/s", "mode": "0600", "secret": True, "template": "s.j2"}
    failing = {**entry, "validate": "sh -c 'cat $0; exit 3' %s"}
    asked = {"variables": variables, "arguments": ("-vvv",)}
    for outcome in (
        play.run({"files": {"files": [entry]}}, check=True, **asked),
        play.run({"files": {"files": [failing]}}, fails=True, **asked),
        play.run({"files": {"files": [{**entry, "template": "f.j2"}]}}, fails=True, **asked),
        play.run({"files": {"files": [entry]}}, **asked),
        play.run({"files": {"files": [{**entry, "content": "{{ pw }}", "template": None}]}}, **asked),
    ):
        assert "hunter2-xxx" not in outcome.text
    assert "hunter2-xxx" in play.shell(f"cat {shlex.quote(place)}/s")
    assert "hunter2" not in play.shell("journalctl --since -1min --no-pager | grep -v 'ansible.legacy.command' || true")


def test_killed_during_validation(play: Play, place: str) -> None:
    play.shell(f"cd {shlex.quote(place)}; echo old > a; echo old > b")
    entries = [{"dest": f"{place}/{name}", "content": "new\n"} for name in "ab"]
    deadly = [entries[0], {**entries[1], "validate": "sh -c 'kill -9 $PPID' %s"}]
    play.files(*deadly, fails=True)
    found = play.shell(f"cd {shlex.quote(place)}; cat a b; ls -A | grep -c evenkeel").split()
    assert found == ["old", "old", "2"], "the new contents lie beside the old ones"
    assert play.files(*entries)["changed_files"] == [f"{place}/a", f"{place}/b"]
    assert play.shell(f"cd {shlex.quote(place)}; cat a b; ls -A").split() == ["new", "new", "a", "b"]


def test_killed_between_two_files(play: Play, place: str) -> None:
    """A watcher on the host kills the module as soon as it sees the first new file."""
    names = [f"f{number:03}" for number in range(300)]
    size = 20_000
    entries = [{"dest": f"{place}/{name}", "content": "n" * size} for name in names]
    play.files(*[{**entry, "content": "o" * size} for entry in entries])
    # the watcher reads the process number from the name of a staged file
    watcher = (
        'while :; do if [ "$(head -c1 f000)" = n ]; then '
        "kill -9 $(ls -A | sed -n 's/^[.]evenkeel-[0-9a-f]*-\\([0-9]*\\)-.*/\\1/p' | head -1); exit; fi; done"
    )
    play.shell(
        "systemctl reset-failed evk-watcher 2>/dev/null; systemctl stop evk-watcher 2>/dev/null; "
        f"systemd-run --quiet --collect --unit=evk-watcher --working-directory={shlex.quote(place)} "
        f"timeout 60 sh -c {shlex.quote(watcher)}"
    )
    play.files(*entries, fails=True)
    counts = play.shell(
        f"cd {shlex.quote(place)}; for f in f???; do tr -d '\\n' < $f | fold -w1 | sort | uniq -c; done | "
        "awk '{print $1, $2}' | sort | uniq -c"
    )
    seen = {tuple(line.split()[1:]): int(line.split()[0]) for line in counts.splitlines()}
    assert set(seen) == {(str(size), "o"), (str(size), "n")}, "every file is old or new, and there are both"
    again = play.files(*entries)["changed_files"]
    assert len(again) == seen[(str(size), "o")]
    assert play.shell(f"ls -A {shlex.quote(place)}").split() == names, "nothing is left over"
    assert play.files(*entries)["changed"] is False


def test_entries_keep_their_own_variables(play: Play, place: str) -> None:
    play.source("templates", "v.j2", "{{ item.name }} {{ other }}")
    entries = [{"dest": f"{place}/{name}", "template": "v.j2", "vars": {"item": {"name": name}}} for name in "ab"]
    play.files(*entries, variables={"other": "same", "item": {"name": "outer"}})
    assert play.shell(f"cd {shlex.quote(place)}; cat a; echo; cat b") == "a same\nb same"
