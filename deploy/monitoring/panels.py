"""Parts of which dashboards are made: variables, selectors and panels that all look alike.

Contract: a panel asks one or a few questions, each an expression of Prometheus and the legend of what comes back. Every
series has a selector in braces, by which a test finds its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders.common import ReduceDataOptions, VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as StatPanel
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeriesPanel
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)

# Chosen on the dashboard. A gateway's job is the name of the Service that it is scraped through.
NAMESPACE, GATEWAY = "$namespace", "$gateway"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT, _STAT_WIDTH, _STAT_HEIGHT = 8, 8, 6, 4


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and how what it returns is named: text with labels in double braces."""

    expr: str
    legend: str = ""


def gateway(series: str, *matchers: str) -> str:
    """Series of the chosen gateways."""
    return _select(series, f'namespace="{NAMESPACE}"', f'job="{GATEWAY}"', *matchers)


def ray(series: str, *matchers: str) -> str:
    """Series of all Ray clusters in the chosen namespace."""
    return _select(series, f'namespace="{NAMESPACE}"', *matchers)


def rate(series: str, *by: str) -> str:
    """Events per second of a counter, summed."""
    return f"sum{_by(by)}(rate({series}[$__rate_interval]))"


def quantiles(of: Callable[..., str], histogram: str, *matchers: str) -> list[Query]:
    """Median, 90th and 99th percentile of a histogram of gateways or of Ray."""
    buckets = rate(of(f"{histogram}_bucket", *matchers), "le")
    return [
        Query(f"histogram_quantile({quantile}, {buckets})", name)
        for quantile, name in ((0.5, "median"), (0.9, "p90"), (0.99, "p99"))
    ]


def mean(of: Callable[..., str], histogram: str) -> str:
    """Mean of what a histogram of gateways or of Ray counted."""
    return f"{rate(of(f'{histogram}_sum'))} / {rate(of(f'{histogram}_count'))}"


def lines(
    title: str, unit: str, queries: Sequence[Query], *, about: str = "", width: int = _WIDTH, lowest: float | None = 0.0
) -> TimeSeriesPanel:
    """A panel of lines over time.

    Args:
        title: what it shows.
        unit: as Grafana names it.
        queries: what is asked.
        about: a sentence for who does not know; "" for none.
        width: of 24 columns.
        lowest: where the axis begins; None for wherever the lines do.
    """
    panel = (
        TimeSeriesPanel()
        .title(title)
        .datasource(_SOURCE)
        .unit(unit)
        .span(width)
        .height(_HEIGHT)
        .fill_opacity(5)
        .legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .targets([_target(number, query).range() for number, query in enumerate(queries)])
    )
    if lowest is not None:
        panel = panel.min(lowest)
    return panel.description(about) if about else panel


def number(title: str, unit: str, query: Query, *, about: str = "", width: int = _STAT_WIDTH) -> StatPanel:
    """A panel of one number, or of one for each thing that the legend names."""
    panel = (
        StatPanel()
        .title(title)
        .datasource(_SOURCE)
        .unit(unit)
        .span(width)
        .height(_STAT_HEIGHT)
        .graph_mode(BigValueGraphMode.NONE)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .targets([_target(0, query).instant()])
    )
    return panel.description(about) if about else panel


def dashboard(name: str, title: str, rows: Sequence[tuple[str, Sequence[TimeSeriesPanel | StatPanel]]]) -> Dashboard:
    """A dashboard of rows of panels, with data source, namespace and gateway to choose."""
    found = (
        Dashboard(f"TrackStar / {title}")
        .uid(f"trackstar-{name}")
        .tags(["trackstar"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("namespace", "Namespace", "label_values(trackstar_generation_info{}, namespace)"))
        .with_variable(
            _choice("gateway", "Gateway", f'label_values(trackstar_generation_info{{namespace="{NAMESPACE}"}}, job)')
        )
    )
    panel_id = 0
    for row, panels in rows:
        panel_id += 1
        found = found.with_row(Row(row).id(panel_id))
        for panel in panels:
            panel_id += 1
            found = found.with_panel(panel.id(panel_id))
    return found


def _choice(name: str, label: str, query: str) -> QueryVariable:
    return (
        QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _target(number: int, query: Query) -> Dataquery:
    target = Dataquery().ref_id(chr(ord("A") + number)).datasource(_SOURCE).expr(query.expr)
    return target.legend_format(query.legend) if query.legend else target


def _select(series: str, *matchers: str) -> str:
    return f"{series}{{{','.join(matchers)}}}"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
