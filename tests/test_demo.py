"""The demo: real workers of three frameworks on a small folder, and what it says when a job is really lost."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from relay_core.cli.demo import Demo, examples, real_files
from relay_core.cli.demo_report import Ledger, Ledgers, Plan, _tasks, percentiles
from relay_core.errors import InvalidArgument
from tests.command_line import Cli, finished, spawn
from tests.servers import eventually

QUICK = ("--lease", "1")
FACES = ("celery", "dramatiq", "relay")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty files: texts, one that is no text, an empty one, one in a folder, one with a name that needs care."""
    folder = tmp_path / "files"
    (folder / "in a folder").mkdir(parents=True)
    for n in range(26):
        (folder / f"{n:02}.txt").write_text(f"file number {n} " * (n * 50))
    (folder / "binary").write_bytes(bytes(range(256)) * 100)
    (folder / "empty").touch()
    (folder / "in a folder" / "one").write_text("one")
    (folder / "naïve 'quoted' ключ [red]").write_text("words")
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo makes its own folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch


class Terminal:
    """A terminal that remembers what was written to it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self._written += data
        except OSError:  # the last writer is gone
            pass

    def text(self) -> str:
        """All that was written; call it when the writer has ended."""
        os.close(self.slave)
        self._reader.join(30)
        os.close(self._master)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._written.decode(errors="replace"))


def left_behind(scratch: Path) -> list[str]:
    """Processes that still work in the demo's folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):  # a bare machine has no ps
        with suppress(OSError):  # it has ended meanwhile
            found.append(file.read_text(errors="replace").replace("\0", " "))
    return [line for line in found if str(scratch) in line]


