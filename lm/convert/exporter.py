"""A run becomes a Hugging Face folder: the one that it was made of, or one in the library's layout."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from lm import checkpoint, manifests
from lm import config as config_lib
from lm.config import ConfigError
from lm.convert import architectures, safetensors_file
from lm.convert.folder import WEIGHTS
from lm.convert.places import KEPT, LAYOUT, UNUSED, Converted, placed
from lm.convert.safetensors_file import DTYPES, shown
from lm.convert.settings import Settings
from lm.data import external, llama2c, tokenizers
from lm.data.tokenizers import Tokenizer
from lm.nn.transformer import SCANNED, UNROLLED

# Fields of a model's config that do not change what it computes once it is trained.
FREE = {
    "name", "scan", "remat", "kernel", "dtype", "mask", "dropout", "residual_init", "microbatches",
    "stage_repeats", "context_parallel", "matmul_dtype",
}  # fmt: skip


def from_run(workdir: str | Path, target: str | Path, step: int | str = "last") -> Converted:
    """Make the Hugging Face folder `target` of a run's checkpoint.

    Raises:
      ConfigError: no such checkpoint, or a model that no known architecture is.
    """
    workdir, target = Path(workdir), Path(target)
    config, model, params = checkpoint.load(workdir, step=step)
    cfg = model.cfg
    kept = _kept(workdir)
    name, settings = _expressed(config.model.name, cfg, kept["architecture"] if kept else "")
    if kept and not _is_unchanged(workdir / KEPT, kept, name, cfg):
        kept = None
    tokenizer = tokenizers.load(workdir / "tokenizer")
    flat = traverse_util.flatten_dict(params, sep=".")
    arrays: dict[str, np.ndarray] = {}
    for part in architectures.architecture(name).parts(cfg):
        array = np.asarray(_unrolled(flat, part.ours))
        for (theirs, shape), value in zip(part.theirs, part.split(array), strict=True):
            assert value.shape == shape, theirs
            arrays[theirs] = value
    with placed(target, "--to") as unfinished:
        if kept is None:
            _write_plainly(unfinished, settings, arrays, tokenizer)
        else:
            arrays = _write_as_before(unfinished, workdir / KEPT, kept["files"], name, cfg, arrays)
    dtypes = sorted({safetensors_file.dtype_name(array) for array in arrays.values()})
    count = sum(int(leaf.size) for leaf in flat.values())
    return Converted(name, count, "/".join(dtypes), f"{tokenizer.name} of {tokenizer.vocab_size:,}")


def _expressed(family: str, cfg: Any, first: str = "") -> tuple[str, dict[str, Any]]:
    """Return the architecture that a model is, and its config.json.

    It is one if what is written is read as the same config, but for what training alone needs. Of several it
    is `first`, the one that the model was read as, or else the first by name: a model of RoBERTa's options is
    a BERT, as a RoBERTa of theirs counts positions anew where a text holds its pad_token_id.
    """
    found: dict[str, dict[str, Any]] = {}
    reasons = []
    for name in architectures.names():
        architecture = architectures.architecture(name)
        if family != architecture.FAMILY:
            continue
        settings = {
            "model_type": name,
            "architectures": [architecture.CLASSES[0]],
            **architecture.write(cfg),
        }
        try:
            fields = architecture.read(Settings(settings, "config.json"))
            again = _deciding(config_lib.freeze(type(cfg), fields, where="model"), architecture)
        except ConfigError as error:
            reasons.append(f"{name} has no such model ({error})")
            continue
        values = _deciding(cfg, architecture)
        differing = [key for key, value in values.items() if again.get(key) != value]
        if not differing:
            found[name] = settings
            continue
        shown_fields = [f"model.{key}={getattr(cfg, key)!r}" for key in differing]
        reasons.append(f"{name} has no {', '.join(shown_fields)}")
    if found:
        name = first if first in found else min(found)
        return name, found[name]
    known = "; ".join(reasons) or f"known are {', '.join(architectures.names())}"
    raise ConfigError(
        f"model.name={family!r}: no Hugging Face architecture that is known here is this model: {known}; "
        "of the experiments llama_tiny and gpt2_small are such models"
    )


def _deciding(cfg: Any, architecture: Any) -> dict[str, Any]:
    """Return the fields that decide what a model computes, derived sizes filled, unused ones left out."""
    values = {**dataclasses.asdict(cfg), **getattr(cfg, "sizes", {})}
    rules = getattr(cfg, "ONLY_FOR", {})

    def used(key: str) -> bool:
        option, wanted = rules.get(key, ("", ()))
        return not option or (values[option] in wanted and used(option))

    free = FREE | architecture.FREE
    return {key: value for key, value in values.items() if key not in free and used(key)}


def _unrolled(flat: Mapping[str, Any], ours: str) -> Any:
    """Return a parameter by its path in unrolled layers, out of layers of either kind."""
    if ours in flat:
        return flat[ours]
    before, _, after = ours.partition(UNROLLED.format(""))
    number, _, rest = after.partition(".")
    return flat[f"{before}{SCANNED}.{rest}"][int(number)]


def _kept(workdir: Path) -> dict[str, Any] | None:
    """Return the layout of the files that a run was made of; None where it was made otherwise."""
    path = workdir / KEPT / LAYOUT
    return external.read_object(path) if path.is_file() else None


def _is_unchanged(place: Path, kept: Mapping[str, Any], name: str, cfg: Any) -> bool:
    """Return whether a model is still the one that its kept config.json says."""
    if kept["architecture"] != name:
        return False
    config, architecture = place / "config.json", architectures.architecture(name)
    tensors = {theirs for file in kept["files"].values() for _, _, theirs in file["tensors"]}
    fields = architecture.read(Settings(external.read_object(config), str(config), tensors))
    before = _deciding(config_lib.freeze(type(cfg), fields, where="model"), architecture)
    return before == _deciding(cfg, architecture)


def _write_as_before(
    unfinished: Path,
    kept: Path,
    layout: Mapping[str, Any],
    name: str,
    cfg: Any,
    arrays: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Write the files as they lay; return the arrays as they are stored.

    A tensor has its old type where that holds its numbers, as it does unless they were trained on.
    """
    architecture = architectures.architecture(name)
    copies, constants = architecture.copies(cfg), architecture.constants(cfg)
    unused = {}
    if (kept / UNUSED).is_file():
        entries = safetensors_file.read_header(kept / UNUSED).entries
        unused = dict(safetensors_file.read(kept / UNUSED, entries))

    def stored_as(dtype: str, tensor: str) -> np.ndarray:
        if tensor in constants and tensor not in unused:
            return constants[tensor].make().astype(DTYPES[dtype])
        tensor = copies.get(tensor, tensor)
        if tensor not in arrays:
            if tensor in unused:
                return unused[tensor]
            raise ConfigError(f"{kept / LAYOUT}: tensor {shown(tensor)} is not known; restore it")
        array = _as(arrays[tensor], dtype)
        if tensor in unused:
            rows = unused[tensor]
            array[: len(rows)] = rows
        return array

    stored: dict[str, np.ndarray] = {}
    for file, described in layout.items():
        here = {tensor: stored_as(*rest) for tensor, *rest in described["tensors"]}
        safetensors_file.write(
            unfinished / file, here, order=list(here), metadata=described["metadata"]
        )
        stored |= here
    for path in kept.iterdir():
        if path.name not in (LAYOUT, UNUSED):
            shutil.copyfile(path, unfinished / path.name)
    return stored


