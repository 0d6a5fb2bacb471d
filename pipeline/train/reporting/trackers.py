"""Services that show a run while it goes on: wandb, tensorboard.

In: the numbers of the record. Out: calls of accelerate's trackers, whose failures cost a warning and no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, filter_trackers

from pipeline.config import Config
from pipeline.train.runtime import Runtime


class Trackers:
    """wandb and TensorBoard, fed from the record. What goes wrong in one is said once; it is left out from then on."""

    def __init__(self, runtime: Runtime, config: Config, *, run_id: str, settings: dict[str, Any]) -> None:
        self.runtime = runtime
        self.active: list[GeneralTracker] = []
        flat = {
            f"{section}.{key}": str(value)
            for section, keys in settings.items()
            if isinstance(keys, dict)
            for key, value in keys.items()
        }
        # The same wandb run goes on after a resume: its id belongs to the run folder.
        wandb = {"id": run_id, "resume": "allow", "dir": config.run_dir, "name": Path(config.run_dir).name}
        accelerator = runtime.accelerator
        for name in config.log.trackers:
            try:
                if name == "wandb" and _lacks_login():
                    wandb["mode"] = "offline"
                    runtime.say(
                        f"wandb has no login on this machine: it records offline; send that later by `wandb login` and "
                        f"`wandb sync {Path(config.run_dir, 'wandb')}/offline-run-*`"
                    )
                accelerator.trackers = []
                accelerator.log_with = filter_trackers([name], accelerator.logging_dir)
                accelerator.init_trackers(config.log.project, config=flat, init_kwargs={"wandb": wandb})
            except Exception as error:  # any failure of a tracker, whatever its type, must not stop training
                self._warn(name, error)
                continue
            if not accelerator.trackers:  # accelerate passes over what is not installed
                self._warn(name, ModuleNotFoundError("it is not installed"))
            self.active += accelerator.trackers

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Send numbers of one step."""
        for tracker in list(self.active):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # as above
                self.active.remove(tracker)
                self._warn(tracker.name, error)

    def finish(self) -> None:
        """Let them write out what they hold."""
        for tracker in self.active:
            try:
                tracker.finish()
            except Exception as error:  # as above
                self._warn(tracker.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self.runtime.say(f"warning: {name} is left out from here on, metrics.jsonl goes on: {error}")


def _lacks_login() -> bool:
    """Whether wandb would ask for a key at the terminal, and hold up the run until somebody answers."""
    import wandb  # only who asks for it needs it

    if wandb.setup().settings.mode in ("offline", "disabled"):
        return False
    return not wandb.login(prompt=False, verify=False)
