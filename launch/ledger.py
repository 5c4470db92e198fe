"""The runs of this user, over all folders: a cache in SQLite, so that a list is quick. The run folders are the truth.

It lies in the user's state folder (`$ORTHOGON_STATE`, else `$XDG_STATE_HOME/orthogon`, else `~/.local/state/orthogon`), never in
a run folder: SQLite and network file systems do not go together. Where the state folder itself is on one, several login
nodes may share it; hence a rollback journal, which needs file locks only, and not the write-ahead log, which needs shared
memory. What is lost here is read again from the run folders; `folders.txt`, beside the database, remembers where they lie.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from launch import standing
from launch.standing import Standing
from trainer.outcome import Outcome, RunError

VERSION = 1
FILE, FOLDERS, LOCK = "ledger.sqlite", "folders.txt", "ledger.lock"
BUSY_SECONDS = 20.0
"""What a writer waits for another one."""
SCHEMA = """
create table if not exists runs (
    folder text primary key, name text not null, created real, backend text not null, state text not null, note text not null,
    step integer not null, steps integer, loss real, tokens_per_second real, attempts integer not null, updated real not null,
    stamp text not null, resumed_from text, branched_from text, member_of text, distilled_from text
);
create index if not exists runs_by_name on runs (name);
create table if not exists attempts (
    folder text not null, number integer not null, outcome text, message text, ended real, seconds real, step integer,
    checkpoint integer, primary key (folder, number)
);
"""
COLUMNS = (
    "folder", "name", "created", "backend", "state", "note", "step", "steps", "loss", "tokens_per_second", "attempts",
    "updated", "stamp", *standing.LINEAGE,
)  # fmt: skip


def home() -> Path:
    """The user's state folder."""
    if os.environ.get("ORTHOGON_STATE"):
        return Path(os.environ["ORTHOGON_STATE"])
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "orthogon"


@contextmanager
def opened() -> Iterator[sqlite3.Connection]:
    """The ledger, in one transaction that is kept if the `with` ends well. One that is broken, or of a newer version, is
    moved aside and made again.

    Raises:
        RunError: the state folder cannot be written.
    """
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(_sound(folder)) as connection:
            connection.execute("begin immediate")
            yield connection
            connection.execute("commit")
    except (OSError, sqlite3.Error) as error:
        raise RunError(
            f"the ledger cannot be written: {error}",
            where=str(folder / FILE),
            mend="make room there, or choose another folder by ORTHOGON_STATE; the runs themselves are not touched",
            outcome=Outcome.of_errno(error.errno) if isinstance(error, OSError) else _outcome(error),
        ) from None


def remember(folder: Path, *, found: Standing | None = None) -> None:
    """Write down what is known of a run now. A ledger that cannot be written never stops a run: it is told on stderr."""
    try:
        with opened() as connection:
            put(connection, [found or standing.read(folder)])
    except RunError as error:
        print(f"note: {error.what}; `orthogon list --rebuild` makes up for it", file=sys.stderr)


def put(connection: sqlite3.Connection, found: Iterable[Standing]) -> None:
    """Write runs and their attempts, in place of what was known."""
    found = list(found)
    marks = ", ".join(f":{name}" for name in COLUMNS)
    rows = [{**vars(one), **one.lineage, "updated": time.time()} for one in found]
    connection.executemany(f"insert or replace into runs ({', '.join(COLUMNS)}) values ({marks})", rows)
    for one in found:
        connection.executemany(
            "insert or replace into attempts values (:folder, :number, :outcome, :message, :ended, :seconds, :step, :checkpoint)",
            [{"folder": one.folder, **record} for record in one.records],
        )
    _note_folders({str(Path(one.folder).parent) for one in found})


