"""Train a model: `run(config, workdir)`. It reads top to bottom.

The loop's order is the restart guarantee: evaluate, save, next batch, step, log. What is saved at step
s is the state before batch s; rows up to s are on the disk before that checkpoint is good; and a run
that resumes at s repeats neither the evaluation nor the save of s.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lm import (
    checkpoint,
    complete,
    description,
    distributed,
    evaluate,
    experiment,
    hardware,
    initial,
    manifests,
    metrics,
    models,
    peers,
    placement,
    receipt,
    sharding,
    signals,
    step,
    trail,
    watchdog,
)
from lm import config as config_lib
from lm import workdir as workdirs
from lm.config import ConfigError
from lm.data import corpus, pipeline, shards
from lm.exits import DataEnded, Ended, Interrupted
from lm.guard import Guard, again_when_rolled_back, set_aside, with_spikes_of
from lm.log import Log, Profile, profiled

SCHEMA = experiment.SCHEMA


class _Stopped(Exception):
    """An evaluation was cut short."""


@again_when_rolled_back
def run(
    config: ConfigDict, workdir: str | Path, origins: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Train as `config` says in `workdir`, resuming what is there; return the final metrics.

    `origins` says of fields where their values are from, for the receipt (see `lm.receipt`).

    Raises:
      ConfigError: a mistake in the config, the data or the workdir.
      Diverged: a loss or gradient is not finite, or a spike (see `lm.guard`).
      Interrupted: SIGINT or SIGTERM came.
      DataEnded: there is no batch for a step.
    """
    workdir = Path(workdir)
    timeouts = experiment.section(config, "train").peer_timeouts
    with ExitStack() as stack:
        # First, so that a second signal is harmless until all is closed.
        stop = stack.enter_context(signals.stop_signals())
        others = stack.enter_context(peers.watch(*timeouts, together=(Ended,)))
        made = build(config, workdir, others)
        cfg, num_steps = made.cfg, made.num_steps
        eval_every = made.steps_of("eval", "every_steps")  # 0 is never, but for the last step
        save_every = made.steps_of("checkpoint", "every_steps") or num_steps
        gone = stack.enter_context(workdirs.alone_in(workdir))
        watch = stack.enter_context(closing(watchdog.Watchdog(watchdog.limits(cfg), others)))
        saver = stack.enter_context(saver_of(workdir, cfg["checkpoint"], gone, stop))
        stack.callback(watch.at, watchdog.COPYING, num_steps)  # then the saver closes
        check_past(workdir, made, saver)
        stack.enter_context(sharding.use(made.mesh))
        init, train_step, eval_step, abstract = experiment.jitted(made)
        state, first, resumed = begin(made, saver, init, abstract)
        others.ready("restored")
        workdirs.write_files(workdir, made, first, receipt.origins(config, made, origins or {}))
        scores = saved_scores(workdir, first) if resumed else {}
        opened = open_writers(workdir, made, first if resumed else None, bool(scores))
        writers = stack.enter_context(closing(opened))
        announce(writers.say, made, first, resumed)
        log = Log(made, writers)
        guard = Guard(made, workdir, saver, log, train_step, first, watch)
        watch.start(saver.writing, stop, guard.rescue)
        stack.callback(watch.at, watchdog.ENDING, num_steps)
        profile = stack.enter_context(closing(Profile(workdir, profiled(made, first))))
        marks = stack.enter_context(closing(trail.Trail(workdir, made, first)))
        stop.begin(made.mesh)
        digests, batches, end_of_data = read_ahead(made, first)
        end = functools.partial(finish, saver, digests, stop, watch)
        for now in range(first, num_steps + 1):
            last, fresh = now == num_steps, now > first or not resumed
            due = last or (eval_every and now % eval_every == 0)
            evaluating = due and (fresh or not scores)  # a stop may have cut its evaluation short
            saving = fresh and (saver.owed(stop.save_again()) or last or falls_on(now, save_every))
            stopping = stop.agreed(saver.asks())
            if evaluating or saving or stopping:
                state = guard.settle(now, state)
            if evaluating:
                watch.at(watchdog.EVALUATING, now, state)
                if scores := score(made, eval_step, state, stop):
                    writers.write(now, scores)
                stopping = stop.agreed()  # a signal may have come meanwhile
            stopping = stopping and not (last and scores)
            told = scores if evaluating else {}
            if saving or (stopping and fresh):
                final = now >= end_of_data
                guard.save(now, state, told, wait=final or stopping, verify=final)
            elif evaluating and scores and not fresh:
                writers.sync()
                saver.add_metrics(now, scores)
            if evaluating or saving:
                log.pause(now)
            if stopping:
                saver.wait()
                raise Interrupted(f"stopped at step {now}, which is saved")
            if last:
                break
            doing = peers.TRAINING if guard.begun else watchdog.COMPILING
            watch.at(doing, now, state)
            batch = next(batches, None)
            if batch is None:
                raise data_ended(guard, now, state, told, num_steps, saving or not fresh, end)
            if marks.due(now):
                state = guard.settle(now, state)
                watch.at(doing if marks.begun else watchdog.COMPILING, now, state)
                marks.at(now, state, batch)
            watch.at(doing, now)
            profile.before(now)
            state, sums = guard.take(now, state, batch)
            profile.after(now, sums)
        end(num_steps)
        say_sample(writers.say, made, state)
    return {**log.latest, **scores}


