"""The program that migrates Django applications, on a real PostgreSQL with real applications."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from migration_world import World, cluster

from filter_plugins.migrations import migration_digest

ITEM = 'CreateModel("Item", [("id", models.BigAutoField(primary_key=True)), ("name", models.CharField(max_length=20))])'
NULLABLE = 'AddField("item", "note", models.TextField(null=True))'
FILLED = 'AddField("item", "note", models.TextField(default=""))'
ROWS = "INSERT INTO shop_item (name) SELECT 'item ' || n FROM generate_series(1, 1000) n; ANALYZE shop_item"
QUICK = ("--lock-timeout-seconds", "0.3")
numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[Path]:
    with cluster() as folder:
        yield folder


@pytest.fixture(scope="session")
def template(server: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a database with the shop's first migration applied, and a thousand items."""
    world = World(tmp_path_factory.mktemp("template"), server, "shop_template")
    world.migration("0001_initial", ITEM)
    world.run("apply", "core")
    with world.session() as session:
        session.execute(ROWS)
    return world.name


@pytest.fixture
def shop(server: Path, template: str, tmp_path: Path) -> World:
    """A shop of one's own, as the template."""
    world = World(tmp_path, server, f"shop_{next(numbers)}", template=template)
    world.migration("0001_initial", ITEM)
    return world


def outcome(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["reversible"], entry["compatible"], entry["why"]


def test_first_deploy_on_an_empty_database(server: Path, tmp_path: Path) -> None:
    world = World(tmp_path, server, f"shop_{next(numbers)}", ("django.contrib.contenttypes", "django.contrib.auth", "shop"))
    world.migration("0001_initial", ITEM)
    world.migration("0002_note", f"{FILLED}, RunPython(RunPython.noop, RunPython.noop), RunSQL('SELECT 1', '')", "0001_initial")
    plan = world.run("plan", "core", "plugins")[0]
    assert plan["applied"] == plan["unknown"] == {"core": [], "plugins": []}
    assert len(plan["pending"]) == 32  # Django's own on both
    assert all(entry["compatible"] and entry["reversible"] for entry in plan["pending"] if entry["app"] == "shop"), (
        "nobody knows these tables"
    )
    assert plan["databases"]["core"]["name"] == world.name
    assert plan["databases"]["core"]["system"] == str(world.rows("SELECT system_identifier FROM pg_control_system()")[0][0])
    assert plan["heads"]["core"]["shop"] == ["0002_note"]
    assert world.rows("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)], "a plan changes nothing"

    result, told = world.run("apply", "core", "plugins")
    assert (result["outcome"], result["why"], result["stopped_at"]) == ("succeeded", "", "")
    assert result["heads"] == plan["heads"]
    assert len(result["migrations"]) == 32
    assert "core shop.0002_note … 0." in told
    assert world.rows("SELECT count(*) FROM auth_permission WHERE codename = 'add_item'") == [(1,)], "Django's signals are sent"
    assert world.rows("SELECT count(*) FROM pg_tables WHERE tablename = 'shop_item'") == [(1,)]
    with world.session(f"{world.name}_plugins") as session:
        assert session.execute("SELECT count(*) FROM pg_tables WHERE tablename = 'shop_item'").fetchall() == [(0,)], "the router is heard"
    assert world.run("plan", "core", "plugins")[0]["pending"] == []
    state = world.run("state", "core")[0]
    assert state["unknown"] == state["pending"] == {"core": []}
    assert state["heads"] == {"core": result["heads"]["core"]}
    world.migration("0003_thing", 'RenameModel("Item", "Thing")', "0002_note")
    world.run("apply", "core")
    kinds = world.rows("SELECT model FROM django_content_type WHERE app_label = 'shop'")
    assert kinds == [("thing",)], "and those before them, by which Django renames what belongs to a model"


def test_plan_shows_sql_locks_and_what_it_means(shop: World) -> None:
    shop.migration("0002_note", f"{NULLABLE}, AddIndex('item', models.Index(fields=['name'], name='by_name'))", "0001_initial")
    (entry,) = shop.plan()["pending"]
    assert entry["operations"] == ["Add field note to item", "Create index by_name on field(s) name of model item"]
    assert entry["sql"] == ['ALTER TABLE "shop_item" ADD COLUMN "note" text NULL;', 'CREATE INDEX "by_name" ON "shop_item" ("name");']
    assert entry["tables"] == [{"name": "shop_item", "lock": "ACCESS EXCLUSIVE", "rows": 1000}]
    assert outcome(entry) == (True, True, "nothing that the release before uses changes")
    assert shop.plan()["applied"] == {"core": ["shop.0001_initial"]}


CASES = [
    # operations, reversible, compatible, a part of the reason
    (FILLED, True, False, "inserts of the release before fail: no value for shop_item.note"),
    ('AddField("item", "note", models.TextField(db_default=""))', True, True, "nothing"),
    ('AddField("item", "note", models.TextField(null=True, db_default="x", unique=True))', True, False, "shop_item.note is unique"),
    ('RemoveField("item", "name")', True, False, "queries of the release before fail: shop_item.name is gone"),
    ('RenameField("item", "name", "title")', True, False, "shop_item.name is called title"),
    ('RenameModel("Item", "Thing")', True, False, "table shop_item has another name"),
    ('DeleteModel("Item")', True, False, "table shop_item is gone"),
    ('AlterField("item", "name", models.CharField(max_length=40))', True, True, "nothing"),
    ('AlterField("item", "name", models.CharField(max_length=10))', True, False, "shop_item.name is varchar(10), was varchar(20)"),
    ('AlterField("item", "name", models.CharField(max_length=20, null=True))', True, True, "nothing"),
    ('AlterField("item", "name", models.CharField(max_length=20, choices=[("a", "b")]))', True, True, "nothing"),
    (
        'AlterField("item", "name", models.CharField(max_length=20, unique=True))',
        True,
        False,
        "shop_item.name refuses values that are there",
    ),
    ('AlterField("item", "name", models.IntegerField())', True, False, "shop_item.name is integer"),
    ('AlterModelOptions("item", {"verbose_name": "thing"})', True, True, "nothing"),
    (
        'AddConstraint("item", models.CheckConstraint(condition=~models.Q(name=""), name="named"))',
        True,
        False,
        "constraint named on shop_item",
    ),
    ('AlterUniqueTogether("item", {("name", "id")})', True, False, "new unique columns of shop_item"),
    ("RunPython(lambda apps, editor: None)", False, None, "does to data cannot be judged"),
    ("RunPython(RunPython.noop, RunPython.noop)", True, True, "nothing"),
    ('RunSQL("UPDATE shop_item SET name = name", RunSQL.noop)', True, None, "what hand-written SQL does cannot be judged"),
    ('SeparateDatabaseAndState([], [RemoveField("item", "name")])', True, True, "nothing"),
    ('SeparateDatabaseAndState([RemoveField("item", "name")], [])', True, False, "shop_item.name is gone"),
    (f'CreateModel("Tag", [("id", models.BigAutoField(primary_key=True))]), {FILLED.replace("item", "tag")}', True, True, "nothing"),
]


@pytest.fixture(scope="session")
def cases(server: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The plan's entry of each case, each in an application of its own."""
    apps = tuple(f"case{number}" for number in range(len(CASES)))
    world = World(tmp_path_factory.mktemp("cases"), server, "cases", apps)
    for app in apps:
        world.migration("0001_initial", ITEM, app=app)
    world.run("apply", "core")
    for app, case in zip(apps, CASES, strict=True):
        world.migration("0002_change", case[0], "0001_initial", app=app)
    entries = {entry["app"]: entry for entry in world.plan()["pending"]}
    return [entries[app] for app in apps]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0][:45] for case in CASES])
