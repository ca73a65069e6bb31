"""Turns are taken in order, ratios are of rounds, and mistakes end with one line and exit code 2."""

import json
import os
import shutil
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import experiment, models, optim, tasks
from lm.config import ConfigError
from lm.data import corpus, pipeline, tokenizers
from lm.tasks import causal_lm
from tools import bench, bench_alike, bench_mesh, bench_ours, bench_pipe, bench_processes

EXPERIMENT = "experiments/gpt2_small.py"
TINY = {
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.vocab_size": 65,
    "task.length": 32,
    "data.batch_size": 2,
    "train.accumulate_steps": 1,
}

GPT2 = [
    f"--config.model.{key}={value}"
    for key, (value, *_) in bench_alike.ALIKE["gpt"].items()
    if key not in ("matmul_dtype", "bias_in")
]


def flags(**more):
    return [f"--config.{key}={value}" for key, value in {**TINY, **more}.items()]


def test_turns_alternate_and_the_first_round_does_not_count():
    taken = []
    turns = {name: lambda name=name: taken.append(name) or len(taken) for name in "ab"}
    assert bench.take_turns(turns, 2) == {"a": [3, 5], "b": [4, 6]}
    assert taken == list("ababab")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([1.0, 2.0, 3.0, 4.0, 100.0], (3, 2, 4)), ([2.0, 1.0], (1.5, 1.25, 1.75))],
)
def test_spread_is_median_and_quartiles(values, expected):
    assert bench.spread(values) == pytest.approx(expected)


def test_the_ratio_is_the_median_over_rounds_against_the_fastest_mode():
    report = {
        "steps_per_turn": 1,
        "decode": False,
        # A slow second round is slow for all: separate medians would say 3 / 2.
        "seconds": {"ours": [1.0, 10.0, 2.0], "slow": [9.0, 90.0, 9.0], "fast": [2.0, 20.0, 3.0]},
        "peer": {
            "name": "other",
            "library": "other 1",
            "parameters": 2,
            "peak_bytes": 3,
            "modes": {"slow": 1.0, "fast": 2.0},
        },
    }
    lines = bench._comparison(report)
    assert lines[-2].split() == ["by", "round", "2.00", "2.00", "1.50"]
    assert lines[-1].split()[:2] == ["ratio", "2"]
    assert lines[-1].endswith("its fastest, fast")


@pytest.mark.parametrize(
    ("experiment", "fields"),
    [
        (
            "bert_small",
            {"task.next_sentence": False, "model.next_sentence": False, "optim.name": "adamw"},
        ),
        ("t5_small", {"task.source_length": 32, "optim.name": "adamw"}),
    ],
)
def test_a_task_of_any_kind_is_measured(experiment, fields):
    small = {"model.num_layers": 1, "model.model_dim": 32, "model.num_heads": 2, **fields}
    small |= {"data.batch_size": 8, "data.vocab_size": 300}
    args = types.SimpleNamespace(
        config=f"experiments/{experiment}.py", peer="transformers", decode=False, steps=1
    )
    config = bench.checked_config(args, [f"{k}={v}" for k, v in small.items()])
    ours = bench_ours.Ours()
    facts = ours.prepare(config=config_lib.to_json(config), decode=False, started=0.0)
    shape = facts["shape"]
    assert facts["tokens_per_step"] == 8 * shape["max_scored"] > 0
    assert facts["flops_full"] == pytest.approx(
        models.flops_per_token(
            ours.made.cfg["model"], shape["length"], shape["max_scored"] / shape["length"]
        )
        * (shape["length"] / shape["max_scored"])
    )
    assert ours.run(steps=2) > 0


