"""Documents to token shards: read in order, encoded by worker processes, written in order.

What is written depends neither on the number of workers nor on where an earlier start was killed: the
documents are cut into chunks, of which whole shards are made, and a start goes on behind the last whole
shard. Documents before it are read again and not encoded.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm import manifests
from lm.config import ConfigError
from lm.data import cleaning, packing, progress, shards, sources, splits, tokenizers
from lm.data.cleaning import Cleaner
from lm.data.encode import Chunk, Encoder, Sieve, Worked, clean, dtype_for
from lm.data.shards import SPLITS
from lm.data.splits import Item, Rule
from lm.data.tokenizers import Tokenizer
from lm.data.writer import JOURNAL, LOCK, Writer, begun_key, may_begin

FORMAT = 5  # part of every key: raise it when extraction, split or layout changes
CHUNK = 1 << 20  # characters that are encoded at a time
CHUNK_ITEMS = 1 << 14
SHARD = 1 << 28  # bytes of text of a shard, which ends with a chunk
_MOST_LABELS = 10_000
_COUNTS = ("documents", "empty_documents", "characters", "replaced")
_BROKEN = "broken "  # before the kind of what is wrong with a record, in counts


Run = Callable[..., Iterator[Worked]]


def prepare(
    folder: Path,
    cfg: Any,
    source: sources.Source,
    *,
    key: str,
    states: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    workers: int = 0,
    repair: bool = False,
) -> None:
    """Fill `folder` with the corpus of the frozen `data` section `cfg`, or finish it.

    `key` stands for all that the result depends on, and `states` are the source's from before it was made:
    where a part is another after it was read, that is an error. Of two at once the second waits, and
    finds the work done. With `workers` 0 this process does all; with `repair` what is damaged is made again.
    Raises ConfigError for what sources and tokenizers refuse, and where `folder` holds something else.
    """
    if not repair:
        _check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if _is_whole(folder, key, repair=repair):
            return
        rule = splits.rule(cfg, source)
        tokenizer = _tokenizer(folder, cfg, source, tokenizer, key)
        writer = Writer(
            folder, {"key": key, "shard": SHARD}, dtype_for(tokenizer), tokenizer.end_of_text
        )
        cleaner = cleaning.open_cleaner(cfg.clean) if cfg.clean else None
        encoder = Encoder(rule, tokenizer, bool(source.fields.label), cleaner)
        sieve = Sieve(cleaner, writer.progress.clean)
        with progress.bar([source], "encoding") as bar, _pool(encoder, folder, workers) as run:
            if cleaner and cleaner.compares:
                _see_again(run, source, rule, writer.progress.following, sieve)
            waiting = chunks(source, rule, writer.progress.following, writer.progress.counts)
            for worked in run(progress.told(waiting, bar, source)):
                encoded = sieve.pass_on(worked)
                writer.add(encoded)
                writer.progress.clean = sieve.counts
                _check_labels(source, writer.progress.labels)
                if writer.shard_bytes >= SHARD:
                    writer.end_shard()
        writer.end_shard()
        now = source.states(anew=True)
        for part in states | now:
            if states.get(part) != now.get(part):
                raise ConfigError(
                    f"data.path: {part} changed while it was read; empty {folder} and begin again"
                )
        _finish(folder, cfg, source, rule, tokenizer, writer, key)


def _see_again(run: Run, source: Any, rule: Rule, following: tuple[int, int], sieve: Sieve) -> None:
    """Show the documents before `following` to the sieve, which compares later ones with them."""
    before = itertools.takewhile(
        lambda chunk: chunk.following <= following, chunks(source, rule, (0, 0), {})
    )
    for worked in run(before, tokens=False):
        sieve.pass_on(worked, count=False)


def _is_whole(folder: Path, key: str, *, repair: bool) -> bool:
    """Return whether the corpus is there. Raises ConfigError where something else is."""
    other = "of other text or settings; name an empty folder"
    try:
        if (folder / shards.MANIFEST).exists():
            # What is made again may be large; what is only looked at is looked at whole.
            if shards.read_manifest(folder, thorough=not repair)["key"] != key:
                raise ConfigError(f"{folder}: a corpus was prepared here, {other}")
            packing.drop_damaged(folder)
            (folder / JOURNAL).unlink(missing_ok=True)  # of a kill just after the manifest
            return True
        if repair and not may_begin(folder):
            raise shards.Damaged(folder / shards.MANIFEST, "missing")
    except shards.Damaged as error:
        if not repair:
            raise
        print(
            f"{error.file}: a damaged cache entry; building it again", file=sys.stderr, flush=True
        )
        for file in folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name != LOCK:
                file.unlink()
    if begun_key(folder) not in (None, key):
        raise ConfigError(f"{folder}: a corpus was begun here, {other}")
    return False


def _check_place(folder: Path) -> None:
    """Refuse a place that is no folder, or one with anything else in it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; name another")
    if folder.exists() and not (folder / shards.MANIFEST).exists() and not may_begin(folder):
        raise ConfigError(f"{folder}: it holds other files, and no corpus; name an empty folder")


