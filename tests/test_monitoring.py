"""k8s/components/monitoring: rules that promtool has tried, and dashboards whose every panel a real Prometheus answers.

What is marked needs Debian's `prometheus` (with promtool) and, for Grafana's schema, `make grafana`.
"""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from _servers import free_port, spawn, wait_for

from distillery import history, regress, run
from distillery.history import History, whole
from distillery.history.record import Record

ROOT = Path(__file__).resolve().parent.parent
PART = ROOT / "k8s" / "components" / "monitoring"
OURS = ROOT / "tests" / "monitoring"
SCHEMAS = ROOT / ".tools" / "grafana"
DASHBOARDS = sorted((PART / "dashboards").glob("*.json"))
TOY = """
name: toy
dataset: {name: digits, per_class: 30}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 3, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: rded, ipc: [1], options: {mipc: 20, num_crop: 2}}
  - {method: random, ipc: [1]}
students:
  - {net: convnet2, net_options: {width: 8}, recipe: {preset: rded, epochs: 8}}
labels: {mode: stored}
"""
needs_prometheus = [
    pytest.mark.monitoring,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH: apt-get install prometheus"),
]


def rules() -> dict[str, Any]:
    """The rules as Prometheus reads them from a file."""
    found: dict[str, Any] = yaml.safe_load((PART / "rules.yaml").read_text(encoding="utf-8"))["spec"]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule]


def cases() -> list[dict[str, Any]]:
    """Every expectation about an alert in the promtool tests."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in OURS.glob("*_test.yaml")]
    return [case for file in files for test in file["tests"] for case in test.get("alert_rule_test", [])]


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    names = {rule["alert"] for rule in alerts()}
    assert names == {case["alertname"] for case in cases() if case["exp_alerts"]}
    assert names == {case["alertname"] for case in cases() if not case["exp_alerts"]}


def test_every_alert_leads_to_its_runbook() -> None:
    book = (ROOT / "docs" / "runbooks.md").read_text(encoding="utf-8")
    headings = {f"#{name.lower()}" for name in re.findall(r"^## (\w+)$", book, re.MULTILINE)}
    assert {rule["annotations"]["runbook_url"] for rule in alerts()} == {f"docs/runbooks.md{name}" for name in headings}


def test_dashboards_are_what_their_source_writes() -> None:
    spec = importlib.util.spec_from_file_location("make", PART / "dashboards" / "make.py")
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    assert source.texts() == {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS}
    assert len({json.loads(text)["uid"] for text in source.texts().values()}) == 3


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_lie_side_by_side(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_docs_name_every_metric_of_the_exporter() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    source = (ROOT / "distillery" / "exporter.py").read_text(encoding="utf-8")
    names = set(re.findall(r'_(?:gauge|family)\(\s*"(\w+)"', source)) | {"runs_total"}
    assert len(names) > 15
    assert {f"distillery_{name}" for name in names} == set(re.findall(r"^\| `(distillery_\w+)`", page, re.MULTILINE))


class TestWithPromtool:
    """The rules, by Prometheus' own tool."""

    pytestmark = needs_prometheus

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()), encoding="utf-8")
        for path in OURS.glob("*_test.yaml"):
            shutil.copy(path, tmp_path)
        return tmp_path

    def promtool(self, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)

    def test_the_rules_are_valid(self, folder: Path) -> None:
        done = self.promtool(folder, "check", "rules", "rules.yaml")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_alerts_fire_when_they_must(self, folder: Path) -> None:
        done = self.promtool(folder, "test", "rules", *sorted(path.name for path in folder.glob("*_test.yaml")))
        assert done.returncode == 0, done.stdout + done.stderr

    def test_another_threshold_would_be_noticed(self, folder: Path) -> None:
        text = (folder / "rules.yaml").read_text()
        assert "> 0.9" in text
        (folder / "rules.yaml").write_text(text.replace("> 0.9", "> 0.97"))
        assert self.promtool(folder, "test", "rules", "rules_test.yaml").returncode != 0


@pytest.mark.monitoring
@pytest.mark.skipif(not SCHEMAS.exists(), reason="run `make grafana` first: there is no .tools/grafana")
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_follow_grafana_s_published_schema(path: Path) -> None:
    def check(name: str, value: object) -> None:
        schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
        jsonschema.validate(value, schema, jsonschema.Draft7Validator)

    content = json.loads(path.read_text(encoding="utf-8"))
    check("dashboard", content)
    for panel in panels(path):
        check(panel["type"], panel["options"])
        if panel["type"] == "timeseries":
            check("timeseries-field", panel["fieldConfig"]["defaults"]["custom"])
    content["panels"][0]["gridPos"]["width"] = 3
    with pytest.raises(jsonschema.ValidationError):
        check("dashboard", content)


class Prometheus:
    """A real one."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **arguments: str) -> Any:
        """`data` of an answer of its API."""
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}", timeout=10
        ) as found:
            return json.loads(found.read())["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Result of an instant query."""
        return list(self.get("query", query=expr)["result"])


