"""Write the three dashboards: `python k8s/components/monitoring/dashboards/make.py`. Standard library only.

The JSON files beside this one are what Grafana gets; a test holds them to this source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Panel = dict[str, Any]
HERE = Path(__file__).resolve().parent
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDE = 24  # columns of Grafana's grid
OURS = 'experiment=~"$experiment"'
RUN = 'run=~"$run"'
SAME = "(namespace, experiment)"  # two stores may know the same experiment
NEWEST = f"* on {SAME} group_left (run) max by (namespace, experiment, run) (distillery_newest_run{{{RUN}}})"
GOOD_BELOW = [("green", None), ("red", 1)]
GOOD_ABOVE = [("red", None), ("green", 1)]


def panel(kind: str, title: str, text: str, *queries: tuple[str, str], size: tuple[int, int], **more: Any) -> Panel:
    """One panel. A query is (PromQL, legend); `size` is (columns of 24, height)."""
    instant = kind in ("stat", "table", "bargauge")
    targets = [
        {
            "datasource": SOURCE,
            "refId": chr(ord("A") + i),
            "expr": expr,
            "legendFormat": legend,
            "instant": instant,
            "range": not instant,
            "format": "table" if kind == "table" else "time_series",
        }
        for i, (expr, legend) in enumerate(queries)
    ]
    unit, steps = more.pop("unit", "short"), more.pop("steps", [("green", None)])
    defaults: Panel = {
        "unit": unit,
        "thresholds": {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]},
        "color": {"mode": "thresholds" if kind in ("stat", "bargauge") else "palette-classic"},
    }
    defaults |= {key: more.pop(key) for key in ("min", "max", "mappings", "noValue") if key in more}
    if kind == "timeseries":
        stacked = {"mode": "normal" if more.pop("stacked", False) else "none", "group": "A"}
        defaults["custom"] = {"lineWidth": 2, "fillOpacity": 10, "showPoints": "auto", "stacking": stacked}
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    options: dict[str, Panel] = {
        "stat": {
            "reduceOptions": reduce,
            "colorMode": "value",
            "graphMode": "area",
            "textMode": "auto",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "showPercentChange": False,
            "wideLayout": True,
        },
        "bargauge": {
            "reduceOptions": reduce,
            "displayMode": "basic",
            "orientation": "horizontal",
            "showUnfilled": True,
            "namePlacement": "auto",
            "sizing": "auto",
            "valueMode": "color",
            "minVizHeight": 16,
            "minVizWidth": 8,
            "maxVizHeight": 300,
            "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom", "calcs": []},
        },
        "table": {"showHeader": True, "cellHeight": "sm", "frameIndex": 0},
        "timeseries": {
            "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": SOURCE,
        "gridPos": {"w": size[0], "h": size[1], "x": 0, "y": 0},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options[kind],
        **more,
    }


def row(title: str) -> Panel:
    """A heading."""
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": WIDE, "h": 1}}


def columns(*hidden: str, value: str, **names: str) -> list[Panel]:
    """What turns labels into a readable table: columns hidden, the value named, others renamed."""
    away = dict.fromkeys(
        ("Time", "__name__", "instance", "job", "endpoint", "container", "service", "pod", *hidden), True
    )
    return [
        {"id": "labelsToFields", "options": {"mode": "columns"}},
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": away, "renameByName": {"Value": value, **names}}},
    ]


def choice(name: str, label: str, query: str, **single: Any) -> Panel:
    """A variable with the values that a query finds: all of them unless `single` says how one is found."""
    several = {"allValue": ".+", "current": {"text": ["All"], "value": ["$__all"]}}
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"query": query, "refId": "variable"},
        "refresh": 2,
        "sort": 1,
        "multi": not single,
        "includeAll": not single,
        "hide": 0,
        **(single or several),
    }


def dashboard(uid: str, title: str, text: str, variables: list[Panel], since: str, panels: list[Panel]) -> Panel:
    """A whole dashboard, its panels laid out from left to right and top to bottom."""
    x = y = height = 0
    for number, one in enumerate(panels, 1):
        place = one["gridPos"]
        if x + place["w"] > WIDE:
            x, y, height = 0, y + height, 0
        one["id"] = number
        place |= {"x": x, "y": y}
        x, height = x + place["w"], max(height, place["h"])
    source = {"type": "datasource", "name": "source", "label": "Prometheus", "query": "prometheus", "hide": 0}
    source |= {"refresh": 1, "regex": "", "multi": False, "includeAll": False}
    link = {"type": "dashboards", "title": "Distillery", "tags": ["distillery"], "asDropdown": True, "keepTime": True}
    link |= {"icon": "external link", "tooltip": "", "url": "", "includeVars": False, "targetBlank": False}
    return {
        "uid": uid,
        "title": title,
        "description": text,
        "tags": ["distillery"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "1m",
        "time": {"from": since, "to": "now"},
        "links": [link],
        "annotations": {"list": []},
        "templating": {"list": [source, *variables]},
        "panels": panels,
    }


def overview() -> Panel:
    """How the runs of a store go."""
    experiment = choice("experiment", "Experiment", "label_values(distillery_runs_total, experiment)")
    up = [{"type": "value", "options": {"0": {"text": "down"}, "1": {"text": "up"}}}]
    return dashboard(
        "distillery-overview",
        "Distillery overview",
        "Results, schedules and costs of the newest run of each experiment.",
        [experiment],
        "now-30d",
        [
            panel("stat", "Store", "Whether the exporter could read it.", ("min(distillery_store_up)", "store"),
                  size=(4, 4), steps=GOOD_ABOVE, mappings=up),
            panel("stat", "Runs", "In the history.", (f"sum(distillery_runs_total{{{OURS}}})", "runs"), size=(4, 4)),
            panel("stat", "Last run failed", "Experiments and schedules whose last run has failed cells.",
                  (f"sum(distillery_last_run_failed{{{OURS}}})", "failed"), size=(4, 4), steps=GOOD_BELOW),
            panel("stat", "Regressions", "What got worse in the newest runs.",
                  (f"sum(distillery_regressions{{{OURS}}})", "found"), size=(4, 4), steps=GOOD_BELOW),
            panel("stat", "Oldest success of a schedule", "Since the last run whose cells all finished.",
                  (f"max(distillery:schedule_age:seconds{{{OURS}}})", "age"), size=(4, 4), unit="s"),
            panel("stat", "Store used", "Of the disk, or of what the exporter was told.",
                  ("max(distillery_store_used_bytes / distillery_store_capacity_bytes)", "used"),
                  size=(4, 4), unit="percentunit", steps=[("green", None), ("orange", 0.8), ("red", 0.9)]),
            row("Results"),
            panel("table", "Accuracy of the newest runs", "After the last epoch, mean over seeds.",
                  (f"distillery_accuracy_last{{{OURS}}}", ""), size=(14, 10), unit="percentunit",
                  transformations=columns(value="accuracy")),
            panel("bargauge", "Above random images", "Accuracy minus that of random real images under the same recipe.",
                  (f"distillery:accuracy_over_random{{{OURS}}}", "{{method}} {{dataset}} ipc {{ipc}} {{student}}"),
                  size=(10, 10), unit="percentunit", steps=[("red", None), ("green", 0)]),
            panel("timeseries", "Accuracy, last epoch", "A step is a new run.",
                  (f"distillery_accuracy_last{{{OURS}}}", "{{experiment}} {{method}} ipc {{ipc}} {{student}}"),
                  size=(12, 9), unit="percentunit"),
            panel("timeseries", "Accuracy, best evaluation, and the teachers'",
                  "The best epoch is chosen on the test set.",
                  (f"distillery_accuracy_best{{{OURS}}}", "{{experiment}} {{method}} ipc {{ipc}} {{student}}"),
                  (f"distillery_teacher_accuracy{{{OURS}}}", "{{experiment}} teacher {{teacher}}"),
                  size=(12, 9), unit="percentunit"),
            row("Runs and schedules"),
            panel("timeseries", "Runs", "In the history, by how they ended.",
                  (f"sum by (status) (distillery_runs_total{{{OURS}}})", "{{status}}"), size=(8, 8)),
            panel("timeseries", "Since the last success", "By schedule.",
                  (f"distillery:schedule_age:seconds{{{OURS}}}", "{{schedule}}"), size=(8, 8), unit="s"),
            panel("table", "Regressions", "Against the run before.", (f"distillery_regressions{{{OURS}}} > 0", ""),
                  size=(8, 8), transformations=columns(value="findings"), noValue="none"),
            row("Costs"),
            panel("timeseries", "Seconds of each step", "All cells of the newest run together.",
                  (f"distillery_step_seconds{{{OURS}}}", "{{experiment}} {{step}}"),
                  size=(12, 8), unit="s", stacked=True),
            panel("timeseries", "Size of the sets", "Images and soft labels.",
                  (f"distillery_image_bytes{{{OURS}}}", "images {{experiment}} {{method}} ipc {{ipc}}"),
                  (f"distillery_label_bytes{{{OURS}}}", "labels {{experiment}} {{method}} ipc {{ipc}}"),
                  size=(12, 8), unit="bytes"),
        ],
    )  # fmt: skip


def run() -> Panel:
    """One run: its pods while it runs, its results afterwards."""
    pods = f"on (namespace, pod) group_left (run) distillery:step_pod:info{{{RUN}}}"
    cores = 'rate(container_cpu_usage_seconds_total{container="main"}[5m])'
    past = "last_over_time(({})[$__range:1m])"
    ever = ("distillery:step_pod:info", "distillery_newest_run")
    known = " or ".join(f"max by (run) (last_over_time({name}[$__range]))" for name in ever)
    return dashboard(
        "distillery-run",
        "One run",
        "A run's pods while it runs, and its results once it is the newest of its experiment.",
        [
            choice("run", "Run", f"query_result({known})", regex='/run="([^"]+)"/'),
        ],
        "now-6h",
        [
            row("While it runs"),
            panel("timeseries", "Pods of steps", "By phase.",
                  (f"sum by (phase) ((kube_pod_status_phase * {pods}) > 0)", "{{phase}}"), size=(8, 8), stacked=True),
            panel("timeseries", "CPU", "Cores that each pod uses.",
                  (f"sum by (namespace, pod) ({cores}) * {pods}", "{{pod}}"), size=(8, 8)),
            panel("timeseries", "Memory", "Working set of each pod.",
                  (f'sum by (namespace, pod) (container_memory_working_set_bytes{{container="main"}}) * {pods}',
                   "{{pod}}"), size=(8, 8), unit="bytes"),
            panel("timeseries", "GPU busy", "By pod and GPU.",
                  (f"distillery:step_gpu_busy:ratio{{{RUN}}}", "{{pod}} {{gpu}}"),
                  size=(12, 8), unit="percentunit", min=0, max=1),
            panel("timeseries", "GPU memory", "By pod and GPU.",
                  (f"distillery:step_gpu_memory:bytes{{{RUN}}}", "{{pod}} {{gpu}}"), size=(12, 8), unit="bytes"),
            row("When it has finished"),
            panel("table", "Run", "Of which experiment and code.", (past.format(f"distillery_newest_run{{{RUN}}}"), ""),
                  size=(24, 4), transformations=columns("Value", value="")),
            panel("bargauge", "Accuracy", "After the last epoch, mean over seeds.",
                  (past.format(f"distillery_accuracy_last {NEWEST}"), "{{method}} {{dataset}} ipc {{ipc}} {{student}}"),
                  size=(8, 8), unit="percentunit", min=0, max=1),
            panel("bargauge", "Above random images", "Under the same recipe.",
                  (past.format(f"distillery:accuracy_over_random {NEWEST}"), "{{method}} ipc {{ipc}} {{student}}"),
                  size=(8, 8), unit="percentunit", steps=[("red", None), ("green", 0)]),
            panel("bargauge", "Seconds of each step", "All cells together.",
                  (past.format(f"distillery_step_seconds {NEWEST}"), "{{step}}"), size=(8, 8), unit="s"),
            panel("bargauge", "Regressions", "Against the run before.",
                  (past.format(f"distillery_regressions {NEWEST}"), "{{kind}}"), size=(8, 6), steps=GOOD_BELOW),
            panel("bargauge", "Teachers", "Their accuracy.",
                  (past.format(f"distillery_teacher_accuracy {NEWEST}"), "{{teacher}}"),
                  size=(8, 6), unit="percentunit", min=0, max=1),
            panel("bargauge", "Size of the sets", "Images and soft labels.",
                  (past.format(f"distillery_image_bytes {NEWEST}"), "images {{method}} ipc {{ipc}}"),
                  (past.format(f"distillery_label_bytes {NEWEST}"), "labels {{method}} ipc {{ipc}}"),
                  size=(8, 6), unit="bytes"),
        ],
    )  # fmt: skip


def gpu() -> Panel:
    """What steps do with GPUs, what that costs, and how KFP and Argo keep up."""
    busy = f"distillery:step_gpu_busy:ratio{{{RUN}}}"
    price = {"type": "textbox", "name": "price", "label": "Price of a GPU hour", "query": "2", "hide": 0}
    price |= {"current": {"text": "2", "value": "2"}, "options": [{"text": "2", "value": "2", "selected": True}]}
    hours = f"sum by (run) (sum_over_time(({busy} >= bool 0)[$__range:1m])) / 60"
    idle = f"sum by (run) (sum_over_time(({busy} < bool 0.05)[$__range:1m])) / 60"
    waiting = 'max by (namespace, pod) (kube_pod_status_phase{phase="Pending"}) * on (namespace, pod) group_left (run)'
    return dashboard(
        "distillery-gpu",
        "GPU and cost",
        "GPUs held by pipeline steps, by run: DCGM's metrics joined with the labels of KFP's pods.",
        [choice("run", "Run", "label_values(distillery:step_pod:info, run)"), price],
        "now-24h",
        [
            panel("stat", "GPUs in steps", "Held now.", (f"count({busy})", "held"), size=(4, 4), noValue="0"),
            panel("stat", "Busy", "Mean of the GPUs held now.", (f"avg({busy})", "busy"), size=(4, 4),
                  unit="percentunit", steps=[("red", None), ("orange", 0.2), ("green", 0.5)]),
            panel("stat", "GPU hours", "In the time shown.", (f"sum({hours})", "hours"), size=(4, 4), unit="h"),
            panel("stat", "Cost", "GPU hours times the price above.", (f"sum({hours}) * $price", "cost"),
                  size=(4, 4), unit="none"),
            panel("stat", "Idle GPU hours", "Held, and busy below 5 %.", (f"sum({idle})", "idle"),
                  size=(4, 4), unit="h", steps=[("green", None), ("orange", 1)]),
            panel("stat", "Pods that wait", "Steps without a node.",
                  (f"sum({waiting} distillery:step_pod:info)", "pods"),
                  size=(4, 4), noValue="0"),
            row("By run"),
            panel("bargauge", "GPU hours by run", "In the time shown.", (hours, "{{run}}"), size=(12, 8), unit="h"),
            panel("timeseries", "Busy by run", "Mean of a run's GPUs.", (f"avg by (run) ({busy})", "{{run}}"),
                  size=(12, 8), unit="percentunit", min=0, max=1),
            row("By GPU"),
            panel("timeseries", "Busy", "Of GPUs that steps hold.", (busy, "{{Hostname}} {{gpu}} {{pod}}"),
                  size=(8, 8), unit="percentunit", min=0, max=1),
            panel("timeseries", "Memory", "Of GPUs that steps hold.",
                  (f"distillery:step_gpu_memory:bytes{{{RUN}}}", "{{Hostname}} {{gpu}} {{pod}}"),
                  size=(8, 8), unit="bytes"),
            panel("timeseries", "Power", "Of GPUs that steps hold.",
                  (f"distillery:step_gpu_power:watts{{{RUN}}}", "{{Hostname}} {{gpu}} {{pod}}"),
                  size=(8, 8), unit="watt"),
            row("KFP and Argo"),
            panel("timeseries", "Workflows", "By phase, from Argo's controller (4 and 3.6; older ones call it _count).",
                  ("sum by (phase) (argo_workflows_gauge or argo_workflows_count)", "{{phase}}"), size=(8, 8)),
            panel("timeseries", "Pods of workflows", "By phase, from Argo's controller.",
                  ("sum by (phase) (argo_workflows_pods_gauge)", "{{phase}}"), size=(8, 8)),
            panel("timeseries", "Runs of KFP", "From its API server.",
                  ("sum(resource_manager_workflow_runs_success)", "succeeded"),
                  ("sum(resource_manager_workflow_runs_failed)", "failed"), size=(8, 8)),
        ],
    )  # fmt: skip


def texts() -> dict[str, str]:
    """File name -> content."""
    made = {"overview.json": overview(), "run.json": run(), "gpu.json": gpu()}
    return {name: json.dumps(one, indent=2) + "\n" for name, one in made.items()}


if __name__ == "__main__":
    for name, text in texts().items():
        (HERE / name).write_text(text, encoding="utf-8")