def test_the_flags_of_a_mesh_are_those_of_training(monkeypatch):
    monkeypatch.setattr("lm.startup.platform", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    ours = bench_ours.Ours()
    monkeypatch.setattr(bench_ours.distributed, "start", lambda: 1 / 0)  # it is enough
    with pytest.raises(ZeroDivisionError):
        ours.prepare(config='{"mesh": {"data": 2}}', decode=False, started=0.0)
    assert "latency_hiding_scheduler" in os.environ["XLA_FLAGS"]


def test_a_tokenizer_of_a_file_has_its_own_size(tmp_path):
    tokenizers.Byte().save(tmp_path)
    ours = bench_ours.Ours()
    data = {"tokenizer": "file", "tokenizer_path": str(tmp_path), "vocab_size": 4096}
    ours.config = ConfigDict({"data": data})
    with ours._data():
        assert corpus.build(None).tokenizer.vocab_size == 257


def test_the_loop_touches_nothing_of_the_run_and_has_a_schedule_as_short(monkeypatch):
    ran = []
    monkeypatch.setattr(bench_ours.train, "run", lambda config, folder: ran.append(config))
    ours = bench_ours.Ours()
    ours.config = config_lib.override(
        config_lib.load(EXPERIMENT),
        [
            *("checkpoint.remote=gs://bucket/mine", "checkpoint.remote_every=500"),
            *("train.wandb_project=mine", "train.vectors=a.txt", "train.freeze_vectors=True"),
            *("optim.schedule=wsd", "optim.warmup=100", "optim.decay=100"),
        ],
        experiment.SCHEMA,
    )
    ours.loop(steps=2, rounds=1)
    cfg = experiment.freeze(ran[0])
    assert not (cfg["checkpoint"].remote or cfg["checkpoint"].remote_every)
    assert not (cfg["train"].wandb_project or cfg["train"].vectors or cfg["train"].freeze_vectors)
    steps = lambda duration, field: config_lib.to_steps(  # noqa: E731
        duration, field=field, tokens_per_step=1, steps_per_epoch=1, num_steps=5
    )
    optim.build_schedule(cfg["optim"], num_steps=cfg["train"].num_steps, to_steps=steps)


@pytest.mark.parametrize(("dtype", "expected"), [("", "bfloat16"), ("float32", "float32")])
def test_a_product_is_of_the_models_type_on_the_devices_of_the_process(
    dtype, expected, monkeypatch
):
    asked = []
    monkeypatch.setattr(bench_ours.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        bench_ours.hardware,
        "measure_matmul_flops",
        lambda sizes, *, seconds, dtype: asked.append(dtype) or 10.0,
    )
    ours = bench_ours.Ours()
    ours.made = types.SimpleNamespace(
        cfg={"model": types.SimpleNamespace(dtype=dtype)},
        mesh=types.SimpleNamespace(size=8, local_devices=[0, 1]),  # of four processes
    )
    assert ours.gemm() == 20.0
    assert asked == [expected]


class Measured:
    """Stands for our side: a loop that fails, and memory that the limit takes."""

    def __init__(self):
        self.peak = 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, method, **arguments):
        if method == "loop":
            raise bench_pipe.SideError("ConfigError: no such place")
        self.peak = {"run": max(2, self.peak), "gemm": 9}.get(method, self.peak)
        return {"prepare": {}, "peak_bytes": self.peak}.get(method, 1.0)


def test_what_was_measured_is_told_without_a_loop_and_memory_without_the_limits(
    monkeypatch, capsys
):
    monkeypatch.setattr(bench, "_started", lambda *args, **environment: Measured())
    args = types.SimpleNamespace(
        peer=None, peer_python=None, processes=1, decode=False, steps=1, rounds=2
    )
    report = bench.measure(ConfigDict(), args)
    assert report["seconds"] == {"ours": [1.0, 1.0]} and "loop" not in report
    assert "no such place" in capsys.readouterr().out
    assert report["ours"]["peak_bytes"] == 2


def test_a_mode_that_the_peer_has_not_is_named():
    args = types.SimpleNamespace(
        peer="flax", peer_modes=["eager"], processes=1, decode=False, steps=1
    )
    peer = types.SimpleNamespace(call=lambda method, **arguments: {"modes": ["jit"]})
    facts = {"devices": 1, "backend": "cpu", "shape": {}, "optim": {}}
    with pytest.raises(ConfigError, match=r"eager: --peer=flax has no such mode; use some of jit"):
        bench._prepare_peer(peer, facts, args)


