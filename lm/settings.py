"""The section `train` of a config: what a run does, but for what has a section of its own."""

import dataclasses
from typing import ClassVar

from lm import spikes
from lm.config import SET, ConfigError
from lm.value_types import Duration


@dataclasses.dataclass(frozen=True)
class Config:
    num_steps: Duration = 1000  # updates
    accumulate_steps: int = 1  # parts that a batch is taken in, to fit the device
    exact_reduction: int = (
        0  # shards of a batch, summed in one order on any mesh; 0 = as is fastest
    )
    log_every_steps: int = 10  # updates between rows of metrics
    init_from: str = ""  # folder of a run or checkpoint to take parameters from; "" = fresh
    vectors: str = ""  # file of pretrained word vectors that the embedding starts from; "" = none
    freeze_vectors: bool = False  # leave the embedding as it started
    z_loss: float = 0.0  # weight of log(Z)^2 in nats
    label_smoothing: float = 0.0  # share of the target's probability spread over the vocabulary
    loss_chunk: int = 0  # positions whose logits exist at a time; 0 = by memory
    profile_steps: int = 0  # updates to trace into profile/, from the tenth on, of fewer the last
    sample_tokens: int = 100  # tokens to sample when training ends; 0 = none
    sample_prompt: str = ""  # text that the sample continues
    wandb_project: str = ""  # Weights & Biases project to log to; "" = none
    compilation_cache: bool = True  # keep compiled programs between runs
    fingerprint_every_steps: int = 1000  # between rows of fingerprints.jsonl; 0 = none
    step_timeout_seconds: float = (
        1800.0  # for a step and its batch, after which the run ends; 0 = any
    )
    compile_timeout_seconds: float = (
        7200.0  # for the first step, or for looking into a bad one; 0 = any
    )
    peer_timeout_seconds: float = (
        300.0  # of silence of one of several processes, or of a step of theirs, after which all end
    )
    on_bad_step: str = "stop"  # or skip, or rollback: go back to the last checkpoint, leave it out
    max_skips: int = 10  # steps that a run leaves out, after which it stops
    rollback_batches: int = 1  # batches that a rollback leaves out, the bad step's the last
    recordings: int = 2  # bad steps that are kept whole, for tools.replay; 0 = none
    spike_zscore: float = 0.0  # deviations above the running mean that are bad; 0 = none
    spike_metric: str = "loss"  # or grad_norm: what spikes are looked for in
    spike_steps: int = 100  # steps that mean and deviation remember; none is a spike before
    # What makes no difference unless another field has one of these values.
    ONLY_FOR: ClassVar = {
        "max_skips": ("on_bad_step", ("skip", "rollback")),
        "rollback_batches": ("on_bad_step", ("rollback",)),
        "sample_prompt": ("sample_tokens", SET),
        "spike_metric": ("spike_zscore", SET),
        "spike_steps": ("spike_zscore", SET),
    }

    def __post_init__(self):
        for field in ("accumulate_steps", "log_every_steps", "rollback_batches"):
            if getattr(self, field) < 1:
                raise ConfigError(f"train.{field}={getattr(self, field)}: use a positive number")
        if self.spike_steps < 2:  # one step has no deviation: any rise would be a spike
            raise ConfigError(f"train.spike_steps={self.spike_steps}: use 2 or more")
        for field, known in (
            ("on_bad_step", ("stop", "skip", "rollback")),
            ("spike_metric", spikes.METRICS),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"train.{field}={getattr(self, field)}: choose one of {', '.join(known)}"
                )
        if (shards := self.exact_reduction) < 0 or shards & (shards - 1):
            raise ConfigError(
                f"train.exact_reduction={shards}: shards are summed in pairs; use a power of 2, or 0 = off"
            )
        if self.peer_timeout_seconds < 1:
            raise ConfigError(
                f"train.peer_timeout_seconds={self.peer_timeout_seconds}: use a second or more"
            )
        for field in (
            "z_loss", "loss_chunk", "profile_steps", "sample_tokens", "max_skips", "recordings",
            "spike_zscore", "fingerprint_every_steps", "step_timeout_seconds", "compile_timeout_seconds",
        ):  # fmt: skip
            if getattr(self, field) < 0:
                raise ConfigError(f"train.{field}={getattr(self, field)}: use 0 or more")
        if self.freeze_vectors and not self.vectors:
            raise ConfigError(
                "train.freeze_vectors=True: used only with train.vectors; give a file"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"train.label_smoothing={self.label_smoothing}: use a share in [0, 1)"
            )

    @property
    def peer_timeouts(self) -> tuple[float, float]:
        """Seconds that other processes may be silent, and that they may take to come to the first step."""
        return self.peer_timeout_seconds, self.compile_timeout_seconds
