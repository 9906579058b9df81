"""One process at a time in a folder, whatever becomes of it."""

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from imcl_fast.runs import lock

FORK = multiprocessing.get_context("fork")


def held(folder):
    """Why the lock can't be had; None if it can."""
    try:
        with lock.hold(folder):
            return None
    except lock.Held as error:
        return str(error)


def hold_until_killed(folder, ready, fork=False):
    with lock.hold(folder):
        if fork and os.fork() == 0:
            ready.send(os.getpid())
            time.sleep(60)
            os._exit(0)
        ready.send(os.getpid())
        time.sleep(60)


def holder(folder, **options):
    """A process that holds the lock, and the ends of the pipe it writes to."""
    mine, its = FORK.Pipe()
    process = FORK.Process(target=hold_until_killed, args=(folder, its), kwargs=options)
    process.start()
    return process, mine


def test_it_is_held_by_one_and_let_go_of_whatever_happens(tmp_path):
    with pytest.raises(KeyError), lock.hold(tmp_path):
        reason = held(tmp_path)
        assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in reason
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert held(tmp_path) is None


def test_a_killed_process_holds_nothing(tmp_path):
    process, ready = holder(tmp_path)
    assert ready.poll(30)
    assert f"process {process.pid} on" in held(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / lock.NAME).exists()
    assert held(tmp_path) is None and not list(tmp_path.iterdir())


def test_its_forked_processes_hold_nothing(tmp_path):
    process, ready = holder(tmp_path, fork=True)
    pids = {ready.recv() for _ in range(2)}
    process.kill()
    process.join()
    assert held(tmp_path) is None
    (child,) = pids - {process.pid}
    os.kill(child, signal.SIGKILL)


def test_a_program_started_with_it_holds_it_too(tmp_path):
    with lock.hold(tmp_path) as descriptor:
        program = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor]
        )
    assert held(tmp_path) is not None
    program.communicate(b"\n")
    assert held(tmp_path) is None and not list(tmp_path.iterdir())


def contend(folder, inside, times):
    for _ in range(times):
        try:
            with lock.hold(folder):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                os.unlink(inside)
        except lock.Held:
            pass


def test_of_many_at_once_one_gets_it(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    processes = [
        FORK.Process(target=contend, args=(folder, tmp_path / "inside", 300)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert held(folder) is None


# Where the file system, or the system, has no locks


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0.0)


def test_without_locks_one_holds_it_too(no_locks, tmp_path):
    with lock.hold(tmp_path):
        assert f"process {os.getpid()} on" in held(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, False),
        ({"began": "another start of the machine"}, True),  # which gave the number anew
        ({"pid": 2**22 + 1}, True),  # more than any process has
        ({"host": "elsewhere"}, False),
        ({"pid": "1"}, True),
    ],
    ids=["runs", "restarted", "ended", "elsewhere", "damaged"],
)
def test_without_locks_the_record_tells_whether_its_process_runs(no_locks, tmp_path, change, taken):
    with lock.hold(tmp_path):
        record = json.loads((tmp_path / lock.NAME).read_text())
    text = json.dumps({**record, **change})
    (tmp_path / lock.NAME).write_text(text)
    reason = held(tmp_path)
    if taken:
        assert reason is None
        return
    assert "delete " in reason and str(tmp_path / lock.NAME) in reason
    assert (tmp_path / lock.NAME).read_text() == text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"host": "x"', b"{}", b"1"])
def test_a_damaged_record_is_no_lock(no_locks, tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    assert held(tmp_path) is None


def test_it_can_be_imported_where_there_is_no_fcntl(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("lock_without_fcntl", lock.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fcntl is None
