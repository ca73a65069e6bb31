"""The command line: what a user types wrong costs one clear line and exit code 2."""

import errno
import gzip
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm import exits, main, manifests, train

ROOT = Path(__file__).parent.parent

EXPERIMENT = '''
"""A run of seconds."""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({
        "data": {"tokenizer": "byte", "batch_size": 8},
        "task": {"length": 16},
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2},
        "optim": {"name": "adamw", "peak_lr": 1e-2},
        "train": {"num_steps": 2, "sample_tokens": 0},
        "eval": {"max_tokens": 256},
    })
'''


@pytest.fixture
def experiment(tmp_path, text_file):
    """Return a function that runs the experiment with more flags, in `tmp_path`/run."""
    path = tmp_path / "small.py"
    path.write_text(EXPERIMENT)

    def call(*flags, text=text_file):
        data = [] if text is None else [f"--config.data.path={text}"]
        return main.main(["--config", str(path), "--workdir", str(tmp_path / "run"), *data, *flags])

    return call


def one_line(capsys):
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.optim.peak_lrr=1"], ["optim.peak_lrr", "did you mean optim.peak_lr?"]),
        (["--config.optim.lr=1"], ["optim.lr: no such field; did you mean optim.peak_lr?"]),
        (["--config.data.mixture=a=3,b"], ["data.mixture", "for example data.mixture=python_docs=3,python_source=1"]),
        (["--config.train.init_from=nowhere"], ["train.init_from=nowhere: no finished checkpoint there"]),
        ([f"--config.train.init_from={ROOT}"], ["train.init_from=", "no finished checkpoint there"]),
        (["--workdir", str(ROOT / "README.md")], ["README.md: a file; name a folder"]),
        (["--workdir", ""], ["--workdir=: give a folder"]),
        (["--workdir", "gs://bucket/x"], ["--workdir=gs://bucket/x: give a folder"]),
        (["--config.mesh.fsdp=-1"], ["mesh.data=-1 and mesh.fsdp=-1: set mesh.data=1"]),
        (["--config.model.layers=1"], ["model.layers", "did you mean model.num_layers?"]),
        (["--config.model.hidden_size=1"], ["did you mean model.model_dim?"]),
        (["--config.train.learning_rate=1"], ["did you mean optim.peak_lr?"]),
        (["--config.optim.warmup_steps=1"], ["did you mean optim.warmup?"]),
        (["--config.optim.clip_norm=1e400"], ["optim.clip_norm='1e400': expected float"]),
        (["--config.train.num_steps=soon"], ["train.num_steps", "'soon'"]),
        (["--config.model.num_layers=2.5"], ["model.num_layers", "2.5"]),
        (["--config.model.name=gtp"], ["model.name", "gtp", "gpt"]),
        (["--config.task.name=causal"], ["task.name", "causal_lm"]),
        (["--config.optim.momentum=0.5"], ["optim.momentum", "optim.name"]),
        (["--config.model.rope_base=5", "--config.model.positions=learned"], ["model.rope_base", "positions"]),
        (["--config.data.path=missing.txt"], ["missing.txt"]),
        (["--config.data.batch_size=12"], ["data.batch_size=12", "multiple of 8"]),
        (["--config.train.accumulate_steps=3"], ["data.batch_size=8", "multiple of 24"]),
        (["--config.train.accumulate_steps=99999999999"], ["train.accumulate_steps=99999999999", "at most 8"]),
        (["--config.mesh.data=3"], ["mesh", "8 device"]),
        (["--config.mesh.data=1", "--config.mesh.tensor=8"], ["mesh.tensor=8", "heads"]),
        (["--config.mesh.data=1", "--config.mesh.context=8", "--config.model.name=rnn"], ["mesh.context=8", "rnn"]),
        (["--config.mesh.data=2", "--config.mesh.context=4", "--config.task.length=20"], ["mesh.context=4", "20"]),
        (["--config.mesh.data=2", "--config.mesh.context=4", "--config.model.kernel=cudnn"], ["kernel", "''"]),
        (["--config.model.max_length=8"], ["task.length", "model.max_length"]),
        (["--config.model.num_heads=3"], ["model.num_heads=3", "model.model_dim=32"]),
        (["--config.model.dropout=1.5"], ["model.dropout=1.5"]),
        (["--config.data.order=stream"], ["data.order", "carry", "gpt"]),
        (["--config.data.validation_fraction=0"], ["validation"]),
        (["--config.checkpoint.best_metric=eval/los"], ["checkpoint.best_metric=eval/los", "eval/loss"]),
        (["--config.data.validation_fraction=2"], ["data.validation_fraction=2"]),
        (["--config.train.init_from=nowhere"], ["nowhere"]),
        (["--config.optim.warmup=5 weeks"], ["optim.warmup", "5 weeks"]),
        (["--config.train.sample_prompt=É", "--config.data.tokenizer=char", "--config.train.sample_tokens=9"],
         ["train.sample_prompt", "'É'"]),
        (["--config.optim.peak_lr=inf"], ["optim.peak_lr='inf'", "expected float"]),
        (["--config.checkpoint.best_metric=eval_raw/loss"], ["checkpoint.best_metric", "optim.ema_decay"]),
        (["--config.checkpoint.remote_every=5"], ["checkpoint.remote_every=5", "a set checkpoint.remote"]),
        (["--config.train.z_loss=nan"], ["train.z_loss='nan'", "expected float"]),
        (["--config.seed=99999999999999999999"], ["seed=", "too large"]),
        (["--config.train.num_steps=1e5000"], ["train.num_steps='1e5000'", "expected duration"]),
        (["--config.data.batch_size=8000000000000"], ["too large for this machine"]),
        (["--config.data.source=python_source"], ["data.source=python_source", "data.path names the text"]),
        (["--config.model.microbatches=4"], ["model.microbatches=4", "mesh.stage of 2 or more"]),
        (["--config.model.stage_repeats=2"], ["model.stage_repeats=2", "mesh.stage of 2 or more"]),
        (["--config.model.context_parallel=ring"], ["model.context_parallel=ring", "mesh.context of 2"]),
        (["--config.train.sample_prompt=The"], ["train.sample_prompt=The", "a set train.sample_tokens"]),
        (["--config.data.prefetch_batches=4", "--config.data.prefetch_threads=0"], ["data.prefetch_batches=4", "a set"]),
        (["--config.data.on_invalid=refuse", "--config.data.path=()"], ["data.on_invalid=refuse", "python_docs"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(experiment, capsys, flags, words):
    assert experiment(*flags) == 2
    said = one_line(capsys)
    for word in words:
        assert word in said, said


def test_a_missing_or_broken_experiment(tmp_path, capsys):
    assert main.main(["--config", str(tmp_path / "no.py")]) == 2
    assert "no.py" in one_line(capsys)
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    assert main.main(["--config", str(broken)]) == 2
    assert "broken.py:2" in one_line(capsys)
    assert main.main([]) == 2
    assert "--config" in one_line(capsys)


def test_a_mistake_is_told_without_what_goes_unused_besides(tmp_path, capsys):
    path = tmp_path / "small.py"
    path.write_text(EXPERIMENT.replace('"byte"', '"sentencepiece", "vocab_size": 300'))
    assert main.main(["--config", str(path), "--config.data.tokenizer=wrong"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "data.tokenizer=wrong" in said.err


def test_debug_shows_the_traceback(experiment):
    with pytest.raises(ValueError, match="num_steps"):
        experiment("--config.train.num_steps=soon", "--debug")


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("empty.txt", b"", [], "empty"),
        ("bad.txt", b"fine \xff\xfe fine" * 99, ["--config.data.on_invalid=refuse"], "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', [], "broken.jsonl:2"),
        ("field.jsonl", b'{"body": "a"}\n' * 3, [], "text"),
        ("binary.parquet", b"PAR1\0\1" * 99, [], "binary.parquet"),
        ("cut.txt.gz", gzip.compress(b"hello " * 9999, mtime=0)[:-20], [], "cut.txt.gz"),
    ],
)
def test_bad_data_is_named(experiment, tmp_path, capsys, name, content, flags, words):
    (tmp_path / name).write_bytes(content)
    assert experiment(*flags, text=tmp_path / name) == 2
    assert words in one_line(capsys)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(experiment, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"fine \xff fine, and on it goes. " * 99)
    assert experiment(text=tmp_path / "bad.txt") == 0
    assert "99 invalid bytes replaced" in capsys.readouterr().out


def test_a_foreign_checkpoint_is_moved_aside_not_loaded(experiment, tmp_path, capsys):
    foreign = tmp_path / "run" / "checkpoints" / "7"
    foreign.mkdir(parents=True)
    (foreign / "model.bin").write_bytes(b"something else")
    assert experiment() == 0
    assert "checkpoint 7 is not used" in capsys.readouterr().out
    assert (foreign.with_name("7.aside0") / "model.bin").exists()


def test_a_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(
    experiment, capsys, monkeypatch
):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifests, "write", full)
    assert experiment() == 2
    *tries, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and "No space left" in error
    assert len(tries) == 3 and all(line.startswith("warning: ") for line in tries)
    assert "is kept" not in error, "there is none yet"


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
def test_checkpoints_that_are_no_folder_are_an_error_before_anything_is_written(
    experiment, capsys, tmp_path, kind
):
    """A disk that is not mounted: the run would begin anew, and fail at its first save."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    if kind == "a file":
        (workdir / "checkpoints").touch()
    else:
        (workdir / "checkpoints").symlink_to(tmp_path / "nowhere")
    assert experiment() == 2
    error = one_line(capsys)
    assert str(workdir / "checkpoints") in error and "mount its disk" in error
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_divergence_has_its_own_exit_code(experiment, capsys, monkeypatch):
    def diverge(*args):
        raise exits.Diverged("step 3: loss or gradient is not finite")

    monkeypatch.setattr(train, "run", diverge)
    assert experiment() == 3
    assert "step 3" in one_line(capsys)


def test_the_command_to_resume_is_the_one_that_was_typed(experiment, tmp_path, capsys, monkeypatch):
    def stopped(config, workdir, origins):
        raise train.Interrupted("stopped at step 1, which is saved")

    monkeypatch.setattr(train, "run", stopped)
    flags = [
        "--config.optim.warmup=2 epochs",
        '--config.optim.lr_rules=(("(a|b)$",0.5),(".*",1.0))',
    ]
    assert experiment(*flags) == 75
    command = shlex.split(capsys.readouterr().out.partition("to resume: ")[2])
    assert command[:3] == ["python", "-m", "lm.main"]
    assert [word for word in command if word.startswith("--config.optim")] == flags
    assert command[command.index("--workdir") + 1] == str(tmp_path / "run")


def test_ctrl_c_before_training_is_one_line(experiment, capsys, monkeypatch):
    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("lm.experiment.build", stopped)
    assert experiment("--dry_run") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert experiment() == 130
    assert "to start again: python -m lm.main" in capsys.readouterr().out


def test_dry_run_trains_nothing(experiment, tmp_path, capsys):
    assert experiment("--dry_run", "--config.mesh.data=2", "--config.mesh.fsdp=4") == 0
    said = capsys.readouterr().out
    for word in (
        '"peak_lr": 0.01',
        "layers/block_0/attention/qkv/kernel",
        "embed heads qkv kv",
        "FLOPs a position",
    ):
        assert word in said
    # (32, 2, 3, 16) float32 over 4 devices of fsdp.
    assert "3,072" in said
    assert not (tmp_path / "run").exists()


def test_help_lists_every_field(capsys):
    assert main.main(["--help"]) == 0
    said = capsys.readouterr().out
    for word in (
        "data.batch_size",
        "optim.peak_lr",
        "checkpoint.keep",
        "mesh.fsdp",
        "--workdir",
        "--dry_run",
    ):
        assert word in said


def test_the_end_says_where_everything_lies(experiment, tmp_path, capsys):
    assert experiment() == 0
    said = capsys.readouterr().out
    assert f"workdir: {tmp_path / 'run'}" in said
    assert f"python -m tools.generate --workdir {tmp_path / 'run'}" in said


def test_the_commands_at_the_end_can_be_typed(experiment, tmp_path, capsys):
    folder = tmp_path / "my runs"
    assert experiment("--workdir", str(folder)) == 0
    commands = capsys.readouterr().out.partition("next:")[2].strip().splitlines()
    assert [shlex.split(line)[4] for line in commands] == [str(folder)] * 2


def test_a_typing_mistake_is_told_before_jax_is_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys, lm.main\nlm.main.main([])\nassert 'jax' not in sys.modules"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_ctrl_c_that_ends_the_tee_behind_a_run_too_saves_it(experiment, tmp_path, text_file):
    words = [sys.executable, "-m", "lm.main", "--config", str(tmp_path / "small.py")]
    words += ["--workdir", str(tmp_path / "run"), f"--config.data.path={text_file}"]
    words += ["--config.train.num_steps=100000", "--config.train.log_every_steps=1"]
    script = f"trap : INT; {shlex.join(words)} 2>&1 | tee {tmp_path}/log; exit ${{PIPESTATUS[0]}}"
    # Whatever the tests' own shell has done with SIGINT, as one does with what it starts by "&".
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    words = [sys.executable, "-c", heard, "bash", "-c", script]
    shell = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    rows, end = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (rows.exists() and '"step": 20,' in rows.read_text()):
        assert shell.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.wait(60) == exits.RESUMABLE
    assert "is saved" not in (tmp_path / "log").read_text(), "tee was ended too"
    (step,) = manifests.good_steps(tmp_path / "run/checkpoints")
    assert step >= 20


@pytest.mark.parametrize(
    "field",
    ["optim.peak_lr=1", "train.z_loss=1", "train.accumulate_steps=2", "train.on_bad_step=skip",
     "train.recordings=1"],
)  # fmt: skip
def test_what_a_counting_family_does_not_use_is_refused(field, capsys):
    counts = str(ROOT / "experiments/ngram_char.py")
    assert main.main(["--config", counts, f"--config.{field}", "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: {field}: model.name='ngram' learns by counting")
        and said.count("\n") == 1
    )