def test_the_demo_on_another_folder_ends_well_and_tells_all_that_went_wrong_on_purpose(
    folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    process = spawn("demo", str(folder), *QUICK, "--json", url=None, cwd=scratch, stderr=terminal.slave)
    code, out, _none = finished(process, 110)
    shown = terminal.text()
    assert code == 0, shown
    told: dict[str, Any] = json.loads(out)
    assert (told["lost"], told["problems"], told["files"]) == (False, [], 30)
    assert tuple(told["frameworks"]) == FACES
    for name, row in told["frameworks"].items():
        # files, five that fail twice, five delayed, one that kills its worker, and Celery's that is killed with it
        assert row["enqueued"] == 30 + 5 + 5 + 1 + (name == "celery")
        assert (row["processed"], row["dead"]) == (row["enqueued"] - 1, 1)
        assert row["retried"] >= 1
        assert row["reaped"] >= 3 - (name == "celery") * 2
        assert 0 < row["p50"] <= row["p99"]
    # the table says the same
    for name in FACES:
        row = told["frameworks"][name]
        cells = [name, *(str(row[key]) for key in ("enqueued", "processed", "retried", "dead", "reaped"))]
        assert re.search(r"│ +".join(re.escape(cell) + " +" for cell in cells), shown), (cells, shown)
        assert (
            f"{name}: a task that kills its worker is in dead: max_deliveries, delivered 3 times without an answer"
            in shown
        )
    for name in ("celery", "relay"):
        assert f"{name}: 5 duplicates were dropped" in shown
    assert "SIGKILL to the Celery worker" in shown
    starts = re.search(r"workers started: celery (\d+), dramatiq (\d+), relay (\d+)", shown)
    assert starts is not None
    assert int(starts[1]) >= 2
    assert min(int(starts[2]), int(starts[3])) >= 4  # one, and one more for each time that it was killed
    assert "Nothing was lost: all 30 files indexed by all 3" in shown
    # the bar moved, and came to its end
    counts = {int(count) for count in re.findall(r"(\d+)/120\b", shown)}
    assert 120 in counts
    assert len(counts) > 2
    assert list(scratch.glob("relay-demo-*")) == []
    eventually(lambda: not left_behind(scratch), "an end of all processes")


def test_the_demo_fails_and_names_the_file_when_a_job_is_really_lost(
    folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce = Demo.produce
    victim = folder / "13.txt"

    def sabotage(self: Demo) -> list[subprocess.Popen[bytes]]:
        """Take one file's record out of the store before a worker can see it, as no client can."""
        self.broker.pause("index")
        producers = produce(self)
        producers[-1].wait(60)
        (lost,) = [
            job for job in self.broker.jobs("index", "ready", 1000) if json.loads(job.payload)["key"] == str(victim)
        ]
        self.broker.store.raw("HDEL", self.broker.settings.keys("index").jobs, lost.id)
        self.broker.resume("index")
        return producers

    monkeypatch.setattr(Demo, "produce", sabotage)
    monkeypatch.setenv("COLUMNS", "300")
    told = Cli("relay://127.0.0.1:1").run("demo", str(folder), *QUICK, code=1)
    problems = [line for line in told.stdout.splitlines() if line.startswith("LOST OR WRONG")]
    assert problems[0] == f"LOST OR WRONG relay: {victim} was not indexed"
    assert "LOST OR WRONG relay: 41 jobs were sent to 'index' and 40 came to an end" in problems
    assert all(" relay: " in problem for problem in problems)
    assert "Nothing was lost" not in told.stdout
    assert f"relay: {victim} was not indexed" in told.stderr
    (home,) = scratch.glob("relay-demo-*")  # kept, and named, for whoever wants to know why
    assert f"The workers' logs and the data are in {home}" in told.stdout
    assert (home / "relay.log").stat().st_size > 0


def test_the_demo_without_a_framework_names_it_and_leaves_nothing(
    folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_core.cli.demo.find_spec", lambda name: None)
    told = Cli("relay://127.0.0.1:1").run("demo", str(folder), code=2)
    assert "the demo needs celery and dramatiq: pip install 'relay-queue[all]'" in told.stderr
    assert list(scratch.iterdir()) == []


def test_an_interrupted_demo_leaves_nothing(folder: Path, scratch: Path) -> None:
    process = spawn("demo", str(folder), *QUICK, url=None, cwd=scratch)
    eventually(lambda: list(scratch.glob("relay-demo-*/relay.log")), "that its workers are started")
    process.send_signal(signal.SIGINT)
    code, _out, err = finished(process, 60)
    assert code == 1
    assert "Aborted!" in err
    assert "Traceback" not in err
    assert list(scratch.glob("relay-demo-*")) == []
    eventually(lambda: not left_behind(scratch), "an end of all processes")


# --- what counts as lost


PLAN = Plan({"a": "1", "b": "2"}, others=1, delay=2.0, deliveries=3, duplicates=1)


def full() -> Ledger:
    return Ledger({"a": "1", "b": "2"}, [0.1, 0.2], flaky={"f0": 3}, postponed={"p0": 2.1})


def test_a_full_ledger_is_fine() -> None:
    assert _tasks(full(), PLAN) == []


@pytest.mark.parametrize(
    ("part", "content", "said"),
    [
        ("indexed", {"a": "1"}, "b was not indexed"),
        ("indexed", {"a": "1", "b": "9"}, "b has another digest"),
        ("flaky", {}, "1 tasks that fail twice never worked"),
        ("flaky", {"f0": 2}, "f0 worked at try 2, not 3"),
        ("postponed", {}, "1 delayed tasks never ran"),
        ("postponed", {"p0": 1.9}, "p0 ran 1.90 s after it was sent, not 2"),
    ],
)
def test_each_gap_in_a_ledger_is_told(part: str, content: dict[str, Any], said: str) -> None:
    ledger = full()
    setattr(ledger, part, content)
    assert _tasks(ledger, PLAN) == [said]


def test_a_ledger_is_read_on_from_where_the_last_look_ended(tmp_path: Path) -> None:
    ledgers = Ledgers(tmp_path, ["relay"])
    assert ledgers.look() == 0
    line = json.dumps({"face": "relay", "task": "index", "key": "a", "sent": 1.0, "done": 2.5, "digest": "1"}) + "\n"
    half = len(line) // 2
    (tmp_path / "relay-1.jsonl").write_text(line + line.replace('"a"', '"b"')[:half])
    assert ledgers.look() == 1  # a line that is being written is left for the next look
    with (tmp_path / "relay-1.jsonl").open("a") as file:
        file.write(line.replace('"a"', '"b"')[half:])
    assert (ledgers.look(), ledgers.look()) == (2, 2)
    assert ledgers["relay"].latencies == [1.5, 1.5]


def test_percentiles_need_two_values_and_stay_among_them() -> None:
    assert percentiles([1.0]) == (None, None)
    assert percentiles([1.0, 3.0]) == (2.0, pytest.approx(2.98))


# --- the files, and the tasks


def test_the_standard_library_is_several_hundred_files() -> None:
    assert 300 < len(real_files(None)) <= 800


def test_what_cannot_be_read_or_named_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "good").touch()
    (tmp_path / "two\nlines").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/not \xff text")).touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(33 * 2**20)
    assert real_files(tmp_path) == [tmp_path / "good"]


def test_a_folder_without_files_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"no files to index in {tmp_path}")):
        real_files(tmp_path)
    told = Cli("relay://127.0.0.1:1").run("demo", str(tmp_path), code=2)
    assert "no files to index" in told.stderr
    Cli("relay://127.0.0.1:1").run("demo", str(tmp_path / "missing"), code=2)


@pytest.mark.parametrize(("module", "lines"), [("indexing", 0), ("celery_app", 0), ("dramatiq_app", 1)])
def test_framework_code_imports_relay_in_the_line_that_names_the_broker_and_nowhere_else(
    module: str, lines: int
) -> None:
    tree = ast.parse((examples() / f"{module}.py").read_text())
    found = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "relay_" in ast.unparse(node)
    ]
    assert found == ["from relay_adapters.dramatiq import RelayBroker"][:lines]