@contextlib.contextmanager
def texts(folder: Path) -> Iterator[int]:
    """A server of what `folder` holds."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def scheduled_runs(folder: Path) -> list[Record]:
    """A real run, entered as the first of a schedule; then as a second one with other images and a failed third."""
    run.run(TOY, str(folder / "out"))
    (first,) = History(str(folder / "out"), whole).read()
    place = str(folder / "store")
    found = []
    for number in range(2):
        cells = tuple(replace(cell, images_sha256=f"{number:064}") for cell in first.cells)
        again = replace(first, run=f"run-{number}", schedule="nightly", cells=cells)
        found.append(history.enter(place, again, regress.judge)[0])
    found.append(history.enter(place, replace(found[0], run="run-2", status="failed", cells=()), regress.judge)[0])
    assert [one.kind for one in found[1].regressions] == ["images", "images"]
    return found


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with our rules, which has scraped the exporter of a real run's store and a cluster's metrics."""
    folder = tmp_path_factory.mktemp("monitoring")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLERY_LOG", "quiet")
        newest = scheduled_runs(folder)[1].run
    (folder / "cluster").mkdir()
    sample = (OURS / "cluster.prom").read_text(encoding="utf-8").replace("RUN", newest)
    (folder / "cluster" / "metrics").write_text(sample, encoding="utf-8")
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules()), encoding="utf-8")
    ours, port = free_port(), free_port()
    command = [sys.executable, "-m", "distillery", "exporter", (folder / "store").as_uri(), f"--port={ours}"]
    exporter = spawn([*command, "--address=127.0.0.1", "--every=1"], {}, folder / "exporter.log")
    with texts(folder / "cluster") as other:
        jobs = {"distillery-exporter": ours, "cluster": other}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {"job_name": name, "honor_labels": True, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]}
                for name, at in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        given = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        given.append(f"--web.listen-address=127.0.0.1:{port}")
        server = spawn(given, {}, folder / "prometheus.log")
        try:
            wait_for(f"http://127.0.0.1:{ours}/metrics", exporter, folder / "exporter.log")
            wait_for(f"http://127.0.0.1:{port}/-/ready", server, folder / "prometheus.log")
            yield Prometheus(port)
        finally:
            for process in (exporter, server):
                process.terminate()
            assert [exporter.wait(20), server.wait(20)] == [0, 0]


def filled(expr: str, run: str) -> str:
    """A query as Grafana sends it."""
    values = {"experiment": ".+", "run": run, "price": "2", "__range": "30m"}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)


class TestWithPrometheus:
    """Panels, variables and alerts, over the records of a real run."""

    pytestmark = needs_prometheus

    @pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
    def test_every_panel_has_data(self, answering: Prometheus, path: Path) -> None:
        queries = {filled(one["expr"], "run-1"): panel["title"] for panel in panels(path) for one in panel["targets"]}
        end = time.monotonic() + 150  # queries over a range look at whole minutes
        while empty := {title for expr, title in queries.items() if not answering.query(expr)}:
            assert time.monotonic() < end, f"no data for {sorted(empty)}"
            time.sleep(2)

    def test_joins_find_the_gpu_of_the_step_and_no_other(self, answering: Prometheus) -> None:
        (busy,) = answering.query("distillery:step_gpu_busy:ratio")
        labels = {name: busy["metric"][name] for name in ("namespace", "pod", "gpu", "run")}
        assert labels == {"namespace": "team", "pod": "step-1", "gpu": "0", "run": "run-1"}
        assert float(busy["value"][1]) == 0.4
        (memory,) = answering.query("distillery:step_gpu_memory:bytes")
        assert float(memory["value"][1]) == 2**31
        (gap,) = answering.query("distillery:accuracy_over_random")
        assert gap["metric"]["method"] == "rded"

    @pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
    def test_variables_have_values(self, answering: Prometheus, path: Path) -> None:
        for variable in json.loads(path.read_text(encoding="utf-8"))["templating"]["list"]:
            if variable["type"] == "query":
                query = filled(variable["query"]["query"], "")
                if found := re.fullmatch(r"label_values\((\S+), (\w+)\)", query):
                    values = answering.get(f"label/{found[2]}/values", **{"match[]": found[1]})
                else:
                    (inner,) = re.fullmatch(r"query_result\((.*)\)", query).groups()
                    said = [f'{{run="{one["metric"]["run"]}"}}' for one in answering.query(inner)]
                    values = [re.search(variable["regex"].strip("/"), text)[1] for text in said]
                assert values == (["toy"] if variable["name"] == "experiment" else ["run-1"]), variable["name"]

    def test_alerts_of_what_is_wrong_fire_and_the_others_do_not(self, answering: Prometheus) -> None:
        wanted, end = {"DistilleryRunFailed", "DistilleryRegression"}, time.monotonic() + 60
        while (found := {a["labels"]["alertname"] for a in answering.get("alerts")["alerts"]}) != wanted:
            assert time.monotonic() < end, found
            time.sleep(1)
