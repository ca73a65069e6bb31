"""A run becomes a folder again: the same bytes, or the same model where it was trained."""

import dataclasses
import hashlib
import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as library

from lm import checkpoint, experiment, models, sharding, train
from lm import workdir as workdirs
from lm.config import ConfigError
from lm.convert import architectures, exporter, importer, safetensors_file
from lm.convert.architectures import llama
from lm.convert.settings import Settings
from lm.models import gpt
from lm.stored import flatten

BFLOAT16 = ml_dtypes.bfloat16


def hashes(folder):
    """Return the SHA-256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def shard(folder, pieces):
    """Put the tensors of a folder's one file into `pieces` files with an index."""
    path = folder / "model.safetensors"
    arrays = dict(safetensors_file.read(path, safetensors_file.read_header(path).entries))
    path.unlink()
    weight_map = {}
    for number in range(pieces):
        file = f"model-{number + 1:05}-of-{pieces:05}.safetensors"
        here = {name: arrays[name] for name in sorted(arrays)[number::pieces]}
        (folder / file).write_bytes(library.save(here, {"format": "pt"}))
        weight_map |= dict.fromkeys(here, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("layout", ["one file", "three files", "mixed types"])
def test_there_and_back_gives_the_same_files(name, layout, parity, folders, tmp_path):
    fixture, types = parity(name), (np.float32, BFLOAT16, np.float16)
    weights = dict(fixture.weight)
    if layout == "mixed types":
        weights = {k: weights[k].astype(types[i % 3]) for i, k in enumerate(sorted(weights))}
    theirs = folders.write_folder(tmp_path / "theirs", fixture.config, weights)
    (theirs / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    (theirs / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    if layout == "three files":
        shard(theirs, 3)
    before = hashes(theirs)
    importer.to_run(theirs, tmp_path / "run")
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert hashes(tmp_path / "back") == before == hashes(theirs)


def test_a_file_that_the_library_wrote_comes_back_bit_for_bit(parity, folders, tmp_path):
    fixture = parity("gpt2")
    theirs = folders.write_folder(tmp_path / "theirs", fixture.config, fixture.weight)
    content = library.save(fixture.weight, {"format": "pt"})
    (theirs / "model.safetensors").write_bytes(content)
    importer.to_run(theirs, tmp_path / "run")
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == content


def test_old_gpt2_files_have_no_prefix_masks_and_a_second_head(parity, folders, tmp_path):
    fixture = parity("gpt2")
    weights = {k.removeprefix("transformer."): v for k, v in fixture.weight.items()}
    length = fixture.config["n_positions"]
    for number in range(2):
        weights[f"h.{number}.attn.bias"] = np.tri(length, dtype=np.float32)[None, None]
        weights[f"h.{number}.attn.masked_bias"] = np.array(-1e4, np.float32)
    weights["h.0.attn.bias"] = weights["h.0.attn.bias"].astype(np.uint8)
    weights["h.1.attn.masked_bias"] = np.array(-9984, np.float16)  # as bfloat16 had rounded it
    weights["lm_head.weight"] = weights["wte.weight"]
    theirs = folders.write_folder(tmp_path / "theirs", fixture.config, weights)
    importer.to_run(theirs, tmp_path / "run")
    logits, where = folders.logits_of(tmp_path / "run", fixture.input)
    np.testing.assert_allclose(logits[where], fixture.output["logits"][where], rtol=0, atol=2e-5)
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(theirs)
    weights["h.1.attn.bias"] = weights["h.1.attn.bias"][:, :, ::-1]
    folders.write_folder(tmp_path / "wrong", fixture.config, weights)
    with pytest.raises(ConfigError, match=r"h\.1\.attn\.bias is not what config\.json makes it"):
        importer.to_run(tmp_path / "wrong", tmp_path / "other")


@pytest.mark.parametrize("base", [10.0, 2e9])  # the second: numbers that float16 rounds much
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_old_llama_files_have_their_frequencies(dtype, base, parity, folders, tmp_path):
    fixture = parity("llama_llama3")
    rope = {**fixture.config["rope_parameters"], "rope_theta": base}
    settings = {**fixture.config, "rope_parameters": rope}
    cfg = gpt.Config(**architectures.architecture("llama").read(Settings(settings, "")))
    frequencies = cfg.rotary.frequencies(8).astype(dtype)
    if dtype == np.float32:  # as another library rounds them
        frequencies = np.nextafter(frequencies, np.inf, dtype=dtype)
    weights = {**fixture.weight, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    theirs = folders.write_folder(tmp_path / "theirs", settings, weights)
    importer.to_run(theirs, tmp_path / "run")
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(theirs)


def old_bert(fixture):
    """Return the tensors of a published file: old names, a second head, positions; MaskedLM in the config."""
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in fixture.weight.items()
    }
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    length = fixture.config["max_position_embeddings"]
    weights["bert.embeddings.position_ids"] = np.arange(length)[None]
    return weights


@pytest.mark.parametrize("next_sentence", [True, False])
def test_old_bert_files_have_old_names_and_more_than_their_class(
    next_sentence, parity, folders, tmp_path
):
    fixture = parity("bert")
    weights = old_bert(fixture)
    if not next_sentence:  # the pooler stays, with nothing that uses it
        weights = {k: v for k, v in weights.items() if not k.startswith("cls.seq_relationship")}
    settings = {**fixture.config, "architectures": ["BertForMaskedLM"]}
    theirs = folders.write_folder(tmp_path / "theirs", settings, weights)
    importer.to_run(theirs, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run").model.cfg.next_sentence == next_sentence
    logits, where = folders.logits_of(tmp_path / "run", fixture.input)
    np.testing.assert_allclose(logits[where], fixture.output["logits"][where], rtol=0, atol=2e-5)
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(theirs)


def test_roberta_s_first_positions_and_pooler_are_nobody_s_and_come_back(parity, folders, tmp_path):
    fixture, rng = parity("roberta"), np.random.default_rng(0)
    weights = {k: v.astype(BFLOAT16) for k, v in fixture.weight.items()}
    weights["roberta.pooler.dense.weight"] = rng.normal(size=(16, 16)).astype(np.float16)
    weights["roberta.pooler.dense.bias"] = rng.normal(size=16)
    theirs = folders.write_folder(tmp_path / "theirs", fixture.config, weights)
    made = importer.to_run(theirs, tmp_path / "run")
    assert made.architecture == "roberta"
    position = "roberta.embeddings.position_embeddings.weight"
    table = checkpoint.load(tmp_path / "run").params["position_embedding"]
    np.testing.assert_array_equal(table, fixture.weight[position][2:])
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(theirs)
    weights["roberta.pooler.dense.bias"] = rng.normal(size=17)
    folders.write_folder(tmp_path / "wrong", fixture.config, weights)
    with pytest.raises(ConfigError, match=r"roberta\.pooler\.dense\.bias \[17\] and not \[16\]"):
        importer.to_run(tmp_path / "wrong", tmp_path / "other")


@pytest.mark.parametrize(("kind", "types"), [("roberta", 2), ("bert", 1)])
def test_what_a_model_was_counts_more_than_its_kinds_of_segments(
    kind, types, parity, folders, tmp_path
):
    fixture = parity(kind)
    weights = {
        k: v for k, v in fixture.weight.items() if not k.startswith(("cls.seq", "bert.pool"))
    }
    table = f"{kind}.embeddings.token_type_embeddings.weight"
    weights[table] = np.repeat(weights[table], 2, axis=0)[:types]
    (masked,) = architectures.architecture(kind).CLASSES[-1:]
    settings = {**fixture.config, "type_vocab_size": types, "architectures": [masked]}
    theirs = folders.write_folder(tmp_path / "theirs", settings, weights)
    importer.to_run(theirs, tmp_path / "run")
    assert exporter.from_run(tmp_path / "run", tmp_path / "back").architecture == kind
    assert hashes(tmp_path / "back") == hashes(theirs)
    cfg = checkpoint.load(tmp_path / "run").model.cfg
    assert exporter._expressed("bert", cfg)[0] == "bert"


def test_old_t5_files_have_the_embedding_three_times_and_a_table_of_no_use(
    parity, folders, tmp_path
):
    fixture = parity("t5")
    weights = dict(fixture.weight)
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = weights["shared.weight"]
    bias = "relative_attention_bias.weight"
    weights[f"decoder.block.0.layer.1.EncDecAttention.{bias}"] = np.ones((8, 2), np.float32)
    # As before transformers 5, which says what tie_word_embeddings meant by another name.
    settings = {k: v for k, v in fixture.config.items() if k != "scale_decoder_outputs"}
    settings["decoder_start_token_id"] = 3
    theirs = folders.write_folder(tmp_path / "theirs", settings, weights)
    importer.to_run(theirs, tmp_path / "run")
    logits, where = folders.logits_of(tmp_path / "run", fixture.input)
    np.testing.assert_allclose(logits[where], fixture.output["logits"][where], rtol=0, atol=2e-5)
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(theirs)
    completer = workdirs.completer(tmp_path / "run", checkpoint.load(tmp_path / "run"))
    assert completer.task.start == 3 != completer.tokenizer.end_of_text


LLAMA = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "qk_norm": False}
LLAMA |= {"name": "gpt", "activation": "swiglu", "norm_epsilon": 1e-4, "scan": True}
YARN = {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_mscale": 0.7, "rope_mscale_all_dim": 0.5}
GPT2 = {"name": "gpt", "num_layers": 1, "model_dim": 16, "num_heads": 2, "positions": "learned"}
GPT2 |= {"norm": "layernorm", "norm_bias": True, "activation": "gelu_erf", "qk_norm": False}
BERT = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "vocab_size": 50, "max_length": 20}
T5 = {**BERT, "max_source_length": 30, "num_buckets": 8, "max_distance": 12, "start_token": 0}


@pytest.mark.parametrize(
    ("family", "model", "architecture"),
    [
        ("bert", {**BERT, "next_sentence": True}, "bert"),
        ("bert", {**BERT, "num_types": 1}, "bert"),
        ("bert", {**BERT, "num_types": 1, "next_sentence": True}, "bert"),
        ("bert", BERT, "bert"),
        ("bert", {**BERT, "num_types": 1, "activation": "relu"}, "bert"),  # RoBERTa's head has gelu
        ("t5", {**T5, "activation": "geglu", "tied": False, "num_decoder_layers": 1}, "t5"),
        ("t5", {**T5, "start_token": 7}, "t5"),
        (
            "gpt",
            {**GPT2, **BERT, "model_dim": 6, "bias": True},
            "gpt2",
        ),  # heads of 3 turn for no Llama
    ],
)
def test_a_model_of_ours_is_the_narrowest_architecture_that_it_fits(family, model, architecture):
    cfg = models.config_class(family)(**model)
    name, settings = exporter._expressed(family, cfg)
    assert name == settings["model_type"] == architecture
    if family == "t5":
        assert settings["decoder_start_token_id"] == cfg.start_token


def saved(tmp_path, config):
    """Return the folder of a run that has only begun: its first state, every number of it moved."""
    made, workdir = experiment.build(config), tmp_path / "mine"
    with sharding.use(made.mesh):
        state = experiment.jitted(made)[0]()
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), state.params
        )
        saver = checkpoint.Checkpointer(workdir, made.cfg["checkpoint"])
        saver.save(0, dataclasses.replace(state, params=params), {})
        saver.close()
    workdirs.write_files(workdir, made, 0, {})
    return workdir


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("llama", LLAMA),
        ("llama", {**LLAMA, **YARN, "tied": False, "bias": True, "bias_in": "mlp"}),
        ("llama", {**LLAMA, "rope_scaling": "linear", "rope_factor": 2.0, "head_dim": 6}),
        (
            "llama",
            {**LLAMA, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 4},
        ),
        ("gpt2", {**GPT2, "bias": True}),
    ],
)
def test_a_model_of_ours_goes_out_and_comes_in_the_same(architecture, model, tiny, tmp_path):
    run = saved(tmp_path, tiny(model=model))
    made = exporter.from_run(run, tmp_path / "out", step=0)
    assert made.architecture == architecture and made.dtypes == "F32"
    assert importer.to_run(tmp_path / "out", tmp_path / "again").left_out == ""
    (_, model, params), (_, other, same) = (
        checkpoint.load(run),
        checkpoint.load(tmp_path / "again"),
    )
    batch = {"inputs": np.arange(16, dtype=np.int32)[None], "segments": np.ones((1, 16), np.int32)}
    batch["positions"] = batch["inputs"]
    both = jax.jit(
        lambda m, p: m.apply(
            {"params": p}, batch, method=lambda module, b: module.logits(module(b))
        ),
        static_argnums=0,
    )
    logits = [both(model, params), both(other, same)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=2e-5)  # scanned against not
    before, after = flatten(params), flatten(same)
    for path, value in after.items():
        value, ours = np.asarray(value), np.asarray(exporter._unrolled(before, path))
        if path.startswith(("embed.", "head.")):  # the padding of the vocabulary is nobody's
            axis = 0 if path.startswith("embed.") else 1
            ours, value = (np.take(x, range(model.cfg.vocab_size), axis) for x in (ours, value))
        np.testing.assert_array_equal(ours, value, err_msg=path)
    tokenizers = [
        checkpoint.read_config(folder).data.tokenizer for folder in (run, tmp_path / "again")
    ]
    assert tokenizers == ["byte", "file"]
    assert json.loads((tmp_path / "again" / "tokenizer" / "tokenizer.json").read_text()) == {
        "name": "byte"
    }


