"""Prometheus takes our alerts, and they fire when they should and only then."""

import subprocess
from pathlib import Path

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"


def promtool(*arguments):
    found = subprocess.run(
        ["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_prometheus_takes_them():
    assert "SUCCESS" in promtool("check", "rules", "tidegate.rules.yml")


def test_they_fire_when_they_should():
    assert "SUCCESS" in promtool("test", "rules", "tidegate.test.yml")
