"""The ready examples for clusters: what can be known of them without one, and Slurm where it is installed."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from lm import exits, main
from lm.metrics import read_rows, untimed

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "tools" / "cluster"
TPU = ["--zone", "us-east5-a", "--type", "v5p-32", "--nfs", "10.0.0.2:/share", "--dry_run"]


@pytest.fixture
def ray_run(monkeypatch):
    """The example for Ray, which need not be installed."""
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    from tools.cluster import ray_run

    monkeypatch.setattr(ray_run, "ray", sys.modules["ray"])
    return ray_run


def test_all_examples_start_again_after_the_same_codes(ray_run, jobset):
    """After all but those that no new start helps: among them aborts of C++ are not."""
    own = {exits.FAILED, exits.USER_ERROR, exits.DIVERGED, exits.DATA_ENDED, exits.STOPPED}
    final = own | {126, 127}  # a shell's: no such program
    rules = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    script = (CLUSTER / "slurm.sh").read_text()
    assert {int(code) for code in re.findall(r"(\d+)-\*", script)} == {0, *final}
    assert {*ray_run.FINAL} == {*rules[0]["onExitCodes"]["values"]} == final


@pytest.mark.parametrize(("host", "shown"), [("10.0.0.1", "10.0.0.1"), ("fd00::1", "[fd00::1]")])
def test_ray_s_address_has_brackets_where_it_takes_them(ray_run, monkeypatch, host, shown):
    util = types.SimpleNamespace(get_node_ip_address=lambda: host)
    monkeypatch.setattr(sys.modules["ray"], "util", util, raising=False)
    assert ray_run.Process().address().rpartition(":")[0] == shown


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


GCLOUD = """#!/bin/bash
echo "$4" >> "$FOLDER/asked"
[ "$4" != describe ] || { echo "$STATE"; [ -n "$STATE" ]; }
"""


@pytest.mark.parametrize(
    ("state", "asked"),
    [
        ("READY", ["scp", "ssh"]),
        ("", ["create", "scp", "ssh"]),
        ("PREEMPTED", ["delete", "create", "scp", "ssh"]),
        ("TERMINATED", ["delete", "create", "scp", "ssh"]),
        ("CREATING", []),
        ("REPAIRING", []),
    ],
)
def test_a_slice_is_deleted_only_where_it_is_lost(state, asked, tmp_path):
    for name, script in (("gcloud", GCLOUD), ("git", "#!/bin/bash\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FOLDER": str(tmp_path), "STATE": state}
    done = subprocess.run(
        ["bash", CLUSTER / "tpu.sh", *TPU[:-1], "--", "--config", "x"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    said = (tmp_path / "asked").read_text().split()
    assert list(dict.fromkeys(said)) == ["describe", *asked], done.stderr
    assert done.returncode == (not asked) and (state in done.stderr or bool(asked))


def test_the_environment_of_a_tpu_is_made_anew():
    assert "uv venv --quiet --clear " in (CLUSTER / "tpu.sh").read_text()


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
    assert rule["containerName"] == container["name"]


# A Slurm of one node of two CPUs, of the user who runs the tests. A requeued job has KillWait to save, and
# waits for cred_expire.
SLURM = """
ClusterName=lm
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
FirstJobId={first}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=120
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
NodeName=localhost CPUs=2
PartitionName=all Nodes=localhost Default=YES
"""
DAEMONS = ("munged", "slurmctld", "slurmd")
EXPERIMENT = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({{
        "data": {{"path": ({path!r},), "tokenizer": "byte", "batch_size": 8}},
        "task": {{"length": 16}},
        "model": {{"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2}},
        "optim": {{"name": "sgd", "momentum": 0.9, "peak_lr": 0.1}},
        "mesh": {{"fsdp": 2}},
        "train": {{"num_steps": 600, "log_every_steps": 1}},
        "eval": {{"every_steps": 150, "max_tokens": 256}},
        "checkpoint": {{"every_steps": 50}},
    }}, type_safe=False)
"""