def falls_on(now: int, every: int) -> bool:
    """Return whether step `now` is a multiple of `every`, 0 left out."""
    return now > 0 and now % every == 0


def saver_of(
    workdir: Path, cfg: checkpoint.Config, gone: Callable[[], str], stop: signals.Stop
) -> checkpoint.Checkpointer:
    """Return what writes the run's checkpoints; a stop has its grace period for the last copy too."""
    until = functools.partial(stop.until, cfg.grace_seconds)
    return checkpoint.Checkpointer(workdir, cfg, gone=gone, until=until)


def begin(
    made: experiment.Experiment, saver: checkpoint.Checkpointer, init: Callable, abstract: Any
) -> tuple[step.TrainState, int, bool]:
    """Return the state that training goes on from, its step, and whether it is a checkpoint's."""
    state = saver.restore_latest(abstract)
    if state is None:
        return initial.fresh_state(made, init), 0, False
    if state.step > made.num_steps:
        raise ConfigError(
            f"train.num_steps={made.num_steps}: the run in {saver.folder.parent} is at step {state.step} "
            "already; use more"
        )
    state = with_spikes_of(made, saver.folder.parent, state)
    saver.copy(int(state.step))  # where a kill came before it was done
    return state, int(state.step), True


def build(config: ConfigDict, workdir: Path, others: peers.Alone) -> experiment.Experiment:
    """Return the experiment, the same in all processes; the first one prepares its data for them."""
    with others.first_first("data"):
        workdirs.check_place(workdir)
        made = experiment.build(config)  # first: of a mistake, its own line is enough
        check_sample(made)
    others.agree(workdirs.facts(workdir, made))
    for notice in config_lib.notices(config, SCHEMA):
        print(f"notice: {notice}")
    if made.cfg["train"].compilation_cache:
        hardware.use_compilation_cache(corpus.cache_folder() / "programs")
    return made


def open_writers(
    workdir: Path, made: experiment.Experiment, resume_step: int | None, scored: bool
) -> metrics.Writers:
    """Return the writers of the first process; what comes after `resume_step` is done again.

    So is the evaluation at it, unless it is `scored`: a kill may have come before that was noted.
    """
    if jax.process_index() > 0:
        return metrics.Writers([])
    manifest = (
        manifests.read(workdir / "checkpoints", resume_step) if resume_step is not None else None
    )
    return metrics.open_writers(
        workdir,
        resume_step=resume_step,
        scored=scored,
        mark=(manifest or {}).get("rows", ()),
        num_steps=made.num_steps,
        wandb_project=made.cfg["train"].wandb_project,
        config=made.config.to_dict(),
    )


def read_ahead(
    made: experiment.Experiment, first: int
) -> tuple[shards.Check, Iterator[dict[str, jax.Array]], int]:
    """Return what compares the files of a large corpus meanwhile, and batches from step `first` to which."""
    last = made.num_steps
    if epochs := made.cfg["data"].epochs:
        last = min(last, made.batches.steps_in(epochs))
    unchecked = {
        file: record for member in made.corpus.members for file, record in member.unchecked.items()
    }
    digests = shards.Check(unchecked if first < last else {}, made_again=corpus.made_again())
    return digests, place_ahead(made, first, last, digests), last


def place_ahead(
    made: experiment.Experiment, first: int, last: int, digests: shards.Check
) -> Iterator[dict[str, jax.Array]]:
    """Yield the batch of each step, on its devices. Raises Damaged once a file of a large corpus is."""
    cfg = made.cfg["data"]
    threads, buffer = cfg.prefetch_threads, cfg.prefetch_batches
    for _, batch in pipeline.prefetch(made.batches, first, last, threads=threads, buffer=buffer):
        digests.raise_found()
        yield placement.place_batch(made.mesh, batch)


def score(
    made: experiment.Experiment, eval_step: Callable, state: step.TrainState, stop: signals.Stop
) -> dict[str, float]:
    """Return `eval/...` of the parameters, and `eval_raw/...` where `eval` is of their average.

    Nothing where `stop` is asked for meanwhile: the run that resumes evaluates.
    """
    scores: dict[str, float] = {}

    def until_stop(batches):
        for batch in batches:
            if stop.agreed():
                raise _Stopped
            yield batch

    for name, params in (("eval", step.learned(made.model, state)), ("eval_raw", state.params)):
        if name == "eval" or state.ema:
            try:
                values = evaluate.score(
                    made.model,
                    eval_step,
                    params,
                    made.corpus,
                    made.task,
                    made.cfg,
                    made.mesh,
                    until_stop,
                )
            except _Stopped:
                return {}
            scores |= {f"{name}/{key}": value for key, value in values.items()}
    return scores


