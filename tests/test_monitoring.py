"""examples/monitoring against the real Prometheus: it scrapes what runs, rules and dashboard are right, alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from relay_core import Broker
from relay_core.cli.app import COMMANDS
from relay_core.metrics import BuildCollector, DepthCollector, Recorder, StoreCollector
from tests.command_line import spawn
from tests.prometheus import Prometheus, promtool
from tests.scraping import scrape_registry, scrape_url
from tests.servers import MissingServer, Server, eventually, free_port

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "monitoring"
README = (FOLDER / "README.md").read_text()
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
ALERTS = [rule["alert"] for rule in RULES]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

WANTED = {
    "RelayQueueStalled", "RelayBacklogGrowing", "RelayFailureRatio", "RelayDeadLettersGrowing", "RelayNoWorkers",
    "RelayPausedTooLong", "RelayLeasesLost", "RelayReapSpike",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _missing_programs_fail(request: pytest.FixtureRequest) -> Iterator[None]:
    try:
        yield
    except MissingServer as error:  # pragma: no cover
        pytest.fail(str(error), pytrace=False)


# --- the files


def test_promtool_finds_nothing_wrong_with_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml", cwd=FOLDER)
    promtool("check", "rules", "alerts.yml", cwd=FOLDER)


def test_the_unit_tests_of_the_rules_pass_and_test_every_alert() -> None:
    promtool("test", "rules", "alerts_test.yml", cwd=FOLDER)
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == set(ALERTS)
    assert set(ALERTS) >= WANTED


def test_each_alert_has_a_place_in_the_runbook_that_says_what_to_do() -> None:
    sections = dict(re.findall(r"(?ms)^## (\w+)\n\n(.+?)(?=\n#|\Z)", README))
    assert list(sections) == ALERTS
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"examples/monitoring/README.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert len(sections[rule["alert"]]) > 60


def test_the_runbook_names_commands_that_exist() -> None:
    assert set(re.findall(r"`relay ([a-z]+)", README)) <= COMMANDS.keys()


def test_rules_dashboard_runbook_and_docs_name_metrics_that_exist() -> None:
    with Broker("relay://127.0.0.1:1", retry_for=0.0) as broker:
        registry = Recorder(tasks=1).exposed(DepthCollector(broker, ["q"]), BuildCollector())
        families = [*registry.collect(), *StoreCollector(broker).describe()]
    real = set()
    for family in families:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        real |= {family.name + suffix for suffix in suffixes}
    texts = [*EXPRESSIONS, *(rule["expr"] for rule in RULES), README]
    named = {
        name for text in texts for name in re.findall(r"\brelay_(?:jobs?|queue|leases|workers|audit|store)\w*", text)
    }
    assert named - real == set()
    assert len(named) > 15
    told = set(re.findall(r"(?m)^\| `(relay_\w+?)(?:\{[^`]*\})?`", (ROOT / "docs" / "metrics.md").read_text()))
    plain = {name.removesuffix("_bucket") for name in real if not name.endswith(("_count", "_sum"))}
    assert told == plain


def test_promtool_finds_nothing_wrong_with_what_is_served(server: Server) -> None:
    with Broker(server.url) as broker:
        recorder = Recorder(tasks=3, plugins=broker.plugins)
        broker.plugins.register(recorder)
        broker.enqueue_many("mail", [b"1", b"2"])
        one, two = broker.claim("mail", 2)
        broker.ack(one)
        broker.nack(two, "no", dead=True)
        store = CollectorRegistry()
        store.register(StoreCollector(broker))
        for registry in (recorder.exposed(DepthCollector(broker, ["mail"]), BuildCollector()), store):
            promtool("check", "metrics", input=scrape_registry(registry).text)


def test_where_prometheus_is_missing_and_cannot_be_installed_setup_says_what_to_do(tmp_path: Path) -> None:
    for name in ("sh", "sed", "redis-server", "openssl", "curl", "id"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        [str(ROOT / "tools" / "setup-servers")], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Missing on this machine: prometheus. There is no apt-get here." in done.stderr


# --- live

HANDLER = """
def handle(job):
    if job.payload == b"fail":
        from relay_core.worker import Reject
        raise Reject("no")