def chunks(
    source: sources.Source, rule: Rule, following: tuple[int, int], before: dict[str, int]
) -> Iterator[Chunk]:
    """Yield the documents from part and record `following` on; `before` counts those that came before."""
    total, counts = Counter(before), Counter[str]()
    items: list[Item] = []
    size = 0
    for part in range(following[0], len(source.parts)):
        start = following[1] if part == following[0] else 0
        for record, document in enumerate(source.read(part, start), start):
            new = list(rule.items(part, record, document, total))
            items += new
            whole = bool(document.text) and document.second != ""
            read = Counter(characters=len(document.text), replaced=document.replaced)
            broken = document.broken and f"{_BROKEN}{document.broken}"
            read[broken or ("documents" if whole else "empty_documents")] += 1
            total.update(read)
            counts.update(read)
            size += sum(len(text) for item in new for text in item.texts)
            if size >= CHUNK or len(items) >= CHUNK_ITEMS:
                yield Chunk(items, (part, record + 1), counts)
                items, size, counts = [], 0, Counter()
    if counts:
        yield Chunk(items, (len(source.parts), 0), counts)


def _tokenizer(
    folder: Path, cfg: Any, source: sources.Source, given: Tokenizer | None, key: str
) -> Tokenizer:
    """Return the tokenizer in `folder`: the given one, or one trained, once, on the training split."""
    place, mark = folder / "tokenizer", folder / "tokenizer" / ".key"

    def whole() -> str:
        """Return what the mark says of the files that are there: a kill may have damaged one."""
        files = sorted(file for file in place.iterdir() if file != mark)
        return json.dumps([key, {file.name: manifests.hash_file(file) for file in files}])

    if mark.exists() and mark.read_text(errors="replace") == whole():
        return tokenizers.load(place)
    if given is None:
        given = train(cfg, [source])
    mark.unlink(missing_ok=True)  # before what it speaks of
    shutil.rmtree(place, ignore_errors=True)
    given.save(place)
    for file in place.iterdir():
        manifests.sync(file)
    mark.write_text(whole())
    return tokenizers.load(place)


def train(cfg: Any, inputs: Sequence[Any]) -> Tokenizer:
    """Return the tokenizer that the frozen `data` section asks for, trained on all training splits."""
    # An alphabet is no knowledge of the text: it is taken whole, so that both splits encode.
    wanted = range(2) if cfg.tokenizer == "char" else (splits.TRAIN,)
    cleaner = cleaning.open_cleaner(cfg.clean) if cfg.clean else None

    def texts(bar: tqdm) -> Iterator[str]:
        for source in inputs:
            rule = splits.rule(cfg, source)
            for chunk in progress.told(chunks(source, rule, (0, 0), {}), bar, source):
                for _, item in clean(cleaner, chunk.items, labelled=bool(cfg.label_field))[0]:
                    if rule.split_of(item) in wanted:
                        yield from item.texts

    with progress.bar(inputs, "reading") as bar:
        return tokenizers.train(
            cfg.tokenizer,
            texts(bar),
            vocab_size=cfg.vocab_size,
            model=cfg.sentencepiece_model,
            unknown=cfg.unknown,
            symbols=cfg.user_symbols,
        )


