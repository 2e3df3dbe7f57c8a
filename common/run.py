"""The folder of one run: arguments, log, checkpoints, pictures; how it stops and how it is resumed; tracking."""

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import InputError
from common.device import all_gather_lists, all_reduce_max, rank, world_size
from common.memory import step_memory, whole_memory
from common.pore_model import load_tensors
from common.reads.files import written_whole
from common.tracking import log_picture, start_tracker

LOG_EVERY = 10  # steps
ADVICE = "free space or make the folder writable, and go on with --resume"


def save_whole(state, path):
    """torch.save, written_whole: `path` is the old file or the new, never half of one."""
    with written_whole(path, ADVICE) as part, open(part, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # in the place of the error of the write
            raise error.__context__ or error from None


class Run:
    """The folder of one run: args.json, metrics.jsonl, checkpoint.pt and what the script saves at its end.

    Of several processes, rank 0 alone writes to it.
    """

    def __init__(self, args, script):
        self.args, self.script = args, Path(script).stem
        name = f"{self.script}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = args.resume or args.run_dir or Path("runs") / name
        self.tracker, self.saved, self.signal, self.stopping, self.due, self.asked = None, 0, 0, 0, False, False
        self.saved_at = time.monotonic()
        if rank():
            return
        if not args.resume:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError as error:
                raise InputError(f"{self.folder}: exists; choose another --run-dir, or go on with --resume") from error
            except OSError as error:
                raise InputError(f"{self.folder}: cannot be made ({error.strerror}); see --run-dir") from error
            saved = json.dumps(dataclasses.asdict(args), default=str, indent=1)
            try:
                with written_whole(self.folder / "args.json") as part:
                    part.write_text(saved + "\n")
            except BaseException:
                self.folder.rmdir()  # so that it is free for the next try
                raise
        self.lock = FileLock(self.folder / ".lock", blocking=False, is_singleton=True)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise InputError(f"--resume {self.folder}: this run is going on in another process") from error
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); make it writable") from error
        print(f"{self.script}: run folder {self.folder}")
        if args.track:
            try:
                self.tracker = start_tracker(self.folder, args)
            except BaseException:  # Ctrl-C at wandb's question as well
                made_here = {"args.json", ".lock", "wandb"}
                if not args.resume and {path.name for path in self.folder.iterdir()} <= made_here:
                    shutil.rmtree(self.folder, ignore_errors=True)  # so that it is free for the next try
                raise

    def resume(self, parts, last):
        """The step that the run was at: 0, or with --resume that of its last checkpoint, which is put into `parts`.

        parts: {name: model, optimizer, or what else has a state_dict}. The log is cut back to what it was then.
        InputError if there is no checkpoint of this run, or it is beyond step `last`; all then stays as it is.
        """
        if not self.args.resume:
            return 0
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            raise InputError(f"--resume {self.folder}: stopped before its first checkpoint; start a new run")
        state = load_tensors(path)
        kinds = {"script": str, "step": int, "log_bytes": int, "world_size": int}
        if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise InputError(f"{path}: holds no checkpoint; start a new run")
        if state["script"] != self.script:
            raise InputError(f"--resume {self.folder}: a run of {state['script']}.py; go on with that")
        step, processes = state["step"], state["world_size"]
        if len(set(all_gather_lists([step]))) > 1:
            raise InputError(f"{path}: another one on each host; put the run folder where all hosts share it")
        if step > last:
            raise InputError(f"--max-steps {last}: the run in {self.folder} is at step {step} already")
        try:
            for name, part in parts.items():
                part.load_state_dict(state.pop(name))
        except Exception as error:  # whatever such a file may hold
            raise InputError(f"{path}: does not fit this run's models and arguments; start a new run") from error
        if rank() == 0:
            for part in self.folder.glob("*.part-*"):  # of a killed process
                part.unlink()
            log = self.folder / "metrics.jsonl"
            kept = log.read_bytes()[: state["log_bytes"]] if log.exists() else b""  # less after a loss of power
            with open(log, "a") as file:
                file.truncate(kept.rfind(b"\n") + 1)
        self.saved = step
        print(f"going on after step {step}")
        if processes != world_size():
            print(f"the run had {processes} processes, now {world_size()}: it draws other views from here on")
        return step

    def checkpoint(self, step, parts):
        """Writes checkpoint.pt: the state of all `parts` after `step`. InputError if processes have other weights."""
        state = {name: part.state_dict() for name, part in parts.items()}
        if world_size() > 1:
            sums = [value.double().sum().item() for value in tensors_of(state)]
            if any(others != sums for others in all_gather_lists([sums])):
                raise InputError(f"step {step}: processes have other weights; does the loop call average_gradients()?")
        if rank() == 0:
            log = self.folder / "metrics.jsonl"
            about = {"script": self.script, "step": step, "world_size": world_size()}
            about["log_bytes"] = log.stat().st_size if log.exists() else 0
            save_whole(state | about, self.folder / "checkpoint.pt")
        self.saved, self.saved_at = step, time.monotonic()

    def steps(self, first, last):
        """Yields the steps first + 1 ... last under a progress bar.

        Meanwhile Ctrl-C and SIGTERM, which schedulers send, set `stop`, for the loop to end with a checkpoint. A
        second one ends the run at once, but for a process of several: the scheduler and torchrun may each send one.
        """

        def asked(number, frame):
            if self.signal and world_size() == 1:
                raise KeyboardInterrupt
            self.signal = number

        self.since = (first, time.perf_counter())
        steps = range(first + 1, last + 1)
        often = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs fewer lines
        before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(steps, self.script, last, initial=first, unit=" steps", mininterval=often, disable=rank() > 0)
        try:
            with bar as self.bar:
                for step in self.bar:
                    self.asked = False
                    yield step
                    if self.stopping or (self.signal and not self.asked):
                        raise InputError(f"step {step}: stopped; this loop lacks `if run.stop: return run.stop`")
            if self.saved != last and rank() == 0:
                print(f"no checkpoint of step {last} was written", file=sys.stderr)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.stopping:
                if self.tracker:
                    self.tracker.finish(exit_code=self.stop)
                if rank() == 0:
                    what = "" if self.saved == step else f", but its last checkpoint is of step {self.saved}"
                    print(f"stopped after step {step}{what}; go on with --resume {self.folder}", file=sys.stderr)
                # torchrun takes a process that leaves for a failure, and ends those that have not yet
                all_reduce_max(0)

    @property
    def stop(self):
        """The exit code to end with, if Ctrl-C or SIGTERM reached this process or another in this step, or else 0."""
        self.ask()
        return 128 + self.stopping if self.stopping else 0

    @property
    def checkpoint_due(self):
        """Whether the last checkpoint, or the start, is --checkpoint-minutes ago, by the clock of any process."""
        self.ask()
        return self.due

    def ask(self):
        """Notes what all processes have to say of this step: a signal, or else that a checkpoint is due."""
        if not self.asked:
            due = time.monotonic() - self.saved_at >= 60 * self.args.checkpoint_minutes
            said = all_reduce_max(2 * self.signal + due)  # one exchange a step
            self.asked, self.stopping, self.due = True, said // 2, bool(said % 2)

    def log(self, step, **metrics):
        """Appends one JSON line; floats as they are, so that two runs can be compared exactly."""
        if rank():
            return
        metrics = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
        if "loss" in metrics:  # a training step, not a validation
            before, then = self.since
            metrics["chunks_per_second"] = self.args.batch_size * (step - before) / (time.perf_counter() - then)
            self.bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
        self.since = (step, time.perf_counter())  # so that validation does not count as slow training
        metrics = {"step": step} | metrics
        path = self.folder / "metrics.jsonl"
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, before)  # no half line
            raise InputError(f"{path}: cannot be written ({error.strerror}); {ADVICE}") from error
        if "validation/loss" in metrics:
            # a name with a second slash is one of many
            shown = [name for name in metrics if name.startswith("validation/") and name.count("/") == 1]
            shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)
            tqdm.write(f"step {step}: {shown}")
        if self.tracker:
            self.tracker.log({name: value for name, value in metrics.items() if name != "step"}, step=step)

    def save(self, name, state):
        """Writes a state dict to the run folder, whole or not at all, and returns its path.

        As tensors of the CPU: those of a GPU would not load where there is none.
        """
        if rank() == 0:
            save_whole({key: value.cpu() for key, value in state.items()}, self.folder / name)
        return self.folder / name

    def picture(self, name, figure):
        """Writes a matplotlib figure to the run folder as a PNG file, and logs it to the tracker."""
        if rank():
            return
        path = self.folder / f"{name}.png"
        with written_whole(path) as part:
            figure.savefig(part, format="png", dpi=110)
        if self.tracker:
            log_picture(self.tracker, name, path)


