"""Text in, text out, as a family and its task have it: go on, answer, fill in, or classify."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from lm import generate, tasks
from lm.config import ConfigError

MASK = "[MASK]"  # in a prompt: what an encoder fills in, or where a span was cut out


class Sampling(NamedTuple):
    """How tokens are chosen; see `lm.generate.generate`. An encoder shows its `top_k` best, 0 = 5."""

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Completer:
    """A trained model with what turns text into its rows and back.

    Attributes:
      task: what it was trained for.
      paired: whether it was trained on pairs, and so answers a prompt instead of going on with it.
    """

    model: nn.Module
    params: Any
    task: Any
    tokenizer: Any
    paired: bool

    @property
    def kind(self) -> str:
        """The kind of rows that the model reads: "causal", "source" or "masked"."""
        return tasks.kind_for(self.task.KINDS, self.model.accepts)

    @property
    def goes_on(self) -> bool:
        """Whether the answer continues the prompt, so that both are one text."""
        return self.kind == "causal" and not self.paired

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[str]:
        """Return what the model makes of each prompt.

        A text that goes on (without the prompt), the answer to it, the words that an encoder puts for
        each [MASK], or the classes of a text, with their probabilities.

        Raises:
          ConfigError: a prompt that the tokenizer or the model cannot read.
        """
        rows = self.check(prompts, sampling)
        if self.kind == "masked":
            return self._fill(rows, sampling.top_k or 5)
        made = self._write(rows, sampling, on_tokens)
        return [self.answer(*each) for each in zip(prompts, made, strict=True)]

    def check(self, prompts: Sequence[str], sampling: Sampling) -> list[list[int]]:
        """Return the tokens of each prompt. Raises ConfigError, as `complete`; no parameters are needed."""
        generate.check_sampling(*sampling)
        rows = [self.encode(prompt) for prompt in prompts]
        fills = self.kind == "masked" and not self.model.cfg.num_classes
        if fills and not all(self.task.gaps[0] in row for row in rows):
            raise ConfigError(f"prompt: nothing to fill in; write {MASK} where a word is missing")
        return rows

    def _write(
        self, rows: Sequence[list[int]], sampling: Sampling, on_tokens=None
    ) -> list[list[int]]:
        """Return what follows each row; of an encoder-decoder, what it makes of the row as a source."""
        sources = rows if self.kind == "source" else None
        return generate.generate(
            self.model,
            self.params,
            rows if sources is None else [[self.task.start]] * len(rows),
            sources=sources,
            stop_tokens=self.tokenizer.stop_tokens,
            on_tokens=on_tokens,
            **sampling._asdict(),
        )

    def answer(self, prompt: str, tokens: Sequence[int]) -> str:
        """Return the text of the tokens that were made for a prompt, as it is read behind the prompt.

        Where nothing is before them, a tokenizer that puts a space before every text takes it away.
        """
        if self.goes_on and prompt:
            return self.tokenizer.decode_behind(prompt, tokens)
        return self.decode([self.tokenizer.end_of_text, *tokens])

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens that the model reads of a prompt, [MASK] as what the task has for it."""
        read = getattr(self.task, "text_length", None)  # of one to classify, cut as in training
        if self.kind == "causal":
            end = self.tokenizer.end_of_text
            tokens = self.tokenizer.encode(prompt).tolist()[:read]
            return [end, *tokens, *([end] if self.paired else [])]
        texts = prompt.split(MASK)
        marks = self._marks(len(texts) - 1)
        for n, mark in enumerate(marks):
            texts[n : n + 2] = self.tokenizer.beside(mark, texts[n], texts[n + 1])
        parts = [self.tokenizer.encode(text).tolist() for text in texts]
        tokens = list(parts[0])
        for mark, part in zip(marks, parts[1:], strict=True):
            tokens += [mark, *part]
        if self.kind == "source":
            return [*tokens[:read], self.tokenizer.end_of_text]
        return [self.task.cls, *tokens[:read], self.task.sep]

    def _marks(self, count: int) -> list[int]:
        """Return the special tokens that stand for `count` gaps in a text."""
        gaps = list(self.task.gaps)
        if count and not gaps:
            raise ConfigError(f"prompt: {MASK} means nothing to this model; leave it out")
        if count > len(gaps):
            raise ConfigError(f"prompt: {count} times {MASK}; at most {len(gaps)}")
        return gaps[:count]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones of the task by their names."""
        names, text = self.task.names, ""
        run: list[int] = []
        for token in map(int, tokens):
            if token in names:
                text += self.tokenizer.decode(run) + names[token]
                run = []
            else:
                run.append(token)
        return (text + self.tokenizer.decode(run)).strip(" " if names else "")

    def _fill(self, rows: list[list[int]], top_k: int) -> list[str]:
        if self.model.cfg.num_classes:
            names = list(self.task.labels)
            mask = self.task.cls
        else:
            names, mask = None, self.task.gaps[0]
        found = generate.fill_masks(self.model, self.params, rows, mask=mask, top_k=top_k)
        return [
            "\n".join(
                "  ".join(
                    f"{names[i] if names else repr(self.decode([i]))} {probability:.3f}"
                    for i, probability in place
                    if names is None or i < len(names)
                )
                for place in places
            )
            for places in found
        ]

    def example(self, split: Any, prompt: str, sampling: Sampling) -> str:
        """Return one line that shows what the model does: on `prompt`, or on the first row of `split`."""
        if self.goes_on:
            return prompt + self.complete([prompt], sampling)[0]
        if prompt:
            return f"{prompt} -> {self.complete([prompt], sampling)[0]}"
        batch = self.task.rows(split, np.array([0]))
        if self.kind == "source":
            read = batch["source"][0][batch["source_segments"][0] > 0].tolist()
            return f"{self.decode(read)} -> {self.answer('', self._write([read], sampling)[0])}"
        tokens = batch["inputs"][0][batch["segments"][0] > 0]
        if self.kind == "causal":
            first = int(np.flatnonzero(batch["weights"][0])[0])
            (made,) = self._write([tokens[: first + 1].tolist()], sampling)
            return f"{self.decode(tokens[:first])} -> {self.answer('', made)}"
        row = tokens.tolist()
        if not self.model.cfg.num_classes:
            row = self._around_a_mask(row)
        # What a classifier reads is [CLS] text [SEP], and its task has no names for these two.
        marks = (self.task.cls, self.task.sep) if self.model.cfg.num_classes else ()
        shown = self.decode([token for token in row if token not in marks])
        return f"{shown} -> {' | '.join(self._fill([row], 1)[0].splitlines())}"

    def _around_a_mask(self, row: list[int], length: int = 64) -> list[int]:
        """Return `length` tokens of a row with a [MASK] among them: one of the row's, else in the middle."""
        mask = self.task.gaps[0]
        if mask not in row:  # a task shows some of what is to be told as it is, or as another token
            row = [*row]
            row[len(row) // 2] = mask
        first = max(0, row.index(mask) - length // 2)
        return row[first : first + length]
