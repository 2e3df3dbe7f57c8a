"""The command line of a script: its Args read by tyro; the constraints beside the fields are checked by pydantic."""

import atexit
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import tyro
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from common import InputError
from common.device import rank, world_size

# what a resumed run may be given anew
MAY_CHANGE = {"resume", "run_dir", "data", "max_steps", "device", "compile", "activation_checkpointing"}
MAY_CHANGE |= {"checkpoint_minutes", "track"}


def _rising(pair):
    if pair[0] > pair[1]:
        raise ValueError("should be LOW HIGH, with LOW at most HIGH")
    return pair


Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
ProbabilityRange = Annotated[tuple[Probability, Probability], AfterValidator(_rising)]
BatchSize = Annotated[int, Field(ge=2)]  # BatchNorm and the losses need two chunks
ChunkLength = Annotated[int, Field(ge=25)]  # the projector needs four frames


def parse_args(args_class):
    """The script's arguments from the command line, checked; with --resume RUN, those of that run are the defaults.

    From here on InputError, OSError (a full disk) and Ctrl-C end the script with one line and exit code 1 or 130.
    """
    sys.excepthook = _one_line
    if rank():  # one process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    args_class.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    saved, words = None, sys.argv[1:]
    for i, word in enumerate(words):
        if word.startswith("--resume"):
            saved = _read_args(Path(word.partition("=")[2] or "".join(words[i + 1 : i + 2])), TypeAdapter(args_class))
    args = tyro.cli(args_class, default=saved, console_outputs=rank() == 0)
    try:
        TypeAdapter(args_class).validate_python(vars(args))
    except ValidationError as error:
        name, value = error.errors()[0]["loc"][0], error.errors()[0]["input"]
        raise InputError(f"{_option(name)} {_shown(value)}: {_reason(error)}") from error
    if world_size() > 1 and not hasattr(args, "resume"):
        raise InputError("works as one process; start it without torchrun")
    for name, value in vars(saved).items() if saved else ():
        if value != getattr(args, name) and name not in MAY_CHANGE:
            raise InputError(f"{_option(name)}: the run in {args.resume} has {value} and keeps it; leave it out")
    return args


def _option(name):
    return f"--{name.replace('_', '-')}"


def _shown(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _reason(error):
    """What pydantic says of the first field that is wrong."""
    return error.errors()[0]["msg"].removeprefix("Value error, ").replace("Input should be", "should be")


def _read_args(run, adapter):
    try:
        saved = (run / "args.json").read_bytes()
        if not isinstance(found := json.loads(saved), dict) or not found:
            raise ValueError("it holds no arguments")
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {run}: no run folder with an args.json ({error})") from error
    try:
        return adapter.validate_json(saved)
    except ValidationError as error:
        what = f"{_option(str(error.errors()[0]['loc'][0]))} in its args.json: {_reason(error)}"
        raise InputError(f"--resume {run}: not a run of this script ({what})") from error


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
