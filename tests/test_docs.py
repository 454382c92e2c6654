"""Every code block of the documentation runs. tests/pages.py says what that means for each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay_core import hooks
from tests.conftest import Pool
from tests.pages import ROOT, Block, Page, Wrong, blocks, broken_links, missing_files, pages
from tests.servers import Server


@pytest.fixture
def port(pool: Pool) -> int:
    """Of an empty private server."""
    return pool.get(Server, "valkey", tcp=True).port


@pytest.fixture
def page(port: int) -> Iterator[Page]:
    with Page("page.md", port) as page:
        yield page


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_of_the_page_does_what_the_page_says(path: Path, port: int) -> None:
    with Page(str(path.relative_to(ROOT)), port) as page:
        for block in blocks(path.read_text()):
            page.run(block)


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_test_that_the_page_names_is_there(path: Path) -> None:
    assert missing_files(path.read_text()) == []


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_the_page_leads_to_a_file_and_heading(path: Path) -> None:
    assert broken_links(path) == []


def test_every_metric_that_a_page_names_is_on_the_page_of_metrics() -> None:
    known = set(re.findall(r"\brelay_\w+", (ROOT / "docs" / "metrics.md").read_text())) | set(vars(hooks))
    kinds = "queue|jobs?|leases|audit|workers|store|build"
    for path in pages():
        named = set(re.findall(rf"`(relay_(?:{kinds})_?\w*)[`{{]", path.read_text()))
        assert named - known == set(), path


# the rules themselves


def test_blocks_are_found_with_their_tags_and_lines() -> None:
    text = "a\n```python\nx = 1\n```\n\n- in a list:\n\n  ```sh\n  ls\n  ```\n```\nplain\n```\n"
    assert blocks(text) == [Block("python", "x = 1\n", 2), Block("sh", "ls\n", 8), Block("", "plain\n", 11)]
    with pytest.raises(Wrong, match="line 1 is not closed"):
        blocks("```python\nx = 1\n")


@pytest.mark.parametrize(
    ("tag", "text", "why"),
    [
        ("", "a -> b\n", "tagged '' has no rule"),
        ("rust", "fn main() {}\n", "tagged 'rust' has no rule"),
        ("python", "x = 1\nassert x == 2\n", r"page.md\", line 12, in <module>"),
        ("python", "# tasks.py\nimport nowhere\n", "No module named 'nowhere'"),
        ("json", '{"a": }\n', "json block is not well"),
        ("toml", "a = \n", "toml block is not well"),
        ("console", "$ make nonsense\n", "no target 'nonsense'"),
        ("sh", "pip install 'relay-queue[nonsense]'\n", "no extra 'nonsense'"),
        ("sh", "pip uninstall relay-queue\n", "only pip install"),
        ("console", "$ rm -r x\n", "no rule for 'rm'"),
        ("console", "$ relay nonsense\n", "exit code 2"),
        ("console", "$ relay stats --nonsense\n", "exit code 2"),
        ("console", "$ relay stats | relay nonsense\n", "exit code 2"),
        ("console", "$ relay worker mymodule:handle --queue q --nonsense\n", "[Nn]o such option"),
        ("console", "$ relay migrate dramatiq-redis --from redis://old:6379 --nonsense\n", "[Nn]o such option"),
        ("console", "$ relay worker tasks:handle --queue q --url relay://localhost:6379/0\n", "no module 'tasks'"),
        ("sh", "cd examples/nonsense\n", "no folder"),
        ("sh", "prometheus --config.file=nonsense.yml\n", "no nonsense.yml"),
    ],
)
def test_a_block_that_does_not_do_what_it_says_is_told_of(page: Page, tag: str, text: str, why: str) -> None:
    with pytest.raises(Wrong, match=why):
        page.run(Block(tag, text, 10))


def test_blocks_build_on_each_other_and_a_worker_works_until_the_page_ends(page: Page, port: int) -> None:
    for tag, text in (
        (
            "python",
            "# tasks.py\nimport pathlib\n\ndef note(job):\n    pathlib.Path('noted').write_bytes(job.payload)\n",
        ),
        ("sh", "export RELAY_URL=relay://localhost:6379/0\nrelay worker tasks:note --queue q  # goes on\n"),
        ("python", "import tasks\nfrom relay_core import Broker\nbroker = Broker('relay://localhost:6379/0')\n"),
        (
            "console",
            "$ relay job enqueue hello \\\n>   --queue q\n01m88cttkkhkhsc5ycfpm4\n$ relay stats q --json | cat\n",
        ),
        ("python", "import time\nwhile broker.stats('q').counters.get('processed', 0) < 1:\n    time.sleep(0.01)\n"),
        ("python", "assert open('noted').read() == 'hello'\nbroker.close()\n"),
    ):
        page.run(Block(tag, text, 1))
    assert (
        page.mapped("a://localhost:6379/0 and b://127.0.0.1:6379") == f"a://localhost:{port}/0 and b://127.0.0.1:{port}"
    )
    assert page.mapped("localhost:9191") == page.mapped("localhost:9191") != "localhost:9191"
    assert page.mapped("db.example.org:6379") == "db.example.org:6379"
