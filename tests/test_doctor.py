"""`doctor`: every finding that is not fine has a remedy, and the status tells problems."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from made import run_cli

from raytune_vlm import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without a token, and no variable that says something about Ray."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def dashboard():
    """Stands for a cluster's dashboard: `answers(status)` starts one and gives its port."""
    servers = []

    def answers(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_address[1]

    yield answers
    for server in servers:
        server.shutdown()
        server.server_close()


def levels(findings):
    return [found.level for found in findings]


def test_a_whole_examination_names_remedies_and_its_status_tells_problems(home):
    done = run_cli("doctor", "--storage", home / "runs", check=False)
    lines = done.stdout.splitlines()
    assert any(line.startswith("ok       ray: ") for line in lines)
    assert any(line.startswith("warning  ray token: ") for line in lines)
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        assert line.startswith(("ok ", " ")) or after.startswith(" " * 11 + "-> ")
    assert done.returncode == any(line.startswith("problem") for line in lines)
    assert not (home / "runs").exists()

    (home / "file").touch()
    done = run_cli("doctor", "--storage", home / "file" / "runs", "--address", "x", check=False)
    assert done.returncode == 1 and "problem  dashboard: x is no address" in done.stdout


def test_the_tested_versions_are_the_pins_that_the_tests_ran_with():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
        if "==" in line
    )
    block = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0]
    needed = re.findall(r'^    "([a-z0-9_-]+)', block, re.MULTILINE)
    assert {name: pins[name] for name in needed if name in pins} == doctor.TESTED


def test_versions_below_what_is_needed_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.54.9")
    found = {each.about: each for each in doctor.check_versions()}
    assert found["ray"].level == "problem" and ">=2.55 is needed" in found["ray"].what
    assert found["click"].level == "problem" and "pip install 'click==" in found["click"].remedy


def test_tokens_missing_open_and_readable(home, monkeypatch):
    assert levels(doctor.check_token()) == ["warning"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (found,) = doctor.check_token()
    assert found.level == "problem" and "ray get-auth-token" in found.remedy
    ray = Path(sys.executable).with_name("ray")
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
    token = home / ".ray" / "auth_token"
    token.chmod(0o644)  # as Ray leaves it where the umask is 022
    found = list(doctor.check_token())
    assert levels(found) == ["ok", "warning"] and f"chmod 600 {token}" in found[1].remedy
    assert token.read_text() not in str(found)
    token.chmod(0o600)
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert levels(doctor.check_token()) == ["ok"]  # `ray start` takes a token that is there
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert levels(doctor.check_token()) == ["warning"]


def test_dashboards_that_let_everybody_in(dashboard, monkeypatch):
    opened, guarded = dashboard(200), dashboard(401)
    (found,) = doctor.check_dashboard(f"http://127.0.0.1:{opened}")
    assert found.level == "ok" and "asks for no token" in found.what
    (found,) = doctor.check_dashboard(f"http://127.0.0.1:{guarded}")
    assert found.level == "ok" and "asks for a token" in found.what
    # The same servers, as if this loopback address were one on a network.
    monkeypatch.setattr(doctor, "_is_loopback", lambda host: False)
    (found,) = doctor.check_dashboard(f"http://127.0.0.1:{opened}")
    assert found.level == "warning" and "RAY_AUTH_MODE=token" in found.remedy
    (found,) = doctor.check_dashboard(f"http://127.0.0.1:{guarded}")
    assert found.level == "warning" and "unencrypted" in found.what
    (found,) = doctor.check_dashboard("http://127.0.0.1:1")
    assert found.level == "problem"


def test_clusters_to_join_disks_and_shared_memory(home, dashboard, monkeypatch):
    assert list(doctor.check_ray_address()) == []
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dashboard(200)}")
    assert levels(doctor.check_ray_address()) == ["ok"]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert levels(doctor.check_ray_address()) == ["problem"]
    assert levels(doctor.check_ray_disk(home / "missing")) == ["problem"]
    usage = doctor.shutil.disk_usage(home)
    for share, level in ((0.5, "ok"), (0.92, "warning"), (0.97, "problem")):
        nearly = usage._replace(total=1000 * doctor.GIB, free=int((1 - share) * 1000 * doctor.GIB))
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, nearly=nearly: nearly)
        assert levels(doctor.check_ray_disk(home)) == [level]
    little = usage._replace(free=doctor.GIB // 16)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: little)
    (found,) = doctor.check_shared_memory(home)
    assert found.level == "warning" and "--shm-size=" in found.remedy
    assert levels(doctor.check_folder("storage", home / "runs" / "deep")) == ["problem"]


def test_every_optional_part_is_looked_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(extras["optional-dependencies"]) - {"dev"}
