"""KeptRun: the part of the trainer that reads and writes the folder of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import set_seed

from clp_engine.core.errors import DrawingFailed
from clp_engine.core.files import check_folder
from clp_engine.training import building
from clp_engine.training.checkpoints import best, checkpoint, resuming
from clp_engine.training.runs import run_folder


class KeptRun(resuming.Run):
    """A mixin of CLPTrainer. Of several processes the main one writes; the others read the same folder where a run goes on."""

    _has_folder = False  # output_dir holds the run of this trainer
    _save_pending = False

    @contextlib.contextmanager
    def _folder(self) -> Iterator[None]:
        """The folder of the run, locked."""
        if not self.parallel.is_main:
            yield
            return
        check_folder("output_dir", self.args.output_dir)
        with run_folder.training_in(self.args.output_dir):
            yield

    def _begin_run(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        """Go on from a checkpoint, or begin anew; then the folder is this run's. What is refused leaves it as it was."""
        a, parallel, read = self.args, self.parallel, self.policy.read_from
        path = None
        if resume_from_checkpoint:
            path = checkpoint.resolve(a.output_dir, resume_from_checkpoint) if parallel.is_main else None
            path = parallel.gather(path)[0]
        if path is not None:
            read, self.run_id = [*read, path], checkpoint.read_state(path).get("run")
        if parallel.is_main:
            run_folder.check_free(a.output_dir, self.run_id, a.overwrite_output_dir, read)
        # Nothing here draws from the global generators, but reward functions may.
        set_seed(a.seed + parallel.rank)
        with self._whole_deltas(everywhere=True):
            if path is not None:
                resuming.restore(self, path)
            if parallel.count > 1:
                parallel.check_same("settings", a.to_dict())
                parallel.check_same("step", self.state.global_step)
                parallel.check_same("weights (their sums)", building.sums(self.policy))
        if parallel.is_main:
            run_folder.begin(a.output_dir, self.run_id)
            if a.log_completions:
                run_folder.note(a.output_dir, [Path(a.output_dir) / "completions.jsonl"])
            run_folder.start_log(a.output_dir, [] if path is None else self.state.log_history)
        self._has_folder = True

    def _whole_deltas(self, everywhere: bool = False) -> contextlib.AbstractContextManager[None]:
        """Where deltas are cut over the processes: with whole ones, see `ShardedBase`."""
        return contextlib.nullcontext() if self.sharded is None else self.sharded.whole_deltas(everywhere)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append to log.jsonl and the state's history, and tell the callbacks. `logs` gets the epoch, as in transformers."""
        logs["epoch"] = round(self.state.epoch or 0.0, 4)
        entry = {**logs, "step": self.state.global_step}
        self.state.log_history.append(entry)
        if self.parallel.is_main:
            run_folder.append_log(self.args.output_dir, entry)
        self._hear("on_log", logs)

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> Path:
        """Write the policy to `output_dir`, by default <args.output_dir>/policy. Every process calls this."""
        run = Path(self.args.output_dir)
        path = run / "policy" if output_dir is None else Path(output_dir)
        with self._whole_deltas():
            if self.parallel.is_main:
                if output_dir is None and not self._has_folder:
                    run_folder.check_free(run, self.run_id, self.args.overwrite_output_dir)
                run_folder.write_policy(run, path, self.policy)
        return path

    def _save_when_whole(self) -> None:
        """Write a checkpoint, or remember to: the steps on one rollout are not cut in two."""
        self._save_pending = self.state.global_step % self.args.steps_per_rollout != 0
        if not self._save_pending:
            with self._whole_deltas():
                resuming.save(self)
            self._hear("on_save")

    @contextlib.contextmanager
    def _kept_where_drawing_fails(self, first_step: int) -> Iterator[None]:
        """A checkpoint of the last step, where another engine is lost: nothing of what failed has been trained on."""
        try:
            yield
        except DrawingFailed:
            if self.state.global_step > first_step:
                self._save_when_whole()
            raise

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Keep the policy if the evaluation is the best so far and the best is asked for."""
        with self._whole_deltas():
            best.note(metrics, self.args, self.state, self.policy)

    def _load_best(self) -> None:
        if self.args.load_best_model_at_end:
            self.parallel.gather(None)  # the main process may still be writing it
            with self._whole_deltas(everywhere=True):
                best.load(self.state, self.policy)
