"""Whether every panel has data: a real Prometheus scrapes a real demo sweep, and is then asked for
every expression of `deploy/grafana/dashboards/` and every alert.

    python benchmarks/dashboards_live.py [dotted.key=value ...]

Needs `prometheus` (Debian: apt-get install prometheus); says so and ends where there is none. A
panel whose title begins with "GPU:" may be empty where Ray sees no GPU. Takes as long as the demo.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

DEPLOY = Path(__file__).parents[1] / "deploy"
PORT = 19091
STEP_S = 5
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"

SETTINGS = ("sweep.cost_per_cpu_hour=0.05", "sweep.max_cost=10")
"""So that the panels of the budget have something to show."""


def panels() -> list[tuple[str, str, str]]:
    """Dashboard, panel and expression of every query, for all sweeps and metrics."""
    found = []
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expr = target["expr"].replace("$sweep", ".*").replace("$metric", ".*")
                found.append((file.stem, panel["title"], expr))
    return found


def ask(url: str, path: str, **query: object) -> dict:
    """What Prometheus answers."""
    address = f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)["data"]


def empty_panels(url: str, began: float, ended: float) -> list[str]:
    """Print how many series and values each expression has; those without any."""
    missing = []
    for board, title, expr in panels():
        data = ask(url, "query_range", query=expr, start=began, end=ended, step=STEP_S)
        values = [value for series in data["result"] for _, value in series["values"]]
        last = f"{float(values[-1]):.4g}" if values else "-"
        print(f"{board:10} {title:45} {len(data['result']):3} series {len(values):5} values {last}")
        if not values:
            missing.append(f"{board}: {title}: {expr}")
    return missing


def main(overrides: list[str]) -> int:
    """Run both; the exit status is 1 if a panel that is not a GPU's stayed empty."""
    if shutil.which("prometheus") is None:
        print("skipped: prometheus is not installed (apt-get install prometheus)")
        return 0
    # Short: Ray puts sockets below it, whose paths have a limit.
    with tempfile.TemporaryDirectory(prefix="rv") as folder:
        place = Path(folder)
        for file in (DEPLOY / "prometheus").glob("*.yml"):
            text = file.read_text().replace(DISCOVERY, f"{folder}/ray/{Path(DISCOVERY).name}")
            (place / file.name).write_text(text)
        url = f"http://127.0.0.1:{PORT}"
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={place / 'prometheus.yml'}",
             f"--storage.tsdb.path={place / 'tsdb'}", f"--web.listen-address=127.0.0.1:{PORT}"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            began = time.time()
            command = [
                sys.executable,
                "-m",
                "raytune_vlm",
                "demo",
                f"storage_path={place / 'runs'}",
            ]
            subprocess.run(
                [*command, *SETTINGS, *overrides],
                cwd=place,
                env={**os.environ, "RAY_TMPDIR": folder},
                check=True,
            )
            missing = empty_panels(url, began, time.time())
            groups = ask(url, "rules")["groups"]
        finally:
            prometheus.terminate()
            prometheus.wait()
    rules = [rule for group in groups for rule in group["rules"]]
    print(f"alerts: {len(rules)}, healthy: {sum(rule['health'] == 'ok' for rule in rules)}")
    bad = [line for line in missing if " GPU: " not in line]
    for line in missing:
        print(f"{'no GPU here' if line not in bad else 'NO DATA'}: {line}")
    return int(bool(bad) or any(rule["health"] != "ok" for rule in rules))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
