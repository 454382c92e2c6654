"""Runs the Python blocks and the plain `relay` and `celery` lines of one page in one process, for tests/pages.py.

Reads one JSON document per line, answers each by one: {"error": "" or what went wrong, "printed": "..."}.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

namespace: dict[str, Any] = {"__name__": "page"}


def run_block(text: str, page: str, line: int) -> None:
    """Execute a block among the names of the blocks before it. Tracebacks name the line of the page."""
    exec(compile("\n" * line + text, page, "exec"), namespace)


def import_file(name: str) -> None:
    """Import a file that a block has just written, anew if an older one had the same name."""
    module = name.removesuffix(".py").replace("/", ".")
    sys.modules.pop(module, None)
    importlib.invalidate_caches()
    importlib.import_module(module)


def run_command(name: str, args: list[str], environ: dict[str, str]) -> None:
    """A `relay` or `celery` line, without a process of its own; the exit code must be 0."""
    if name == "relay":
        from relay_core.cli.app import relay as command
    else:
        from celery.bin.celery import celery as command

    before = dict(os.environ)
    os.environ.update(environ)
    try:
        command.main(args, prog_name=name)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    sys.path.insert(0, os.getcwd())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a block prints past sys.stdout is no answer
    for request in sys.stdin:
        asked = json.loads(request)
        os.chdir(asked["folder"])
        if asked["folder"] not in sys.path:
            sys.path.insert(0, asked["folder"])
        error, printed = "", io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                if asked["kind"] == "command":
                    run_command(asked["name"], asked["args"], asked["environ"])
                elif asked["kind"] == "file":
                    Path(asked["name"]).parent.mkdir(parents=True, exist_ok=True)
                    Path(asked["name"]).write_text(asked["text"])
                    import_file(asked["name"])
                else:
                    run_block(asked["text"], asked["page"], asked["line"])
            except BaseException:
                error = traceback.format_exc()
        answers.write(json.dumps({"error": error, "printed": printed.getvalue()}) + "\n")
        answers.flush()
    os._exit(0)  # what a page leaves open, its reader may leave open too


if __name__ == "__main__":
    main()