def tensors_of(state):
    """All tensors in nested dicts and lists."""
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, dict | list):
            yield from tensors_of(value)
        elif torch.is_tensor(value):
            yield value


def stop_if_not_finite(step, loss, terms, batch):
    """InputError, with the reads of the batch, if the loss is not finite; the last checkpoint stays as it is."""
    if not torch.isfinite(loss):
        # a name with a slash is one of many
        terms = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items() if "/" not in name)
        raise InputError(
            f"step {step}: the loss is {loss.item()} ({terms}); try a lower --lr or --precision fp32, "
            f"or look at the reads of this batch: {' '.join(sorted(set(batch.reads)))}"
        )


def say_cost(pore_model, models, optimizer, chunks, args, samples, trained, averaged=0):
    """Says how much memory a step will take and, on a CPU with a large model, how long an epoch, from one pass.

    samples: the width of a view; trained, averaged: passes of a chunk through a pore model with gradients, and
    without. On a CPU with a small model it says nothing, unless memory is short.
    """
    device, parameters = pore_model.norm.weight.device, sum(p.numel() for p in pore_model.parameters())
    rows = -(-args.batch_size // world_size())
    kept, computed_anew = (
        step_memory(pore_model, models, optimizer, rows, samples, trained, args.precision, checkpointing) / 1e9
        for checkpointing in (False, True)
    )
    taken, there = computed_anew if args.activation_checkpointing else kept, whole_memory(device) / 1e9
    short = ""
    if taken > 0.9 * there:
        short = f", of {there:.1f} GB here: give a smaller --batch-size"
        if not args.activation_checkpointing:
            short += f", or --activation-checkpointing, which takes about {computed_anew:.1f} GB"
    if device.type != "cpu" or parameters < 1e6:
        if device.type != "cpu" or short:
            print(f"a step will take about {taken:.1f} GB of memory{short}")
        return
    pore_model = copy.deepcopy(pore_model)  # so that BatchNorm's statistics stay as they are
    signal = torch.randn(2, samples)
    start = time.perf_counter()
    pore_model(signal)[0].square().mean().backward()
    passes = trained + averaged / 3  # a forward alone takes a third
    seconds = (time.perf_counter() - start) / len(signal) * passes * len(chunks) / world_size()
    print(
        f"no GPU: {parameters / 1e6:.0f} M parameters will take about {seconds / 3600:.1f} hours an epoch here "
        f"({len(chunks)} chunks); --size tiny is meant for this machine. A step will take about {taken:.1f} GB of "
        f"memory{short}"
    )