def _finish(
    folder: Path,
    cfg: Any,
    source: Any,
    rule: Rule,
    tokenizer: Tokenizer,
    writer: Writer,
    key: str,
) -> None:
    """Write the manifest."""
    done, digests = writer.progress, writer.finish()
    everything = tokenizer.fingerprint + "".join(digests[split] for split in SPLITS)
    broken = {n.removeprefix(_BROKEN): c for n, c in done.counts.items() if n.startswith(_BROKEN)}
    report = {
        "source": source.name,
        "files": len(source.parts),
        "paired": source.paired,
        **{name: done.counts.get(name, 0) for name in _COUNTS},
        "bytes": sum(done.bytes.values()),
        "broken": broken,
        "clean": done.clean,
        "labels": done.labels,
        "split": rule.by,
    }
    for split in SPLITS:
        numbers = {"documents": done.documents, "bytes": done.bytes, "tokens": done.tokens}
        report[split] = {name: values[split] for name, values in numbers.items()}
    others = [f"{split}.{kind}" for split in SPLITS for kind in ("starts", "origins")]
    others += [f"tokenizer/{file.name}" for file in sorted((folder / "tokenizer").iterdir())]
    shards.write_manifest(
        folder,
        {
            "key": key,
            "fingerprint": hashlib.blake2b(everything.encode(), digest_size=16).hexdigest(),
            "dtype": dtype_for(tokenizer).str,
            "report": report,
            "settings": dataclasses.asdict(cfg),
            "parts": list(source.parts),
            "shards": dict(sorted(writer.shards.items())),
            "files": done.files | {name: shards.recorded(folder / name) for name in others},
        },
    )
    (folder / JOURNAL).unlink()


def _check_labels(source: sources.Source, labels: Sequence[str]) -> None:
    if len(labels) > _MOST_LABELS:
        raise ConfigError(
            f"data.label_field={source.fields.label}: more than {_MOST_LABELS} labels; is it "
            "data.target_field?"
        )


@contextlib.contextmanager
def _pool(encoder: Encoder, folder: Path, workers: int) -> Iterator[Run]:
    """Yield a function that encodes chunks, in order, in `workers` processes or, with 0, in this one."""
    if not workers:
        yield lambda waiting, tokens=True: (encoder.encode(c, tokens=tokens) for c in waiting)
        return
    # Not fork: jax's threads may run here already.
    context = multiprocessing.get_context("spawn")
    setup = (folder / "tokenizer", encoder.rule, encoder.labelled, encoder.cleaner)
    pool: Any = ProcessPoolExecutor(workers, context, _begin_worker, setup)
    try:

        def run(waiting: Iterable[Chunk], tokens: bool = True) -> Iterator[Worked]:
            running: deque = deque()
            for chunk in itertools.chain(waiting, [None] * (2 * workers)):
                if chunk is not None:
                    with _no_interrupts():  # which a process that this starts inherits
                        running.append(pool.submit(_encode, chunk, tokens))
                if running and (chunk is None or len(running) == 2 * workers):
                    yield running.popleft().result()

        yield run
    except (BrokenProcessPool, OSError, MemoryError) as error:
        # A pool that breaks closes what `submit` may just write to; other errors are their own.
        if not pool._broken and not isinstance(error, MemoryError):
            raise
        if pool._broken:
            _let_go(pool)
        what = "was killed, perhaps for memory" if pool._broken else "has no memory left"
        raise ConfigError(
            f"a worker that encodes {what}; use fewer workers, and go on with the same command"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _let_go(pool: Any) -> None:
    """Let a pool that lost a worker end: its thread waits for ever to hand a chunk to nobody.

    Nobody are a worker that was started meanwhile and waits for what the lost one held, and before Python
    3.11.5 (gh-94777) the pool itself, which can read what it writes.
    """
    for process in list((pool._processes or {}).values()):
        process.kill()
    with contextlib.suppress(OSError):  # its thread may do the same just now
        pool._call_queue._reader.close()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C in this thread: the parent decides when its workers end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_ENCODER: list[Encoder] = []  # of a worker process


def _begin_worker(folder: Path, rule: Rule, labelled: bool, cleaner: Cleaner | None) -> None:
    tokenizers.use_one_thread()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _ENCODER.append(Encoder(rule, tokenizers.load(folder), labelled, cleaner))


def _end_with(parent: Any) -> None:
    """Wait for the end of the parent, by a kill too, which a pool's processes would outlive."""
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk, tokens: bool) -> Worked:
    return _ENCODER[0].encode(chunk, tokens=tokens)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, after another process that holds it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{folder}: waiting for another process that prepares it",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks there
        yield
    finally:
        os.close(handle)