def test_what_the_release_before_can_bear(cases: list[dict[str, Any]], number: int) -> None:
    _operations, reversible, compatible, why = CASES[number]
    assert (cases[number]["reversible"], cases[number]["compatible"]) == (reversible, compatible), cases[number]
    assert why in cases[number]["why"].replace(f"case{number}_", "shop_")


def test_what_a_new_required_column_means_is_true(shop: World) -> None:
    shop.migration("0002_note", FILLED, "0001_initial")
    shop.run("apply", "core")
    with shop.session() as session, pytest.raises(Exception, match='null value in column "note"'):
        session.execute("INSERT INTO shop_item (name) VALUES ('x')")


def test_code_is_not_run_by_a_plan(shop: World) -> None:
    code = """
        def forwards(apps, editor):
            apps.get_model("shop", "Item").objects.all().delete()

        class Own(migrations.operations.base.Operation):
            def state_forwards(self, app_label, state): pass
            def database_forwards(self, app_label, editor, before, after): print("Own was run")
            def describe(self): return "Delete all"
    """
    shop.migration("0002_code", "SeparateDatabaseAndState([RunPython(forwards)], []), Own(), RunSQL('SELECT 1')", "0001_initial", code)
    with shop.start("plan", "core") as process:
        out, _err = process.communicate(timeout=60)
    assert "Own was run" not in out
    (entry,) = json.loads(out)["pending"]
    assert entry["sql"][0] == "-- Python code: shop.migrations.0002_code.forwards, not shown as SQL"
    assert entry["sql"][1] == "-- the operation Own of shop.migrations.0002_code, not shown as SQL"
    assert entry["sql"][2] == "SELECT 1;"
    assert outcome(entry)[:2] == (False, None)
    shop.run("apply", "core", "--expect", "0" * 64, code=1)
    assert shop.rows("SELECT count(*) FROM shop_item") == [(1000,)]


