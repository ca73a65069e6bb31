"""A folder becomes a run that everything else can use, or one line says what is wrong with it."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from lm import checkpoint, train
from lm.config import ConfigError
from lm.convert import architectures, importer, safetensors_file
from lm.convert import folder as folder_lib
from lm.convert.settings import Settings
from tools import convert, evaluate

BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def theirs(parity, folders, tmp_path_factory):
    """A folder of a Llama."""
    fixture = parity("llama")
    return folders.write_folder(
        tmp_path_factory.mktemp("folder") / "theirs", fixture.config, fixture.weight
    )


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(theirs, tmp_path / "copy")


def change_config(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_weights(folder, change):
    """Rewrite the tensors after `change` of their dictionary."""
    path = folder / "model.safetensors"
    arrays = dict(safetensors_file.read(path, safetensors_file.read_header(path).entries))
    change(arrays)
    path.unlink()
    safetensors_file.write(path, arrays, order=sorted(arrays), metadata=None)


def test_a_converted_run_is_a_run(theirs, tmp_path, text_file, capsys):
    """It loads, is evaluated, and other runs begin from it."""
    run = tmp_path / "run"
    made = importer.to_run(theirs, run)
    assert made.architecture == "llama" and made.dtypes == "F32"
    config, model, params = checkpoint.load(run)
    assert model.cfg.num_layers == 2 and config.task.name == "causal_lm"
    padding = np.asarray(params["embed"]["embedding"])[model.cfg.vocab_size :]
    assert len(padding) and not padding.any()
    flags = [
        "--workdir",
        str(run),
        f"--config.data.path={text_file}",
        "--config.eval.max_tokens=64",
    ]
    assert evaluate.main(flags) == 0
    assert "perplexity" in capsys.readouterr().out
    config = checkpoint.read_config(run)
    config.data.path, config.data.batch_size, config.task.length = (str(text_file),), 8, 16
    config.optim.peak_lr, config.optim.warmup = 1e-9, 0
    config.train.init_from, config.train.num_steps, config.train.sample_tokens = str(run), 1, 0
    config.eval.max_tokens = 64
    train.run(config, tmp_path / "more")
    more = checkpoint.load(tmp_path / "more").params
    np.testing.assert_allclose(more["head"]["kernel"], params["head"]["kernel"], atol=1e-8)


def test_a_converted_run_is_not_trained_on_in_its_place(theirs, tmp_path, text_file):
    """Its data are not known, so a run that would go on there is another."""
    importer.to_run(theirs, tmp_path / "run")
    config = checkpoint.read_config(tmp_path / "run")
    config.data.path = (str(text_file),)
    with pytest.raises(ConfigError, match="holds a run of another config"):
        train.run(config, tmp_path / "run")


def test_what_is_there_is_never_touched(theirs, tmp_path):
    importer.to_run(theirs, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="there is something already"):
        importer.to_run(theirs, tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="there is something already"):
        importer.to_run(theirs, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    importer.to_run(theirs, tmp_path / "empty")
    checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize("at", ["_write_run_files", "_keep", "_check_rest"])
def test_a_conversion_that_is_cut_short_leaves_nothing(theirs, tmp_path, monkeypatch, at):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importer, at, stop)
    with pytest.raises(KeyboardInterrupt):
        importer.to_run(theirs, tmp_path / "deep" / "run")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_whole(theirs, tmp_path):
    import os
    import subprocess
    import sys
    import time

    for wait in np.linspace(2, 8, 7):
        target = tmp_path / f"run{wait}"
        command = [
            sys.executable,
            "-m",
            "tools.convert",
            "--from",
            str(theirs),
            "--to",
            str(target),
        ]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        time.sleep(wait)
        process.kill()
        process.wait()
        if target.exists():
            checkpoint.load(target)


def test_two_types_of_16_bits_are_read_exactly(folder, theirs, tmp_path):
    def halve(arrays):
        for number, name in enumerate(sorted(arrays)):
            arrays[name] = arrays[name].astype((BFLOAT16, np.float16)[number % 2])

    change_weights(folder, halve)
    made = importer.to_run(folder, tmp_path / "half")
    assert made.dtypes == "BF16/F16"
    importer.to_run(theirs, tmp_path / "whole")
    half, whole = (checkpoint.load(tmp_path / name).params for name in ("half", "whole"))
    # The fixture's numbers are bfloat16's, and few enough bits for float16 where they are not tiny.
    for ours, other in zip(_leaves(half), _leaves(whole), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, other, rtol=0, atol=2**-25)


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_a_tokenizer_can_be_given(folder, theirs, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        importer.to_run(folder, tmp_path / "run")
    importer.to_run(folder, tmp_path / "run", theirs / "tokenizer.json")
    assert (tmp_path / "run" / "tokenizer" / "huggingface.json").is_file()


def spoil(name):
    """Return a change of the folder's tensors that takes, adds or bends one."""

    def change(arrays):
        key = "model.layers.1.mlp.up_proj.weight"
        if name == "missing":
            del arrays[key]
        elif name == "extra":
            arrays["model.layers.2.mlp.up_proj.weight"] = arrays[key]
        elif name == "misshapen":
            arrays[key] = arrays[key].T.copy()
        elif name == "type":
            arrays[key] = arrays[key].astype(np.float64)
        elif name == "several":
            for number in range(9):
                arrays[f"more.{number}"] = arrays[key]
            del arrays[key]

    return lambda folder: change_weights(folder, change)


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(weight_map):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def config(**values):
    return lambda folder: change_config(folder, **values)


