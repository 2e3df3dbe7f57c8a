"""What every script does around its method: arguments, device, the run folder with its log, checkpoints and resume."""

import atexit
import contextlib
import copy
import dataclasses
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
import typing
import warnings
import zipfile
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from common import InputError
from common.distributed import all_gather_lists, all_reduce_max, join, rank, world_size
from common.files import written_whole

LOG_EVERY = 10  # steps
ADVICE = "free space or make the folder writable, and go on with --resume"
# what a resumed run may be given anew
MAY_CHANGE = {"resume", "run_dir", "data", "max_steps", "device", "compile", "checkpoint_every", "track"}


def parse_args(args_class):
    """The script's arguments from the command line, checked; with --resume RUN, those of that run are the defaults.

    From here on InputError, OSError (a full disk) and Ctrl-C end the script with one line and exit code 1 or 130.
    """
    sys.excepthook = _one_line
    if rank():  # one process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    saved, words = None, sys.argv[1:]
    for i, word in enumerate(words):
        if word.startswith("--resume"):
            run = Path(word.partition("=")[2] or (words[i + 1] if i + 1 < len(words) else ""))
            saved = args_class(**_read_args(run, args_class))
    args = tyro.cli(args_class, default=saved, console_outputs=rank() == 0)
    check_args(args)
    if world_size() > 1 and not hasattr(args, "resume"):
        raise InputError("works as one process; start it without torchrun")
    for name, value in vars(saved).items() if saved else ():
        if value != getattr(args, name) and name not in MAY_CHANGE:
            raise InputError(
                f"--{name.replace('_', '-')}: the run in {args.resume} has {value} and keeps it; leave it out"
            )
    return args


def _one_line(kind, error, traceback):
    atexit.unregister(dist.destroy_process_group)  # with NCCL it would wait for processes that wait for this one
    if rank():
        if issubclass(kind, KeyboardInterrupt):
            return
        # if rank 0, or another process of this host, has the same to say, torchrun ends this process in the meantime
        time.sleep(10 if int(os.environ["LOCAL_RANK"]) else 5)
    if issubclass(kind, (InputError, OSError)):
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _read_args(run, args_class):
    try:
        saved = json.loads((run / "args.json").read_text())
        if not isinstance(saved, dict) or "data" not in saved:
            raise ValueError("it holds no arguments")
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {run}: no run folder with an args.json ({error})") from error
    unknown = saved.keys() - {field.name for field in dataclasses.fields(args_class)}
    if unknown:
        raise InputError(f"--resume {run}: not a run of this script (its arguments have {', '.join(sorted(unknown))})")
    # JSON has neither tuples nor paths
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    hints = typing.get_type_hints(args_class)
    paths = {name: Path(value) for name, value in saved.items() if value and hints[name] == Path | None}
    return saved | paths | {"data": tuple(Path(path) for path in saved["data"])}


COUNTED_FROM_ZERO = ("seed", "start", "overlap", "warmup_steps", "freeze_steps")


def check_args(args):
    """InputError, naming the argument, if a value cannot be meant: no script has a use for negative numbers."""
    for name, value in vars(args).items():
        if name == "drop_chance":
            rule, holds = "LOW HIGH with 0 <= LOW <= HIGH < 1", 0 <= value[0] <= value[1] < 1
            value = f"{value[0]} {value[1]}"
        elif name == "label_fraction":
            rule, holds = "above 0 and at most 1", 0 < value <= 1
        elif name == "dropout" and value is not None:
            rule, holds = "0 or more and below 1", 0 <= value < 1
        elif name.endswith("momentum") or name in ("min_coverage", "min_identity"):
            rule, holds = "from 0 to 1", 0 <= value <= 1
        elif name.endswith(("lr", "temperature")) and value is not None:
            rule, holds = "above 0", 0 < value < math.inf
        elif type(value) is int and name not in COUNTED_FROM_ZERO:
            rule, holds = "at least 1", value >= 1
        elif type(value) in (int, float):
            rule, holds = "0 or more", 0 <= value < math.inf
        else:
            continue
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} {value}: should be {rule}")