def test_only_what_was_approved_is_applied(shop: World) -> None:
    shop.migration("0002_note", NULLABLE, "0001_initial")
    digest = migration_digest(shop.plan()["pending"])
    shop.migration("0002_note", FILLED, "0001_initial")
    result, _told = shop.run("apply", "core", "--expect", digest, code=1)
    assert result["why"] == "what is pending now is not what was approved, so nothing was applied; look at the plan again"
    assert result["migrations"] == []
    assert shop.plan()["applied"] == {"core": ["shop.0001_initial"]}
    shop.migration("0002_note", NULLABLE, "0001_initial")
    assert shop.run("apply", "core", "--expect", digest)[0]["heads"] == {"core": {"shop": ["0002_note"]}}


def test_failed_midway_says_what_is_done_and_goes_on(shop: World) -> None:
    shop.migration("0002_note", NULLABLE, "0001_initial")
    shop.migration(
        "0003_digits", 'RunSQL("ALTER TABLE shop_item ADD x int; ALTER TABLE shop_item ALTER name TYPE int USING name::int")', "0002_note"
    )
    shop.migration("0004_last", 'AddField("item", "last", models.TextField(null=True))', "0003_digits")
    result, _told = shop.run("apply", "core", code=1)
    assert result["outcome"] == "failed"
    assert result["stopped_at"] == "shop.0003_digits"
    assert result["why"].startswith('core shop.0003_digits: invalid input syntax for type integer: "item 1"; nothing of it stays. 1 of 3 ')
    assert [entry["name"] for entry in result["migrations"]] == ["0002_note"]
    assert result["heads"] == {"core": {"shop": ["0002_note"]}}
    assert shop.rows("SELECT count(*) FROM pg_attribute WHERE attrelid = 'shop_item'::regclass AND attname = 'x'") == [(0,)]
    shop.migration("0003_digits", "", "0002_note")
    assert [entry["name"] for entry in shop.run("apply", "core")[0]["migrations"]] == ["0003_digits", "0004_last"]


def test_statement_time_out(shop: World) -> None:
    shop.migration("0002_slow", 'RunSQL("SELECT pg_sleep(30)")', "0001_initial")
    result, _told = shop.run("apply", "core", "--statement-timeout-seconds", "0.3", code=1)
    assert "it took longer than the 0 s of the statement time-out" in result["why"]


def test_waits_for_a_lock_names_its_holder_and_tries_again(shop: World) -> None:
    shop.migration("0002_note", 'RemoveField("item", "name")', "0001_initial")
    with shop.session(autocommit=False) as holder:
        holder.execute("SELECT count(*) FROM shop_item")
        pid = holder.info.backend_pid
        started = time.monotonic()
        process = shop.start("apply", "core", *QUICK, "--tries", "8")
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(
            f"core shop.0002_note waits for a lock held by pid {pid} from this host (idle in transaction: SELECT count(*)"
        )
        assert "try 2 of 8 in 1 s" in line
        with shop.session() as other:  # users are held up for no longer than the lock time-out
            other.execute("SET statement_timeout = '2s'; INSERT INTO shop_item (name) VALUES ('meanwhile')")
        holder.rollback()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out)["migrations"][0]["name"] == "0002_note"
    assert time.monotonic() - started < 15


def test_gives_up_on_a_lock_after_its_tries(shop: World) -> None:
    shop.migration("0002_note", NULLABLE, "0001_initial")
    with shop.session(autocommit=False) as holder:
        holder.execute("LOCK shop_item IN ACCESS SHARE MODE")
        pid = holder.info.backend_pid
        result, _told = shop.run("apply", "core", *QUICK, "--tries", "2", code=1)
    assert f"core shop.0002_note: lock time-out in 2 tries, the lock is held by pid {pid} from this host" in result["why"]
    assert shop.plan()["pending"][0]["name"] == "0002_note"


def test_what_is_not_atomic_is_not_tried_again(shop: World) -> None:
    both = 'RunSQL("CREATE TABLE y ()"), RunSQL("ALTER TABLE shop_item ADD x int")'
    shop.migration("0002_note", both, "0001_initial", "migrations.Migration.atomic = False")
    with shop.session(autocommit=False) as holder:
        holder.execute("LOCK shop_item IN ACCESS SHARE MODE")
        result, _told = shop.run("apply", "core", *QUICK, code=1)
    assert "lock time-out in 1 try" in result["why"]
    assert "it is not atomic, so what it did before the error stays. 0 of 1" in result["why"]
    assert result["partial"] == [{"database": "core", "app": "shop", "name": "0002_note"}]


