"""What the processes of a run say of each other, over a store that is a dictionary here."""

import importlib.util
import itertools
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lm import distributed, exits, peers
from lm.config import ConfigError


class Store:
    """Stands in for the client of jax's coordination service."""

    def __init__(self, count):
        self.values, self.meeting = {}, threading.Barrier(count)

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values, key
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(k, v) for k, v in dict(self.values).items() if k.startswith(f"{folder}/")]

    def blocking_key_value_get(self, key, timeout):
        return self.values[key]

    def wait_at_barrier(self, name, timeout):
        self.meeting.wait(20)


@pytest.fixture
def meet(monkeypatch):
    """Return a function that makes the peers of a run, each of which this process is in turn."""
    made = []

    def make(count, timeout):
        store = Store(count)
        monkeypatch.setattr(peers, "_runs", itertools.repeat(0))
        monkeypatch.setattr(peers.Peers, "_end", lambda *args: None)  # it would end the tests
        # Each is made in a thread of its own, because it waits for the others.
        states = [
            types.SimpleNamespace(
                client=store, process_id=i, num_processes=count, coordinator_address="host:1"
            )
            for i in range(count)
        ]
        local = threading.local()

        class Known:
            @property
            def global_state(self):
                return local.state

        monkeypatch.setattr(peers, "jax_distributed", Known())

        def one(state):
            local.state = state
            return peers.Peers(timeout)

        with ThreadPoolExecutor(count) as pool:
            made.extend(pool.map(one, states))
        return made[-count:]

    yield make
    for one in made:
        one._end = lambda *args: None  # a thread of its may still come to it
        one.close()


def together(every, work):
    """Do `work` as each of the processes at once; return what each raises."""

    def one(peer):
        try:
            work(peer)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(len(every)) as pool:
        return list(pool.map(one, every))


def until(question, seconds=10.0):
    end = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return answer


def test_who_differs_is_named_with_the_field(meet):
    every = meet(3, 15.0)
    facts = [{"optim.peak_lr": "0.1", "jax": "1"} for _ in every]
    facts[1]["optim.peak_lr"] = "0.2"
    said = together(every, lambda peer: peer.agree(facts[peer._index]))
    assert len(set(said)) == 1, "all are told the same"
    assert said[0].startswith("process 1 (") and "optim.peak_lr is 0.2, not 0.1" in said[0]
    assert "jax is" not in said[0]


def test_the_first_process_may_be_the_one_that_differs(meet):
    every = meet(3, 15.0)
    said = together(every, lambda peer: peer.agree({"x": "1" if peer._index else "2"}))
    assert said[0].startswith("process 0 (") and "x is 2, not 1" in said[0]


def test_agreement_is_silent(meet):
    assert together(meet(2, 15.0), lambda peer: peer.agree({"x": "1"})) == [None, None]


def test_a_process_that_others_wait_for_too_long_before_training_is_named(meet, monkeypatch):
    every, ended = meet(3, 15.0), []
    every[2].at("restoring", 0)
    until(lambda: every[0]._said(2) == ["restoring", 0])
    monkeypatch.setattr(peers.Peers, "_end", lambda self, why: ended.append((self._index, why)))
    every[0]._patience, every[1]._patience = 0.5, 0.0
    with ThreadPoolExecutor(3) as pool:
        first, second = (pool.submit(every[i].ready, "restored") for i in range(2))
        until(lambda: first.done())
        assert not second.done(), "of no patience's end"
        every[2].ready("restored")
    ((index, why),) = ended
    assert index == 0 and "process 2 (" in why and "restoring" in why and "process 1 (" not in why
    assert "not there in 0.5 s (train.compile_timeout_seconds)" in why


def test_a_silent_process_is_named_and_so_is_what_it_did(meet):
    every = meet(2, 15.0)
    every[1].at("training", 7)
    until(lambda: every[0]._said(1) == ["training", 7])
    assert not every[0]._lost(5.0)
    every[1].close()
    said = until(lambda: every[0]._lost(1.2))
    assert "process 1 (" in said and "not heard of for" in said and "training, step 7" in said


def test_a_process_that_leaves_is_named_with_its_reason(meet):
    every = meet(2, 15.0)
    every[1].leave(ConfigError("data.path: missing"))
    assert "process 1 (" in (said := until(lambda: every[0]._lost(15.0)))
    assert "has ended: ConfigError: data.path: missing" in said


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.path: missing"), 2),
        (TypeError("in the code"), 1),
        (OSError("no space"), exits.LOST),
        (KeyboardInterrupt(15), 143),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_what_would_fail_again_is_the_exit_code_of_all(meet, monkeypatch, error, code):
    """A cluster goes by the highest code, and starts a run that has lost a process again."""
    end, codes = peers.Peers._end, []
    every = meet(2, 15.0)
    monkeypatch.setattr(peers.Peers, "_lost", lambda *_: "")
    monkeypatch.setattr(peers.os, "_exit", codes.append)
    every[1].leave(error)
    until(lambda: every[0]._left)
    end(every[0], "why")
    assert codes == [code]


def test_a_step_that_does_not_end_shows_who_is_behind(meet, monkeypatch):
    every = meet(2, 15.0)
    for peer, doing in zip(every, ("training", "evaluating and saving"), strict=True):
        peer.at(doing, 9)
    until(lambda: every[0]._said(1)[1] == 9)
    assert not every[0]._stuck()
    for peer in every:
        peer._since -= 100
    assert "process 1 (" in (said := every[0]._stuck()) and "saving, step 9" in said
    assert not every[1]._stuck(), "an evaluation or a save may take long"


