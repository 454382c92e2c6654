"""The code blocks of the documentation, and what becomes of each. A page is run from top to bottom, as a reader would.

Every fenced block has a tag, and every tag and every command line has a rule here; one without a rule is an error.

`python`
    Executed, all blocks of a page in one process and among the same names. A block whose first line is a comment
    with a file name, `# tasks.py`, is written to that file and imported.
`console`, `sh`
    Run line by line; in `console` the lines that begin with `$ `, the others being what was printed. By first word:
    `relay`, `python`, `curl`, `redis-cli`, `ls`, `cat`
        Run; the exit code must be 0.
    `celery … worker`, `dramatiq …`, `relay worker`, `relay exporter`
        The first of a kind on a page, and the first after an `export`, runs until the end of the page; the line is
        left when it is ready. Of more of them, and of those whose module is called `my…`, which is the reader's, the
        options must be understood.
    `celery beat|events|multi|flower`, `relay top` and `relay schedule run` without `--once`
        Never end: their options must be understood. Other `celery …` lines are run.
    `prometheus`
        Not run: its configuration file lies beside the page, where tests/test_monitoring.py holds it.
    `cd`, `export`
        Are for the lines and blocks that follow.
    `make`, `pip`
        Not run: the target is in the Makefile, the extra in pyproject.toml.
    Any line with a host that is not this one is not run, but its options must be understood.
`json`, `toml`, `ini`
    Must parse.
`text`
    An illustration: a diagram, an output.
`acl`
    Held by tests/test_acl.py.

`localhost:6379` (and `redis-cli -p 6379`) on a page is the private server of the test, any other loopback port a free
one; see `Page.mapped`.
Each page has a folder of its own with a copy of `examples/` in it, so `relay://` is an embedded server of its own.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.servers import free_port

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE = 60.0
"""Seconds that a line may take, a worker to be ready, and a process to end."""

FOLDERS = ("relay_core", "relay_adapters", "tests", "examples", "benchmarks", "docs", "tools")
ILLUSTRATIONS = {"text"}
HELD_ELSEWHERE = {"acl": "tests/test_acl.py"}

READY = {"celery": r"\bready\.", "dramatiq": r"ready for action", "worker": r"\bserving ", "exporter": r"\bserving "}
"""What a process that goes on says when it is ready."""


class Wrong(Exception):
    """A block does not do what the page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is that of its opening fence, from 1."""

    tag: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every page that is held to the rules."""
    found = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    return sorted([*found, *ROOT.glob("benchmarks/README.md")])


def blocks(text: str) -> list[Block]:
    """The fenced blocks, also those inside of lists, without their indent. Raises Wrong for one that is not closed."""
    found: list[Block] = []
    inside: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if inside is None:
            if match := re.match(r"( *)(```+|~~~+) *(\S*)", line):
                inside, lines = (match[2], match[3], number), []
                indent = len(match[1])
        elif line.strip() == inside[0]:
            found.append(Block(inside[1], "".join(f"{one[indent:]}\n" for one in lines), inside[2]))
            inside = None
        else:
            lines.append(line)
    if inside is not None:
        raise Wrong(f"the block of line {inside[2]} is not closed")
    return found


