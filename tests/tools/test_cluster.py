"""The ready examples for clusters: what can be known of them without one."""

import subprocess
from pathlib import Path

import pytest

from lm import main

CLUSTER = Path(__file__).parent.parent.parent / "tools" / "cluster"
TPU = ["--zone", "us-east5-a", "--type", "v5p-32", "--nfs", "10.0.0.2:/share", "--dry_run"]


@pytest.mark.parametrize("name", ["slurm.sh", "tpu.sh"])
def test_scripts_are_bash(name):
    done = subprocess.run(["bash", "-n", CLUSTER / name], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_a_dry_run_prints_the_commands_of_a_tpu(tmp_path):
    flags = ["--config", "a b.py", "--config.seed=1"]
    done = subprocess.run(
        ["bash", CLUSTER / "tpu.sh", *TPU, "--", *flags],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    create = next(line for line in lines if "create" in line)
    assert "--accelerator-type v5p-32" in create and "--version v2-alpha-tpuv5 " in create
    assert all("--worker all" in line for line in lines if " ssh " in line)
    assert "lm.main" in lines[-1] and "--config.seed=1" in lines[-1]


def test_a_tpu_without_a_zone_is_refused():
    done = subprocess.run(
        ["bash", CLUSTER / "tpu.sh", "--type", "v5p-8", "--", "--config", "x"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "--zone" in done.stderr


@pytest.fixture
def jobset():
    return pytest.importorskip("yaml").safe_load((CLUSTER / "jobset.yaml").read_text())


def test_the_jobs_of_the_jobset_are_valid(jobset):
    kubernetes = pytest.importorskip("kubernetes_validate")
    for part in jobset["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": part["name"]},
            "spec": part["template"]["spec"],
        }
        kubernetes.validate(job, kubernetes.latest_version(), strict=True)
        del job["spec"]["template"]["spec"]["containers"][0]["name"]
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(job, kubernetes.latest_version(), strict=True)


def test_the_numbers_and_names_of_the_jobset_agree(jobset):
    (part,) = jobset["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(variables["JAX_NUM_PROCESSES"])
    name = jobset["metadata"]["name"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{part['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert container["command"][2] == main.__name__
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["containerName"] == container["name"] and rule["values"] == [2, 3]