def test_roberta_s_options_go_out_with_the_positions_that_they_had(tiny, tmp_path):
    """RoBERTa of transformers counts tokens that are not its padding; any token of ours may have its id."""
    model = {"name": "bert", "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_types": 1}
    run = saved(tmp_path, tiny(model=model, task={"name": "masked_lm", "length": 16}))
    exporter.from_run(run, tmp_path / "out", step=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids = np.array([5, 1, 6, 1, 7])
    theirs = np.arange(len(ids))
    if config["model_type"] == "roberta":
        text = ids != config["pad_token_id"]
        theirs = np.cumsum(text) * text + config["pad_token_id"] - 2
    np.testing.assert_array_equal(theirs, np.arange(len(ids)))


def test_a_run_that_began_from_a_folder_goes_out_with_its_tokenizer(
    parity, folders, tiny, tmp_path
):
    fixture = parity("gpt2")
    theirs = folders.write_folder(tmp_path / "theirs", fixture.config, fixture.weight)
    importer.to_run(theirs, tmp_path / "run")
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 " * 400)
    model = checkpoint.read_config(tmp_path / "run").model
    data = {"path": (str(tmp_path / "text.txt"),), "batch_size": 8, "tokenizer": "file"}
    data["tokenizer_path"] = str(tmp_path / "run" / "tokenizer")
    config = tiny(model=model, data=data, train__init_from=str(tmp_path / "run"))
    train.run(config, tmp_path / "mine")
    exporter.from_run(tmp_path / "mine", tmp_path / "out")
    ours, before = (tmp_path / "out", theirs)
    assert (ours / "tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes()
    tokens = json.loads((ours / "tokenizer_config.json").read_text())
    assert tokens["eos_token"] == "</s>" and tokens["unk_token"] == "<unk>"
    config = json.loads((ours / "config.json").read_text())
    assert config["eos_token_id"] == 2 and config["architectures"] == ["GPT2LMHeadModel"]
    first, last = (
        dict(safetensors_file.read(f / "model.safetensors", ["transformer.wte.weight"]))
        for f in (before, ours)
    )
    moved = np.abs(first["transformer.wte.weight"] - last["transformer.wte.weight"]).max()
    assert 1e-4 < moved < 0.2


def test_how_a_model_was_computed_is_no_part_of_it():
    ways = {"microbatches": 8, "stage_repeats": 2, "context_parallel": "gather", "scan": True}
    ways["matmul_dtype"] = "fp8"
    cfg = gpt.Config(**{**LLAMA, "num_layers": 4, "vocab_size": 50, "max_length": 16, **ways})
    assert exporter._expressed("gpt", cfg)


def test_numbers_that_16_bits_do_not_hold_are_written_in_32():
    values = np.array([1.0, 1 / 3], np.float32)
    assert exporter._as(values[:1], "BF16").dtype == BFLOAT16
    assert exporter._as(values, "BF16").dtype == np.float32
    assert exporter._as(np.array([np.nan], np.float32), "F16").dtype == np.float16


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"qk_norm": True}, "llama has no model.qk_norm=True"),
        ({"activation": "relu2"}, "llama has no model.activation='relu2'"),
        ({"window": 3}, "llama has no model.window=3"),
        ({"logit_softcap": 5.0}, "llama has no model.logit_softcap=5.0"),
        ({"norm": "layernorm"}, "llama has no model.norm='layernorm'"),
        ({**GPT2, "bias": True, "bias_in": "mlp"}, "gpt2 has no model.bias_in='mlp'"),
        ({**GPT2, "bias": True, "num_kv_heads": 1}, "gpt2 has no model.num_kv_heads=1"),
        ({**GPT2, "bias": True, "head_dim": 6}, "gpt2 has no model.head_dim=6"),
        ({**GPT2, "bias": False}, "gpt2 has no model.bias=False"),
    ],
    ids=str,
)
def test_a_model_that_is_no_known_architecture_says_why(model, words):
    cfg = gpt.Config(**{**LLAMA, "vocab_size": 50, "max_length": 16, "scan": False, **model})
    with pytest.raises(ConfigError) as caught:
        exporter._expressed("gpt", cfg)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.name='rnn': no Hugging Face architecture"):
        exporter._expressed("rnn", cfg)


