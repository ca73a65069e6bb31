"""A run on a Ray cluster, a process on each node or GPU:

    pip install ray
    python tools/cluster/ray_run.py --processes 2 --gpus 8 -- --config mine.py --workdir /nfs/runs/one

From the repository's folder on a machine of the cluster (RAY_ADDRESS names another cluster). Ray copies the
folder to the nodes, where lm's packages must be installed; the workdir must be on a file system that all
see. What is given after -- goes to lm.main. A run that was stopped, or lost a process or a node, is started
again.
"""

import argparse
import os
import socket
import subprocess
import sys

import ray

# For a person: an error, a mistake, a divergence, no more data; no such program; Ctrl-C.
FINAL = (1, 2, 3, 4, 126, 127, 130)
KILLED = 128 + 9


class Process:
    """One process of the run, where Ray has room for it."""

    def address(self) -> str:
        """Return where the others find process 0."""
        with socket.socket() as free:
            free.bind(("", 0))
            host = ray.util.get_node_ip_address()
            return f"{f'[{host}]' if ':' in host else host}:{free.getsockname()[1]}"

    def run(self, index: int, count: int, address: str, flags: list[str]) -> int:
        """Run lm.main to its end; return its exit code."""
        who = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        words = [sys.executable, "-m", "lm.main", *flags]
        code = subprocess.call(words, env={**os.environ, **who})
        return code if code >= 0 else 128 - code


def attempt(args: argparse.Namespace, flags: list[str]) -> int:
    """Start every process once; return the exit code that says most."""
    options = {"num_gpus": args.gpus, "num_cpus": args.cpus}
    every = [ray.remote(Process).options(**options).remote() for _ in range(args.processes)]
    try:
        address = ray.get(every[0].address.remote())
        runs = [
            process.run.remote(index, args.processes, address, flags)
            for index, process in enumerate(every)
        ]
        codes = ray.get(runs)
    except ray.exceptions.RayError as error:  # its node is gone
        print(f"lost a process: {error}", file=sys.stderr)
        return KILLED
    finally:
        for process in every:
            ray.kill(process)
    return max([code for code in codes if code in FINAL] or codes)


def main() -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="of each process")
    parser.add_argument("--cpus", type=int, default=1, help="of each process")
    parser.add_argument("--attempts", type=int, default=100)
    parser.add_argument("flags", nargs="+", help="after --: flags of lm.main, --workdir among them")
    args = parser.parse_args()
    if not any(flag.startswith("--workdir") for flag in args.flags):
        parser.error("give --workdir, on a file system that all nodes see")
    ray.init(runtime_env={"working_dir": ".", "excludes": [".git", "runs"]})
    for number in range(args.attempts):
        code = attempt(args, args.flags)
        print(f"attempt {number} ended with {code}", flush=True)
        if code in (0, *FINAL):
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
