"""What a run starts from: fresh parameters, another run's, or pretrained word vectors."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lm import checkpoint, experiment, manifests, sharding, step
from lm.config import ConfigError
from lm.data import tokenizers, vectors
from lm.stored import averaged, flatten, layers_by_stack, restore, shapes_of, sources_of, unflatten


def fresh_state(
    made: experiment.Experiment, init: Callable[[], step.TrainState]
) -> step.TrainState:
    """Return the state of step 0, with the parameters of `train.init_from` where that is given."""
    state = init()
    if source := made.cfg["train"].init_from:
        state = step.begin_with(state, init_from(source, state.params))
        _compare_tokenizers(Path(source).absolute(), made.corpus.tokenizer)
    if made.cfg["train"].vectors:
        state = step.begin_with(state, with_vectors(made, state.params))
    return state


def with_vectors(
    made: experiment.Experiment, params: Any, say: Callable[[str], None] = print
) -> Any:
    """Return `params` with the rows of the embedding that `train.vectors` has words for.

    A row's word is its token's text without spaces around it; a token that begins a word comes first.

    Raises:
      ConfigError: no embedding, a file that is missing or damaged, vectors of another width, or no word
        in common.
    """
    source, tokenizer = made.cfg["train"].vectors, made.corpus.tokenizer
    tables = [
        path
        for path, _ in jax.tree.leaves_with_path(params)
        if re.search(experiment.EMBEDDING, sharding.path_name(path))
    ]
    if not tables:
        raise ConfigError(
            f"train.vectors={source}: model.name={made.cfg['model'].name!r} has no embedding to start from "
            "them; leave it out"
        )
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    order = sorted(range(len(texts)), key=lambda i: (not texts[i].startswith(" "), i))
    ids: dict[str, int] = {}
    for i in order:
        ids.setdefault(texts[i].strip(), i)
    ids.pop("", None)
    rows, found = vectors.read(source, ids, field="train.vectors")

    def replace(path, leaf):
        if path not in tables:
            return leaf
        if leaf.shape[1] != found.shape[1]:
            raise ConfigError(
                f"train.vectors={source}: vectors of {found.shape[1]} numbers, and the embedding has "
                f"{leaf.shape[1]}; change the model's width, or give other vectors"
            )
        return jax.jit(lambda table: table.at[rows].set(found), out_shardings=leaf.sharding)(leaf)

    if not len(rows):
        raise ConfigError(
            f"train.vectors={source}: none of the {len(ids):,} words of the vocabulary"
        )
    params = jax.tree.map_with_path(replace, params)
    share = len(rows) / len(ids)
    say(f"vectors: {source}: {len(rows):,} of {len(ids):,} words of the vocabulary ({share:.1%})")
    return params


def _compare_tokenizers(source: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Say so where the run that parameters are from has another tokenizer: its tokens mean other things."""
    folders = [place / "tokenizer" for place in (source, source.parent.parent)]
    if (folder := next(filter(Path.is_dir, folders), None)) is None:
        return
    if tokenizers.load(folder).fingerprint != tokenizer.fingerprint:
        print(
            "notice: init_from: its tokenizer is another, so what it learned of a token is of other text; to "
            f"go on with its own: --config.data.tokenizer=file --config.data.tokenizer_path={folder}"
        )


def init_from(source: str | Path, params: Any, say: Callable[[str], None] = print) -> Any:
    """Return `params` with every parameter of the same name in `source` taken from there.

    Args:
      source: a run's folder (its last checkpoint), or one checkpoint's folder.
      params: placed arrays, kept where `source` has none of the name; both kinds are said.

    Raises:
      ConfigError: no checkpoint there, no name in common, or a shape that differs.
    """
    path = Path(source).absolute()
    if path.name.isdecimal() and (path / manifests.MANIFEST).is_file():
        folder, step = path.parent, int(path.name)
    else:
        folder = path / "checkpoints"
        if not manifests.good_steps(folder):
            raise ConfigError(
                f"train.init_from={source}: no finished checkpoint there; give a run's folder, or one of its "
                "checkpoints'"
            )
        step = checkpoint.find_step(path)
    if bad := manifests.problem(folder, step):
        raise ConfigError(f"train.init_from={source}: {bad}; choose another checkpoint")
    arrays = (manifests.read(folder, step) or {})["arrays"]
    part = averaged(arrays)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in flatten({part: params}).items()
    }
    shapes, depths = shapes_of(arrays), (layers_by_stack(wanted), layers_by_stack(arrays))
    names = {
        name: [source for source, _, _ in sources_of(name, leaf, shapes, *depths)]
        for name, leaf in wanted.items()
    }
    missing = sorted(name for name in wanted if not set(names[name]) <= set(arrays))
    used = {source for name in wanted if name not in missing for source in names[name]}
    extra = sorted(name for name in arrays if name.startswith(f"{part}.") and name not in used)
    if len(missing) == len(wanted):
        raise ConfigError(
            f"train.init_from={source}: no parameter of that model has a name of this one's"
        )
    found = restore(
        folder, step, {name: leaf for name, leaf in wanted.items() if name not in missing}
    )
    say(f"init_from {source} step {step}: {len(found)} parameters taken")
    for title, names_of in (
        ("not there, so fresh", missing),
        ("there, but not in this model", extra),
    ):
        if names_of:
            say(f"init_from: {title}: {', '.join(names_of)}")
    return unflatten({part: params}, {**flatten({part: params}), **found})[part]
