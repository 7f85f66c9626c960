"""Two processes give the weights of one: DDP and FSDP2 over gloo, started by torchrun as a user would.

This file is also what torchrun runs: `test_distributed.py PARALLEL PRECISION DIRECTORY CASE...` unlearns by every
case in turn and leaves one state dict each.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.unlearn import methods
from remanence.unlearn.catalog import settings
from remanence.unlearn.data import read_rows
from remanence.unlearn.encode import Encoder
from remanence.unlearn.methods import Setup, unlearn
from remanence.unlearn.workers import Workers
from safetensors.torch import load_file, save_file

from remanence.forget import Order, forget_to

# Of every weight, in absolute terms.
TOLERANCE = 1e-5

# Five forget rows in batches of four, eleven retain rows in batches of five, two rows a pass: there are updates of one
# row, of which the second process gets none, and passes that have rows of one set only.
UNEVEN = {"forget_batch": 4, "retain_batch": 5, "micro_batch": 2}
BRISK = UNEVEN | {"steps": 6, "learning_rate": 1e-4, "warmup": 1}
# Where a gradient is nothing but rounding noise, Adam makes a full step of it. With KL that is so at the start, in the
# embeddings that no forget row uses; with SAM in a few weights out of 100,000. These two run as they are shipped, and
# in double precision without reserve.
SHIPPED = UNEVEN | {"steps": 12}
# The demo model is 64 wide.
GRID = {"against": "rtn-w4a16-g32-plain"}

SINGLE = {
    "npo": ("npo", BRISK),
    "npo-kl": ("npo", SHIPPED | {"retain_loss": "kl"}),
    "rmu": ("rmu", BRISK),
    "sam": ("sam", SHIPPED),
}
DOUBLE = {
    "npo": ("npo", BRISK),
    "npo-kl": ("npo", BRISK | {"retain_loss": "kl"}),
    "rmu": ("rmu", BRISK),
    "sam": ("sam", BRISK),
    "dpo": ("dpo", BRISK),
    "kto": ("kto", BRISK),
    "undial": ("undial", BRISK),
    "ceu": ("ceu", BRISK),
    "pdu": ("pdu", BRISK | {"dual_warmup": 0}),
    "flat-tv": ("flat-tv", BRISK),
    "jensun": ("jensun", BRISK),
}
# Not QUAIL: its hinge has a kink exactly at the start, and rounding decides to which side each logit goes.
WHOLE_WEIGHTS = {
    "wagle": ("wagle", BRISK),
    "sure": ("sure", BRISK),
    "loku": ("loku", BRISK),
    "saf": ("saf", BRISK | GRID),
    "floor": ("floor", BRISK | GRID),
    "bucketed": ("bucketed", BRISK | GRID | {"learning_rate": 0.04}),
    "task-vector": ("task-vector", BRISK),
}


def run_cases(parallel, precision, directory, names):
    """Unlearn by each case in this world; the first process writes what came of it."""
    cases = SINGLE if precision == "single" else DOUBLE | WHOLE_WEIGHTS
    workers = Workers(parallel)
    encoder = Encoder(load_tokenizer(directory / "target"), 128)
    rows = [tuple(read_rows(directory / f"{name}.jsonl")) for name in ("forget", "retain")]
    with training_in(torch.float32 if precision == "single" else torch.float64):
        for name in names:
            method, asked = cases[name]
            model = load_model(directory / "target")
            done = unlearn(model, encoder, *rows, method, settings(method, **asked), setup=Setup(workers))
            if workers.first:
                state = {key: tensor.detach().clone() for key, tensor in done.model.state_dict().items()}
                save_file(state, directory / f"{precision}-{parallel}-{workers.world}-{name}.safetensors")
    workers.close()


@contextmanager
def training_in(dtype):
    """Weights and products in `dtype`, which no setting can make double."""
    before = methods._Job._precision
    methods._Job._precision = lambda job: job.model.to(dtype) and None
    try:
        yield
    finally:
        methods._Job._precision = before


if __name__ == "__main__":
    run_cases(*sys.argv[1:3], Path(sys.argv[3]), sys.argv[4:])


@pytest.fixture(scope="module")
def place(memorized, tmp_path_factory, one_thread):  # noqa: ARG001 (one thread, as torchrun's processes)
    """A folder with the target, forget rows and retain rows."""
    directory = tmp_path_factory.mktemp("distributed")
    save_model(memorized.target, memorized.tokenizer, directory / "target")
    for name, rows in (("forget", memorized.corpus.forget[:5]), ("retain", memorized.corpus.retain[:11])):
        lines = [json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


def torchrun(*arguments, processes=2, seconds=120):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=seconds, env=environment
    )


def order(place, **given):
    data = {
        "model": str(place / "target"),
        "forget": str(place / "forget.jsonl"),
        "retain": str(place / "retain.jsonl"),
    }
    return Order(**data, device="cpu", **given)


def line(place, out, *more):
    """`remanence unlearn` with NPO, for torchrun."""
    given = ["--model", place / "target", "--method", "npo", "--forget", place / "forget.jsonl"]
    given += ["--retain", place / "retain.jsonl", "--out", out, "--device", "cpu", "--json"]
    for key, value in BRISK.items():
        given += ["--set", f"{key}={value}"]
    return ["-m", "remanence", "unlearn", *given, *more]


def difference(one, other):
    """Largest absolute difference between two state dicts of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.fixture(scope="module")