ROPE = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config of no JSON": (write("config.json", "{"), "config.json: not a JSON object"),
    "config of a list": (write("config.json", "[]"), "config.json: not a JSON object"),
    "deep config": (write("config.json", "[" * 100_000), "config.json: not a JSON object"),
    "unknown architecture": (config(model_type="mamba"), "model_type='mamba' is no architecture that is known here; known are "),
    "no architecture": (config(model_type=...), "model_type=None"),
    "architecture of no text": (config(model_type=["llama"]), "model_type=['llama']"),
    "path for an architecture": (config(model_type="../llama"), "model_type='../llama'"),
    "other head": (config(architectures=["LlamaForSequenceClassification"]), "only LlamaForCausalLM can be read"),
    "size of no number": (config(hidden_size="16"), "hidden_size='16', expected a whole number"),
    "negative size": (config(vocab_size=-1), "vocab_size=-1, expected"),
    "zero layers": (config(num_hidden_layers=0), "num_hidden_layers=0, expected"),
    "a billion layers": (config(num_hidden_layers=10**9), "1000000000 layers, and "),
    "huge width": (config(hidden_size=2**30), "of another shape: model.embed_tokens.weight [47, 16] and not [47, 1073741824]"),
    "more layers": (config(num_hidden_layers=3), "missing: model.layers.2."),
    "fewer layers": (config(num_hidden_layers=1), "not known: model.layers.1."),
    "other vocabulary": (config(vocab_size=48), "[47, 16] and not [48, 16]"),
    "heads": (config(num_key_value_heads=3), "config.json: model.num_kv_heads=3"),
    "flag of no truth": (config(attention_bias=1), "attention_bias=1, expected true or false"),
    "other activation": (config(hidden_act="gelu"), "hidden_act='gelu', expected 'silu'"),
    "other rope": (config(rope_parameters={**ROPE, "rope_type": "dynamic"}), "rope_type='dynamic', expected one of default, linear"),
    "rope of no object": (config(rope_parameters=[1]), "rope_parameters=[1], expected an object"),
    "rope without factor": (config(rope_parameters={"rope_type": "linear"}), "rope_parameters: factor=None"),
    "rope without frequency": (config(rope_parameters={**ROPE, "rope_type": "llama3"}), "low_freq_factor=None"),
    "two ropes": (config(rope_scaling={"rope_type": "dynamic"}), "rope_scaling: rope_type='dynamic', expected"),
    "both ways": (config(is_causal=False), "is_causal=False, expected True"),
    "partial rope": (config(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5, expected 1.0"),
    "factor below 1": (config(rope_parameters={**ROPE, "factor": 0.5}), "model.rope_factor=0.5"),
    "amplitude without a factor": (config(rope_parameters={**ROPE, "factor": 1.0, "attention_factor": 0.5}), "attention_factor=0.5, expected 1.0"),
    "infinite epsilon": (config(rms_norm_eps=float("inf")), "rms_norm_eps=inf, expected a number"),
    "missing tensor": (spoil("missing"), "missing: model.layers.1.mlp.up_proj.weight"),
    "extra tensor": (spoil("extra"), "not known: model.layers.2.mlp.up_proj.weight"),
    "misshapen tensor": (spoil("misshapen"), "model.layers.1.mlp.up_proj.weight [16, 28] and not [28, 16]"),
    "tensor of float64": (spoil("type"), "of a type that is not F32, BF16, F16: model.layers.1.mlp.up_proj.weight F64"),
    "several tensors": (spoil("several"), "missing: model.layers.1.mlp.up_proj.weight; not known: more.0, more.1, more.2, more.3 and 5 more"),
    "truncated": (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]), "ends at"),
    "only pickled": (only_pickled, "pytorch_model.bin: weights are read from safetensors only"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "index of no map": (index([1]), "it has no weight_map"),
    "index out of the folder": (index({"a": "../a.safetensors"}), "'../a.safetensors', which is no safetensors file of this folder"),
    "index to an absolute path": (index({"a": "/etc/a.safetensors"}), "which is no safetensors file of this folder"),
    "index to a pickle": (index({"a": "a.bin"}), "which is no safetensors file of this folder"),
    "index to no text": (index({"a": 1}), "which is no safetensors file of this folder"),
    "index to a missing file": (index({"a": "a.safetensors", "b": "b.safetensors"}), "b.safetensors: missing"),
    "index to many files": (index({str(i): f"{i}.safetensors" for i in range(1001)}), "names 1001 files"),
    "a tokenizer too large": (write("tokenizer.json", "WORDS"), "has 99 ids, and the model of"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "broken tokenizer": (write("tokenizer.json", "{}"), "not a tokenizer of Hugging Face's"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(
    case, folder, folders, tmp_path, capsys
):
    """Through the tool, as a user has it."""
    change, words = BAD[case]
    change(folder)
    if case == "a tokenizer too large":
        (folder / "tokenizer.json").write_text(folders.tokenizer_json(99))
    assert convert.main(["--from", str(folder), "--to", str(tmp_path / "new" / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and str(folder) in error and "\n" not in error
    assert not list((tmp_path / "new").iterdir()) if (tmp_path / "new").exists() else True


def test_a_tensor_that_is_there_by_an_older_name_too_is_refused(parity, folders, tmp_path):
    fixture = parity("bert")
    name = "bert.embeddings.LayerNorm.weight"
    weights = {**fixture.weight, "bert.embeddings.LayerNorm.gamma": 3 * fixture.weight[name]}
    folder = folders.write_folder(tmp_path / "theirs", fixture.config, weights)
    with pytest.raises(ConfigError, match=f"there twice, by an older name too: {name}; get"):
        importer.to_run(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "tensor", "shape", "words"),
    [
        ("gpt2", "lm_head.weight", (-1,), r"lm_head\.weight \[\d+\] and not \["),
        ("gpt2", "transformer.h.0.attn.bias", (1,), r"attn\.bias \[1\] and not \[1, 1, "),
        ("gpt2", "transformer.h.0.attn.masked_bias", (1,), r"masked_bias \[1\] and not \[\]"),
        ("bert", "bert.embeddings.position_ids", (1,), r"position_ids \[1\] and not \[1, "),
        ("roberta", "roberta.embeddings.position_ids", (1,), r"_ids \[1\] and not \[1, "),
        (
            "llama",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            (1,),
            r"_freq \[1\] and not \[4\]",
        ),
    ],
)
def test_copies_and_constants_of_another_shape_are_refused_before_any_is_made(
    kind, tensor, shape, words, parity, folders, tmp_path, monkeypatch
):
    """A config of a few bytes can ask for a mask of many gigabytes."""
    fixture = parity(kind)
    value = np.ones(1, np.float32)
    if tensor == "lm_head.weight":
        value = fixture.weight["transformer.wte.weight"]
    weights = {**fixture.weight, tensor: value.reshape(shape)}
    folder = folders.write_folder(tmp_path / "theirs", fixture.config, weights)
    monkeypatch.setattr(importer, "_check_rest", lambda *arguments: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=words):
        importer.to_run(folder, tmp_path / "run")


def test_an_encoder_s_tokenizer_has_the_tokens_of_its_task(parity, folders, tmp_path):
    fixture = parity("roberta")
    words = fixture.config["vocab_size"]
    folder = folders.write_folder(tmp_path / "theirs", fixture.config, fixture.weight)
    (folder / "tokenizer.json").write_text(folders.tokenizer_json(words))
    with pytest.raises(ConfigError, match=rf"needs {words + 3} ids .* the model has {words}; give"):
        importer.to_run(folder, tmp_path / "run")
    named = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "w3"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    importer.to_run(folder, tmp_path / "run")


def test_no_folder_is_one_line(tmp_path, capsys):
    assert convert.main(["--from", str(tmp_path / "no"), "--to", str(tmp_path / "run")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_tied_head_that_is_another_is_refused(folder, tmp_path):
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        importer.to_run(folder, tmp_path / "run")


def test_files_beside_the_weights_are_kept_while_they_are_small_and_the_rest_is_named(
    folder, tmp_path, monkeypatch, capsys
):
    (folder / "README.md").write_text("about")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "vocab.json").write_text("x" * 10_000)
    used = sum((folder / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    monkeypatch.setattr(folder_lib, "MAX_BESIDE", used + 9_999)
    assert convert.main(["--from", str(folder), "--to", str(tmp_path / "run")]) == 0
    assert "not copied: README.md, vocab.json\n" in capsys.readouterr().out
    kept = {path.name for path in (tmp_path / "run" / "huggingface").iterdir()}
    assert kept == {"config.json", "tokenizer.json", "added_tokens.json", "layout.json"}


@pytest.mark.parametrize(
    ("kind", "settings", "field", "value"),
    [
        ("gpt2", {"num_attention_heads": 4}, "num_heads", 4),
        ("gpt2", {"n_head": 6}, "num_heads", 6),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                   "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling", "linear"),
        ("llama", {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": None}, "rope_base", 500.0),
        ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}, "activation", "geglu"),
    ],
)  # fmt: skip
def test_a_setting_of_two_names_is_read_as_transformers_reads_it(kind, settings, field, value):
    assert architectures.architecture(kind).read(Settings(settings, ""))[field] == value


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {"is_causal": False}),
        ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}),
        ("t5", {"dense_act_fn": "silu"}),
        ("t5", {"feed_forward_proj": "gated-silu", "is_gated_act": False}),
    ],
)
def test_a_setting_that_makes_another_model_is_refused(kind, settings):
    with pytest.raises(ConfigError, match="the only one that is known here"):
        architectures.architecture(kind).read(Settings(settings, ""))
