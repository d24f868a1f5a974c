"""The files of `deploy/`: valid, guarded by a token, and answering on loopback addresses only."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import ray
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
CLUSTER = (DEPLOY / "cluster.yaml").read_text()

LOCAL = """
cluster_name: raytune-vlm
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}
auth: {ssh_user: me}
"""


def prepared(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready = prepare_config(config)
    validate_config(ready)
    return ready


def test_ray_s_launcher_takes_the_cluster_for_aws():
    ready = prepared(yaml.safe_load(CLUSTER))
    types = ready["available_node_types"]
    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["gpu_on_demand"]["node_config"]
    assert "pip install" not in str(ready["setup_commands"]) + str(ready["head_setup_commands"])
    head = ready["head_start_ray_commands"][-1]
    for part in ("RAY_AUTH_MODE=token", "--dashboard-host=127.0.0.1", "RAY_gcs_storage=rocksdb"):
        assert part in head
    assert "RAY_AUTH_MODE=token" in ready["worker_start_ray_commands"][-1]
    wrong = yaml.safe_load(CLUSTER)
    wrong["available_node_types"]["head"]["instance"] = "m6i"
    with pytest.raises(Exception, match="'instance' was unexpected"):
        prepared(wrong)


def test_it_takes_machines_of_one_s_own_too():
    config = yaml.safe_load(CLUSTER)
    local = yaml.safe_load(LOCAL)
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("available_node_types", "head_node_type", "max_workers")
    }
    ready = prepared({**kept, **local, "min_workers": 2, "max_workers": 2})
    assert ready["max_workers"] == 2


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_file_parses_and_names_exact_images(file):
    for document in yaml.safe_load_all(file.read_text()):
        assert document
        for image in images(document):
            assert ":" in image and not image.endswith(":latest"), image


def images(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "image" and isinstance(value, str):
                yield value
            else:
                yield from images(value)
    elif isinstance(node, list):
        for value in node:
            yield from images(value)


def kuberay(name):
    return yaml.safe_load((DEPLOY / "kuberay" / name).read_text())


def test_kubernetes_clusters_ask_for_a_token_share_storage_and_wait_in_a_queue():
    cluster, job = kuberay("raycluster.yaml"), kuberay("rayjob.yaml")
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert env == {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    for named, spec in ((cluster, cluster["spec"]), (job, job["spec"]["rayClusterSpec"])):
        assert named["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == ray.__version__
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounts == volumes == {"shared", "memory"}
            assert pod["containers"][0]["resources"]["limits"]["memory"]


def test_monitoring_answers_on_this_machine_only():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert all("ports" not in service for service in services.values())
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


STUBS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo head; echo worker; else echo "$@" >>calls; fi',
    "hostname": "echo 127.0.0.1",
    "ray": 'echo "ray $*" >>calls; case "$*" in *--block*) exec sleep 20;; esac',
    "python": """
case "$*" in
  *token_hex*) echo token;;
  *nodes*) echo 2;;
  *) echo "$*" >>calls; trap 'exit 3' TERM; while true; do sleep 0.1; done;;
esac""",
}
"""Stand for Slurm, Ray and the sweep."""


def test_a_slurm_job_saves_before_its_time_is_over_and_is_queued_again(tmp_path):
    script = DEPLOY / "slurm" / "sweep.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "2"}
    folder = {"RAYTUNE_VLM_FOLDER": str(tmp_path / "runs" / "x")}
    started = subprocess.Popen(
        ["bash", script, "x.yaml", "storage_path=runs"],
        cwd=tmp_path,
        env={**os.environ, **job, **folder, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
    )
    calls = tmp_path / "calls"
    end = time.monotonic() + 30
    while not calls.exists() or "raytune_vlm" not in calls.read_text():
        assert time.monotonic() < end and started.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    started.terminate()
    try:
        assert started.wait(20) == 3
    finally:
        os.killpg(started.pid, 9)
    said = calls.read_text()
    assert "-m raytune_vlm sweep x.yaml storage_path=runs" in said and "requeue 7" in said
    assert "--head --node-ip-address=127.0.0.1 --port=20007 --dashboard-host=127.0.0.1" in said
    assert "ray start --address=127.0.0.1:20007" in said
