"""Rows of metrics as a run at Weights & Biases (the extra `wandb`)."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm import manifests
from lm.config import ConfigError

ID = "wandb_id"  # the file of a workdir that has its run's id there


class Run:
    """Send rows to Weights & Biases; a workdir is one run there, also when it resumes, and no other is."""

    def __init__(self, workdir: str | Path, *, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"wandb project {project!r}: wandb is not installed; pip install -e '.[wandb]'"
            ) from None
        path = Path(workdir) / ID
        if not path.exists():
            manifests.write_whole(path, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            dir=str(workdir),
            id=path.read_text(encoding="utf-8").strip(),
            name="-".join(Path(workdir).absolute().parts[-2:]),
            resume="allow",
            config=dict(config),
        )
        # As a metric of its own: W&B's own step refuses to go back when a run resumes.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send values after `step` updates."""
        self._run.log({"step": step, **values})

    def sync(self) -> None:
        """Do nothing: rows are sent by a process of its own; metrics.jsonl is the record."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