def test_a_squash_of_what_is_applied_is_recorded_when_that_was_approved(shop: World) -> None:
    """Else a later release without the old migrations would make its tables again."""
    shop.migration("0002_note", NULLABLE, "0001_initial")
    shop.run("apply", "core")
    both = "Replaces = [('shop', '0001_initial'), ('shop', '0002_note')]"
    shop.migration("0001_squashed", f"{ITEM}, {NULLABLE}", None, both)
    text = (shop.migrations() / "0001_squashed.py").read_text().replace("    dependencies", "    replaces = Replaces\n    dependencies", 1)
    (shop.migrations() / "0001_squashed.py").write_text(text)
    plan = shop.plan()
    (entry,) = plan["pending"]
    assert (entry["name"], entry["sql"], entry["tables"]) == ("0001_squashed", [], [])
    assert entry["operations"] == ["Record that it stands for shop.0001_initial, shop.0002_note, which are applied"]
    assert outcome(entry) == (True, True, "only a row in django_migrations is written")
    result = shop.run("apply", "core", "--expect", migration_digest(plan["pending"]))[0]
    assert [(each["name"], each["recorded"]) for each in result["migrations"]] == [("0001_squashed", True)]
    assert shop.plan()["pending"] == []
    for name in ("0001_initial", "0002_note"):
        (shop.migrations() / f"{name}.py").unlink()
    assert shop.plan()["pending"] == []


def test_one_runner_at_a_time(shop: World) -> None:
    shop.migration("0002_slow", 'RunSQL("SELECT pg_sleep(30)")', "0001_initial")
    first = shop.start("apply", "core")
    while not shop.rows(
        "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active' AND datname = current_database()"
    ):
        assert first.poll() is None
    result, _told = shop.run("apply", "core", code=1)
    (pid,) = shop.rows(
        f"SELECT pid FROM pg_locks JOIN pg_database d ON database = d.oid WHERE locktype = 'advisory' AND datname = '{shop.name}'"
    )[0]
    assert f"another run is migrating core: pid {pid} from this host, since 20" in result["why"]
    first.terminate()  # as systemd ends it
    out, _err = first.communicate(timeout=10)
    assert json.loads(out)["why"].startswith("it was interrupted; 0 of 1 migrations are done")
    assert not shop.rows(
        "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active' AND datname = current_database()"
    )


CONCURRENTLY = """
    from django.contrib.postgres.operations import AddIndexConcurrently
    migrations.Migration.atomic = False
"""
IDIOM = "CREATE INDEX CONCURRENTLY IF NOT EXISTS\n by_name ON shop_item (name)"
NAMED = "AddIndexConcurrently('item', models.Index(fields=['name'], name='by_name'))"


def break_index(shop: World) -> None:
    """Leave an index as a broken try does."""
    with shop.session() as session:
        session.execute("CREATE INDEX by_name ON shop_item (name)")
    with shop.session(user="super") as session:
        session.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'by_name'::regclass")


def test_concurrent_index_is_built_again_after_a_broken_try(shop: World) -> None:
    shop.migration("0002_index", NAMED, "0001_initial", CONCURRENTLY)
    break_index(shop)
    (entry,) = shop.plan()["pending"]
    assert entry["tables"][0]["lock"] == "SHARE UPDATE EXCLUSIVE"
    with shop.session(autocommit=False) as holder:  # whom it waits for longer than the lock time-out
        holder.execute("INSERT INTO shop_item (name) VALUES ('x')")
        process = shop.start("apply", "core", *QUICK)
        time.sleep(1.5)
        holder.commit()
    out, err = process.communicate(timeout=30)
    assert json.loads(out)["outcome"] == "succeeded", err
    assert "drops the invalid index by_name" in err
    assert "try 2" not in err
    assert shop.rows("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_name'::regclass") == [(True,)]


@pytest.mark.parametrize(
    "operation",
    [
        f"RunSQL({IDIOM!r}, state_operations=[AddIndex('item', models.Index(fields=['name'], name='by_name'))])",
        f"RunSQL(['SET statement_timeout = 0', ({IDIOM!r}, None)])",
        f"SeparateDatabaseAndState([{NAMED}], [])",
        f"SeparateDatabaseAndState([RunSQL({IDIOM.replace('shop_item', 'public.shop_item')!r})], [])",
    ],
)
def test_concurrent_index_written_in_another_way_is_built_again_too(shop: World, operation: str) -> None:
    shop.migration("0002_index", operation, "0001_initial", CONCURRENTLY)
    break_index(shop)
    with shop.session(autocommit=False) as holder:  # whom it waits for longer than the lock time-out
        holder.execute("INSERT INTO shop_item (name) VALUES ('x')")
        process = shop.start("apply", "core", *QUICK)
        time.sleep(1.5)
        holder.commit()
    out, err = process.communicate(timeout=30)
    assert json.loads(out)["outcome"] == "succeeded", err + out
    assert "drops the invalid index by_name" in err
    assert shop.rows("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_name'::regclass") == [(True,)]


def test_a_migration_that_leaves_an_invalid_index_does_not_succeed(shop: World) -> None:
    more = f"""{CONCURRENTLY}
    def spoil(apps, editor):
        import psycopg
        with psycopg.connect(host="{shop.server}", user="super", dbname="{shop.name}") as session:
            session.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'by_name'::regclass")
    """
    shop.migration("0002_index", f"RunSQL({IDIOM!r}), RunPython(spoil)", "0001_initial", more)
    result, _told = shop.run("apply", "core", code=1)
    assert "the index by_name is still invalid, so no query uses it: type DROP INDEX CONCURRENTLY by_name and deploy again" in result["why"]
    assert [entry["name"] for entry in shop.plan()["pending"]] == ["0002_index"], "or it would never be built"