def pick_device(name):
    """The torch.device that `--device` names; auto: cuda, else mps, else cpu. Under torchrun, joins the processes."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise InputError(f"--device {name}: not available on this machine; leave it out or give --device cpu")
    return join(torch.device(name))


def autocast(device, precision):
    """The context that models run in: bfloat16 where `--precision` says so; auto: on a GPU that has it."""
    bf16 = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def seed_step(seed, step):
    """Seeds all randomness of one step (views, dropout), so that a resumed run draws what the whole run would have.

    Each process draws numbers of its own.
    """
    torch.manual_seed(((rank() * 1_000_003 + seed) * 1_000_003 + step) % 2**63)


def save_whole(state, path):
    """torch.save, written_whole: `path` is the old file or the new, never half of one."""
    with written_whole(path, ADVICE) as part, open(part, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # in the place of the error of the write
            raise error.__context__ or error from None


def load_tensors(path, device="cpu"):
    """What torch.save wrote to `path`, read without executing anything. InputError if it is no such file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch does not look at the checksums
                    raise ValueError("damaged")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        raise InputError(f"{path}: not a PyTorch file of tensors, or damaged") from error


class Run:
    """The folder of one run: args.json, metrics.jsonl, checkpoint.pt and what the script saves at its end.

    Of several processes, rank 0 alone writes to it.
    """

    def __init__(self, args, script):
        self.script = Path(script).stem
        name = f"{self.script}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = args.resume or args.run_dir or Path("runs") / name
        self.tracker = self.stopping = self.signal = None
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
        self._lock()
        print(f"{self.script}: run folder {self.folder}")
        if args.track:
            try:
                self.tracker = self._tracker(args)
            except BaseException:  # Ctrl-C at wandb's question as well
                if not args.resume and {path.name for path in self.folder.iterdir()} <= {"args.json", "wandb"}:
                    shutil.rmtree(self.folder, ignore_errors=True)  # so that it is free for the next try
                raise

    def _lock(self):
        """InputError if another process has this run; the system unlocks it however this process ends."""
        try:
            self.lock = open(self.folder / "args.json", "a")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); make it writable") from error
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"--resume {self.folder}: this run is going on in another process") from error
        except OSError:  # a file system without locks
            pass

    def _tracker(self, args):
        """The wandb run; a resumed run goes on with the one it had."""
        import wandb

        latest = self.folder / "wandb" / "latest-run"  # a link to run-TIME-ID or offline-run-TIME-ID
        known = {}
        if latest.is_symlink():
            known = {"id": latest.readlink().name.partition("run-")[2].partition("-")[2], "resume": "allow"}
        report = sys.excepthook  # wandb puts one of its own in the place, which prints a traceback before
        try:
            tracker = wandb.init(
                project="poressl", name=self.folder.name, config=dataclasses.asdict(args), dir=self.folder, **known
            )
        except (wandb.Error, ValueError) as error:  # ValueError: its settings, as of a WANDB_MODE that it does not know
            reason = " ".join(str(error).split())
            raise InputError(f"--track: wandb: {reason}; WANDB_MODE=offline needs no account") from error
        finally:
            sys.excepthook = report

        def failed(*error):
            try:
                tracker.finish(exit_code=1)
            finally:
                report(*error)  # the last line on the screen

        sys.excepthook = failed
        return tracker

    def resume(self, device, last, parts, *others):
        """Loads the last checkpoint into `parts` ({name: model or optimizer}), to go on to step `last`.

        Returns the checkpoint, which has "step" and the numbers `others`. The log is cut back to what it was then. If
        the checkpoint is none of this run: InputError, and all stays as it is.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            raise InputError(f"--resume {self.folder}: stopped before its first checkpoint; start a new run")
        state = load_tensors(path, device)
        kinds = {"script": str, "step": int, "log_bytes": int} | dict.fromkeys(others, float)
        if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise InputError(f"{path}: holds no checkpoint; start a new run")
        if state["script"] != self.script:
            raise InputError(f"--resume {self.folder}: a run of {state['script']}.py; go on with that")
        if len(set(all_gather_lists([state["step"]]))) > 1:
            raise InputError(f"{path}: another one on each host; put the run folder where all hosts share it")
        if state["step"] > last:
            raise InputError(f"--max-steps {last}: the run in {self.folder} is at step {state['step']} already")
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
        print(f"going on after step {state['step']}")
        before = state.get("world_size", 1)
        if before != world_size():
            print(f"the run had {before} processes, now {world_size()}: it draws other views from here on")
        return state

    def checkpoint(self, step, **state):
        """Writes checkpoint.pt: all that the script needs to go on after `step`."""
        log = self.folder / "metrics.jsonl"
        log_bytes = log.stat().st_size if log.exists() else 0
        about = {"script": self.script, "step": step, "log_bytes": log_bytes, "world_size": world_size()}
        self.save("checkpoint.pt", state | about)

    def steps(self, first, last, batch_size):
        """Yields the steps first + 1 ... last under a progress bar; batch_size is for the logged chunks a second.

        Ctrl-C and SIGTERM, which schedulers send, are kept for asked_to_stop(): the script finishes the step with a
        checkpoint, and ends here. A second one ends it at once, but for a process of several: the scheduler and
        torchrun may each send one.
        """

        def stop(number, frame):
            if self.signal and world_size() == 1:
                raise KeyboardInterrupt
            self.signal = number

        self.batch_size, self.since = batch_size, (first, time.perf_counter())
        steps = range(first + 1, last + 1)
        often = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs fewer lines
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            bar = tqdm(steps, self.script, last, initial=first, unit=" steps", mininterval=often, disable=rank() > 0)
            with bar as self.bar:
                for step in self.bar:
                    yield step
                    if self.stopping and step < last:
                        break
            if self.stopping and step < last:
                if self.tracker:
                    self.tracker.finish(exit_code=128 + self.stopping)
                if rank() == 0:
                    print(f"stopped after step {step}; go on with --resume {self.folder}", file=sys.stderr)
                all_reduce_max(
                    0
                )  # torchrun takes a process that leaves for a failure, and ends those that have not yet
                sys.exit(128 + self.stopping)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked_to_stop(self):
        """Whether this process or another one has been: each script asks once a step."""
        self.stopping = all_reduce_max(self.signal or 0)
        return bool(self.stopping)

    def log(self, step, **metrics):
        """Appends one JSON line; floats as they are, so that two runs can be compared exactly."""
        if rank():
            return
        metrics = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
        if "loss" in metrics:  # a training step, not a validation
            before, then = self.since
            metrics["chunks_per_second"] = self.batch_size * (step - before) / (time.perf_counter() - then)
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
        """Writes `state` to the run folder, whole or not at all."""
        if rank() == 0:
            save_whole(state, self.folder / name)

    def picture(self, name, figure):
        """Writes a matplotlib figure to the run folder as a PNG file, and logs it to the tracker."""
        if rank():
            return
        path = self.folder / f"{name}.png"
        with written_whole(path) as part:
            figure.savefig(part, format="png", dpi=110)
        if self.tracker:
            import wandb

            # not the name alone, which a metric may have; no new row, so that the step's metrics may follow
            self.tracker.log({f"pictures/{name}": wandb.Image(str(path))}, commit=False)


def stop_if_not_finite(step, loss, terms, reads):
    """InputError, with the reads of the batch, if the loss is not finite; the last checkpoint stays as it is."""
    if not torch.isfinite(loss):
        values = {name: value.item() if torch.is_tensor(value) else value for name, value in terms.items()}
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise InputError(
            f"step {step}: the loss is {loss.item()} ({terms}); try a lower --lr or --precision fp32, "
            f"or look at the reads of this batch: {' '.join(sorted(set(reads)))}"
        )


def warn_if_slow(device, models, chunk_len, chunks, passes):
    """On a CPU with a large model: says how long an epoch of `chunks` will take, from one forward and backward.

    `passes`: how many of them a chunk takes; a forward alone counts a third.
    """
    parameters = sum(p.numel() for p in models[0].parameters())
    if device.type != "cpu" or parameters < 1e6:
        return
    pore_model, head = copy.deepcopy(models)  # so that BatchNorm's statistics stay as they are
    signal = torch.randn(2, chunk_len)
    start = time.perf_counter()
    head(pore_model(signal)[0]).square().mean().backward()
    seconds = (time.perf_counter() - start) / len(signal) * passes * chunks / world_size()
    print(
        f"no GPU: {parameters / 1e6:.0f} M parameters will take about {seconds / 3600:.1f} hours an epoch here "
        f"({chunks} chunks); --size tiny is meant for this machine"
    )