def saved_scores(workdir: Path, at: int) -> dict[str, float]:
    """Return the scores that were saved with the checkpoint of step `at`."""
    manifest = manifests.read(workdir / "checkpoints", at) or {}
    return dict(json.loads(distributed.from_first(json.dumps(manifest.get("metrics", {})))))


def data_ended(
    guard: Guard,
    now: int,
    state: step.TrainState,
    scores: Mapping[str, float],
    num_steps: int,
    saved: bool,
    end: Callable[[int], None],
) -> DataEnded:
    """Save step `now`, for which there is no batch, unless it is `saved`; return the run's end."""
    state = guard.settle(now, state)
    if not saved:
        guard.save(now, state, scores, wait=True, verify=True)
    end(now)
    return DataEnded(
        f"the data ended at step {now} of {num_steps}, which is saved; raise data.epochs to go on"
    )


def finish(
    saver: checkpoint.Checkpointer,
    digests: shards.Check,
    stop: signals.Stop,
    watch: watchdog.Watchdog,
    now: int,
) -> None:
    """Wait until the last save is good, and all files of a large corpus are compared, but for a stop."""
    watch.at(watchdog.ENDING, now)
    saver.wait()
    watch.at(watchdog.COMPARING, now)
    digests.finish(lambda: stop.asked)
    watch.at(watchdog.ENDING, now)


def announce(
    say: Callable[[str], None], made: experiment.Experiment, first: int, resumed: bool
) -> None:
    """Say what is about to be trained, on what, and one batch in words."""
    devices = jax.devices()
    count = step.count_parameters(made.shapes)
    active = models.active_parameters(made.cfg["model"], made.axes, made.shapes)
    more = f", of which a token meets {active:,}" if active < count else ""
    say(f"model:   {made.cfg['model'].name}, {count:,} parameters{more}")
    say(f"devices: {len(devices)} x {devices[0].device_kind}; mesh {sharding.shown(made.mesh)}")
    if stages := description.describe_stages(made):
        say(f"stages:  {stages}")
    if every := made.cfg["mesh"].local_steps:
        count = experiment.environment(made)["replicas"]
        say(
            f"groups:  {count}, which meet every {every} steps; what is evaluated changes only then"
        )
    say(f"data:    {made.corpus.summary()}")
    epochs = made.num_steps / made.batches.steps_per_epoch
    say(f"steps:   {made.num_steps:,} of {made.tokens_per_step:,} tokens, {epochs:.2f} epochs")
    if resumed:
        done = "; that is all, use a higher train.num_steps" if first == made.num_steps else ""
        say(f"resumed: at step {first}{done}")
    say(description.describe_batch(made, width=160))
    if first < made.num_steps:
        say(
            "compiling the training step; the first one takes seconds to minutes by the model's size"
        )


def check_past(workdir: Path, made: experiment.Experiment, saver: checkpoint.Checkpointer) -> None:
    """Bring what the second place has; refuse, or move aside, what is there of another run."""
    saver.fetch()
    workdirs.check_resume(workdir, made)
    set_aside(workdir, saver.folder, made)
    if jax.process_index() == 0:
        saver.identity = manifests.identify(workdir, workdirs.identity(made))


def sample_of(
    made: experiment.Experiment, params: Any
) -> tuple[complete.Completer, complete.Sampling]:
    """Return what makes the sample, of no parameters yet where they are None, and how."""
    text = made.corpus
    completer = complete.Completer(
        made.model, params, made.task, text.tokenizer, paired=text.train.paired
    )
    tokens = made.cfg["train"].sample_tokens
    return completer, complete.Sampling(max_tokens=tokens, seed=made.config.seed)


def check_sample(made: experiment.Experiment) -> None:
    """Refuse, before there is any training, a sample that could not be made after it."""
    prompt = made.cfg["train"].sample_prompt
    completer, sampling = sample_of(made, None)
    try:
        completer.check([prompt] if prompt else [], sampling)
    except ConfigError as error:
        field = "sample_tokens" if str(error).startswith("max_tokens") else "sample_prompt"
        raise ConfigError(f"train.{field}: {error}") from None


def say_sample(
    say: Callable[[str], None], made: experiment.Experiment, state: step.TrainState
) -> None:
    """Say a sample of the trained model."""
    cfg = made.cfg["train"]
    if not cfg.sample_tokens:
        return
    if jax.process_count() > 1:
        say("sample:  by tools.generate alone, where a run has several processes")
        return
    params = jax.device_get(step.learned(made.model, state))
    # What is placed while another mesh is in use stays of that mesh, also on one device.
    with sharding.use(sharding.make_mesh(sharding.Config(), jax.local_devices()[:1])):
        params = jax.device_put(params, jax.local_devices()[0])
        completer, sampling = sample_of(made, params)
        try:
            shown = completer.example(made.corpus.validation, cfg.sample_prompt, sampling)
        except ConfigError as error:  # such as a prompt longer than the model reads: all is saved
            shown = f"none, as {error}"
        say(f"sample:  {shown}")