def test_two_concurrent_indexes_of_which_one_is_there_say_what_to_drop(shop: World) -> None:
    more = NAMED.replace("by_name", "by_id").replace("['name']", "['id']")
    shop.migration("0002_index", f"{NAMED}, {more}", "0001_initial", CONCURRENTLY)
    with shop.session() as session:
        session.execute("CREATE INDEX by_name ON shop_item (name)")
    result, _told = shop.run("apply", "core", code=1)
    assert 'relation "by_name" already exists' in result["why"]
    assert (
        "it would build again what is there; when an earlier try built it, type first: DROP INDEX CONCURRENTLY by_name. 0" in result["why"]
    )
    with shop.session() as session:
        session.execute('DROP INDEX CONCURRENTLY "by_name"')
    assert shop.run("apply", "core")[0]["outcome"] == "succeeded"


@pytest.mark.parametrize(
    ("operation", "again"),
    [
        ("AddIndex('item', models.Index(fields=['name'], name='by_name'))", True),
        ("SeparateDatabaseAndState([AddIndex('item', models.Index(fields=['name'], name='by_name'))], [])", True),
        ("RunPython(alter, atomic=True)", True),
        ("RunPython(alter)", False),
        ("Alter(alter, atomic=True)", False),
        ("RunSQL('CREATE TABLE y (); ALTER TABLE shop_item ADD x int')", False),
        ("AddField('item', 'note', models.TextField(db_default='x'))", False),
    ],
)
def test_what_is_not_atomic_is_tried_again_only_when_nothing_of_it_can_stay(shop: World, operation: str, again: bool) -> None:
    more = """
        migrations.Migration.atomic = False
        class Alter(RunPython): pass
        def alter(apps, editor):
            editor.execute("ALTER TABLE shop_item ADD x int")
    """
    shop.migration("0002_alter", operation, "0001_initial", more)
    with shop.session(autocommit=False) as holder:
        holder.execute("INSERT INTO shop_item (name) VALUES ('x')")
        result, _told = shop.run("apply", "core", *QUICK, "--tries", "2", code=1)
    assert f"lock time-out in {'2 tries' if again else '1 try'}" in result["why"]
    assert ("nothing of it stays" if again else "it is not atomic, so what it did before the error stays") in result["why"]
    assert bool(result["partial"]) is not again


def test_a_migrations_own_time_out_ends_with_it(shop: World) -> None:
    shop.migration("0002_set", "RunSQL('SET statement_timeout = 0; SET lock_timeout = 0')", "0001_initial")
    shop.migration("0003_slow", "RunSQL('SELECT pg_sleep(5)')", "0002_set")
    result, _told = shop.run("apply", "core", "--statement-timeout-seconds", "0.5", code=1)
    assert result["stopped_at"] == "shop.0003_slow"


def test_older_release_sees_what_it_does_not_know(shop: World) -> None:
    shop.migration("0002_note", NULLABLE, "0001_initial")
    shop.run("apply", "core")
    (shop.migrations() / "0002_note.py").unlink()
    state = shop.run("state", "core")[0]
    assert state["unknown"] == {"core": ["shop.0002_note"]}
    assert (state["heads"], state["pending"]) == ({"core": {"shop": ["0001_initial"]}}, {"core": []})
    assert shop.plan()["unknown"] == {"core": ["shop.0002_note"]}


BACK = json.dumps({"core": {"shop": "0001_initial"}})


def test_going_back(shop: World) -> None:
    shop.migration("0002_note", f"{NULLABLE}, RunPython(RunPython.noop, RunPython.noop)", "0001_initial")
    shop.migration("0003_gone", 'RemoveField("item", "name")', "0002_note")
    shop.run("apply", "core")
    plan = shop.run("reversal", "core", "--to", BACK)[0]
    assert [(entry["name"], entry["backwards"], entry["reversible"]) for entry in plan["pending"]] == [
        ("0003_gone", True, True),
        ("0002_note", True, True),
    ]
    assert plan["pending"][0]["why"] == "shop.item.name comes back without its values"
    assert plan["pending"][1]["why"] == "the values of shop.item.note are lost"
    assert plan["pending"][1]["sql"] == ['ALTER TABLE "shop_item" DROP COLUMN "note" CASCADE;']
    assert plan["heads"] == {"core": {"shop": ["0001_initial"]}}
    assert len(shop.run("state", "core")[0]["applied"]["core"]) == 3
    with shop.session() as session:
        session.execute("DELETE FROM shop_item")  # or else the column could not come back
    result = shop.run("reverse", "core", "--to", BACK)[0]
    assert [entry["name"] for entry in result["migrations"]] == ["0003_gone", "0002_note"]
    assert result["heads"] == {"core": {"shop": ["0001_initial"]}}
    assert shop.plan()["applied"] == {"core": ["shop.0001_initial"]}