def _as(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an array in a type of the format's, or in float32 where that would change a number."""
    stored = array.astype(DTYPES[dtype])
    exact = np.array_equal(stored.astype(np.float32), array, equal_nan=True)
    return stored if exact else array


def _write_plainly(
    unfinished: Path,
    settings: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
) -> None:
    """Write one file of tensors, config.json and the tokenizer."""
    order = safetensors_file.standard_order(arrays)
    safetensors_file.write(unfinished / WEIGHTS, arrays, order=order, metadata={"format": "pt"})
    ids = {f"{role}_token_id": tokenizer.specials.get(role) for role in ("bos", "eos", "pad")}
    if tokenizer.name not in external.SAVED:
        ids = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    text = json.dumps({**ids, **settings, "dtype": "float32"}, indent=2)
    manifests.write_whole(unfinished / "config.json", text + "\n")
    _write_tokenizer(unfinished, tokenizer)


def _write_tokenizer(unfinished: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer as others read it; one of ours, as `lm.data.external` finds it."""
    if isinstance(tokenizer, external.HuggingFace):
        (unfinished / "tokenizer.json").write_bytes(tokenizer.content)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {f"{role}_token": token for role, token in tokenizer.role_tokens().items()}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        manifests.write_whole(unfinished / "tokenizer_config.json", text + "\n")
    elif isinstance(tokenizer, llama2c.Llama2C):
        (unfinished / "tokenizer.bin").write_bytes(tokenizer.content)
    else:
        tokenizer.save(unfinished / external.OURS)
