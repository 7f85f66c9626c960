"""Tables of configurations: found by their key, kept whole, and ignored with a word where they are stale."""

import json
from dataclasses import replace

import pytest

configs = pytest.importorskip("remanence.kernels.triton.configs", reason="Triton is not installed: pip install triton")
tune = pytest.importorskip("remanence.kernels.triton.tune", reason="Triton is not installed: pip install triton")

HERE = configs.Machine("NVIDIA Test 1-2", "9.0", 132, 227 << 10)
TASK = configs.Task("gemm", 4, 128, False, "bfloat16", 4096, 4096, 16)
CONFIG = configs.Config(64, 16, 64, 4, 5, 2)


@pytest.fixture(autouse=True)
def forget_tables():
    configs.stored.cache_clear()


def test_rows_fall_into_buckets():
    assert [configs.bucket(m) for m in (1, 2, 3, 8, 9, 64, 65, 5000)] == [1, 2, 4, 8, 16, 64, 128, 1024]


def test_a_tuned_entry_is_found_by_its_bucket(tmp_path):
    path = configs.store(HERE, {TASK.key: CONFIG}, tmp_path)
    configs.store(HERE, {replace(TASK, m=2).key: configs.default(HERE, TASK)}, tmp_path)
    assert path.name == "nvidia_test_1_2.json"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert configs.stored(HERE, tmp_path)[replace(TASK, m=13).key] == CONFIG
    assert len(configs.stored(HERE, tmp_path)) == 2


@pytest.mark.parametrize("field", ["version", "device", "capability", "triton", "kernels"])
def test_a_stale_table_is_ignored_with_one_line(tmp_path, caplog, field):
    path = configs.store(HERE, {TASK.key: CONFIG}, tmp_path)
    table = json.loads(path.read_text())
    table["header"][field] = "another"
    path.write_text(json.dumps(table))
    assert configs.stored(HERE, tmp_path) == configs.stored(HERE, tmp_path) == {}
    (line,) = caplog.messages
    assert f"{field} 'another'" in line


def test_without_a_table_the_default_is_taken():
    assert configs.choose(HERE, TASK) == configs.default(HERE, TASK)


def test_shipped_tables_name_their_device():
    for path in configs.FOLDER.glob("*.json"):
        table = json.loads(path.read_text())
        assert set(table["header"]) == set(configs.header(HERE))
        assert configs.Machine(table["header"]["device"], "", 0, 0).slug == path.stem


@pytest.mark.parametrize("group", [128, 64, 32, 100, 4096])
def test_a_step_of_k_leaves_little_empty(group):
    for m in (1, 8, 64, 1024):
        step = configs.default(HERE, replace(TASK, group=group, m=m)).block_k
        assert -(-group // step) * step <= group * 9 / 8


@pytest.mark.parametrize("kernel", ["gemv", "gemm", "integer"])
def test_the_tuner_has_something_to_choose_from(kernel):
    found = list(tune.candidates(replace(TASK, kernel=kernel, group=32)))
    assert len(found) == len(set(found)) > 50
    assert all(config.block_k == 32 for config in found) or kernel == "gemv"
    assert [task.m for task in tune.tasks(256, 256)] == [1, 2, 4, 8, 16, 32, 64]


def test_the_tuner_needs_a_gpu(device, tmp_path):
    if device.type == "cuda":
        assert tune.tune([configs.Task("gemm", 4, 64, False, "bfloat16", 512, 512, 2)], folder=tmp_path).is_file()
    else:
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            tune.tune([TASK])
