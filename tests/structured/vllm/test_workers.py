"""Threads that neither run too many calls at a time nor keep a process alive."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("trl")

from hf_ebft.structured.vllm import workers
from hf_ebft.structured.vllm.workers import DaemonPool
from tests.support import fake_vllm
from tests.support.fake_vllm import serving


def test_results_and_errors_come_back_and_no_more_than_size_run_at_a_time():
    pool = DaemonPool(3)
    lock, running, most = threading.Lock(), [], []

    def work(number):
        with lock:
            running.append(number)
            most.append(len(running))
        time.sleep(0.005)
        with lock:
            running.remove(number)
        return 1 / number

    futures = [pool.submit(work, number) for number in range(20)]
    assert [future.result(5) for future in futures[1:]] == [1 / n for n in range(1, 20)]
    assert isinstance(futures[0].exception(5), ZeroDivisionError)
    assert max(most) == 3
    pool.close()


def test_closing_cancels_what_has_not_begun():
    pool = DaemonPool(1)
    hold = threading.Event()
    first = pool.submit(hold.wait)
    while not first.running():
        time.sleep(0.001)
    rest = [pool.submit(time.sleep, 0) for _ in range(3)]
    pool.close()
    assert all(future.cancelled() for future in rest)
    hold.set()
    assert first.result(5) is True


def test_a_call_that_never_ends_does_not_keep_the_process_alive():
    # By its path: importing the package takes seconds.
    script = f"""
        import runpy, time
        pool = runpy.run_path({workers.__file__!r})["DaemonPool"](2)
        future = pool.submit(time.sleep, 600)
        while not future.running():
            time.sleep(0.01)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=20, check=True)


@pytest.mark.slow
def test_control_c_ends_a_run_whose_server_has_frozen(tmp_path):
    with serving() as fake:
        # Everything up to the first rollouts is answered.
        real = fake.complete
        frozen = threading.Event()

        def freezes(payload):
            if payload["ignore_eos"]:
                return real(payload)
            frozen.set()
            fake.lock.release()  # other requests reach the frozen server, too
            time.sleep(120)
            fake.lock.acquire()
            return real(payload)

        fake.complete = freezes
        fake.fail("/v1/unload_lora_adapter", fake_vllm.slow(120), times=9)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "interrupted.py"), fake.url, tmp_path],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert frozen.wait(120)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            _, errors = process.communicate(timeout=60)
            assert time.monotonic() - started < 20
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors
    assert list((tmp_path / "sync").iterdir()) == []
