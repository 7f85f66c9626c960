"""Finished work is found again, damaged work is made again, half-done work is never seen."""

import os
import subprocess
import sys
import threading

import pytest

from remanence.store import Store, digest, directory_digest


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return Store(tmp_path / "store", warnings.append)


def make(store, text="one", stage="s"):
    inputs = {"text": text}
    return store.make(store.key(stage, inputs), stage, inputs, lambda work: (work / "a.txt").write_text(text))


def test_what_was_made_is_found(store):
    path = make(store)
    assert store.find(store.key("s", {"text": "one"})) == path
    assert (path / "a.txt").read_text() == "one"
    assert store.find(store.key("s", {"text": "two"})) is None


def test_key_ignores_order_and_sees_every_change():
    base = digest({"a": 1, "b": [1, 2]})
    assert digest({"b": [1, 2], "a": 1}) == base
    assert (
        len({base, digest({"a": 1, "b": [2, 1]}), digest({"a": 2, "b": [1, 2]}), digest({"a": "1", "b": [1, 2]})}) == 4
    )


@pytest.mark.parametrize("harm", ["edit", "delete", "manifest", "truncate manifest"])
def test_damage_is_noticed_and_made_again(store, warnings, harm):
    path = make(store)
    if harm == "edit":
        (path / "a.txt").write_text("0ne")
    elif harm == "delete":
        (path / "a.txt").unlink()
    elif harm == "manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text("{")
    assert store.find(path.name) is None
    assert "damaged" in warnings[0]
    assert make(store) == path
    assert store.find(path.name) == path


def test_failure_leaves_nothing(store):
    def fail(work):
        (work / "half.txt").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        store.make("ab" * 32, "s", {}, fail)
    assert [p for p in store.root.rglob("*") if p.is_file()] == []
    assert store.find("ab" * 32) is None


def test_two_runs_at_once_both_end_with_the_result(store):
    """Both build; the second finds the place taken by the same content."""
    barrier, results, errors = threading.Barrier(2), [], []

    def build(work):
        (work / "a.txt").write_text("same")
        barrier.wait(timeout=10)

    def run():
        try:
            results.append(store.make("cd" * 32, "s", {}, build))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results[0] == results[1]
    assert store.find("cd" * 32) == results[0]
    assert not list(store.root.glob("*/.*tmp*"))


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    code = f"""
import os, signal
from remanence.store import Store
store = Store({str(tmp_path / "store")!r}, print)
def build(work):
    (work / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
store.make("ef" * 32, "s", {{}}, build)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert list((tmp_path / "store").glob("*/.*tmp*"))
    store = Store(tmp_path / "store", print)
    assert not list((tmp_path / "store").glob("*/.*tmp*"))
    assert store.find("ef" * 32) is None


def test_work_of_a_living_process_is_left_alone(tmp_path):
    work = tmp_path / "store/ab" / f".{'ab' * 32}.tmp-{os.getpid()}_x"
    work.mkdir(parents=True)
    Store(tmp_path / "store", print)
    assert work.is_dir()


def test_directory_digest_sees_names_and_contents(tmp_path):
    for name, file, text in (("a", "x", "1"), ("b", "y", "1"), ("c", "x", "2"), ("d", "x", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    a, b, c, d = (directory_digest(tmp_path / name) for name in "abcd")
    assert a == d
    assert len({a, b, c}) == 3
