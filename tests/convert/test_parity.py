"""Our models against transformers': committed logits, and with PyTorch installed live ones of other sizes."""

import json
from pathlib import Path

import numpy as np
import pytest

from lm.convert import exporter, importer

TOLERANCE = 2e-5  # absolute, of float32 logits; nowhere loosened


def assert_same(ours, theirs, where):
    assert np.abs(theirs[where]).max() > 0.5, "logits too small to tell models apart"
    np.testing.assert_allclose(ours[where], theirs[where], rtol=0, atol=TOLERANCE)


@pytest.mark.optimized
def test_logits_are_those_of_the_fixture(name, parity, folders, tmp_path):
    fixture = parity(name)
    folders.write_folder(tmp_path / "theirs", fixture.config, fixture.weight)
    importer.to_run(tmp_path / "theirs", tmp_path / "run")
    logits, where = folders.logits_of(tmp_path / "run", fixture.input)
    assert not where.all(), "no padding to get wrong"
    assert_same(logits, fixture.output["logits"], where)


def test_biases_and_norm_weights_are_off_0_and_1(name, parity):
    for tensor, values in parity(name).weight.items():
        if values.ndim == 1:
            least = np.abs(values - ("norm" in tensor.lower() and "bias" not in tensor)).mean()
            assert least > 0.1 and values.std() > 0.1, tensor


def test_the_fixtures_are_small():
    files = list((Path(__file__).parents[1] / "fixtures").glob("*.safetensors"))
    assert len(files) >= 13 and sum(file.stat().st_size for file in files) <= 300_000


# Sizes of the live models, which no fixture has; what an architecture does not know is left out.
SIZES = {
    "vocab_size": 131,
    **{"n_embd": 24, "n_head": 3, "n_layer": 3, "n_positions": 40},
    **{
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "intermediate_size": 50,
    },
    "num_key_value_heads": 2,
    **{"d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 3, "num_layers": 3},
    "num_decoder_layers": 1,
}


OTHERWISE = {
    "GPT2LMHeadModel": {
        **{"n_inner": 70, "activation_function": "gelu", "tie_word_embeddings": False},
        "layer_norm_epsilon": 1e-3,
    },
    "LlamaForCausalLM": {
        **{"num_key_value_heads": 3, "head_dim": 10, "rms_norm_eps": 1e-3},
        **{"attention_bias": False, "mlp_bias": True},
    },
    "BertForPreTraining": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 3},
    "RobertaForMaskedLM": {"layer_norm_eps": 1e-3},
    "T5ForConditionalGeneration": {
        **{"layer_norm_epsilon": 1e-3, "relative_attention_num_buckets": 12},
        "relative_attention_max_distance": 30,
    },
}


def live_settings(case, number):
    """Return sizes for a case's config, and more options for the second model of an architecture."""
    settings = {key: size for key, size in SIZES.items() if key in case.config}
    return settings | (OTHERWISE[case.architecture] if number else {})


@pytest.mark.parametrize("number", [0, 1])
def test_live_logits_go_both_ways(name, number, folders, tmp_path):
    """A model of transformers' -> a run -> a folder that transformers loads: the same logits three times."""
    torch = pytest.importorskip("torch", reason="needs the extra `bench`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `bench`")
    from tools import make_fixtures

    case = make_fixtures.CASES[name]
    made = make_fixtures.make(case, 7 + number, **live_settings(case, number))
    made.model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **made.config}))
    (tmp_path / "theirs" / "tokenizer.json").write_text(folders.tokenizer_json())
    importer.to_run(tmp_path / "theirs", tmp_path / "run")
    inputs = {key: value.numpy() for key, value in made.inputs.items()}
    logits, where = folders.logits_of(tmp_path / "run", inputs)
    theirs = made.outputs["logits"].detach().numpy()
    assert_same(logits, theirs, where)

    # With what it remembers of the folder, and without, as a trained run would be.
    exporter.from_run(tmp_path / "run", tmp_path / "back")
    (tmp_path / "run" / "huggingface" / "layout.json").unlink()
    exporter.from_run(tmp_path / "run", tmp_path / "plain")
    for folder in ("back", "plain"):
        cls = getattr(transformers, case.architecture)
        model, loading = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(
            loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        with torch.no_grad():
            again = model.eval()(**made.inputs)
        logits = again["prediction_logits" if "prediction_logits" in again else "logits"].numpy()
        np.testing.assert_array_equal(logits[where], theirs[where])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer("w3 w5", add_special_tokens=False).input_ids == [3, 5]