@pytest.mark.parametrize(
    ("operation", "told"),
    [
        ("RunPython(RunPython.noop, RunPython.noop), RunSQL('SELECT 1', '')", "no data is lost"),
        ("RunPython(RunPython.noop, forget)", "what the code of shop.migrations.0002_data.forget does to data cannot be judged"),
        ("RunSQL('SELECT 1', 'DELETE FROM shop_item')", "what hand-written SQL does to data cannot be judged"),
        ("Own()", "what the operation Own of shop.migrations.0002_data does to data cannot be judged"),
        (
            "AlterField('item', 'name', models.TextField())",
            "values of shop.item.name that do not fit varchar(20) are cut, rounded or refused",
        ),
        (
            "SeparateDatabaseAndState([AlterField('item', 'name', models.TextField(null=True))], [])",
            "values of shop.item.name that do not fit varchar(20) are cut, rounded or refused; "
            "rows without shop.item.name get its default or are refused",
        ),
        ("AlterField('item', 'name', models.CharField(max_length=10))", "no data is lost"),
    ],
)
def test_going_back_claims_nothing_of_code_that_it_cannot_judge(shop: World, operation: str, told: str) -> None:
    more = """
        def forget(apps, editor): pass
        class Own(migrations.operations.base.Operation):
            def state_forwards(self, app_label, state): pass
            def database_forwards(self, app_label, editor, before, after): pass
            def database_backwards(self, app_label, editor, before, after): editor.execute("DELETE FROM shop_item")
    """
    shop.migration("0002_data", operation, "0001_initial", more)
    shop.run("apply", "core")
    assert shop.run("reversal", "core", "--to", BACK)[0]["pending"][0]["why"] == told


def test_going_back_takes_along_what_depends_on_it_in_another_application(server: Path, template: str, tmp_path: Path) -> None:
    world = World(tmp_path, server, f"shop_{next(numbers)}", ("shop", "tally"), template=template)
    world.migration("0001_initial", ITEM)
    world.migration("0002_note", NULLABLE, "0001_initial")
    world.migration("0001_initial", 'CreateModel("Tally", [("id", models.BigAutoField(primary_key=True))])', app="tally", needs="0002_note")
    world.migration("0002_count", 'AddField("tally", "count", models.IntegerField(null=True))', "0001_initial", app="tally")
    world.run("apply", "core")
    # no more of the tally than this must be reversed for its own sake
    back = json.dumps({"core": {"shop": "0001_initial", "tally": "0001_initial"}})
    plan = world.run("reversal", "core", "--to", back)[0]
    assert [f"{entry['app']}.{entry['name']}" for entry in plan["pending"]] == ["tally.0002_count", "tally.0001_initial", "shop.0002_note"]
    assert world.run("reverse", "core", "--to", back)[0]["heads"] == {"core": {"shop": ["0001_initial"]}}


def test_what_cannot_be_reversed_is_named(shop: World) -> None:
    shop.migration("0002_data", "RunPython(lambda apps, editor: None)", "0001_initial")
    shop.run("apply", "core")
    (entry,) = shop.run("reversal", "core", "--to", BACK)[0]["pending"]
    assert outcome(entry) == (False, None, "cannot be reversed: Raw Python operation")
    result, _told = shop.run("reverse", "core", "--to", BACK, code=1)
    assert result["why"] == "shop.0002_data cannot be reversed, so nothing was changed"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "other"), "plan: the application's settings have no database other; known are: core, plugins"),
        (
            ("reversal", "core", "--to", '{"core": {"shop": "0000_x"}}'),
            "this release cannot go back to shop.0000_x, which it does not know",
        ),
        (("reversal", "core", "--to", '{"core": {"stop": "zero"}}'), "this release has no migrations of stop"),
    ],
)
def test_one_sentence_for_what_cannot_be(shop: World, arguments: tuple[str, ...], says: str) -> None:
    _nothing, told = shop.run(*arguments, code=1)
    assert says in told
    assert len(told.splitlines()) == 1


def test_conflicting_migrations_are_refused(shop: World) -> None:
    shop.migration("0002_a", "", "0001_initial")
    shop.migration("0002_b", "", "0001_initial")
    assert "two migrations claim to be the last one (shop: 0002_a, 0002_b)" in shop.run("plan", "core", code=1)[1]


def test_history_that_does_not_fit_is_refused(shop: World) -> None:
    shop.migration("0002_a", "", "0001_initial")
    with shop.session() as session:
        session.execute("UPDATE django_migrations SET name = '0002_a' WHERE app = 'shop'")
    assert "the history of core does not fit this release: Migration shop.0002_a is applied before" in shop.run("plan", "core", code=1)[1]


