"""Data workers outlive the signals that ask a run to stop: they are needed until the step is done and saved.

Slurm and torchrun send a signal to every process there is; a worker that obeyed it would break the step that the training
process wants to finish. A worker ends when its parent says so or is gone.
"""

from __future__ import annotations

import os
import signal
import threading

_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def outlive_signals(worker: int) -> None:
    """A ``worker_init_fn``: ignore what asks this process to stop, but for SIGTERM from its parent."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED_TO_STOP)
    threading.Thread(target=_obey_parent, args=(parent,), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:  # only this call tells who has sent it
        pass
    os._exit(0)
