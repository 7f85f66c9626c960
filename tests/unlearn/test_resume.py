"""A run that is killed (SIGKILL, at any moment, again and again) ends with the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from remanence.compress.checkpoint import save_model
from remanence.unlearn.keeper import Keeper, Saving
from remanence.unlearn.workers import Workers
from transformers import AutoModelForCausalLM, GPT2Config

from remanence.forget import Order, forget_to

STEPS = 30
EVERY = 6
BATCHES = {"forget_batch": 3, "retain_batch": 8, "warmup": 2}
CASES = {
    "npo": ("llama", "npo", {"learning_rate": 3e-4, "micro_batch": 2}),
    "dropout": ("gpt2", "npo", {"learning_rate": 3e-4}),
    "loku": ("llama", "loku", {"learning_rate": 1e-3, "lora_rank": 4}),
    "pdu": ("llama", "pdu", {"learning_rate": 3e-4, "dual_warmup": 0}),  # with a dual variable beside the weights
}


@pytest.fixture(scope="module")
def place(memorized, tmp_path_factory, one_thread):  # noqa: ARG001 (one thread, as the processes that are killed)
    """A folder with two targets and their rows. GPT-2 has dropout, the Llama knows the rows by heart."""
    directory = tmp_path_factory.mktemp("resume")
    save_model(memorized.target, memorized.tokenizer, directory / "llama")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(memorized.tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.2
    )
    config.bos_token_id = config.eos_token_id = memorized.tokenizer.eos_token_id
    save_model(AutoModelForCausalLM.from_config(config), memorized.tokenizer, directory / "gpt2")
    for name, rows in (("forget", memorized.corpus.forget), ("retain", memorized.corpus.retain)):
        lines = [json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


def order(place, case, **given):
    model, method, asked = CASES[case]
    files = {name: str(place / f"{name}.jsonl") for name in ("forget", "retain")}
    asked = {**BATCHES, "steps": STEPS, **asked}
    return Order(str(place / model), method, **files, **{"asked": asked, "device": "cpu", "save_every": EVERY} | given)


@pytest.fixture(scope="module")
def uninterrupted(place):
    """uninterrupted(case) -> the directory of a run that nobody killed, without a checkpoint on its way."""

    def run(case):
        out = place / f"{case}-uninterrupted"
        if not out.exists():
            forget_to(order(place, case, save_every=0), out, lambda _: None)
        return out

    return run


def start(place, case, out, *launcher, resume=True, more=()):
    """`remanence unlearn` in a process group of its own."""
    model, method, asked = CASES[case]
    given = ["--model", place / model, "--method", method, "--out", out, "--device", "cpu", "--steps", STEPS]
    given += ["--forget", place / "forget.jsonl", "--retain", place / "retain.jsonl", "--save-every", EVERY]
    for key, value in (BATCHES | asked).items():
        given += ["--set", f"{key}={value}"]
    command = [sys.executable, *launcher, "-m", "remanence", "unlearn", *given, *["--resume"] * resume, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )


def lines(out):
    """Complete lines of the log of the run that writes to `out`."""
    log = out.with_name(f"{out.name}.run") / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def checkpoints(out):
    return sorted(int(path.name[5:]) for path in out.with_name(f"{out.name}.run").glob("step-*"))


def kill(process, out, least, moment):
    """SIGKILL to the whole group, `moment` seconds after update number `least` was logged."""
    began = time.monotonic()
    while lines(out) < least:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < 120, f"{lines(out)} updates in two minutes, {least} were to come"
        time.sleep(0.002)
    time.sleep(moment)
    assert process.poll() is None, "the run was over before it could be killed; the test's runs are too short"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def equal_runs(out, whole):
    """The same bytes of weights, and the same log but for the time of day."""
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (out, whole)]
    for log in logs:
        assert [record["step"] for record in log] == list(range(1, STEPS + 1))
        for record in log:
            del record["time"]
    assert logs[0] == logs[1]
    record = json.loads((out / "unlearning.json").read_text())
    assert record["steps_done"] == STEPS
    assert not out.with_name(f"{out.name}.run").exists()
    assert not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.slow
def test_killed_once(place, uninterrupted):
    out = place / "once"
    process = start(place, "npo", out, resume=False)
    kill(process, out, EVERY + 1, random.Random(0).uniform(0, 0.1))
    assert checkpoints(out)
    assert not out.exists()
    finish(start(place, "npo", out))
    equal_runs(out, uninterrupted("npo"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(place, uninterrupted, case):
    """Once before there is a checkpoint, then three times at a random update and moment."""
    chance, out = random.Random(case), place / f"{case}-again"
    kill(start(place, case, out, resume=False), out, 2, 0)
    assert checkpoints(out) == []
    seen = []
    for first, last in ((EVERY + 1, 12), (13, 18), (19, 23)):
        kill(start(place, case, out), out, chance.randint(first, last), chance.uniform(0, 0.1))
        seen += checkpoints(out)
    assert seen[0] < seen[1] <= seen[2], seen
    finish(start(place, case, out))
    equal_runs(out, uninterrupted(case))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_killed(place, parallel):
    """Checkpoints are whole, whatever the split: both killed, both resumed, the same bytes as never killed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--parallel", parallel, "--processes", "2"]
    whole, out = place / f"{parallel}-uninterrupted", place / f"{parallel}-killed"
    finish(start(place, "npo", whole, *launcher, resume=False, more=more))
    kill(start(place, "npo", out, *launcher, resume=False, more=more), out, EVERY + 3, 0.05)
    assert checkpoints(out)
    finish(start(place, "npo", out, *launcher, more=more))
    equal_runs(out, whole)


def test_resume_without_a_run_begins_one(place, uninterrupted):
    out = place / "nothing-to-resume"
    forget_to(order(place, "npo", resume=True), out, lambda _: None)
    equal_runs(out, uninterrupted("npo"))


@pytest.mark.parametrize(
    ("given", "what"),
    [({"asked": {**BATCHES, "steps": 9, "learning_rate": 1e-4}}, "settings"), ({"seed": 1}, "seed")],
)
def test_another_run_is_not_resumed(place, tmp_path, given, what):
    out, asked = tmp_path / "other", {**BATCHES, "steps": 9, "learning_rate": 3e-4}
    workers = Workers()
    stopped = Stop("after update 8")

    def say(_):
        pass

    with pytest.MonkeyPatch.context() as patch:
        logged = Keeper.log
        patch.setattr(Keeper, "log", lambda self, step, record: logged(self, step, record) or stopped.at(step, 8))
        with pytest.raises(Stop):
            forget_to(order(place, "npo", asked=asked), out, say)
    assert checkpoints(out) == [EVERY]
    with pytest.raises(ValueError, match=f"resume: .*step-00000006 was made with {what} .*, this run has"):
        forget_to(order(place, "npo", **{"asked": asked} | given, resume=True), out, say)
    assert checkpoints(out) == [EVERY]
    # Without --resume it is a new run, and what was there goes.
    Keeper(Saving(out.with_name("other.run"), EVERY, {}), workers)
    assert checkpoints(out) == []
    assert lines(out) == 0


class Stop(BaseException):
    """The machine is switched off."""

    def at(self, step, when):
        if step == when:
            raise self
