"""The work of the demo: index a file. Plain Python that knows of no queue; all three workers share it.

What was done is written to `$DEMO_LEDGER`, one JSON line each, so that the demo can check it afterwards.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

LEDGER = Path(os.environ.get("DEMO_LEDGER", "demo-ledger"))
WORD = re.compile(r"[A-Za-z_]{3,}")
DELAY = float(os.environ.get("DEMO_DELAY", "2"))
"""Seconds that a postponed task waits."""


def note(face: str, task: str, key: str, sent: float, **more: object) -> None:
    """Append one line in one write, so that a killed process leaves whole lines only."""
    line = {"face": face, "task": task, "key": key, "sent": sent, "done": time.time(), **more}
    with open(LEDGER / f"{face}-{os.getpid()}.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def index_file(face: str, path: str, sent: float) -> None:
    """Size, digest and the commonest words of a file."""
    data = Path(path).read_bytes()
    words = Counter(WORD.findall(data.decode("utf-8", "replace")))
    note(face, "index", path, sent, size=len(data), digest=digest(data), words=words.most_common(5))


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def flaky(face: str, key: str, sent: float) -> None:
    """Fails twice, then works."""
    with open(LEDGER / f"tries-{face}-{key}", "ab", buffering=0) as tries:
        tries.write(b".")
        tried = tries.tell()
    if tried < 3:
        raise RuntimeError(f"try {tried} of {key} fails, as the demo wants it")
    note(face, "flaky", key, sent, tries=tried)


def postponed(face: str, key: str, sent: float) -> None:
    """Must not run before its delay is over."""
    note(face, "postponed", key, sent)


def slow(face: str, key: str, sent: float) -> None:
    """Runs until its worker was killed once; the next worker finishes it."""
    note(face, "begun", key, sent)
    deadline = time.monotonic() + 60
    while not (LEDGER / "killed").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    note(face, "slow", key, sent)


def poison(face: str, key: str) -> None:
    """Takes its worker process with it."""
    note(face, "poison", key, time.time())
    os._exit(1)


def todo(argv: list[str]) -> tuple[list[str], int]:
    """The paths to index and the number of flaky and postponed tasks, as the demo passes them."""
    return Path(argv[1]).read_text().splitlines(), int(argv[2])
