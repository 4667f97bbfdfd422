"""Files and locks: whole or not at all after a kill or on a full disk, nobody else's file lost, one writer at a time."""

import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from clp_engine.core import files, locking
from clp_engine.core.errors import ConfigError

NEW = {"a.json": "new", "policy/b.json": "new", "policy/c.json": "new"}


def write(path, content=NEW):
    with files.write_directory(path) as temporary:
        for name, text in content.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text)


def held(path):
    return {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}


def forked(work):
    """The wait status of a forked process that does `work`; 1 << 8 where that raised."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def kill_at(number):
    """Kill this process before (even numbers) or after (odd ones) its rename `number // 2`."""
    renames = [0]

    def dying(real):
        def rename(*arguments, **options):
            renames[0] += 1
            if renames[0] == number // 2 and number % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments, **options)
            if renames[0] == number // 2 and number % 2 == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return rename

    os.rename, os.replace = dying(os.rename), dying(os.replace)


def killed_at_rename(number, work):
    """Whether a forked process that does `work` lived to the end; it is killed at its rename `number`, before or after."""

    def killed():
        kill_at(number)
        work()

    status = forked(killed)
    assert status in (0, signal.SIGKILL), "the work failed by itself"
    return status == 0


BEFORE = {
    "nothing": {},
    "the same files": {name: "old" for name in NEW},
    "somebody's files": {"policy/b.json": "old", "notes.txt": "mine", "policy/notes.txt": "mine"},
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_a_kill_at_any_rename_leaves_the_old_or_the_new_files_once_the_next_process_has_finished(
    tmp_path, before
):
    for number in range(2, 40):
        path = tmp_path / str(number) / "folder"
        path.parent.mkdir()
        if before:
            write(path, before)
        lived = killed_at_rename(number, functools.partial(write, path))
        files.finish(path)
        others = {name: text for name, text in before.items() if name not in NEW}
        now = held(path) if path.exists() else {}
        assert now in (before, others | NEW), (number, now)
        assert [p.name for p in path.parent.iterdir()] == (["folder"] if now else [])
        if lived:
            assert now == others | NEW
            return
    raise AssertionError("every number of renames was followed by another one")


def test_what_a_version_without_ready_folders_left_is_put_back(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for kind, content in (("old", "before"), ("new", "half")):
        left = tmp_path / f".policy.{kind}-{gone.pid}"
        left.mkdir()
        (left / "a.json").write_text(content)
    files.finish(tmp_path / "policy")
    assert held(tmp_path) == {"policy/a.json": "before"}


def test_what_a_living_process_or_another_host_is_writing_is_left_to_it(tmp_path):
    for name in (f".policy.new-{socket.gethostname()}-{os.getppid()}", ".policy.new-elsewhere-7"):
        (tmp_path / name).mkdir()
    files.finish(tmp_path / "policy")
    assert len(list(tmp_path.iterdir())) == 2
    files.finish(tmp_path / "policy", alone=True)
    assert not list(tmp_path.iterdir())


def test_who_may_only_read_is_not_stopped_by_what_was_left(tmp_path, monkeypatch):
    (tmp_path / f".policy.new-{os.getpid()}").mkdir()

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files.shutil, "rmtree", read_only)
    files.finish(tmp_path / "policy")


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path):
    write(tmp_path / "folder", {"a.json": "old", "mine.txt": "mine"})
    with pytest.raises(OSError, match="full"), files.write_directory(tmp_path / "folder") as temporary:
        (temporary / "a.json").write_text("new")
        raise OSError("full")
    assert held(tmp_path) == {"folder/a.json": "old", "folder/mine.txt": "mine"}
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        write(tmp_path / "folder" / "a.json")


def test_a_linked_folder_stays_a_link(tmp_path):
    write(tmp_path / "elsewhere", {"a.json": "old"})
    (tmp_path / "policy").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "policy")
    assert (tmp_path / "policy").is_symlink() and held(tmp_path / "elsewhere") == NEW


@pytest.mark.parametrize(
    ("target", "how"), [("run/policy", "is"), ("run", "holds"), ("run/policy/out", "lies in")]
)
def test_a_target_that_is_holds_or_lies_in_what_is_read_is_refused(tmp_path, target, how):
    with pytest.raises(ConfigError, match=rf"{how} .*run/policy, which is being read"):
        files.refuse_overlap(tmp_path / target, [tmp_path / "run" / "policy"])
    files.refuse_overlap(tmp_path / "run" / "policy-2", [tmp_path / "run" / "policy"])


# -- locks -------------------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from clp_engine.core.locking import exclusive
with exclusive(sys.argv[1]):
    there, ready = os.pipe()
    if os.fork() == 0:  # a child that outlives its parent
        os.write(ready, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(there, 1)
    print(os.getpid(), flush=True)
    input()
"""


def test_a_lock_names_its_holder_and_ends_with_it_whatever_children_are_left(tmp_path):
    lock = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert int(holder.stdout.readline()) == holder.pid
        with (
            pytest.raises(locking.Busy, match=f"process {holder.pid} on {socket.gethostname()}"),
            locking.exclusive(lock),
        ):
            pass
        holder.kill()
        holder.wait()
        assert json.loads(lock.read_text())["pid"] == holder.pid  # stale
        with locking.exclusive(lock):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
            with pytest.raises(locking.Busy), locking.exclusive(lock):
                pass
        assert not lock.exists()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.check
def test_of_many_that_want_a_lock_one_has_it_at_a_time(tmp_path):
    lock, log = tmp_path / ".lock", tmp_path / "log"
    deadline = time.monotonic() + 3
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                while time.monotonic() < deadline:
                    try:
                        with locking.exclusive(lock):
                            os.close(os.open(log, os.O_CREAT | os.O_EXCL))  # fails where another is inside
                            os.unlink(log)
                    except locking.Busy:
                        pass
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
