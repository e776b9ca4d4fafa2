"""Signals that come in any number, at any moment, end a process: none of them makes it wait for itself."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from das_service.stop_signals import set_by_signals

_WAITING = textwrap.dedent("""
    import signal, sys, threading, time
    from das_service.stop_signals import set_by_signals

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for those that come late
    stopping = threading.Event()
    heard = 0
    with set_by_signals(stopping, (signal.SIGUSR1,)):
        print("ready", flush=True)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            heard += stopping.wait(0.0001)  # mostly within the event's lock, where a signal may find it
            stopping.clear()
    print(heard > 0)
""")


def test_signals_in_the_middle_of_waiting_do_not_make_it_wait_for_ever() -> None:
    with subprocess.Popen([sys.executable, "-c", _WAITING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            end = time.monotonic() + 1
            while time.monotonic() < end:
                process.send_signal(signal.SIGUSR1)
                time.sleep(0.0001)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()

    assert said == "True\n"
    assert process.returncode == 0


def test_each_signal_is_counted_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    stopping = threading.Event()
    counted: list[int] = []
    with set_by_signals(stopping, (signal.SIGUSR1,), also=counted.append):
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert stopping.wait(10)

    assert counted == [signal.SIGUSR1, signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ValueError, match="broken"), set_by_signals(threading.Event(), (signal.SIGUSR1,)):
        raise ValueError("broken")

    assert signal.getsignal(signal.SIGUSR1) is before
