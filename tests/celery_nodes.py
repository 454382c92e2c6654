"""Many of Celery's remote control nodes in one process: `python -m tests.celery_nodes URL FIRST COUNT`.

Each is a real `kombu.pidbox.Node` with the settings and the mailbox of a Celery app, on a channel of its own; a
worker's pool and task consumer are left out. Says `ready`, then one line per command that a node was given.
"""

from __future__ import annotations

import sys

from celery import Celery


def main(url: str, first: int, count: int) -> None:
    app = Celery("shop", broker=url)
    with app.connection_for_read() as connection:
        for number in range(first, first + count):
            name = f"node-{number}@here"

            def say(state: object, text: str = "", name: str = name) -> dict[str, str]:
                print(name, text, flush=True)
                return {"ok": "pong"}

            node = app.control.mailbox(connection).Node(name, handlers={"ping": say}, channel=connection.channel())
            node.listen()
        print("ready", flush=True)
        while True:
            try:
                connection.drain_events(timeout=5.0)
            except TimeoutError:
                continue


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
