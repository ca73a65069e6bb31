"""This project's side of the benchmark: its own training step, loop and generation, on random tokens.

`bench` starts this as a process and calls `Ours`.
"""

import contextlib
import dataclasses
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from lm import startup

startup.prepare()

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm import config as config_lib
from lm import distributed, experiment, generate, hardware, models, placement, sharding, step, train
from lm.data import corpus, external
from lm.data.tokenizers import Tokenizer
from tools import bench, bench_pipe

PROMPT = 16  # tokens that generation continues
NUM_BATCHES = 4  # different batches that the bare step is fed, all on the device
VOCAB_SIZES = {"byte": 257, "char": 65}  # of tokenizers that data.vocab_size says nothing of
DOCUMENT = 500  # tokens of a synthetic document


class Numbers(Tokenizer):
    """Token ids that stand for themselves."""

    name = "synthetic"

    def __init__(self, vocab_size: int):
        self.vocab_size, self.end_of_text, self.stop_tokens = vocab_size, 0, (0,)
        self.token_bytes = np.minimum(np.arange(vocab_size, dtype=np.int32), 1)
        self.fingerprint = f"synthetic {vocab_size}"

    def decode(self, ids) -> str:
        """Return the ids in words."""
        return " ".join(map(str, ids))


def synthetic_corpus(vocab_size: int, num_tokens: int) -> corpus.Corpus:
    """Return a corpus of random tokens: `num_tokens` to train, and a tenth of that to validate."""
    rng = np.random.default_rng(0)

    def split(name: str, size: int) -> corpus.Split:
        documents = -(-size // DOCUMENT)
        tokens = rng.integers(1, vocab_size, documents * DOCUMENT + 1, dtype=np.int32)
        starts = np.arange(documents) * DOCUMENT
        tokens[starts] = tokens[-1] = 0
        return corpus.Split(name, tokens, starts, size)

    train_split, validation = split("train", num_tokens), split("validation", num_tokens // 10)
    counts = {
        part.name: {"documents": len(part.starts), "tokens": len(part.tokens) - 1}
        for part in (train_split, validation)
    }
    sizes = {"source": "synthetic", "bytes": num_tokens, "replaced": 0, "empty_documents": 0}
    sizes |= {"labels": [], "paired": False, "split": "synthetic"}
    return corpus.Corpus(
        Numbers(vocab_size), train_split, validation, "synthetic", {**sizes, **counts}
    )


@contextlib.contextmanager
def synthetic_data(vocab_size: int, num_tokens: int) -> Iterator[None]:
    """Give every experiment that is built a corpus of random tokens instead of its own."""
    made = synthetic_corpus(vocab_size, num_tokens)
    with mock.patch.object(corpus, "build", lambda cfg: made):
        yield


class Ours:
    """One experiment, trained or decoded."""

    def prepare(self, *, config: str, decode: bool, started: float) -> dict[str, Any]:
        """Build the experiment of the JSON `config`, compile it, take a step, and say what it is.

        `started` is the time in seconds since the epoch that the time to the first step counts from.
        """
        self.config = config_lib.from_json(config)
        said = experiment.prepare(self.config)
        distributed.start()  # where there are several of this process
        with self._data():
            self.made = made = experiment.build(self.config)
        cfg = made.cfg["model"]
        sheet = hardware.data_sheet_flops()
        facts: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(),
            "devices": made.mesh.size,
            "jax": jax.__version__,
            "flags": said,
            "parameters": step.count_parameters(made.shapes),
            "data_sheet_flops": sheet and sheet * made.mesh.size,
            "shape": self._shape(),
            "optim": dataclasses.asdict(made.cfg["optim"]),
        }
        if decode:
            # Every weight is read for a token, but those of tables that are only looked up in.
            weights = models.flops_per_token(cfg, 0) / 6
            self._prepare_decode()
            return {**facts, "weights": weights, "first_step_s": time.time() - started}
        scored = made.tokens_per_step / made.positions_per_step
        lengths = (made.task.row_length, 0)
        full, empty = (models.flops_per_token(cfg, length, scored) for length in lengths)
        full, empty = full / scored, empty / scored  # of a token that is scored
        if made.task.source_length:  # of no target at all the source is still read
            empty = full
        facts |= {
            "flops_full": full,
            "flops_half": (full + empty) / 2,  # causal attention counted as what it needs
            "tokens_per_step": made.tokens_per_step,
        }
        facts |= self._prepare_training()
        return {**facts, "first_step_s": time.time() - started}

    def _data(self):
        config = config_lib.complete(self.config, experiment.SCHEMA)
        data, rows = config.data, config.data.batch_size * bench.row_tokens(config)
        vocab_size = config.model.get("vocab_size") or VOCAB_SIZES.get(data.tokenizer)
        if not vocab_size and data.tokenizer == "file":
            vocab_size = external.open_tokenizer(data.tokenizer_path).vocab_size
        return synthetic_data(vocab_size or data.vocab_size, max(NUM_BATCHES * rows, 100_000))

    def _shape(self) -> dict[str, Any]:
        """Return what a peer needs to know: the model's fields, and of the task and the batch."""
        made, cfg = self.made, self.made.cfg["model"]
        return {
            **dataclasses.asdict(cfg),
            **getattr(cfg, "sizes", {}),
            "family": cfg.name,
            "stateful": made.stateful,
            "source_length": made.task.source_length,
            "max_scored": made.task.max_scored,
            "length": made.task.row_length,
            "rows": made.cfg["data"].batch_size,
            "accumulate_steps": made.cfg["train"].accumulate_steps,
            "prompt": PROMPT,
        }

    def _prepare_training(self) -> dict[str, Any]:
        with sharding.use(self.made.mesh):
            init, train_step, _, _ = experiment.jitted(self.made)
            self.state = init()
            self.batches = [
                placement.place_batch(self.made.mesh, self.made.batches[i])
                for i in range(NUM_BATCHES)
            ]
            start = time.perf_counter()
            if self.made.cfg[
                "train"
            ].exact_reduction:  # several programs, which the first step compiles
                self.step = train_step
                self.run(steps=1)
                compiled = time.perf_counter() - start
                return {"trace_s": 0.0, "compile_s": compiled, "temporary_bytes": None}
            lowered = train_step.lower(self.state, self.batches[0])  # type: ignore[attr-defined]
            traced = time.perf_counter()
            self.step = program = lowered.compile()
            compiled = time.perf_counter()
        self.run(steps=1)
        memory = program.memory_analysis()
        return {
            "trace_s": traced - start,
            "compile_s": compiled - traced,
            "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        }

    def run(self, *, steps: int) -> float:
        """Return the seconds that `steps` bare training steps take, two at once as in the loop."""
        start, before = time.perf_counter(), None
        with sharding.use(self.made.mesh):
            for index in range(steps):
                self.state, sums = self.step(self.state, self.batches[index % NUM_BATCHES])
                jax.block_until_ready(before)
                before = sums
        jax.block_until_ready(self.state)
        return time.perf_counter() - start

    def _prepare_decode(self) -> None:
        init = step.init_variables
        self.params = nn.unbox(
            jax.jit(lambda: init(self.made.model, jax.random.key(0))["params"])()
        )
        self.decode(steps=1)

    def decode(self, *, steps: int) -> float:
        """Return the seconds that continuing one prompt by `steps` tokens takes, greedily."""
        prompt = self.made.batches[0]["inputs"][0, :PROMPT].tolist()
        start = time.perf_counter()
        (row,) = generate.generate(self.made.model, self.params, [prompt], max_tokens=steps)
        assert len(row) == steps
        return time.perf_counter() - start

    def gemm(self) -> float:
        """Return the FLOP/s of this process in a matrix product of the model's type of computation."""
        on_cpu = jax.default_backend() == "cpu"
        dtype = hardware.compute_dtype(getattr(self.made.cfg["model"], "dtype", "float32"))
        rate = hardware.measure_matmul_flops((2048 if on_cpu else 8192,), seconds=0.3, dtype=dtype)
        # Devices of a CPU share its cores.
        return rate if on_cpu else rate * len(self.made.mesh.local_devices)

    def bandwidth(self) -> float:
        """Return the bytes a second that one device reads from memory: the best of two ways."""
        rows, columns = 4096, 2**15
        matrix = jnp.ones((rows, columns), jnp.float32)
        ways = [
            (jax.jit(lambda x: x[:1, :rows] @ x), matrix.nbytes),
            (jax.jit(lambda x: x + 1), 2 * matrix.nbytes),
        ]
        rates = []
        for function, num_bytes in ways:
            function(matrix).block_until_ready()
            for _ in range(5):
                start = time.perf_counter()
                function(matrix).block_until_ready()
                rates.append(num_bytes / (time.perf_counter() - start))
        return max(rates)

    def peak_bytes(self) -> int:
        """Return the most memory in use so far: the device's, or the process's on a CPU."""
        stats = jax.local_devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"]
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def loop(self, *, steps: int, rounds: int) -> list[list[float]]:
        """Return [seconds of the loop, seconds of the bare step] for `steps` updates, each round.

        `train.run` itself runs, with its writers, and is stopped by turns for as many bare steps.
        """
        self.state = None
        turns = Turns(steps)
        config = config_lib.complete(self.config, experiment.SCHEMA)
        config.train.update(num_steps=steps * (rounds + 1) + 1, sample_tokens=0, init_from="")
        config.train.update(profile_steps=0, compilation_cache=False, wandb_project="")
        config.train.update(vectors="", freeze_vectors=False)
        config.optim.update(schedule="constant", warmup=0)  # its durations may be longer than this
        config.eval.update(every_steps="100%", max_tokens=1)
        config.checkpoint.update(every_steps="100%", remote="", remote_every=0)
        real = experiment.jitted

        def jitted(made):
            init, train_step, eval_step, abstract = real(made)
            return init, turns.wrap(train_step), eval_step, abstract

        with (
            self._data(),
            mock.patch.object(experiment, "jitted", jitted),
            tempfile.TemporaryDirectory() as folder,
        ):
            train.run(config, folder)  # what it prints goes to the error stream
        return turns.seconds


class Turns:
    """A training step that takes `steps` more steps by itself after every `steps` calls."""

    def __init__(self, steps: int):
        self.seconds: list[list[float]] = []
        self._steps, self._calls, self._start = steps, 0, 0.0

    def wrap(self, train_step):
        """Return `train_step` so changed; its first `steps` calls warm up and count nothing."""

        def call(state, batch):
            if self._calls and self._calls % self._steps == 0:
                state = self._bare(train_step, state, batch)
            self._calls += 1
            return train_step(state, batch)

        return call

    def _bare(self, train_step, state, batch):
        jax.block_until_ready(state)
        looped = time.perf_counter() - self._start
        start = time.perf_counter()
        for _ in range(self._steps):
            state, _ = train_step(state, batch)
        jax.block_until_ready(state)
        bare = time.perf_counter() - start
        if self._calls > self._steps:
            self.seconds.append([looped, bare])
        self._start = time.perf_counter()
        return state


if __name__ == "__main__":
    bench_pipe.serve(Ours())
