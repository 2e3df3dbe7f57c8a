"""Weights & Biases, if asked for with --track."""

import dataclasses
import sys

from common import InputError


def start_tracker(folder, args):
    """The wandb run; a resumed run goes on with the one it had."""
    import wandb  # here, since it takes long to import

    latest = folder / "wandb" / "latest-run"  # a link to run-TIME-ID or offline-run-TIME-ID
    known = {}
    if latest.is_symlink():
        known = {"id": latest.readlink().name.partition("run-")[2].partition("-")[2], "resume": "allow"}
    report = sys.excepthook  # wandb puts one of its own in the place, which prints a traceback before
    try:
        tracker = wandb.init(project="poressl", name=folder.name, config=dataclasses.asdict(args), dir=folder, **known)
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


def log_picture(tracker, name, path):
    """Logs the PNG file `path`."""
    import wandb

    # not the name alone, which a metric may have; no new row, so that the step's metrics may follow
    tracker.log({f"pictures/{name}": wandb.Image(str(path))}, commit=False)
