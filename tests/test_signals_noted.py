import os
import signal
import threading
import time

import pytest

from localctl import signals
from localctl.signals import (
    SIGNALS,
    Interrupt,
    Signalled,
    ending_at_once,
    exit_code,
    ignore_signals,
    left_to_the_system,
)


def test_the_first_only_asks_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.signal
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_the_launcher_forwards_again_is_the_same_request(monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 0.05)
    with pytest.raises(KeyboardInterrupt), Interrupt(os.getppid()) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)


def test_both_are_noted_and_both_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in SIGNALS] == before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert (exit_code(signal.SIGINT), exit_code(signal.SIGTERM)) == (130, 143)


def test_workers_leave_signals_to_their_parent():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ignore_signals(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
        for number in SIGNALS:
            os.kill(os.getpid(), number)  # would end the tests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_former_handler_is_back_also_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_works_in_a_thread_that_may_not_set_handlers():
    errors = []

    def work():
        try:
            with Interrupt() as interrupt:
                assert not interrupt.signal
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_closed_session_counts_and_nohup_keeps_its_meaning():
    assert signal.SIGHUP in SIGNALS and exit_code(signal.SIGHUP) == 129
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.signal == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for context in (Interrupt(), ending_at_once()):
            with context:
                os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_to_be_saved_a_signal_ends_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Signalled, match=signal.Signals(number).name) as caught, ending_at_once():
        os.kill(os.getpid(), number)
        raise AssertionError("not reached")
    assert caught.value.number == number and signal.getsignal(number) is before


def test_a_launcher_that_is_gone_counts_as_sigterm():
    assert Interrupt(None).signal == 0  # a shell may go: nobody waits for its word
    assert Interrupt(os.getppid()).signal == 0
    assert Interrupt(os.getppid() + 1).signal == signal.SIGTERM


def test_while_a_library_waits_the_system_acts_and_the_former_handlers_are_back_then():
    with ending_at_once():
        before = [signal.getsignal(number) for number in SIGNALS]
        with left_to_the_system():
            assert all(signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS)
        assert [signal.getsignal(number) for number in SIGNALS] == before