class Slurm:
    """A cluster of this machine, in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as one, socket.socket() as two:
            for each in (one, two):
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in (one, two)]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        # The port where the processes of a run meet is by the job's number.
        values = {"user": getpass.getuser(), "ports": ports, "first": os.getpid() % 4000 + 1}
        (folder / "slurm.conf").write_text(SLURM.format(folder=folder, **values))
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONPATH": str(ROOT),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "XLA_FLAGS": "",  # a device a process
        }

    @contextlib.contextmanager
    def started(self):
        """Run the daemons; end them, and all that they have started."""
        own = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{name}={self.folder}/munge.{end}" for name, end in own.items()]
        with contextlib.ExitStack() as stack:
            stack.callback(self._kill_all)
            self._daemon(stack, "munged", "--foreground", "--force", *files)
            self._daemon(stack, "slurmctld", "-D", "-c")
            self._daemon(stack, "slurmd", "-D", "-N", "localhost")
            self.until(lambda: "idle" in self.say("sinfo", "--noheader", check=False))
            yield self

    def _daemon(self, stack, *words):
        log = stack.enter_context((self.folder / f"{words[0]}.log").open("wb"))
        running = subprocess.Popen(
            words, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        stack.callback(running.wait)
        stack.callback(running.kill)

    def _kill_all(self):
        """Kill every process that has this Slurm in its environment."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()

        def left():
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if mark in (process / "environ").read_bytes().split(b"\0"):
                        yield int(process.name)

        while found := list(left()):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def say(self, *words, check=True):
        """Run a command of Slurm's in the folder; return its output."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.environment, cwd=self.folder
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def until(self, there, seconds=600, pause=0.1):
        end = time.monotonic() + seconds
        while not there():
            logs = (path.read_text() for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, "\n".join(logs)
            time.sleep(pause)

    def submit(self, experiment, *flags):
        """Submit a run of two processes; return its number."""
        said = self.say(
            "sbatch", "--parsable", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1",
            CLUSTER / "slurm.sh", "--config", experiment, *flags,
        )  # fmt: skip
        return int(said)

    def log(self, job):
        path = self.folder / f"lm-{job}.log"
        return path.read_text() if path.exists() else ""

    def workdir(self, job):
        return self.folder / "runs" / f"slurm-{job}"

    def wait_for_checkpoint(self, job, step):
        folder = self.workdir(job) / "checkpoints"
        saved = lambda path: int(path.parent.name) >= step  # noqa: E731
        self.until(lambda: any(map(saved, folder.glob("*/manifest.json"))))

    def resumed(self, job, starts):
        """Return the step at which each of the later starts of a job began, once there are as many."""
        steps = lambda: re.findall(r"resumed: at step (\d+)", self.log(job))  # noqa: E731
        self.until(lambda: len(steps()) == starts)
        return [int(step) for step in steps()]

    def kill(self, job, process):
        said = self.say("scontrol", "listpids", f"{job}.0")
        (pid,) = re.findall(rf"^(\d+) +\d+ +0 +{process} ", said, re.MULTILINE)
        os.kill(int(pid), signal.SIGKILL)

    def about(self, job, field):
        return re.search(rf"\b{field}=(\w+)", self.say("scontrol", "show", "job", str(job)))[1]

    def wait(self, job):
        """Wait for the end of a job; return (its state, its exit code, how often it was started again)."""
        ends = ("COMPLETED", "FAILED", "CANCELLED")
        self.until(lambda: self.about(job, "JobState") in ends, pause=1)
        return self.about(job, "JobState"), *(
            int(self.about(job, name)) for name in ("ExitCode", "Restarts")
        )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    paths = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in DAEMONS if not shutil.which(name, path=paths)]:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
    with Slurm(tmp_path_factory.mktemp("slurm")).started() as started:
        yield started


@pytest.fixture(scope="module")
def experiment(text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(EXPERIMENT.format(path=str(text_file)))
    return path


def numbers(workdir):
    """Return the rows of a run, but for its speed."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [untimed(row) for row in rows]


@pytest.mark.alone
@pytest.mark.slow
def test_stopped_requeued_and_killed_a_job_of_slurm_goes_on_to_the_same_bits(slurm, experiment):
    """By the signal before its time is over, by `scontrol requeue`, by the loss of a process."""
    job = slurm.submit(experiment)
    slurm.wait_for_checkpoint(job, 50)
    slurm.say("scancel", "--signal=TERM", str(job))  # to the processes alone, as --signal does
    slurm.wait_for_checkpoint(job, slurm.resumed(job, starts=1)[0] + 50)
    slurm.say("scontrol", "requeue", str(job))
    slurm.wait_for_checkpoint(job, slurm.resumed(job, starts=2)[1] + 50)
    slurm.kill(job, process=1)
    resumed = slurm.resumed(job, starts=3)
    assert slurm.wait(job) == ("COMPLETED", 0, 3), slurm.log(job)
    said = slurm.log(job)
    ends = re.findall(r"^start (\d+) ended with (\d+)$", said, re.MULTILINE)
    assert ends == [("0", "75"), ("1", "75"), ("2", "137"), ("3", "0")], said
    saved = [int(step) for step in re.findall(r"stopped at step (\d+), which is saved", said)]
    print(f"stopped at {saved}, resumed at {resumed}")
    assert resumed[:2] == saved and 50 <= saved[0] < saved[1] < resumed[2] < 600, said
    rows = numbers(slurm.workdir(job))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 601))
    whole = slurm.submit(experiment)
    assert slurm.wait(whole) == ("COMPLETED", 0, 0), slurm.log(whole)
    assert rows == numbers(slurm.workdir(whole))


@pytest.mark.alone
@pytest.mark.slow
def test_a_cancelled_job_of_slurm_is_saved_and_does_not_come_back(slurm, experiment):
    job = slurm.submit(experiment, "--config.train.num_steps=5000")
    slurm.wait_for_checkpoint(job, 50)
    slurm.say("scancel", str(job))
    slurm.until(lambda: "start 0 ended with 75" in slurm.log(job))
    assert slurm.wait(job)[::2] == ("CANCELLED", 0), slurm.log(job)
    assert "which is saved" in slurm.log(job)


@pytest.mark.alone
@pytest.mark.slow
def test_a_mistake_in_a_job_of_slurm_is_not_tried_again(slurm, experiment):
    job = slurm.submit(experiment, "--config.data.path=missing.txt")
    slurm.until(lambda: "start 0 ended with" in slurm.log(job))
    assert "start 0 ended with 2" in slurm.log(job), slurm.log(job)
    assert slurm.wait(job) == ("FAILED", 2, 0), slurm.log(job)
