import signal
import subprocess
import sys

import pytest

START = """
import os, signal, time
from tdc_ray.execution import interrupts
from tdc_ray.execution.interrupts import interrupts_deferred, received_signal
interrupts.RAISED_AGAIN_EVERY_S = 0.1
same_within, interrupts.SAME_WITHIN_S = interrupts.SAME_WITHIN_S, 0.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's inherits another
interrupts.handle_interrupts(lambda number: print("said", flush=True))

def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)
"""


def outcome(code: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-u", "-c", START + code]  # os._exit leaves what is held back
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout.split() + done.stderr.splitlines()[-1:]


def test_an_interrupt_that_a_library_swallows_is_raised_again():
    code = """
try:
    send()
except BaseException:
    pass
print("on")
try:
    time.sleep(50)
except KeyboardInterrupt:
    print("stopped", received_signal())
"""
    assert outcome(code) == (0, ["said", "on", "stopped", "2"])


def test_an_interrupt_is_one_though_nobody_listens_any_more():
    code = """
def fail(_number): raise BrokenPipeError
interrupts.handle_interrupts(fail)
try:
    send()
except KeyboardInterrupt:
    print("stopped")
    os._exit(0)
"""
    assert outcome(code) == (0, ["stopped"])


def test_what_cleans_up_after_an_interrupt_is_not_interrupted():
    code = """
try:
    try:
        send()
    finally:
        time.sleep(0.5)
        print("clean")
except KeyboardInterrupt:
    time.sleep(0.5)
    print("stopped")
    os._exit(0)
"""
    assert outcome(code) == (0, ["said", "clean", "stopped"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_ends_the_process_at_once(number):
    code = f"""
try:
    send()
finally:
    send({int(number)})
    print("never")
"""
    assert outcome(code) == (128 + number, ["said"])


def test_one_that_is_sent_to_the_process_and_to_its_group_is_one():
    code = """
interrupts.SAME_WITHIN_S = same_within
try:
    try:
        send(signal.SIGTERM)
    finally:
        send(signal.SIGTERM)
        print("clean")
except KeyboardInterrupt:
    print("stopped", received_signal())
"""
    assert outcome(code) == (0, ["said", "clean", "stopped", "15"])


def test_a_second_one_ends_what_the_process_started():
    code = """
import subprocess
shell = subprocess.Popen(["sh", "-c", "sleep 100 & wait"], start_new_session=True)
while not open(f"/proc/{shell.pid}/task/{shell.pid}/children").read():
    time.sleep(0.01)
try:
    send()
finally:
    send()
"""
    # Which hold the pipe open that this waits for the end of.
    assert outcome(code) == (128 + signal.SIGINT, ["said"])


def test_an_interrupt_waits_for_the_end_of_a_block_that_must_not_be_cut():
    code = """
def ours(): return signal.getsignal(signal.SIGTERM)
before = ours()
try:
    with interrupts_deferred():
        signal.signal(signal.SIGTERM, lambda *_: print("another's"))
        send(signal.SIGTERM)
        time.sleep(0.3)
        print("whole", ours() is before)
    print("never")
except KeyboardInterrupt:
    print("stopped")
    os._exit(0)
"""
    assert outcome(code) == (0, ["said", "whole", "True", "stopped"])


def test_a_handler_that_c_code_puts_in_place_meanwhile_is_replaced():
    code = """
import ctypes
try:
    with interrupts_deferred():
        # As Ray's does: it ends all.
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(0))
        time.sleep(0.2)
        send(signal.SIGTERM)
        print("whole")
except KeyboardInterrupt:
    print("stopped")
    os._exit(0)
"""
    assert outcome(code) == (0, ["said", "whole", "stopped"])


def test_what_is_ignored_stays_so():
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.handle_interrupts(lambda number: print("said"))
with interrupts_deferred():
    send()
interrupts.ignore_interrupts()
send()
print("on")
"""
    assert outcome(code) == (0, ["on"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_comes_as_the_process_ends_leaves_its_exit_code(number):
    code = f"""
import atexit, sys
from tdc_ray.cli.main import main
sys.argv = ["tdc-ray", "--version"]
atexit.register(send, {int(number)})
main()
"""
    code, printed = outcome(code)
    assert (code, printed[0]) == (0, "tdc-ray")


def test_who_handles_no_interrupts_sees_no_change():
    code = """
interrupts._state.say = None
with interrupts_deferred():
    signal.signal(signal.SIGTERM, lambda *_: print("another's"))
    send(signal.SIGTERM)
"""
    assert outcome(code) == (0, ["another's"])