def test_what_is_there_is_never_touched(tiny, tmp_path):
    run = saved(tmp_path, tiny(model={**LLAMA, "num_layers": 1}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="there is something already"):
        exporter.from_run(run, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("family", "model", "words"),
    [
        ("bert", {"num_types": 0}, "bert has no such model (config.json: type_vocab_size=0"),
        ("bert", {"num_classes": 3}, "bert has no model.num_classes=3"),
        ("bert", {"activation": "relu2"}, "bert has no model.activation='relu2'"),
        ("t5", {"activation": "gelu"}, "t5 has no model.activation='gelu'"),
    ],
)
def test_an_encoder_that_is_no_known_architecture_says_why(family, model, words):
    cfg = models.config_class(family)(**{**(T5 if family == "t5" else BERT), **model})
    with pytest.raises(ConfigError) as caught:
        exporter._expressed(family, cfg)
    assert words in str(caught.value)


def test_a_damaged_layout_is_one_line(parity, folders, tmp_path):
    fixture = parity("llama")
    theirs = folders.write_folder(tmp_path / "theirs", fixture.config, fixture.weight)
    importer.to_run(theirs, tmp_path / "run")
    path = tmp_path / "run" / "huggingface" / "layout.json"
    whole = path.read_text()
    path.write_text(whole.replace("model.norm.weight", "model.nor.weight"))
    with pytest.raises(ConfigError, match=r"tensor 'model\.nor\.weight' is not known"):
        exporter.from_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_text(whole[:-9])
    with pytest.raises(ConfigError, match=r"layout\.json: not a JSON object"):
        exporter.from_run(tmp_path / "run", tmp_path / "out")


def test_headers_are_padded_to_eight_bytes(tmp_path):
    safetensors_file.write(tmp_path / "x", {"a": np.ones(1)}, order=["a"], metadata={"k": "v"})
    (length,) = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])
    assert length % 8 == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_positions_are_where_every_version_looks(scaled):
    """transformers before 5 reads rope_theta and rope_scaling; without them it takes 10,000 and none."""
    scaling = {"rope_scaling": "linear", "rope_factor": 4.0} if scaled else {}
    cfg = models.config_class("gpt")(**{**LLAMA, "rope_base": 5e5, **scaling})
    cfg = models.resolve(cfg, vocab_size=64, max_length=32, packed=False)
    written = llama.write(cfg)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written.get("rope_scaling") == (
        {"rope_type": "linear", "factor": 4.0} if scaled else None
    )