def anchors(text: str) -> set[str]:
    """What a link to a heading of the page may name, as GitHub makes it of the heading."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Links of a page to files and headings of this repository that are not there."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def missing_files(text: str) -> list[str]:
    """Files of this repository that a page names in backticks and that are not there, and tests that no file has."""
    missing = []
    for name, test in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.-]*)(?:::(\w+))?[^`]*`", text):
        file = ROOT / name
        if not file.exists() or (test and f"def {test}(" not in file.read_text()):
            missing.append(f"{name}::{test}" if test else name)
    written = set(re.findall(r"^ *# ([\w/]+\.py)$", text, re.MULTILINE))
    for name in set(re.findall(r"`((?:\w+/)*\w+\.(?:py|lua))`", text)) - written:
        if not (ROOT / name).exists() and not any(found for top in FOLDERS for found in (ROOT / top).rglob(name)):
            missing.append(name)
    return missing


class Page:
    """A page on its way: its folder, the environment of its lines, and the processes that go on until it ends.

    :param name: as errors name it, e.g. `docs/cli.md`
    :param port: loopback port of a private server, which `localhost:6379` stands for
    """

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.folder = Path(tempfile.mkdtemp(prefix="relay-page-"))
        self.here = self.folder
        self._ports = {"6379": port}
        self._going: dict[str, tuple[subprocess.Popen[bytes], Path, str]] = {}
        self._session: subprocess.Popen[str] | None = None
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        self.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environ["PYTHONUNBUFFERED"] = "1"
        self._exported: dict[str, str] = {}

    def __enter__(self) -> Page:
        shutil.copytree(ROOT / "examples", self.folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop_all(check=error is None)
        finally:
            for process, _log, _line in self._going.values():
                _kill(process)
            if self._session is not None:
                assert self._session.stdin is not None
                self._session.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    self._session.wait(10)
                _kill(self._session)
            shutil.rmtree(self.folder, ignore_errors=True)

    # the rules

    def run(self, block: Block) -> None:
        """What the block's tag asks for. Raises Wrong, which names the line of the page."""
        rules: dict[str, Callable[[Block], None]] = {
            "python": self._python,
            "console": self._lines,
            "sh": self._lines,
            "json": lambda block: json.loads(block.text),
            "toml": lambda block: _toml(block.text),
            "ini": lambda block: configparser.ConfigParser().read_string(block.text),
        }
        if block.tag in ILLUSTRATIONS or block.tag in HELD_ELSEWHERE:
            return
        if block.tag not in rules:
            raise Wrong(f"{self.name}:{block.line}: a block tagged {block.tag!r} has no rule; see tests/pages.py")
        try:
            rules[block.tag](block)
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"{self.name}:{block.line}: the {block.tag} block is not well: {error}") from error

    def mapped(self, text: str) -> str:
        """The text with the reader's servers on this machine replaced by the test's: 6379 is the private server."""

        def port(match: re.Match[str]) -> str:
            if match[2] not in self._ports:
                self._ports[match[2]] = free_port()
            return f"{match[1]}{self._ports[match[2]]}"

        return re.sub(r"\b(localhost:|127\.0\.0\.1:|redis-cli -p )(\d+)", port, text)

    def _python(self, block: Block) -> None:
        text = self.mapped(block.text)
        if match := re.match(r"# ([\w/]+\.py)\n", text):
            self._ask(block.line, kind="file", name=match[1], text=text)
        else:
            self._ask(block.line, kind="block", text=text, page=self.name, line=block.line)

    def _lines(self, block: Block) -> None:
        for line, text in _commands(block):
            try:
                self._line(line, self.mapped(text))
            except Wrong:
                raise
            except Exception as error:
                raise Wrong(f"{self.name}:{line}: {text}: {error}") from error

    def _line(self, line: int, text: str) -> None:
        lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        if words[-1:] == ["&"]:  # what the shell would let go on, goes on by its rule
            words, text = words[:-1], text.rstrip(" &")
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if not words:
            return
        plain = not re.search(r"[|&;<>$`*]", re.sub(r"'[^']*'", "", text))  # nothing in it is the shell's
        first, rest = words[0], words[1:]
        if first == "cd":
            self.here = self.here / rest[0]
            if not self.here.is_dir():
                raise Wrong(f"{self.name}:{line}: there is no folder {rest[0]}")
        elif first == "export":
            self._exported.update(one.split("=", 1) for one in rest)
        elif first == "make":
            _make(rest)
        elif first == "prometheus":
            for name in re.findall(r"--config\.file=(\S+)", text):
                if not (ROOT / self.name).with_name(name).is_file():
                    raise Wrong(f"{self.name}:{line}: there is no {name} beside the page")
        elif first == "pip":
            _pip(rest)
        elif _elsewhere(text) or _is_never_over(first, rest):
            _understood(first, rest)
        elif kind := _goes_on(first, rest):
            module = next((word for word in rest if re.match(r"my\w*[:.]?", word)), None)
            key = " ".join([kind, *map("=".join, self._exported.items())])
            if key in self._going or module:
                _understood(first, rest)
            else:
                self._start(line, kind, key, text)
        elif first in ("relay", "celery") and plain:
            self._ask(line, kind="command", name=first, args=rest, environ=self._exported)
        elif first in ("relay", "python", "celery", "curl", "redis-cli", "ls", "cat"):
            self._shell(line, text)
        else:
            raise Wrong(f"{self.name}:{line}: there is no rule for {first!r}; see tests/pages.py")

    # processes

    def _environ(self) -> dict[str, str]:
        return {**self.environ, **self._exported}

    def _shell(self, line: int, text: str) -> None:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {text}"],
            cwd=self.here, env=self._environ(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=PATIENCE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Wrong(f"{self.name}:{line}: {text}: exit code {done.returncode}\n{done.stdout}")

    def _start(self, line: int, kind: str, key: str, text: str) -> None:
        log = self.folder / f"{kind}-{line}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"],
                cwd=self.here, env=self._environ(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self._going[key] = (process, log, f"{self.name}:{line}: {text}")
        deadline = time.monotonic() + PATIENCE
        while not re.search(READY[kind], log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                del self._going[key]
                _kill(process)
                raise Wrong(f"{self.name}:{line}: {text}: not ready\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)

    def _stop_all(self, *, check: bool) -> None:
        """SIGTERM must end them well. One that only just said it is ready may not have its handler yet."""
        for process, _log, _what in self._going.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process, log, what in self._going.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            if check and process.poll() not in (0, -signal.SIGTERM):
                raise Wrong(f"{what}: ended with {process.poll()}\n{log.read_text(errors='replace')[-3000:]}")

    def _ask(self, at: int, **request: Any) -> None:
        """One turn of the page's Python process."""
        if self._session is None:
            self._session = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "page_session.py")],
                cwd=self.folder, env=self._environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self._session.stdin is not None
        assert self._session.stdout is not None
        self._session.stdin.write(json.dumps({"folder": str(self.here), **request}) + "\n")
        self._session.stdin.flush()
        answer = json.loads(self._session.stdout.readline() or '{"error": "its process ended", "printed": ""}')
        if answer["error"]:
            shown = request.get("args") or request["text"]
            raise Wrong(f"{self.name}:{at}: {shown}\n{answer['printed']}\n{answer['error']}")


def _commands(block: Block) -> Iterator[tuple[int, str]]:
    """The command lines of a block, each with its line on the page; a backslash at the end joins two."""
    joined, began = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if not joined:
            if block.tag == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            began = number
        joined += line.removeprefix("> ") if joined else line
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        if joined.strip() and not joined.startswith("#"):
            yield began, joined
        joined = ""


def _goes_on(first: str, rest: list[str]) -> str | None:
    """The kind of a process that ends only when it is told to, or None."""
    if first == "dramatiq":
        return "dramatiq"
    if first == "celery":
        return "celery" if "worker" in rest else None
    if first == "relay" and rest[:2] != ["worker", "ls"]:
        return next((word for word in rest[:1] if word in ("worker", "exporter")), None)
    return None


def _is_never_over(first: str, rest: list[str]) -> bool:
    """True for what goes on as well, and of which only the options are looked at."""
    if first == "celery":
        return bool({"beat", "events", "multi", "flower"} & set(rest))
    return first == "relay" and (
        (rest[:1] == ["top"] and "--once" not in rest) or (rest[:2] == ["schedule", "run"] and "--once" not in rest)
    )


def _elsewhere(text: str) -> bool:
    """True for a line with the address of another machine."""
    hosts = re.findall(r"\w://(?:[^@\s/'\"]*@)?([\w.-]+)", text)
    return any(host not in ("localhost", "127.0.0.1") for host in hosts)


def _understood(first: str, rest: list[str]) -> None:
    """The command exists and its options parse; it is not run."""
    import click

    if first == "dramatiq":
        from dramatiq.cli import make_argument_parser

        make_argument_parser().parse_args(rest)  # type: ignore[no-untyped-call]
        return
    if first not in ("relay", "celery"):
        raise Wrong(f"there is no rule for {first!r} with another machine; see tests/pages.py")
    if first == "relay":
        from relay_core.cli.app import relay as command
    else:
        from celery.bin.celery import celery as command

        rest = [word for word in rest if word != "-A"]
    _parse(command, rest, click.Context(command))


def _parse(command: Any, words: list[str], parent: Any) -> None:
    """Walk down the groups, and let the last command read its options."""
    import click

    if not isinstance(command, click.Group):
        with command.make_context(command.name, list(words), parent=parent):
            return
    rest = list(words)
    while rest:
        child = command.get_command(parent, rest[0])
        if child is not None:
            _parse(child, rest[1:], parent)
            return
        rest.pop(0)  # an option of the group, or its value
    default = command.get_command(parent, "run")  # which may be left out where there is one
    if default is None:
        raise Wrong(f"no command in {' '.join(words)!r}")
    _parse(default, words, parent)


def _make(rest: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in rest:
        if "=" not in word and word not in targets:
            raise Wrong(f"the Makefile has no target {word!r}")


def _pip(rest: list[str]) -> None:
    project = _toml((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    if rest[:1] != ["install"]:
        raise Wrong(f"pip {' '.join(rest)}: only pip install has a rule")
    for word in rest[1:]:
        match = re.fullmatch(r"relay-queue(?:\[([\w,-]+)\])?(?:[=<>~].*)?", word)
        for extra in (match[1] or "").split(",") if match and match[1] else ():
            if extra not in extras:
                raise Wrong(f"relay-queue has no extra {extra!r}")


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10, where pytest brings it
        import tomli as tomllib
    return tomllib.loads(text)


def _kill(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait(10)
