"""Joining the processes of a run, on one host or many: who they are, and the service that they meet at.

Flags or the environment say so (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`: what
`tools.launch` sets), else a cluster that jax knows: Slurm, Open MPI, Kubernetes, TPU. A process that is
alone touches nothing of this.

The service is a process of its own beside process 0. jax runs it inside, and every other process is then
aborted by its C++ client in the moment in which process 0 dies, before a word can be said of why.

Imports of jax are inside functions: a command knows this file before it knows whether it needs jax.
"""

import contextlib
import faulthandler
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm import exits
from lm.config import ConfigError

START_SECONDS = 60  # least time to wait for the other processes to start
NOWHERE = "where the others are is not known; give --coordinator_address, HOST:PORT of process 0"
GIVE = (
    "give --coordinator_address, --num_processes and --process_id, or their environment variables"
)
END_SECONDS = 60  # that a process which has failed may take to end
LONGEST = 10**8  # seconds that are for ever, and that jax can count and a thread wait
IN_POD = "KUBERNETES_SERVICE_HOST"  # Kubernetes sets it
FOREVER = 1000 * 86400 * 7  # milliseconds: who is missing is found by `lm.peers`, not by this
_joined = False
_asked = itertools.count()
_SERVICE = "get_distributed_runtime_service"
_ESTABLISHED = "01"  # in /proc/net/tcp


def start(
    coordinator_address: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
) -> bool:
    """Join the other processes of this run, if there are any; return whether there are.

    Arguments that are not given are those of the environment, else of the cluster. Before any use of a
    device. All but the first process lose their standard output: the first speaks for all. `timeout` is in
    seconds, as of `lm.peers.watch`.

    Raises:
      ConfigError: who this process is, or where the others are, is not known. Where the others do not come
        in time, this process ends.
    """
    global _joined
    import jax
    from jax._src import distributed as jax_distributed

    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = _number("num_processes", num_processes)
    index = _number("process_id", process_id)
    if not address and (count == 1 or not clustered()):
        if (count or 1) > 1:
            raise ConfigError(f"--num_processes={count}: {NOWHERE}")
        return False
    if address and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"--coordinator_address={address}: no port; write HOST:PORT")
    # jax's own end of a process that is not heard of comes after ours, which says who that is.
    patience = int(min(max(START_SECONDS, timeout), LONGEST))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    method = None if address else _method()
    if address and IN_POD in os.environ and None not in (count, index):
        method = "deactivate"  # all is known: jax would ask Kubernetes all the same
    inside = getattr(jax_distributed._jax, _SERVICE)
    setattr(jax_distributed._jax, _SERVICE, _Service)
    try:
        with deadline(patience):  # jax's own is an abort from C++
            jax.distributed.initialize(
                address or None,
                count,
                index,
                local_device_ids=local_devices(os.environ),
                initialization_timeout=patience + 60,
                heartbeat_timeout_seconds=2 * patience + 60,
                cluster_detection_method=method,
            )
    except (ValueError, RuntimeError, TypeError) as error:
        why = exits.line(error).rstrip(".")
        raise ConfigError(f"cannot join the other processes: {why}; {GIVE}") from None
    finally:
        setattr(jax_distributed._jax, _SERVICE, inside)
    _joined = True
    faulthandler.enable()  # of what C++ aborts, the stacks
    if jax_distributed.global_state.process_id > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    return True


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process where what is inside, in which it waits for the others, takes longer."""
    seconds = min(seconds, LONGEST)
    alarm = threading.Timer(seconds, _give_up, (seconds,))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _give_up(seconds: float) -> None:
    """End this process, which waits for others that do not come."""
    from jax._src import distributed as jax_distributed

    known = jax_distributed.global_state
    print(
        f"error: process {known.process_id} of {known.num_processes}: the others did not come to "
        f"{known.coordinator_address} in {seconds:g} s; start all of them, with the same address and number "
        "of processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(exits.LOST)


def _number(name: str, given: int | None) -> int | None:
    """Return a flag's value, or that of its environment variable."""
    text = os.environ.get(f"JAX_{name.upper()}", "")
    if given is None and text and not text.isdecimal():
        raise ConfigError(f"JAX_{name.upper()}={text}: use a number")
    return given if given is not None or not text else int(text)


def clustered() -> bool:
    """Return whether a cluster that jax knows has started this process as one of several."""
    from jax._src.clusters import ClusterEnv

    if _method():
        return True
    for cluster in ClusterEnv._cluster_types:
        # In a pod jax asks the cluster who it is, which only one of an indexed job can know.
        of_pods = cluster.__name__ == "K8sCluster" and IN_POD in os.environ
        if cluster.opt_in_only_method or (of_pods and "JOB_COMPLETION_INDEX" not in os.environ):
            continue
        try:
            if of_pods and importlib.util.find_spec("kubernetes") is None:
                raise ModuleNotFoundError("in an indexed Job it takes the package kubernetes")
            if cluster.is_env_present():
                return cluster.get_process_count() > 1
        except Exception as error:  # the package's own, as of a pod without rights
            why = exits.line(error).rstrip(".")
            raise ConfigError(
                f"cannot find the other processes: {why}; {GIVE}, or --num_processes=1 to train alone"
            ) from None
    return False


