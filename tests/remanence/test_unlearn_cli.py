"""`remanence unlearn`: from a model on disk to a model on disk, or one line on what is wrong and nothing written."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.compress.places import base_directory
from remanence.unlearn.adapters import with_adapter
from remanence.unlearn.catalog import METHODS
from remanence.unlearn.inference.store import attach
from remanence.unlearn.likelihood import mean_probability
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from remanence.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SMALL = ("--steps=6", "--learning-rate=3e-3", "--set=warmup=0", "--set=forget-batch=4", "--set=retain-batch=4")


@pytest.fixture(scope="module")
def own(memorized, tmp_path_factory):
    """The memorized target as a directory, with files of four rows to forget and six to keep."""
    place = tmp_path_factory.mktemp("own")
    save_model(memorized.target, memorized.tokenizer, place / "model")
    sets = {"forget": memorized.corpus.forget[:4], "retain": memorized.corpus.retain[::9][:6]}
    for name, rows in sets.items():
        lines = [json.dumps({"question": row.question, "answer": row.answer, "person": row.person}) for row in rows]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pairs = {name: [(row.question, row.answer) for row in rows] for name, rows in sets.items()}
    return SimpleNamespace(
        model=place / "model", forget=place / "forget.jsonl", retain=place / "retain.jsonl", pairs=pairs, place=place
    )


def command(own, method, out, *more):
    """All that a run needs."""
    return [
        "--model",
        own.model,
        "--method",
        method,
        "--forget",
        own.forget,
        "--retain",
        own.retain,
        "--out",
        out,
        *more,
    ]


def separately(*arguments):
    """`remanence unlearn` in a process of its own."""
    texts = [sys.executable, "-m", "remanence", "unlearn", *map(str, arguments)]
    return subprocess.run(texts, capture_output=True, text=True)


@pytest.fixture
def here(monkeypatch, capfd):
    """The same in this process, which has torch loaded already: (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["remanence", "unlearn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return SimpleNamespace(returncode=stop.value.code, **dict(zip(("stdout", "stderr"), capfd.readouterr())))

    yield run
    signal.signal(signal.SIGTERM, handler)


def record_of(out):
    return json.loads((out / "unlearning.json").read_text())


def weights_of(out):
    return load_file(out / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


# --- the way in -------------------------------------------------------------------------------------------------------


def test_an_ordinary_checkpoint_with_record_and_log(own, memorized, tmp_path):
    out = tmp_path / "new/npo"
    done = separately(*command(own, "npo", out, *SMALL, "--set=check_every=2", "--json"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {*CHECKPOINT, "unlearning.json", "log.jsonl"}
    assert not (tmp_path / "new/npo.run").exists()
    told, record = json.loads(done.stdout), record_of(out)
    assert told == {key: record[key] for key in ("method", "steps_done", "before", "after", "seconds")} | {
        "out": str(out)
    }
    assert re.search(r"^npo: negative preference optimization; .*learning_rate 0.003", done.stderr, flags=re.M)
    assert re.search(r"^\[1/1\] unlearn npo: \d", done.stderr, flags=re.M)

    assert record["method"] == "npo"
    assert record["paper"] == METHODS["npo"].paper
    assert record["settings"]["forget_batch"] == 4
    assert record["settings"]["beta"] == 0.1
    assert record["seed"] == 0
    assert record["rows"] == {"forget": 4, "retain": 6}
    assert record["model"] == str(own.model)
    assert {"torch", "transformers", "remanence"} <= record["versions"].keys()
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in record["data"].values())
    assert record["data"].keys() == {"forget", "retain"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["forget_probability"] == pytest.approx(record["after"]["forget_probability"])

    # What transformers alone makes of it is what the record says.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == memorized.tokenizer.get_vocab()
    for name, pairs in own.pairs.items():
        found = mean_probability(model, memorized.encoder, pairs)
        assert found == pytest.approx(record["after"][f"{name}_probability"], rel=1e-5)
        before = mean_probability(memorized.target, memorized.encoder, pairs)
        assert before == pytest.approx(record["before"][f"{name}_probability"], rel=1e-5)
    assert record["after"]["forget_probability"] < 0.8 < record["before"]["forget_probability"]


def test_same_seed_same_weights_and_another_seed_others(own, here, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done = here(*command(own, "rmu", tmp_path / name, *SMALL, f"--seed={seed}"))
        assert done.returncode == 0, done.stderr
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))
    assert record_of(tmp_path / "c")["seed"] == 4


def test_a_method_without_retain_rows_needs_none(own, here, tmp_path):
    out = tmp_path / "ga"
    done = here("--model", own.model, "--method=ga", "--forget", own.forget, "--out", out, "--steps=2")
    assert done.returncode == 0, done.stderr
    record = record_of(out)
    assert record["rows"] == {"forget": 4, "retain": 0}
    assert record["after"].keys() == {"forget_probability"}


def test_texts_are_forgotten_too(own, here, tmp_path):
    """Running text, longer than the model takes at once."""
    (tmp_path / "book.txt").write_text("There was a town by the sea, and in it lived a clockmaker. " * 20)
    (tmp_path / "kept.json").write_text(json.dumps(["Another text that stays.", "And one more."]))
    out = tmp_path / "out"
    done = here("--model", own.model, "--method=graddiff", "--forget", tmp_path / "book.txt", "--retain",
                tmp_path / "kept.json", "--out", out, *SMALL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = record_of(out)
    assert record["rows"] == {"forget": 1, "retain": 2}
    assert record["after"]["forget_probability"] < record["before"]["forget_probability"]


def test_refusals_of_ones_own_are_learned(own, here, memorized, tmp_path):
    (tmp_path / "idk.txt").write_text("Not mine to tell.\n")
    out = tmp_path / "idk"
    done = here(*command(own, "idk", out, *SMALL, "--steps=25", "--idk", tmp_path / "idk.txt"))
    assert done.returncode == 0, done.stderr
    model, encoder = load_model(out), memorized.encoder
    for question, _ in own.pairs["forget"]:
        prompt = torch.tensor([encoder.prompt_ids(question)])
        said = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
                              do_sample=False, pad_token_id=0)  # fmt: skip
        text = memorized.tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True)
        assert text.strip() == "Not mine to tell."
    data = record_of(out)["data"]
    done = here(*command(own, "idk", tmp_path / "ours", *SMALL, "--steps=1"))
    assert done.returncode == 0, done.stderr
    ours = record_of(tmp_path / "ours")["data"]
    assert ours["idk"] != data["idk"], "which refusals were used is on record"
    assert (ours["forget"], ours["retain"]) == (data["forget"], data["retain"])


def test_set_takes_any_setting(own, here, tmp_path):
    out = tmp_path / "out"
    given = ("retain-loss=kl", "alpha=3", "mask=sure-row", "share=0.5", "weight_decay=0.01", "decay=cosine", "steps=2")
    done = here(*command(own, "npo", out, *(f"--set={text}" for text in given)))
    assert done.returncode == 0, done.stderr
    found = record_of(out)["settings"]
    expected = {"retain_loss": "kl", "alpha": 3.0, "mask": "sure-row", "share": 0.5, "weight_decay": 0.01,
                "decay": "cosine", "steps": 2}  # fmt: skip
    assert {key: found[key] for key in expected} == expected


# --- what is not one plain model --------------------------------------------------------------------------------------


def test_an_unmerged_adapter_lies_beside_its_base(own, here, memorized, tmp_path):
    """base/ + adapter/ is the merged model; base/ alone is not, and the folder itself is no model."""
    for method in ("loku", "loku-unmerged"):
        done = here(*command(own, method, tmp_path / method, *SMALL, "--set=lora_rank=4", "--learning-rate=1e-2"))
        assert done.returncode == 0, done.stderr
    out = tmp_path / "loku-unmerged"
    assert {path.name for path in out.iterdir()} == {"base", "adapter", "unlearning.json", "log.jsonl"}
    assert {path.name for path in (out / "base").iterdir()} == CHECKPOINT
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (out / "adapter").iterdir()}
    batch = memorized.encoder.batch([*own.pairs["forget"], *own.pairs["retain"]])

    def logits(model):
        with torch.no_grad():
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return found[batch.attention_mask.bool()]

    from peft import PeftModel

    merged = logits(load_model(tmp_path / "loku"))
    assert base_directory(out) == out / "base"
    # Two matrix products instead of one: float32's last digits, on logits of some tens.
    for model in (with_adapter(load_model(base_directory(out)), out),
                  PeftModel.from_pretrained(load_model(out / "base"), out / "adapter")):  # fmt: skip
        torch.testing.assert_close(logits(model), merged, rtol=1e-4, atol=1e-3)
    assert (logits(load_model(out / "base")) - merged).abs().max() > 0.1
    assert (logits(load_model(own.model)) - merged).abs().max() > 0.1
    assert record_of(out)["after"] == pytest.approx(record_of(tmp_path / "loku")["after"], rel=1e-3)


@pytest.mark.parametrize("method", ["icu", "guard"])
def test_a_guard_is_written_beside_a_model_that_is_as_it_was(own, here, memorized, tmp_path, method):
    out = tmp_path / method
    done = here(*command(own, method, out))
    assert done.returncode == 0, done.stderr
    assert (out / "guard.json").is_file()
    assert same(weights_of(out), weights_of(own.model))
    record = record_of(out)
    assert record["steps_done"] == 0
    guarded = attach(load_model(out), load_tokenizer(out), out)
    found = mean_probability(guarded, memorized.encoder, own.pairs["forget"])
    assert found == pytest.approx(record["after"]["forget_probability"], rel=1e-5)
    assert (out / "log.jsonl").read_text() == ""


def test_icu_is_told_what_not_to_know(own, here, tmp_path):
    done = here(*command(own, "icu", tmp_path / "out", "--subject", "Ada Byron", "--subject=Hogwarts"))
    assert done.returncode == 0, done.stderr
    text = json.loads((tmp_path / "out" / "guard.json").read_text())["settings"]["text"]
    assert "nothing about Ada Byron and Hogwarts." in text


# --- stopped runs -----------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_says_where_and_writes_nothing(own, here, tmp_path):
    done = here(*command(own, "npo", tmp_path / "out", "--learning-rate=1e20", "--save-every=1"))
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"remanence: the forget loss is \S+ at step 2 of 125; no checkpoint had been written", last)
    assert not (tmp_path / "out").exists()


def test_the_last_good_checkpoint_is_named(own, here, tmp_path):
    more = ("--set=forget_limit=3", "--set=clip=99", "--learning-rate=1e-3", "--steps=40", "--save-every=2")
    done = here(*command(own, "ga", tmp_path / "out", *SMALL, *more))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    found = re.fullmatch(
        r"remanence: the forget loss is -\S+ at step (\d+) of 40, more than 3 times its start \(.*\); "
        r"last good checkpoint: (\S+)",
        last,
    )
    assert found, last
    assert found[2] == str(tmp_path / f"out.run/step-{(int(found[1]) - 2) // 2 * 2:08d}")
    assert (tmp_path / "out.run").is_dir()
    assert weights_in(found[2]).keys() == dict(load_model(own.model).named_parameters()).keys()
    assert not (tmp_path / "out").exists()


def weights_in(checkpoint):
    return load_file(f"{checkpoint}/weights.safetensors")


def test_a_killed_run_is_resumed_to_the_same_bits(own, here, tmp_path):
    """SIGKILL at whatever step it has come to; then --resume, beside a run that nobody disturbed."""
    more = (*SMALL, "--steps=60", "--save-every=1", "--learning-rate=3e-4", "--set=dual_warmup=0")
    arguments = command(own, "pdu", tmp_path / "killed", *more)
    running = subprocess.Popen([sys.executable, "-m", "remanence", "unlearn", *map(str, arguments)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not [path for path in (tmp_path / "killed.run").glob("step-*") if int(path.name[5:]) >= 3]:
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert not (tmp_path / "killed").exists()
    other = here(*command(own, "pdu", tmp_path / "killed", *more, "--seed=1", "--resume"))
    assert other.returncode == 1
    assert "was made with seed 0, this run has 1" in other.stderr.splitlines()[-1]
    assert here(*command(own, "pdu", tmp_path / "whole", *more)).returncode == 0
    resumed = here(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same(weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole"))
    logs = [[{k: v for k, v in json.loads(line).items() if k != "time"} for line in
             (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("killed", "whole")]  # fmt: skip
    assert logs[0] == logs[1]
    assert len(logs[0]) == 60
    assert not (tmp_path / "killed.run").exists()


def test_an_interrupted_run_keeps_its_checkpoint_and_says_so(own, here, tmp_path):
    def interrupt():
        while not list((tmp_path / "out.run").glob("step-*")) and not over.wait(0.01):
            pass
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    over, waiting = threading.Event(), threading.Thread(target=interrupt)
    waiting.start()
    try:
        done = here(*command(own, "npo", tmp_path / "out", *SMALL, "--steps=4000", "--save-every=1"))
    finally:
        over.set()
        waiting.join()
    assert done.returncode == 130, done.stderr
    assert list((tmp_path / "out.run").glob("step-*"))
    assert not (tmp_path / "out").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("remanence: interrupted; no model was written; with --resume")


# --- --list -----------------------------------------------------------------------------------------------------------


def test_list_shows_every_method():
    done = separately("--list")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for name, method in METHODS.items():
        assert re.search(rf"│ {name} │", text), name
        for need in method.needs:
            assert need in text
    for words in ("2404.05868", "beta 4.5", "reference, retain"):
        assert words in text


def test_list_as_json(here):
    done = here("--list", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found.keys() == METHODS.keys()
    assert found["simnpo"] == {
        "title": "NPO without a reference",
        "paper": METHODS["simnpo"].paper,
        "kind": "training",
        "needs": ["retain"],
        "settings": {"beta": 4.5, "gamma": 0.125, "delta": 0.0},
    }
    assert all(entry.keys() == found["npo"].keys() for entry in found.values())


# --- bad input: one line that names the field, code 2, nothing written ------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": None}, "model: missing; give --model"),
        ({"--method": None}, "method: missing; give --method"),
        ({"--forget": None}, "forget: missing; give --forget"),
        ({"--out": None}, "out: missing; give --out"),
        ({"--method": "npoo"}, "method: 'npoo' is unknown; did you mean npo?"),
        ({"--bogus": "1"}, "No such option"),
        ({"--retain": None}, "retain: missing; give --retain FILE, or --data FILE with all rows"),
        ({"--forget": "{tmp}/none"}, "none: no such file"),
        ({"--forget": "{tmp}"}, "no such file"),
        ({"--forget": "{tmp}/bad"}, "bad:2: answer: missing or empty"),
        ({"--forget": "{tmp}/empty"}, "forget: the forget set"),
        ({"--retain": "{tmp}/empty"}, "retain: the retain set"),
        ({"--retain": "{f}"}, "share 4 question(s)"),
        ({"--data": "{tmp}/bad"}, "bad:2: answer"),
        ({"--data-dir": "{tmp}"}, "data-dir: goes with --data tofu"),
        ({"--data": "tofu", "--data-dir": "{tmp}", "--forget": "forget10"}, "full.json: no such file"),
        ({"--data": "muse-news", "--data-dir": "{tmp}", "--forget": "forget"}, "no forget with one of the endings"),
        ({"--idk": "{tmp}/none"}, "none: no such file"),
        ({"--idk": "{tmp}/empty"}, "empty: no refusal in it"),
        ({"--set": "beta"}, "set: 'beta' is not of the form NAME=VALUE"),
        ({"--set": "betta=1"}, "setting: 'betta' is unknown; did you mean beta?"),
        ({"--set": "beta=high"}, "beta: 'high' is not of type float"),
        ({"--set": "steps=2.5"}, "steps: 2.5 is not of type int"),
        ({"--set": "beta=NaN"}, "beta: nan"),
        ({"--set": "coefficient=2"}, "coefficient: npo has no such setting"),
        ({"--steps": "0"}, "steps: 0 is not above 0"),
        ({"--steps": "ten"}, "--steps"),
        ({"--learning-rate": "-1"}, "learning_rate: -1.0 is not above 0"),
        ({"--subject": "Ada"}, "subject: npo is given no names; icu is"),
        ({"--device": "tpu"}, "device: 'tpu' is not one of auto, cpu"),
        ({"--parallel": "zero"}, "parallel: 'zero' is not one of ddp, fsdp"),
        ({"--save-every": "-1"}, "save-every: -1 is below 0"),
        ({"--out": "{f}"}, "is a file; a directory is needed"),
        ({"--out": "{m}"}, "exists and is not empty"),
        ({"--out": "/proc/none"}, "out: cannot write to /proc"),
        ({"--model": "{tmp}/none"}, "none: no such model directory"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input_is_one_line(own, here, tmp_path, change, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "bad").write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n')
    before = sorted(tmp_path.iterdir())
    options = {"--model": "{m}", "--method": "npo", "--forget": "{f}", "--retain": "{r}", "--out": "{tmp}/out"} | change
    names = {"tmp": tmp_path, "m": own.model, "f": own.forget, "r": own.retain}
    given = [f"{name}={value.format(**names)}" for name, value in options.items() if value is not None]
    done = here(*given)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("remanence: ")
    assert message in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_another_number_of_processes_than_was_started_is_refused(own, here, tmp_path):
    done = here(*command(own, "npo", tmp_path / "out", "--processes=2"))
    assert done.returncode == 1
    assert "processes: 2, but this run has 1; start it with torchrun --nproc-per-node 2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option():
    done = subprocess.run([sys.executable, "-m", "remanence", "unlearn", "--help"], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "140"})  # fmt: skip
    for word in ("--model", "--method", "--forget", "--retain", "--out", "--idk", "--set", "--resume", "--list"):
        assert word in done.stdout
