"""Ctrl-C and SIGTERM where Python cannot raise an exception."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

import pytest

from clt_plugins.distributed import signals
from clt_plugins.distributed.signals import Signals, heard
from clt_plugins.errors import ExitCode, Stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_callback_of_c_code_comes_again(number, capfd):
    """As in LLVM's callbacks while Numba loads a kernel: ctypes prints the exception, and goes on."""

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        signal.raise_signal(number)

    def work() -> None:
        callback()
        time.sleep(20)

    hook, begun = sys.unraisablehook, time.monotonic()
    with pytest.raises(Stopped) as caught, heard():
        work()
    assert caught.value.code == ExitCode.INTERRUPTED
    assert time.monotonic() - begun < 10
    assert "Exception ignored" not in capfd.readouterr().err
    assert sys.unraisablehook is hook


def test_an_error_that_is_made_of_an_interrupt_is_one():
    """As in a library that takes whatever goes wrong in a call of its own for a wrong argument."""

    def library() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise ValueError("invalid bounding box") from None

    with pytest.raises(Stopped) as caught, heard():
        library()
    assert caught.value.code == ExitCode.INTERRUPTED


def test_an_error_without_an_interrupt_stays_what_it_is():
    with pytest.raises(ValueError, match="wrong"), heard():
        raise ValueError("wrong")


def test_other_exceptions_that_cannot_be_raised_are_told_as_ever(capfd):
    told = []

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        raise ValueError("lost")

    hook = sys.unraisablehook
    try:
        sys.unraisablehook = told.append
        with heard():
            callback()
    finally:
        sys.unraisablehook = hook
    assert [one.exc_type for one in told] == [ValueError]


def test_no_interrupt_comes_after_the_end():
    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        signal.raise_signal(signal.SIGINT)

    with heard():
        callback()
    time.sleep(0.2)  # four times the pause after which it would come


def test_a_sigterm_that_is_repeated_at_once_is_the_same_request(monkeypatch):
    """SLURM may send it to the ranks of a step, and torchrun passes its own on to them."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    for again, after in ((signal.SIGTERM, 2.5), (signal.SIGINT, 0.1)):
        asked = Signals()
        with asked.in_loop():
            asked(signal.SIGTERM, None)
            asked(signal.SIGTERM, None)
            assert asked.asked and not asked.raised
            now[0] += after
            with pytest.raises(KeyboardInterrupt):
                asked(again, None)
