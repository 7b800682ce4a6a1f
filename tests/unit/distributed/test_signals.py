"""A process copied from one that notes signals still ends when its parent asks it to."""

import os
import signal
import time

from nemo_automodel.components.distributed.signals import StopSignals


def test_a_copy_of_the_process_ends_at_the_first_signal():
    signals = StopSignals(["SIGTERM"], announce=False)
    signals.defer()
    try:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        start = time.monotonic()
        _, status = os.waitpid(child, 0)
        assert time.monotonic() - start < 10
        assert os.WTERMSIG(status) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
    finally:
        signals.restore()
