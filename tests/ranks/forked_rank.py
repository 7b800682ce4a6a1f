"""The process that ranks of one number are forked from: it has imported everything, and has run nothing and has no threads.

``launch.on_ranks`` starts it and writes a job a line; it answers with the rank's process id, and its exit code.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading

PRELOADED = [
    "datasets",
    "numpy",
    "peft",
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.parallel",
    "torchdata.stateful_dataloader",
    "transformers.image_processing_utils",
    "transformers.models.llama.modeling_llama",
]


def preload() -> None:
    given = dict(os.environ)
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator would start a thread
    for name in PRELOADED:
        importlib.import_module(name)
    package = importlib.import_module("nemo_automodel")
    for module in pkgutil.walk_packages(package.__path__, "nemo_automodel."):
        importlib.import_module(module.name)
    os.environ.clear()  # some set a variable when imported
    os.environ.update(given)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after the imports: a fork would lose all but one"
    gc.freeze()  # or each rank's collector copies every page that has an object in it


def die_with_parent() -> None:
    """No process of a test is left where the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def redirect(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, descriptor)
    os.close(opened)


def serve() -> None:
    """Fork a rank for each job, until there are no more."""
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    redirect(0, os.devnull, os.O_RDONLY)
    os.dup2(2, 1)
    die_with_parent()
    preload()
    for line in jobs:
        pid = os.fork()
        if pid == 0:
            jobs.close()
            answers.close()
            end(json.loads(line))
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


def end(job: dict) -> None:
    """Run the job and end as the interpreter does, but for the seconds that taking down every module takes."""
    code = 0
    try:
        run(job)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict) -> None:
    """What a fresh interpreter would run, as far as it can tell."""
    die_with_parent()
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for descriptor, path in enumerate(job["streams"], 1):
        redirect(descriptor, path, os.O_WRONLY | os.O_APPEND)
    importlib.import_module("numpy").random.seed()  # Python's own is seeded anew by the fork
    importlib.import_module("torch").default_generator.seed()
    target, arguments = job["target"], job["args"]
    if target.endswith(".py"):
        sys.argv = [target, *arguments]
        sys.path[0] = os.path.dirname(target)
        runpy.run_path(target, run_name="__main__")
    elif ":" not in target:
        sys.argv = [target, *arguments]
        sys.path[0] = job["cwd"]
        del sys.modules[target]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        module, function = target.split(":")
        sys.argv = ["-c", *arguments]
        getattr(importlib.import_module(module), function)(*arguments)


if __name__ == "__main__":
    serve()
    os._exit(0)