def alone(place):
    """The directory that `remanence unlearn` writes with one process."""
    forget_to(order(place, method="npo", asked=BRISK, save_every=2), place / "alone", lambda _: None)
    return place / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_through_the_command_line(place, alone, parallel):
    out = place / f"two-{parallel}"
    ran = torchrun(*line(place, out, "--parallel", parallel, "--processes", "2", "--save-every", "2"))
    assert ran.returncode == 0, ran.stderr
    one, two = (load_file(path / "model.safetensors") for path in (alone, out))
    assert difference(one, two) < TOLERANCE
    assert difference(one, load_file(place / "target" / "model.safetensors")) > 10 * TOLERANCE
    assert (out / "config.json").read_text() == (alone / "config.json").read_text()
    assert (out / "generation_config.json").read_text() == (alone / "generation_config.json").read_text()
    logs = [[json.loads(text) for text in (path / "log.jsonl").read_text().splitlines()] for path in (alone, out)]
    assert [record["step"] for record in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert all(record["gradient_norm"] > 1 for record in logs[0])  # so clipping is part of what is compared
    for mine, theirs in zip(*logs, strict=True):
        for key in ("forget", "retain", "loss", "gradient_norm"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key
    told, record = json.loads(ran.stdout), json.loads((out / "unlearning.json").read_text())
    assert told["steps_done"] == 6
    assert (record["processes"], record["parallel"]) == (2, parallel)
    for moment in ("before", "after"):
        assert record[moment] == pytest.approx(json.loads((alone / "unlearning.json").read_text())[moment], rel=1e-4)
    assert not (place / f"two-{parallel}.run").exists()


def compared(place, parallel, precision, names):
    """Differences between one and two processes, and how far weights moved, by case."""
    if not (place / f"{precision}-ddp-1-{names[-1]}.safetensors").exists():
        run_cases("ddp", precision, place, names)
    ran = torchrun(Path(__file__), parallel, precision, place, *names, seconds=400)
    assert ran.returncode == 0, ran.stderr
    start = load_file(place / "target" / "model.safetensors")
    differences, moved = {}, {}
    for name in names:
        one = load_file(place / f"{precision}-ddp-1-{name}.safetensors")
        two = load_file(place / f"{precision}-{parallel}-2-{name}.safetensors")
        differences[name], moved[name] = difference(one, two), difference(one, start)
    print(parallel, precision, {name: f"{differences[name]:.1e} of {moved[name]:.1e}" for name in names})
    return differences, moved


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_in_single_precision(place, parallel):
    differences, moved = compared(place, parallel, "single", list(SINGLE))
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}
    assert {name: value for name, value in moved.items() if not value > 4 * TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "names"), [("ddp", list(DOUBLE | WHOLE_WEIGHTS)), ("fsdp", list(DOUBLE))])
def test_two_processes_by_every_method_in_double_precision(place, parallel, names):
    """Without rounding noise there is no difference left, but for the last bit of what is then stored as float32."""
    differences, moved = compared(place, parallel, "double", names)
    assert {name: value for name, value in differences.items() if not value < 2e-7} == {}
    assert {name: value for name, value in moved.items() if not value > 1e-4} == {}


@pytest.mark.slow
def test_fewer_processes_than_said(place):
    ran = torchrun(*line(place, place / "three", "--processes", "3"))
    assert ran.returncode == 1
    assert "remanence: processes: 3, but this run has 2; start it with torchrun --nproc-per-node 3" in ran.stderr
    assert not (place / "three").exists()


def test_fewer_processes_than_said_without_torchrun(place):
    with pytest.raises(RuntimeError, match="processes: 2, but this run has 1; start it with torchrun"):
        forget_to(order(place, method="npo", processes=2), place / "none", lambda _: None)


@pytest.mark.parametrize("method", ["rocr", "uld"])
def test_several_processes_are_for_training(place, method):
    with pytest.raises(ValueError, match="parallel: several processes are for methods that train"):
        forget_to(order(place, method=method, parallel="fsdp"), place / "none", lambda _: None)


def test_fsdp_needs_processes(place):
    with pytest.raises(RuntimeError, match="parallel: fsdp splits a model over processes; start them with torchrun"):
        forget_to(order(place, method="npo", parallel="fsdp"), place / "none", lambda _: None)


@pytest.mark.parametrize(
    ("method", "asked", "what"),
    [
        ("loku", {}, "lora_rank"),
        ("wagle", {}, "mask"),
        ("saf", GRID, "through"),
        ("floor", GRID, "floor"),
        ("bucketed", GRID, "bucketed"),
        ("quail", GRID, "quail"),
        ("task-vector", {}, "task-vector"),
    ],
)
def test_fsdp_refuses_what_needs_whole_weights(place, method, asked, what):
    with pytest.raises(ValueError, match=f"parallel: fsdp splits weights that {what} needs whole; use ddp"):
        forget_to(order(place, method=method, asked=asked, parallel="fsdp"), place / "none", lambda _: None)


def test_world_size_without_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but no launcher started this process"):
        Workers()


def test_unknown_parallel():
    with pytest.raises(ValueError, match="parallel: 'fsdp2' is not one of ddp, fsdp"):
        Workers("fsdp2")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")
def test_auto_without_an_accelerator_is_the_cpu():
    assert Workers(device="auto").device.type == "cpu"
