"""What a run starts from: fresh parameters, another run's, or pretrained word vectors."""

import re
from collections.abc import Callable
from typing import Any

import jax

from lm import checkpoint, experiment, sharding, step
from lm.config import ConfigError
from lm.data import vectors


def fresh_state(
    made: experiment.Experiment, init: Callable[[], step.TrainState]
) -> step.TrainState:
    """Return the state of step 0, with the parameters of `train.init_from` where that is given."""
    state = init()
    if source := made.cfg["train"].init_from:
        state = step.begin_with(state, checkpoint.init_from(source, state.params))
    if made.cfg["train"].vectors:
        state = step.begin_with(state, with_vectors(made, state.params))
    return state


def with_vectors(
    made: experiment.Experiment, params: Any, say: Callable[[str], None] = print
) -> Any:
    """Return `params` with the rows of the embedding that `train.vectors` has words for.

    A row's word is its token's text without spaces around it; a token that begins a word comes first.

    Raises:
      ConfigError: a file that is missing or damaged, vectors of another width, or no word in common.
    """
    source, tokenizer = made.cfg["train"].vectors, made.corpus.tokenizer
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    order = sorted(range(len(texts)), key=lambda i: (not texts[i].startswith(" "), i))
    ids: dict[str, int] = {}
    for i in order:
        ids.setdefault(texts[i].strip(), i)
    ids.pop("", None)
    rows, found = vectors.read(source, ids, field="train.vectors")

    def replace(path, leaf):
        if not re.search(experiment.EMBEDDING, sharding.path_name(path)):
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