def test_system_identifier_from_outside(shop: World) -> None:
    assert shop.run("plan", "core", "--system", "core=123")[0]["databases"]["core"]["system"] == "123"


def test_a_default_that_is_computed_does_not_make_another_plan_each_time(shop: World) -> None:
    fields = (
        'AddField("item", "made", models.DateTimeField(auto_now_add=True)), AddField("item", "key", models.UUIDField(default=uuid.uuid4))'
    )
    shop.migration("0002_computed", f"{fields}", "0001_initial", "import uuid")
    first, second = shop.plan()["pending"], shop.plan()["pending"]
    assert first == second
    assert "'<now>'" in " ".join(first[0]["sql"]) and "'<uuid.uuid4>'" in " ".join(first[0]["sql"])
    shop.run("apply", "core", "--expect", migration_digest(first))
    assert shop.rows("SELECT count(DISTINCT key) FROM shop_item WHERE made > now() - interval '1 hour'") == [(1,)]


@pytest.mark.parametrize(
    ("operations", "told"),
    [
        ('AlterField("item", "name", models.CharField(max_length=50, db_column="title")), RemoveField("item", "name")', "was called name"),
        ('RenameField("item", "name", "title"), RemoveField("item", "title")', "shop_item.name is called title"),
        ('AlterField("item", "id", models.IntegerField(primary_key=True))', "is no longer numbered by itself"),
        ('AddField("item", "mark", models.CharField(max_length=5, db_default="x", unique=True))', "shop_item.mark is unique"),
        ('AddField("item", "extra", models.TextField(null=True)), RemoveField("item", "extra")', ""),
    ],
)
def test_what_the_release_before_uses_is_known_by_table_and_column(shop: World, operations: str, told: str) -> None:
    shop.migration("0002_more", operations, "0001_initial")
    (entry,) = shop.plan()["pending"]
    assert entry["compatible"] is (not told), entry
    assert told in entry["why"]


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("INSERT INTO shop_item (name) VALUES (NULL), ('pbkdf2_secret')", 'null value in column "name"'),
        ("UPDATE shop_item SET name = 'secret (a)\nb'; CREATE UNIQUE INDEX named ON shop_item (name)", "Key (name)=(…) is duplicated"),
    ],
)
def test_no_row_is_told_when_one_is_refused(shop: World, sql: str, told: str) -> None:
    shop.migration("0002_refused", f"RunSQL({sql!r})", "0001_initial")
    with shop.session() as session:
        session.execute("ALTER TABLE shop_item ADD password text DEFAULT 'pbkdf2_secret'")
    result, err = shop.run("apply", "core", code=1)
    assert told in result["why"]
    assert "Failing row" not in result["why"] and "secret" not in json.dumps(result) + err
    assert "nothing of it stays. 0 of 1" in result["why"]


def test_who_holds_a_lock_is_told_without_the_values_in_its_statement(shop: World) -> None:
    shop.migration("0002_note", NULLABLE, "0001_initial")
    with shop.session(autocommit=False) as holder:
        holder.execute("UPDATE shop_item -- it's\nSET name = 'token-abc' WHERE name IN (E'j\\'ane@', $$j'ane@$$, 'unended ja''ne@', 'x')")
        result, told = shop.run("apply", "core", *QUICK, "--tries", "2", code=1)
    assert "(idle in transaction: UPDATE shop_item SET name = '…' WHERE name IN ('…', '…', '…', '…'))" in result["why"]
    assert "token" not in told + result["why"] and "ane@" not in told + result["why"]


@pytest.mark.parametrize("freed", [True, False])
def test_signals_after_migrations_are_sent_again_or_told(server: Path, template: str, tmp_path: Path, freed: bool) -> None:
    """Else the content types and permissions of new models are missing for good: the next plan is empty."""
    world = World(tmp_path, server, f"shop_{next(numbers)}", ("django.contrib.contenttypes", "shop"), template=template)
    world.migration("0001_initial", ITEM)
    world.run("apply", "core")
    world.migration("0002_tag", 'CreateModel("Tag", [("id", models.BigAutoField(primary_key=True))])', "0001_initial")
    with world.session(autocommit=False) as holder:
        holder.execute("LOCK django_content_type IN ACCESS EXCLUSIVE MODE")
        pid = holder.info.backend_pid
        process = world.start("apply", "core", *QUICK, "--tries", "8" if freed else "2")
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        if not freed:
            process.wait(timeout=30)
    out, err = process.communicate(timeout=30)
    assert lines[1].startswith(f"core the signals after migrations waits for a lock held by pid {pid} from this host"), (lines, err)
    result = json.loads(out)
    assert [entry["name"] for entry in result["migrations"]] == ["0002_tag"]
    made = world.rows("SELECT model FROM django_content_type WHERE model = 'tag'")
    if freed:
        assert (result["outcome"], made) == ("succeeded", [("tag",)])
    else:
        assert (result["outcome"], result["stopped_at"], made) == ("failed", "core: the signals after migrations", [])
        start = "core: all migrations are done, but not what Django does after them (lock time-out in 2 tries, the lock is held by pid"
        assert result["why"].startswith(start)
        assert result["why"].endswith("): type python -m django migrate --database core in the environment of this release")