"""


def shortened(text: str) -> str:
    """The rules with seconds in place of minutes and hours, so that what they say can be seen to happen."""
    text = re.sub(r"(?m)^(\s+for:) .*$", r"\1 1s", text)
    return re.sub(r"\[\w+\]", "[5s]", text)


class Site:
    """A store with a worker, an exporter, and a Prometheus that looks at both five times a second."""

    def __init__(self, server: Server, folder: Path) -> None:
        (folder / "handlers.py").write_text(HANDLER)
        self.broker = Broker(server.url)
        self.worker_port, self.exporter_port = free_port(), free_port()
        environment = {"url": server.url, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.worker = spawn(
            "worker", "handlers:handle", "-q", "mail", "--metrics-addr", str(self.worker_port), **environment
        )
        self.exporter = spawn("exporter", "--addr", str(self.exporter_port), **environment)
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
        for job, port in zip(config["scrape_configs"], (self.exporter_port, self.worker_port), strict=True):
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yml").write_text(shortened((FOLDER / "alerts.yml").read_text()))
        self.prometheus = Prometheus(folder)

    def close(self) -> None:
        for process in (self.worker, self.exporter):
            process.kill()
            process.wait(10)
        self.broker.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Server("redis") as server:
        made = Site(server, tmp_path_factory.mktemp("site"))
        try:
            with made.prometheus:
                yield made
        finally:
            made.close()


def test_prometheus_scrapes_a_live_worker_and_the_exporter(site: Site) -> None:
    site.broker.enqueue_many("mail", [b"fine"] * 20)
    ask = site.prometheus.values
    eventually(lambda: ask("up") == [1, 1], "both targets are up")
    eventually(lambda: ask('relay_jobs_processed_total{queue="mail"}') == [20], "the worker's own count")
    eventually(lambda: ask('relay_queue_processed_total{queue="mail"}') == [20], "the store's count")
    eventually(lambda: ask('relay_workers{queue="mail"}') == [1], "the worker in the roster")
    assert ask('relay_job_run_seconds_count{queue="mail"}') == [20]
    assert ask('relay_queue_depth{queue="mail",state="ready",job="relay-exporter"}') == [0]
    assert len(ask("relay_build_info")) == 2
    for port in (site.worker_port, site.exporter_port):
        promtool("check", "metrics", input=scrape_url(f"http://127.0.0.1:{port}/metrics").text)


def test_every_expression_of_the_dashboard_is_one_and_finds_something(site: Site) -> None:
    site.broker.enqueue("mail", b"fine")
    empty = {}
    for expression in EXPRESSIONS:
        empty[expression] = re.sub(r"\$queue", "mail", expression.replace("$__rate_interval", "1m")).replace(
            "$exporter", "relay-exporter"
        )
        assert "$" not in empty[expression]
        if "relay_leases_lost" in expression:  # of which there are none
            site.prometheus.values(empty.pop(expression))

    def look() -> bool:
        for expression, asked in list(empty.items()):
            if site.prometheus.values(asked):
                del empty[expression]
        return not empty

    eventually(look, "an answer to every expression")


def test_an_alert_fires_when_what_it_is_for_happens_and_ends_with_it(site: Site) -> None:
    assert site.prometheus.ask("rules")["groups"][0]["rules"], "the rules are loaded"
    site.broker.enqueue("post", b"x")  # which no worker serves
    site.broker.pause("mail")
    site.broker.enqueue_many("bad", [b"x"] * 9)
    eventually(lambda: len(site.prometheus.values('relay_queue_dead_total{queue="bad"}')) == 1, "a scrape without dead")
    for job in site.broker.claim("bad", 9):
        site.broker.nack(job, "no", dead=True)
    eventually(lambda: site.prometheus.firing().keys() >= {"RelayPausedTooLong", "RelayNoWorkers"}, "two alerts")
    eventually(lambda: "RelayDeadLettersGrowing" in _ever(site), "the alert of dead letters")
    firing = site.prometheus.firing()
    assert firing["RelayPausedTooLong"]["queue"] == "mail"
    assert firing["RelayNoWorkers"]["queue"] == "post"
    site.broker.resume("mail")
    site.broker.purge("post")
    eventually(lambda: not site.prometheus.firing().keys() & {"RelayPausedTooLong", "RelayNoWorkers"}, "their end")


def _ever(site: Site) -> set[str]:
    """The alerts that fired within the last minute."""
    found = site.prometheus.ask("query", query='max_over_time(ALERTS{alertstate="firing"}[1m])')["result"]
    return {row["metric"]["alertname"] for row in found}


def test_the_store_s_absence_is_an_alert(site: Site, tmp_path: Path) -> None:
    port = free_port()
    away = spawn(
        "exporter", "--addr", str(port), url=f"relay://127.0.0.1:{free_port()}", cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found: list[float | None] = []
        eventually(
            lambda: found.append(scrape_url(f"http://127.0.0.1:{port}/metrics")("relay_store_up")) or found, "a scrape"
        )
        assert found == [0]
    finally:
        away.kill()
        away.wait(10)