def _method() -> str | None:
    """Return how jax is to look for the others where it has to be told: mpi4py, under Open MPI 5.

    Raises ConfigError where there is none: else each process would train alone.
    """
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size == "1" or "OMPI_MCA_orte_hnp_uri" in os.environ:
        return None
    if importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            f"OMPI_COMM_WORLD_SIZE={size}: to join the other processes of Open MPI 5 takes mpi4py; install "
            f"it, or {GIVE}"
        )
    return "mpi4py"


def local_devices(environment: Any) -> list[int] | None:
    """Return which of the GPUs that this process sees are its own; None = as jax decides.

    Under Slurm and Open MPI jax takes the one of the task's number on its host. That is wrong where the
    cluster shows each task only its own GPUs, and where a host has one task.

    Raises ConfigError where several tasks see fewer GPUs than they are.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if "JAX_LOCAL_DEVICE_IDS" in environment or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    number = visible.count(",") + 1 if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get(
        "OMPI_COMM_WORLD_LOCAL_SIZE", ""
    )
    tasks = tasks.partition("(")[0]
    asked = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # as 2 or a100:2
    if number and (tasks == "1" or (visible and (number == 1 or asked == str(number)))):
        return list(range(number))
    if visible and tasks.isdecimal() and number < int(tasks):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible}: {tasks} tasks on this host see {number} GPUs; give each its "
            "own (--gpus-per-task), or start no more tasks than GPUs"
        )
    return None


class _Service:
    """jax's coordination service in a process of its own, which outlives this one until all have left."""

    def __init__(self, address: str, num_processes: int, **options: Any):
        asked = json.dumps([address, num_processes, options])
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({asked!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the coordination service does not start on {address}")

    def shutdown(self) -> None:
        """End the service: every process has left it."""
        self._process.communicate(b"end")


def serve(asked: str) -> None:
    """Serve until process 0 says that it ends, or is gone and no other process is connected.

    Then it is no longer than all need to find out: a host that is lost leaves its connection open.
    """
    import jaxlib._jax as _jax  # type: ignore[import-untyped]

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for those who train
        signal.signal(number, signal.SIG_IGN)
    address, num_processes, options = json.loads(asked)
    try:
        service = getattr(_jax, _SERVICE)(address, num_processes, **options)
    except Exception:  # which process 0 tells
        os._exit(1)
    os.write(1, b"ready\n")
    end = os.read(0, 3)
    port = int(address.rpartition(":")[2])
    last = time.monotonic() + options.get("heartbeat_timeout", 0)
    while not end and _connected(port) and time.monotonic() < last:
        time.sleep(1)
    if end:
        service.shutdown()
    os._exit(0)


def _connected(port: int) -> bool:
    """Return whether anybody is connected to the local TCP `port` (as Linux shows it)."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        path = Path(table)
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        for line in lines:
            _, local, _, state, *_ = line.split()
            if state == _ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def from_first(value: str) -> str:
    """Return the value of process 0 to every process, which all ask in the same order."""
    from jax._src import distributed as jax_distributed

    known, key = jax_distributed.global_state, f"lm/first/{next(_asked)}"
    if known.client is None:
        return value
    if known.process_id == 0:
        known.client.key_value_set(key, value)
        return value
    return known.client.blocking_key_value_get(key, FOREVER)


def from_all(value: str) -> list[str]:
    """Return the values of all processes to every one, which all ask in the same order."""
    from jax._src import distributed as jax_distributed

    known, key = jax_distributed.global_state, f"lm/all/{next(_asked)}"
    if known.client is None:
        return [value]
    known.client.key_value_set(f"{key}/{known.process_id}", value)
    everyone = range(known.num_processes)
    return [known.client.blocking_key_value_get(f"{key}/{i}", FOREVER) for i in everyone]


def meet(place: str, failed: str) -> None:
    """Wait until every process has come to `place`, a name of this one time.

    Raises OSError, in a line, where one has told its end of that under `failed` (see `tell`).
    """
    from jax._src import distributed as jax_distributed

    known, pause = jax_distributed.global_state, 0.02
    known.client.key_value_set(f"{place}/{known.process_id}", "here")
    while len(known.client.key_value_dir_get(place)) < known.num_processes:
        if told := known.client.key_value_dir_get(failed):
            raise OSError(told[0][1])
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def tell(failed: str, why: str) -> None:
    """Tell those who `meet`, or will, that this process does not come."""
    import jax
    from jax._src import distributed as jax_distributed

    if (known := jax_distributed.global_state).client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told already
            known.client.key_value_set(f"{failed}/{known.process_id}", why)


def forget(name: str) -> None:
    """Take from the store, in the first process, what lies under `name`."""
    import jax
    from jax._src import distributed as jax_distributed

    if (known := jax_distributed.global_state).client is not None and known.process_id == 0:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            known.client.key_value_delete(f"{name}/")


def leave(code: int) -> None:
    """End this process. One of several that fails ends at once: an orderly end waits for the others."""
    if _joined and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        # Threads of libraries that have failed may never end, and Python waits for them.
        last = threading.Timer(END_SECONDS, os._exit, (code,))
        last.daemon = True
        with contextlib.suppress(RuntimeError):  # no more threads
            last.start()
    sys.exit(code)
