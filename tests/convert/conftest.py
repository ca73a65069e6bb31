"""Hugging Face folders of the fixtures, a tokenizer small enough for them, and batches of their inputs."""

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lm import checkpoint
from lm.convert import architectures, safetensors_file

FIXTURES = Path(__file__).parents[1] / "fixtures"


def tokenizer_json(words=19):
    """Return a tokenizer.json of a few words: so few that the fixtures have ids left for a task's own."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"w{i}": i for i in range(3, words)}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library.to_str()


def write_folder(path, config, weights, *, tokenizer=True):
    """Write a Hugging Face folder, the tensors in their own types."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    order = safetensors_file.standard_order(weights)
    safetensors_file.write(
        path / "model.safetensors", weights, order=order, metadata={"format": "pt"}
    )
    if tokenizer:
        (path / "tokenizer.json").write_text(tokenizer_json())
    return path


def batch_of(inputs):
    """Return the batch of a fixture's inputs."""
    batch = {}

    def take(ids, mask, name, segments, positions):
        batch[name], batch[segments] = ids.astype(np.int32), mask.astype(np.int32)
        batch[positions] = np.arange(ids.shape[1], dtype=np.int32)[None] * batch[segments]

    if "decoder_input_ids" in inputs:
        take(inputs["input_ids"], inputs["attention_mask"],
             "source", "source_segments", "source_positions")  # fmt: skip
        take(inputs["decoder_input_ids"], inputs["decoder_attention_mask"],
             "inputs", "segments", "positions")  # fmt: skip
    else:
        take(inputs["input_ids"], inputs["attention_mask"], "inputs", "segments", "positions")
    if "token_type_ids" in inputs:
        batch["types"] = inputs["token_type_ids"].astype(np.int32)
    return batch


def logits_of(workdir, inputs):
    """Return the logits [B, L, V] that a run gives, and where they are of a text."""
    _, model, params = checkpoint.load(workdir)
    batch = batch_of(inputs)

    @jax.jit
    def run(params, batch):
        return model.apply(
            {"params": params}, batch, method=lambda module, b: module.logits(module(b))
        )

    logits = np.asarray(run(params, batch))[..., : model.cfg.vocab_size]
    return logits, batch["segments"] > 0


def pytest_generate_tests(metafunc):
    """Give `name` every fixture of an architecture that can be converted."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", fixture_names())


def fixture_names():
    """Return the fixtures of the architectures that can be converted, sorted."""
    found = []
    for path in sorted(FIXTURES.glob("*.safetensors")):
        about = json.loads(safetensors_file.read_header(path).metadata["fixture"])
        if about["config"].get("model_type") in architectures.names():
            found.append(path.stem)
    return found


@pytest.fixture(scope="session")
def folders():
    """Return the functions of this file, which tests cannot import by name."""
    functions = (tokenizer_json, write_folder, batch_of, logits_of)
    return types.SimpleNamespace(**{function.__name__: function for function in functions})
