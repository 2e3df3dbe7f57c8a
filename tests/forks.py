"""Processes for tests: forks of one that has imported all and computed nothing, since imports take seconds."""

import atexit
import contextlib
import importlib
import os
import pickle
import re
import resource
import signal
import subprocess
import sys


def script(name, *words, **options):
    """The whole of the script, with the words of a command line, and options that are turned into such words."""
    options = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    sys.argv = [f"{name}.py", *map(str, [*words, *options])]
    module = importlib.import_module(name)
    sys.exit(module.main(module.parse_args(module.Args)))


def full_disk(size):
    """No file grows beyond `size` bytes from now on: the write that would let it fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed(size):
    """The process dies in the midst of the write that would let a file grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    full_disk(size)


def stdout_to(path):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 1)


def without_bars(said):
    """The lines of a standard error that are no progress bars."""
    lines = [line.split("\r")[-1] for line in said.splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"\d\d:\d\d.*\] *$", line)]


def _child(folder, environment, calls):
    """Makes these calls, and ends this process as an interpreter would."""
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for call in calls:
            try:
                call()
            except SystemExit as end:
                code = end.code or 0
            if code:
                break
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def serve():
    """Answers (folder, environment, calls) with the exit code and the lines on standard error of a process so made."""
    import barlow, basecall, finetune_basecaller, prepare_data  # noqa: E401, F401, I001
    import torch._dynamo  # noqa: F401 - as the first optimizer does

    while sys.stdin.buffer.peek(1):
        asked = pickle.load(sys.stdin.buffer)
        reader, writer = os.pipe()  # a file would be subject to the limits as well
        if (child := os.fork()) == 0:
            os.dup2(writer, 2), os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.close(writer)
            _child(*asked)
        os.close(writer)
        with open(reader, errors="replace") as said:
            lines = without_bars(said.read())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pickle.dump((code, lines), sys.stdout.buffer)
        sys.stdout.buffer.flush()
    os._exit(0)  # at once: to take all modules apart takes a second


@contextlib.contextmanager
def server():
    """A function that says with which exit code a process ended that made `calls` in `folder`, and what it said."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", "from tests import forks; forks.serve()"]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def run(folder, *calls, **changes):
            pickle.dump((folder, os.environ | changes, calls), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)

        yield run
        process.stdin.close()
