"""The dashboards that are kept are those that the code makes, and can be imported as they are."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from deploy.monitoring.dashboards import DASHBOARDS, FOLDER, as_json
from tests.charts.rendering import MINIMAL, merged, of_kind, render
from tests.charts.series import RAY_GPU

NAMES = sorted(DASHBOARDS)


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_what_is_made(name: str) -> None:
    made = as_json(DASHBOARDS[name]())
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == made, "give python -m deploy.monitoring.dashboards"


def test_nothing_else_is_kept() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{name}.json" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_source_namespace_and_gateway_are_chosen_on_the_dashboard(name: str) -> None:
    variables = {variable["name"]: variable for variable in kept(name)["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "gateway"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for panel in kept(name)["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all('namespace="$namespace"' in target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_ids_of_their_own_and_do_not_overlap(name: str) -> None:
    panels = kept(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["title"], panel["gridPos"]) for panel in panels]
    for (title, a), (other, b) in combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{title} lies over {other}"
    assert all(place["x"] + place["w"] <= 24 for _, place in places)


def config_maps(**monitoring: Any) -> dict[str, Any]:
    objects = render(merged(MINIMAL, {"monitoring": {"enabled": True, **monitoring}}))
    named = {made["metadata"]["name"]: made for made in of_kind(objects, "ConfigMap")}
    return {name: made for name, made in named.items() if "-dashboard-" in name}


def test_dashboards_come_with_the_chart_as_they_are() -> None:
    found = config_maps()
    assert sorted(found) == [f"ts-trackstar-dashboard-{name}" for name in NAMES]
    for name in NAMES:
        made = found[f"ts-trackstar-dashboard-{name}"]
        assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(made["data"][f"{name}.json"]) == kept(name)


def test_dashboards_can_be_left_out() -> None:
    assert not config_maps(dashboards=False)


def test_series_of_gpus_are_in_rays_own_table() -> None:
    table = {f"ray_{name}": set(gauge.view.columns) for name, gauge in METRICS_GAUGES.items()}
    for name, labels in RAY_GPU.items():
        assert table[name].issuperset(labels)