NO_LONGER_UNIQUE = [
    # what makes it unique, what takes that back, which columns
    (
        'AddConstraint("item", models.UniqueConstraint(fields=["name", "id"], name="both"))',
        'RemoveConstraint("item", "both")',
        "name, id",
    ),
    (
        'AlterField("item", "name", models.CharField(max_length=20, unique=True))',
        'AlterField("item", "name", models.CharField(max_length=20))',
        "name",
    ),
    (
        'AlterUniqueTogether("item", {("name", "id")})',
        'AlterUniqueTogether("item", set())',
        "name, id",
    ),
]


def test_what_is_no_longer_unique_may_be_written_by_that(server: Path, tmp_path: Path) -> None:
    apps = tuple(f"case{number}" for number in range(len(NO_LONGER_UNIQUE)))
    world = World(tmp_path, server, f"shop_{next(numbers)}", apps)
    for app, (unique, _back, _columns) in zip(apps, NO_LONGER_UNIQUE, strict=True):
        world.migration("0001_initial", f"{ITEM}, {unique}", app=app)
    world.run("apply", "core")
    for app, (_unique, back, _columns) in zip(apps, NO_LONGER_UNIQUE, strict=True):
        world.migration("0002_back", back, "0001_initial", app=app)
    entries = {entry["app"]: outcome(entry) for entry in world.plan()["pending"]}
    why = "the release before may write with ON CONFLICT on {} of {}_item, which are no longer unique"
    assert entries == {
        app: (True, None, why.format(columns, app)) for app, (_unique, _back, columns) in zip(apps, NO_LONGER_UNIQUE, strict=True)
    }


LOCKING = [
    'ALTER TABLE "shop_line" DROP COLUMN "item_id" CASCADE',
    "ALTER TABLE shop_line\n  DROP CONSTRAINT IF EXISTS to_item",
    "ALTER TABLE shop_line DROP item_id, ADD y int",
    "ALTER TABLE shop_line DROP CONSTRAINT few",
    "ALTER TABLE shop_item DROP COLUMN id CASCADE",
    "ALTER TABLE\n  shop_item ADD x int",
    "ALTER TABLE shop_item ALTER name DROP NOT NULL",
    "DROP TRIGGER IF EXISTS a ON shop_item",
    "CREATE TABLE y (id bigint, item bigint REFERENCES shop_item)",
    "CREATE TABLE y (id bigint, item bigint, FOREIGN KEY (item)\nREFERENCES  shop_item (id))",
    "DROP TABLE shop_line",
    "DROP TABLE shop_item CASCADE",
    "DROP  INDEX lines",
    "CREATE UNIQUE  INDEX x ON shop_item (name)",
]


def test_locks_are_those_that_postgresql_takes(shop: World) -> None:
    with shop.session() as session:
        session.execute(
            "CREATE TABLE shop_line (item_id bigint CONSTRAINT to_item REFERENCES shop_item, x int CONSTRAINT few CHECK (x < 9));"
            "CREATE INDEX lines ON shop_line (item_id);"
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
            "CREATE TRIGGER a BEFORE INSERT ON shop_item FOR EACH ROW EXECUTE FUNCTION f()"
        )
    before = "0001_initial"
    for number, sql in enumerate(LOCKING):
        shop.migration(f"1{number:03}_lock", f"RunSQL({sql!r})", before)
        before = f"1{number:03}_lock"
    order = ("ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "AccessExclusiveLock")  # from weak to strong, without reads
    with shop.session(autocommit=False) as session:
        for sql, entry in zip(LOCKING, shop.plan()["pending"], strict=True):
            names = dict(session.execute("SELECT oid, relname FROM pg_class WHERE relname IN ('shop_item', 'shop_line')").fetchall())
            session.execute(sql)
            held = session.execute("SELECT relation, mode FROM pg_locks WHERE pid = pg_backend_pid()").fetchall()
            session.rollback()
            taken = {names[table]: mode for strength in order for table, mode in held if table in names and mode == strength}
            told = {each["name"]: each["lock"].title().replace(" ", "") + "Lock" for each in entry["tables"]}
            assert told == taken, sql


def test_a_long_statement_is_planned_and_run(shop: World) -> None:
    shop.migration(
        "0002_rows", "RunSQL([(SQL, None)])", "0001_initial", "SQL = 'INSERT INTO shop_item (name) VALUES ' + '(1),' * 5000 + '(2)'"
    )
    assert shop.plan()["pending"][0]["tables"] == [{"name": "shop_item", "lock": "ROW EXCLUSIVE", "rows": 1000}]
    assert shop.run("apply", "core")[0]["outcome"] == "succeeded"
