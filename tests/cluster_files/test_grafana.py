"""The Grafana dashboard: its structure, and that its queries name what the workers export."""

import json
import re

from cluster_commands import CLUSTER

from raylit.driver.ray.worker_metrics import DESCRIPTIONS, GOODPUT

DASHBOARD = json.loads((CLUSTER / "grafana-dashboard.json").read_text(encoding="utf-8"))


def test_queries_name_all_metrics_that_workers_export_and_no_others():
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"ray_(raylit_\w+)", query)}
    assert named == {*DESCRIPTIONS, f"{GOODPUT}_total"}


def test_panels_have_their_own_places_and_the_chosen_data_source():
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