def test_a_mesh_has_some_of_the_gpus_that_are_given(monkeypatch):
    started = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    class Side(Measured):
        def __init__(self, module, **environment):
            super().__init__()
            started.append(environment)

        def call(self, method, **arguments):
            facts = {"device": "some", "jax": "1", "shape": {}, "flags": ["XLA_FLAGS: --x=1"]}
            return facts if method == "prepare" else 1.0

    monkeypatch.setattr(bench_mesh, "Side", Side)
    said = bench_mesh.measure(ConfigDict(), ["data=2"], steps=1, rounds=1)
    assert said.count("XLA_FLAGS: --x=1") == 2
    assert [own["CUDA_VISIBLE_DEVICES"] for own in started] == ["4", "4,6"]
    assert {own["XLA_PYTHON_CLIENT_PREALLOCATE"] for own in started} == {"false"}


def test_a_bubble_is_of_the_rows_of_a_device():
    shape = {"rows": 32, "accumulate_steps": 1, "microbatches": 0, "stage_repeats": 1}
    for axis in ("dcn", "data", "fsdp", "expert"):
        said = bench_mesh._bubble(shape, {"stage": 2, axis: 8})
        assert said.startswith("; 4 parts"), axis


def test_bare_steps_follow_as_many_of_the_loop(monkeypatch):
    clock, steps = [0.0], []
    monkeypatch.setattr(bench_ours, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(state, batch):
        clock[0] += 1.0
        steps.append(state)
        return state + 1, {}

    turns = bench_ours.Turns(2)
    wrapped, state = turns.wrap(step), 0
    for _ in range(7):
        state, _ = wrapped(state, None)
        clock[0] += 0.5  # what the loop adds
    assert turns.seconds == [[3.0, 2.0], [3.0, 2.0]]  # the first two calls only warm up
    assert steps == list(range(7 + 3 * 2))  # every state is used once, as it is donated


def test_synthetic_data_is_a_stream_as_of_a_corpus():
    made = bench_ours.synthetic_corpus(300, 20_000)
    for split in (made.train, made.validation):
        assert split.tokens[0] == split.tokens[-1] == made.tokenizer.end_of_text
        assert np.array_equal(np.flatnonzero(split.tokens == 0)[:-1], split.starts)
        assert split.tokens.max() == 299
    batches = pipeline.Batches(
        [made.train],
        causal_lm.Task(causal_lm.Config(), tasks.Setting("causal", made.tokenizer)),
        batch_size=4,
        seed=0,
        order="shuffle",
    )
    assert batches[0]["weights"].sum() == 4 * 256


@pytest.fixture
def side(tmp_path):
    (tmp_path / "echo.py").write_text(
        "from tools import bench_pipe\n"
        "class Echo:\n"
        "    def give(self, *, value):\n"
        "        print('noise')\n"
        "        return value\n"
        "    def fail(self):\n"
        "        raise ValueError('no good')\n"
        "    def leave(self):\n"
        "        raise SystemExit(3)\n"
        "bench_pipe.serve(Echo())\n"
    )
    with bench_pipe.Side("echo", PYTHONPATH=str(tmp_path)) as side:
        yield side


def test_calls_cross_the_pipe(side):
    assert side.call("give", value={"a": [1, 2.5, None]}) == {"a": [1, 2.5, None]}
    with pytest.raises(bench_pipe.SideError, match="ValueError: no good"):
        side.call("fail")
    assert side.call("give", value="still there") == "still there"
    with pytest.raises(bench_pipe.SideError, match="exit code 3"):
        side.call("leave")
    with pytest.raises(bench_pipe.SideError, match="exit code 3"):
        side.call("give", value=1)


def test_processes_stay_in_step_where_one_fails(tmp_path):
    (tmp_path / "part.py").write_text(
        "import os\n"
        "from tools import bench_pipe\n"
        "class Part:\n"
        "    def run(self, *, mode):\n"
        "        assert mode or os.environ['JAX_PROCESS_ID'] != '0', 'not in the first'\n"
        "        return float(mode)\n"
        "bench_pipe.serve(Part())\n"
    )
    with bench_processes.Sides("part", processes=2, PYTHONPATH=str(tmp_path)) as sides:
        with pytest.raises(bench_pipe.SideError, match="not in the first"):
            sides.call("run", mode=0)
        assert [side.call("run", mode=5) for side in sides.sides] == [5.0, 5.0]


def test_processes_answer_together(tmp_path):
    """Each on its share of the cores; the slowest's seconds count, and bytes add up."""
    (tmp_path / "part.py").write_text(
        "import os\n"
        "from tools import bench_pipe\n"
        "number = int(os.environ['JAX_PROCESS_ID'])\n"
        "class Part:\n"
        "    def run(self): return 1.0 + number\n"
        "    def peak_bytes(self): return 10 + number\n"
        "    def prepare(self):\n"
        "        return [number, os.environ['JAX_NUM_PROCESSES'], len(os.sched_getaffinity(0))]\n"
        "bench_pipe.serve(Part())\n"
    )
    cores = len(os.sched_getaffinity(0))
    with bench_processes.Sides("part", processes=2, PYTHONPATH=str(tmp_path)) as sides:
        assert sides.call("run") == 2.0
        assert sides.call("peak_bytes") == 21
        assert sides.call("prepare") == [0, "2", cores // 2 or cores]
        assert (
            not set.intersection(*(os.sched_getaffinity(side._process.pid) for side in sides.sides))
            or cores == 1
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], ["--rounds=0", "use 1 or more"]),
        (["--processes", "2"], ["--processes=2", "give --peer"]),
        (["--decode", "--steps", "17"], ["--steps=17", "32 positions"]),
        (
            ["--peer", "transformers", *GPT2, "--config.optim.name=lion"],
            ["optim.name='lion'", "--config.optim.name=adamw"],
        ),
        (
            ["--peer", "transformers", "--config.model.name=rnn"],
            ["model.name='rnn'", "torch or flax"],
        ),
        (["--peer", "flax", "--config.model.name=gpt"], ["model.name='gpt'", "use transformers"]),
        (
            ["--peer", "flax", "--config.model.name=seq2seq"],
            ["model.name='seq2seq'", "leave it out"],
        ),
        (["--peer", "torch", "--config.model.name=rnn", "--decode"], ["decodes GPT-2 alone"]),
        (
            ["--peer", "torch", "--config.model.name=rnn", "--config.model.num_heads=2"],
            ["model.num_heads=2", "--config.model.num_heads=0"],
        ),
        (
            ["--peer", "torch", "--peer_python", shutil.which("false"), "--config.model.name=rnn"],
            ["has no torch;"],
        ),
        (
            ["--peer", "flax", "--config.model.name=rnn", "--processes", "2"],
            ["--processes=2", "a model of its own"],
        ),
        (["--peer_modes", "eager"], ["--peer_modes", "only with --peer"]),
        (["--peer_python", "python"], ["--peer_python", "only with --peer"]),
        (["--peer", "transformers"], ["model.positions='rotary'", "positions=learned"]),
        (
            ["--peer", "transformers", *GPT2, "--config.model.num_experts=4"],
            ["model.num_experts=4", "--config.model.num_experts=0"],
        ),
        (
            ["--peer", "transformers", *GPT2, "--config.model.dtype=bfloat16"],
            ["model.dtype='bfloat16'", "--config.model.dtype="],
        ),
        (
            ["--peer", "transformers", *GPT2, "--config.optim.ema_decay=0.9"],
            ["optim.ema_decay=0.9", "--config.optim.ema_decay=0.0"],
        ),
        (
            ["--peer", "transformers", "--config.model.name=t5", "--config.model.num_experts=4"],
            ["model.num_experts=4"],
        ),
        (["--config.model.layers=2"], ["did you mean", "num_layers"]),
    ],
)
def test_mistakes_end_with_one_line(arguments, words, capsys, tmp_path):
    plain = tmp_path / "experiment.py"
    plain.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'task': ConfigDict({'length': 32})})\n"
    )
    assert bench.main(["--config", str(plain), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.measure
@pytest.mark.parametrize("decode", [False, True])
def test_a_tiny_model_is_measured(decode, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    out = tmp_path / "report.json"
    longer = {} if decode else {"optim.warmup": 100}  # than the loop is here
    arguments = ["--rounds", "2", "--json", str(out), *(["--decode", "--steps", "8"] * decode)]
    assert bench.main(["--config", EXPERIMENT, *flags(**longer), *arguments]) == 0
    words, report = capsys.readouterr().out, json.loads(out.read_text())
    assert len(report["seconds"]["ours"]) == 2
    assert min(report["seconds"]["ours"]) > 0
    assert "peak memory" in words
    if decode:
        assert "% of weights' bytes" in words
    else:
        assert len(report["loop"]) == 2
        assert "MFU_half" in words
