import os
import signal
import threading

import pytest

from localctl.run.interrupt import SIGNALS, Interrupt, exit_code, ignore_signals


def test_the_first_only_asks_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.signal
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


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