def rows(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """All runs, the newest first."""
    connection.row_factory = sqlite3.Row
    return [dict(row) for row in connection.execute("select * from runs order by created desc, folder")]


def named(name: str) -> list[Path]:
    """The folders of the runs of this name, as far as they are known and still there."""
    with opened() as connection:
        found = connection.execute("select folder from runs where name = ? order by created desc", (name,)).fetchall()
    return [Path(row[0]) for row in found if (Path(row[0]) / "config.yaml").exists()]


def refreshed() -> list[dict[str, Any]]:
    """All runs with their states of now; what has changed is written down.

    What had ended, and whose folder looks as it did then, is not read again.
    """
    with opened() as connection:
        known = rows(connection)
    stale = [row for row in known if row["state"] not in standing.LASTING or standing.stamp(row) != row["stamp"]]
    gone = {row["folder"] for row in stale if not os.path.exists(os.path.join(row["folder"], "config.yaml"))}
    fresh = {
        one.folder: one for one in standing.read_all([Path(r["folder"]) for r in stale if r["folder"] not in gone])
    }
    if fresh:
        try:
            with opened() as connection:
                put(connection, fresh.values())
        except RunError as error:  # a list is worth something on a full disk, too
            print(f"note: {error.what}", file=sys.stderr)
    return [
        row | ({"state": "gone", "note": "its folder is not there"} if row["folder"] in gone else {})
        if row["folder"] not in fresh
        else row | _columns(row, fresh[row["folder"]])
        for row in known
    ]


def rebuild(runs: Path) -> int:
    """Read all runs again, those in `runs` and in the folders that are known; returns how many there are."""
    with opened() as connection:
        parents = {runs.resolve(), *_folders(), *(Path(row["folder"]).parent for row in rows(connection))}
    found = sorted({path.parent for parent in parents for path in parent.glob("[!.]*/config.yaml")})
    standings = standing.read_all(found)
    with opened() as connection:
        connection.execute("delete from runs")
        connection.execute("delete from attempts")
        put(connection, standings)
    return len(found)


def _columns(row: Mapping[str, Any], one: Standing) -> dict[str, Any]:
    values = {**vars(one), **one.lineage}
    return {key: values[key] for key in row if key in values}


def _sound(folder: Path) -> sqlite3.Connection:
    """A connection to a ledger that can be read; checked under a lock, so that only one process moves a bad one aside."""
    with suppress(sqlite3.DatabaseError, _Unusable):
        return _connect(folder / FILE)
    with open(folder / LOCK, "a", encoding="utf-8") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _connect(folder / FILE)
        except (sqlite3.DatabaseError, _Unusable) as error:
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise  # busy, full, not readable: nothing is wrong with what is in it
            aside = _move_aside(folder)
            print(f"note: the ledger was unusable ({error}); it is kept as {aside} and made again", file=sys.stderr)
        connection = _connect(folder / FILE)
        connection.execute("begin immediate")
        put(connection, standing.read_all(sorted({p.parent for f in _folders() for p in f.glob("[!.]*/config.yaml")})))
        connection.execute("commit")
        return connection


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        version = connection.execute("pragma user_version").fetchone()[0]
        if version > VERSION:
            raise _Unusable(f"it is of version {version}, this program's is {VERSION}")
        if version < VERSION:
            connection.execute("begin immediate")
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"pragma user_version = {VERSION}")
            connection.execute("commit")
        connection.execute(f"select {', '.join(COLUMNS)} from runs limit 0").fetchone()
        sound = connection.execute("pragma quick_check(1)").fetchone()[0]
        if sound != "ok":
            raise _Unusable(sound)
    except BaseException:
        connection.close()
        raise
    return connection


class _Unusable(Exception):
    """The ledger is damaged, or was written by a newer version of this program."""


def _move_aside(folder: Path) -> str:
    aside = f"{FILE}.{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for ending in ("", "-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            (folder / f"{FILE}{ending}").rename(folder / f"{aside}{ending}")
    return aside


def _folders() -> list[Path]:
    """The folders of run folders that were ever written down."""
    with suppress(OSError):
        return [Path(line) for line in (home() / FOLDERS).read_text(encoding="utf-8").splitlines() if line]
    return []


def _note_folders(parents: set[str]) -> None:
    new = parents - {str(path) for path in _folders()}
    if new:
        with open(home() / FOLDERS, "a", encoding="utf-8") as file:
            file.write("".join(f"{path}\n" for path in sorted(new)))


def _outcome(error: sqlite3.Error) -> Outcome:
    full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
    return Outcome.NO_SPACE if full else Outcome.INFRASTRUCTURE
