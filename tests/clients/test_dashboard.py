"""The dashboard for Grafana, read with the types that Grafana makes of its own schema."""

import json
from pathlib import Path

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "tidegate.json"
# What Prometheus as a data source adds to a dashboard, which its schema leaves open.
OF_PROMETHEUS = {"definition", "step", "titleFormat", "textFormat"}


def strangers(written, read, place=""):
    """Whatever is not, or not as written, in what was read."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            # A dashboard that is still to be imported has no number.
            if key in OF_PROMETHEUS or (place, key, value) == ("", "id", None):
                continue
            if key in read:
                yield from strangers(value, read[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}"
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, (ours, theirs) in enumerate(zip(written, read, strict=True)):
            yield from strangers(ours, theirs, f"{place}[{index}]")
    elif written != read:
        yield f"{place}: {written!r} is read as {read!r}"


def read(dashboard):
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


@pytest.fixture(scope="module")
def dashboard():
    plugins.register_default_plugins()
    return json.loads(DASHBOARD.read_text())


def test_grafana_knows_all_that_the_dashboard_says(dashboard):
    assert list(strangers(dashboard, read(dashboard))) == []


def test_what_grafana_does_not_know_would_be_found(dashboard):
    dashboard = json.loads(json.dumps(dashboard))
    panel = next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries")
    panel["titel"] = "misspelt"
    panel["fieldConfig"]["defaults"]["custom"] = {"lineWith": 2}
    found = list(strangers(dashboard, read(dashboard)))
    number = dashboard["panels"].index(panel)
    assert found == [f"/panels[{number}]/fieldConfig/defaults/custom/lineWith", f"/panels[{number}]/titel"]