def test_a_process_that_still_compiles_is_waited_for(meet):
    """Its program may be new to it where another one has found its own in a cache."""
    every = meet(2, 15.0)
    every[0].at("training", 1)
    every[1].at("compiling", 0)
    until(lambda: every[0]._said(1) == ["compiling", 0])
    every[0]._since -= 100
    assert not every[0]._stuck()
    every[1].at("training", 1)
    assert until(every[0]._stuck)


def test_one_process_alone_waits_for_nobody():
    with peers.watch(1.0) as alone:
        alone.agree({"x": "1"})
        alone.ready("x")
        alone.at("training", 1)
        with alone.first_first("x"):
            pass
    assert distributed.from_first("x") == "x"
    assert not distributed.start()


def test_environment_variables_are_checked(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES=two"):
        distributed.start()


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(("tasks", "joins"), [("1", False), ("2", True)])
def test_a_cluster_of_one_is_no_cluster(monkeypatch, tasks, joins):
    for name, value in {**SLURM, "SLURM_NTASKS": tasks}.items():
        monkeypatch.setenv(name, value)
    assert distributed.clustered() == joins
    assert not distributed.start(num_processes=1), "asked to be alone in any cluster"


def test_time_in_which_a_process_was_stopped_is_no_silence(monkeypatch):
    """Of a job that is suspended as a whole every process is stopped, and none is lost."""
    now = [100.0]

    def wait(seconds):
        now[0] += seconds + 900
        return False

    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    one = object.__new__(peers.Peers)
    one._closed = types.SimpleNamespace(wait=wait)
    one._pause, one._index, one._left, one._coordinator = 1.0, 0, {}, "host:1"
    one._since = one._answered = now[0]
    one._heard = {number: (now[0], ["training", 3]) for number in range(2)}
    assert not one._waited(0.5)
    assert one._lost(10.0) == "" and now[0] - one._since < 1
    now[0] += 20
    assert "no answer from host:1, at process 0, for 20 s" in one._lost(10.0)


def test_several_that_do_not_know_where_the_others_are():
    with pytest.raises(
        ConfigError, match=r"--num_processes=2: where .* give --coordinator_address"
    ):
        distributed.start(num_processes=2, process_id=0)
    for address in ("10.0.0.1", "host:abc", ":1"):
        with pytest.raises(ConfigError, match=rf"--coordinator_address={address}: no port"):
            distributed.start(address, 2, 0)


def test_open_mpi_5_takes_mpi4py(monkeypatch):
    """jax asks mpi4py only where it is told to: else each process would train alone."""
    joined: list = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **how: joined.append(how))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"OMPI_COMM_WORLD_SIZE=2: .* takes mpi4py; install it"):
        distributed.start()
    assert not distributed.start(num_processes=1) and not joined
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "mpi4py" or find(name))
    monkeypatch.setattr(distributed, "_joined", False)
    monkeypatch.setattr(distributed.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert distributed.start() and joined[0]["cluster_detection_method"] == "mpi4py"


def test_a_pod_that_is_no_part_of_an_indexed_job_is_alone_or_of_what_runs_in_it(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert not distributed.clustered()
    for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.clustered()


@pytest.mark.parametrize(
    ("package", "why"),
    [(None, "it takes the package kubernetes"), ("no rights\nto read pods", "no rights")],
)
def test_an_indexed_job_that_cannot_ask_who_it_is_is_refused(monkeypatch, package, why):
    """Else each of its pods would train alone, into the same folder."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    find = importlib.util.find_spec

    def spec(name):
        return package and find("json") if name == "kubernetes" else find(name)

    def fails(*_):
        raise RuntimeError(package)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr("jax._src.clusters.k8s_cluster.K8sCluster.is_env_present", fails)
    with pytest.raises(ConfigError, match=f"cannot find .*: .*{why}; give --coordinator_address"):
        distributed.start()
    assert not distributed.start(num_processes=1)


def test_who_is_told_all_asks_no_cluster_of_pods(monkeypatch):
    joined: list = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **how: joined.append(how))
    monkeypatch.setattr(distributed, "_joined", False)
    monkeypatch.setattr(distributed.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert distributed.start("host:1", 2, 1)
    assert joined[0]["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("visible", "tasks", "own"),
    [
        ("", "2", None),  # as jax decides
        ("", "1(x2)", [0, 1, 2, 3, 4, 5, 6, 7]),  # all that the host has
        ("0,1", "4(x2)", [0, 1]),  # the cluster shows each task two GPUs, and says so
        ("3", "4(x2)", [0]),  # the cluster shows each task one GPU
        ("0,1,2,3", "1(x2)", [0, 1, 2, 3]),  # a task has its host for itself
        ("0,1,2,3", "4(x2)", None),  # jax takes the one of the task's number
    ],
)
def test_which_gpus_are_a_task_s_own(monkeypatch, visible, tasks, own):
    there = [Path(f"/dev/nvidia{number}") for number in range(8)]
    monkeypatch.setattr(Path, "glob", lambda *_: there)
    environment = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_STEP_TASKS_PER_NODE": tasks}
    environment |= {"SLURM_GPUS_PER_TASK": "a100:2"}
    assert distributed.local_devices(environment) == own
    assert distributed.local_devices({**environment, "JAX_PLATFORMS": "cpu"}) is None


def test_a_process_that_has_failed_ends_also_where_a_thread_does_not():
    code = (
        "import threading; threading.Thread(target=threading.Event().wait).start();"
        "from lm import distributed; distributed.END_SECONDS = 1; distributed.leave(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 2


def test_tasks_that_see_fewer_gpus_than_they_are_are_refused():
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=0,1: 4 tasks .* see 2 GPUs; give"):
        distributed.local_devices(environment)
