"""The whole line, through the command line, on small but real models: trained, unlearned, compressed, reloaded."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.encode import Encoder
from remanence.unlearn.feed import Feed
from remanence.unlearn.layers import forward
from remanence.unlearn.losses import nll
from remanence.unlearn.people import people_corpus
from remanence.unlearn.train import Objective, Schedule, Term, fit
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from remanence.report import show_evaluation

SMALL = ["--people", "10", "--methods", "npo", "--recipes", "rtn-w8a16-plain,rtn-w4a16-g64-plain"]


def remanence(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "remanence", *map(str, arguments)], capture_output=True, text=True, **more
    )


def without_times(value):
    """The document but for what the clock measured."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "times"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def one_line(done, code):
    """The command failed with `code` and said so in one line on stderr; returns it."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("loading", "device: "))]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("remanence: ")
    return lines[0]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """One small audit of the demo model: output directory, the finished command, its store."""
    place = tmp_path_factory.mktemp("audit")
    done = remanence("audit", *SMALL, "--cache", place / "cache", "--out", place / "out", "--json")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=place / "out", done=done, cache=place / "cache")


@pytest.fixture(scope="module")
def cache(audited):
    return audited.cache


@pytest.fixture(scope="module")
def document(audited):
    return json.loads((audited.out / "audit.json").read_text())


def verdicts(document):
    return {(cell["method"], cell["recipe"]): cell["verdict"] for cell in document["cells"]}


def test_controls_come_out_as_they_must(document):
    found = verdicts(document)
    assert found["bucketed", "rtn-w4a16-g64-plain"] == "returned"
    assert found["bucketed", "rtn-w8a16-plain"] == "held"
    assert found["bucketed", "dense"] == "held"
    assert {found["target", recipe] for recipe in ("dense", "rtn-w8a16-plain", "rtn-w4a16-g64-plain")} == {"undecided"}
    assert {found["oracle", recipe] for recipe in ("dense", "rtn-w8a16-plain", "rtn-w4a16-g64-plain")} == {"held"}
    assert all(control["ok"] for control in document["controls"].values())
    assert set(document["controls"]) == {"baseline", "negative", "positive"}


def test_the_document_has_what_readers_rely_on(audited, document):
    assert document["schema"] == "remanence.audit/2"
    assert json.loads(audited.done.stdout) == document
    assert {"torch", "transformers", "cpu", "kernel_isa"} <= set(document["environment"])
    assert len(document["cells"]) == 12
    for cell in document["cells"]:
        share = cell["recovered_share"]
        assert share["low"] <= share["value"] <= share["high"]
        assert 0 <= cell["forget"] <= 1
        assert 0 <= cell["retain"] <= 1
        assert cell["size_bytes"] > 0
        assert cell["peak_memory_bytes"] > 0
        assert cell["times"]["decode_tokens_per_s"] > 0
    assert min(document["train_probability"].values()) >= 0.95


def test_the_target_answers_word_for_word_and_the_unlearned_model_does_not(document):
    dense = {cell["method"]: cell for cell in document["cells"] if cell["recipe"] == "dense"}
    assert dense["target"]["forget_verbatim"] >= 0.9
    assert dense["npo"]["forget_verbatim"] <= 0.1
    assert dense["npo"]["retain"] >= 0.75 * dense["target"]["retain"]


def test_rounding_undoes_the_bucketed_update_and_nothing_else(document):
    survival = {(c["method"], c["recipe"]): c["update_survival"] for c in document["cells"]}
    own = survival["bucketed", "rtn-w4a16-g64-plain"]
    assert (own["changed_codes"], own["changed"], own["norm"], own["survival"]) == (0.0, 0.0, 0.0, 0.0)
    assert own["predicted_codes"] > 0.1, "updates that keep clear of the buckets' edges"
    assert survival["bucketed", "rtn-w8a16-plain"]["changed_codes"] > 0.5
    assert survival["npo", "rtn-w4a16-g64-plain"]["survival"] > 0.5
    assert (survival["target", "dense"]["changed"], survival["target", "dense"]["norm"]) == (0.0, None)


def test_the_page_is_self_contained(audited):
    page = (audited.out / "report.html").read_text()
    assert "returned" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


@pytest.mark.slow
def test_a_second_run_takes_everything_from_the_store_and_says_the_same(document, cache, tmp_path):
    done = remanence("audit", *SMALL, "--cache", cache, "--out", tmp_path)
    assert done.returncode == 0
    stages = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(stages) == 16
    assert all(line.endswith("cached") for line in stages)
    assert without_times(json.loads((tmp_path / "audit.json").read_text())) == without_times(document)
    assert "bucketed" in done.stdout
    assert "held" in done.stdout


@pytest.mark.slow
def test_same_seed_same_document_from_nothing(document, tmp_path):
    done = remanence("audit", *SMALL, "--cache", tmp_path / "cache", "--out", tmp_path / "out")
    assert done.returncode == 0
    again = json.loads((tmp_path / "out/audit.json").read_text())
    assert without_times(again) == without_times(document)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        pytest.param(["--fail-on", "returned,unforgotten"], 0, marks=pytest.mark.slow),  # only controls are
        (["--fail-on", "held"], 3),
        pytest.param(["--fail-on", "returned", "--methods", "npo,bucketed"], 3, marks=pytest.mark.slow),
    ],
    ids=["controls-do-not-count", "held", "bucketed-asked-for"],
)
def test_fail_on(cache, tmp_path, more, code):
    assert remanence("audit", *SMALL, *more, "--cache", cache, "--out", tmp_path).returncode == code


def demo_models(cache):
    """Directories of the trained target and oracle in a store."""
    models = {}
    for manifest in cache.glob("*/*/manifest.json"):
        stage = json.loads(manifest.read_text())
        if stage["stage"] == "demo":
            models["target" if stage["inputs"]["with_forget"] else "oracle"] = manifest.parent
    return models


@pytest.mark.slow
def test_evaluate(cache, document, tmp_path):
    """One model by itself has the figures that the audit has for it, and those that take longer."""
    models = demo_models(cache)
    (tmp_path / "text.txt").write_text("a text of some words, about nobody. " * 30)
    done = remanence(
        *("evaluate", models["target"], "--data", "people", "--people", 10, "--oracle", models["oracle"]),
        *("--target", models["target"], "--pressures", "forms,early-exit", "--perplexity", tmp_path / "text.txt"),
        *("--out", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out/evaluation.json").read_text())
    shown = io.StringIO()
    show_evaluation(found, shown)
    assert "model utility geometric" in shown.getvalue()
    assert found["schema"] == "remanence.evaluation/1"
    audited = next(c for c in document["cells"] if (c["method"], c["recipe"]) == ("target", "dense"))
    for name in ("forget", "truth_ratio", "model_utility", "forget_quality", "privacy", "memorisation", "distance"):
        assert found["model"][name] == audited[name], name
    assert found["model"]["membership"]["gradient_norm"]["value"] > 0.9
    assert found["oracle"]["membership"]["reference"]["value"] == 0.5
    assert (
        found["model"]["knowledge"]["perplexity_change"] == found["model"]["knowledge"]["knowledge_loss"]["value"] == 0
    )
    assert found["model"]["probes"]["normalised"]["value"] > found["model"]["probes"]["chance"]
    exits = found["model"]["pressures"]["early-exit"][0]
    assert list(exits["variants"])[-1] == "layer 4"
    assert exits["variants"]["layer 4"]["mean"] == pytest.approx(exits["before"], rel=1e-4)
    items = json.loads((tmp_path / "out/items.json").read_text())
    assert len(items["model"]["sets"]["forget"]["probability"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["scalability", "sustainability"])
def test_axes(tmp_path, axis):
    """Two people of ten, forgotten together or one after the other."""
    done = remanence(
        *("audit", "--people", 10, "--forget", "forget20", "--methods", "npo", "--recipes", "rtn-w4a16-g64-plain"),
        *(f"--{axis}", 2, "--pressures", "forms", "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out/axis.json").read_text())
    assert (found["schema"], found["axis"]) == ("remanence.axis/1", axis)
    assert [(run["requests"], run["forget_rows"]) for run in found["runs"]] == [(1, 5), (2, 10)]
    for number, run in enumerate(found["runs"], 1):
        document = json.loads((tmp_path / f"out/request-{number}/audit.json").read_text())
        assert len(document["cells"]) == len(run["cells"]) == 8
        assert all(control["ok"] for control in document["controls"].values())
        npo = next(c for c in document["cells"] if (c["method"], c["recipe"]) == ("npo", "dense"))
        assert npo["forget"] < 0.2
        assert npo["retain"] > 0.75
        assert npo["pressures"]["forms"]
    stages = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/*/manifest.json")]
    runs = [stage["inputs"] for stage in stages if stage["stage"] == "unlearn" and stage["inputs"]["method"] == "npo"]
    assert len(runs) == 2
    assert len([stage for stage in stages if stage["stage"] == "demo"]) == 2, "one target and one oracle for all runs"
    starts = {inputs["target"] for inputs in runs}
    assert len(starts) == (2 if axis == "sustainability" else 1)


@pytest.mark.slow
def test_target_and_oracle_as_models_already_unlearned(cache, tmp_path):
    """Given by path, as a user would: the audit must not take a target for unlearned."""
    models = demo_models(cache)
    given = [f"--unlearned=notouch={models['target']}", f"--unlearned=retrained={models['oracle']}"]
    done = remanence("audit", *SMALL[:2], *given, "--recipes=rtn-w4a16-g64-plain", "--cache", cache, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "audit.json").read_text())
    found = verdicts(document)
    assert {found["notouch", recipe] for recipe in ("dense", "rtn-w4a16-g64-plain")} == {"undecided"}
    assert {c["recipe"]: c["unforgotten"] for c in document["cells"] if c["method"] == "notouch"}["dense"]
    again = remanence(
        *("audit", *SMALL[:2], *given, "--recipes=rtn-w4a16-g64-plain", "--cache", cache, "--out", tmp_path),
        *("--fail-on", "returned,unforgotten"),
    )
    assert again.returncode == 3, again.stderr
    assert {found["retrained", recipe] for recipe in ("dense", "rtn-w4a16-g64-plain")} == {"held"}


@pytest.mark.slow
def test_pruning_first(cache, tmp_path):
    """What is unlearned after pruning starts from the pruned target and keeps its zeros; the target is the same."""
    plain, first = "wanda-s50", "wanda-s50+order=prune-unlearn"
    rounded = "rtn-w4a16-g64+p_sparsity=0.5+p_method=wanda+p_order=prune-unlearn"
    done = remanence("audit", *SMALL[:4], f"--recipes={plain},{rounded}", "--cache", cache, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stderr.splitlines() if re.match(r"\[\d+/\d+\]", line)]
    assert re.match(r"\[(\d+)/\1\]", shown[-1]), "as many stages as were planned"
    cells = {(c["method"], c["recipe"]): c for c in json.loads((tmp_path / "audit.json").read_text())["cells"]}
    # The pruning by itself is what rounding is held against: nothing of an update is lost there, nothing comes back.
    assert cells["npo", first]["update_survival"]["survival"] == pytest.approx(1)
    assert cells["npo", first]["recovered_share"]["value"] == 0
    assert 0 < cells["npo", rounded]["update_survival"]["moved"] < 0.6
    for model in ("target", "oracle"):
        assert cells[model, plain]["forget"] == cells[model, first]["forget"]
    assert cells["npo", plain]["forget"] != cells["npo", first]["forget"]
    stages = [(path.parent, json.loads(path.read_text())) for path in cache.glob("*/*/manifest.json")]
    pruned = {path.name: path for path, stage in stages if stage["stage"] == "prune"}
    assert len(pruned) == 2, "target and oracle"
    unlearned = [(path, stage["inputs"]) for path, stage in stages if stage["stage"] == "unlearn"]
    kept = {inputs["method"]: path for path, inputs in unlearned if inputs["target"] in pruned}
    assert kept.keys() == {"npo", "bucketed"}
    (begun,) = {inputs["target"] for _, inputs in unlearned} & pruned.keys()
    start, npo = (load_file(path / "model.safetensors") for path in (pruned[begun], kept["npo"]))
    layers = [name for name in start if name.endswith("_proj.weight")]
    assert all(torch.equal(start[name] == 0, npo[name] == 0) for name in layers)
    assert all((start[name] == 0).sum() == start[name].numel() // 2 for name in layers)
    assert any((start[name] != npo[name]).any() for name in layers)


def test_a_recipe_that_a_model_cannot_take_is_a_failed_cell(cache, tmp_path):
    """192 input features do not divide into groups of 80."""
    done = remanence("audit", *SMALL[:4], "--recipes=rtn-w4a16-g80-plain", "--cache", cache, "--out", tmp_path)
    assert done.returncode == 4, done.stderr
    cells = json.loads((tmp_path / "audit.json").read_text())["cells"]
    failed = [cell for cell in cells if "error" in cell]
    assert {cell["recipe"] for cell in failed} == {"rtn-w4a16-g80-plain"}
    assert all("192 input features do not divide into groups of 80" in cell["error"] for cell in failed)
    assert "failed" in done.stdout


@pytest.mark.parametrize(
    "signal_number",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL],
    ids=lambda s: s.name,
)
def test_an_interrupted_audit_goes_on_where_it_stood(cache, tmp_path, signal_number):
    """Stopped while it unlearns: what was finished stays, nothing half-done is left, the same command ends."""
    store, out = tmp_path / "store", tmp_path / "out"
    shutil.copytree(cache, store)
    for manifest in store.glob("*/*/manifest.json"):
        stage = json.loads(manifest.read_text())
        if stage["stage"] == "unlearn" and stage["inputs"]["method"] == "npo":
            shutil.rmtree(manifest.parent)
    command = [
        sys.executable,
        "-m",
        "remanence",
        "audit",
        *SMALL[:4],
        "--recipes=dense",
        "--cache",
        store,
        "--out",
        out,
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(store.glob("*/.*.tmp-*")):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal_number)
    _, errors = running.communicate(timeout=60)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[signal_number]
    assert running.returncode == expected, errors
    if signal_number == signal.SIGINT:
        assert errors.splitlines()[-1].startswith("remanence: interrupted; finished stages are kept")
    if signal_number != signal.SIGKILL:
        assert not list(store.glob("*/.*.tmp-*"))
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stderr.splitlines() if line.startswith("[") and not line.endswith("cached")]
    assert len(made) == 1
    assert "unlearn npo" in made[0]
    assert not list(store.glob("*/.*.tmp-*"))


# --- a user's own model and files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny GPT-2 that knows 24 rows by heart, saved by transformers, and its files."""
    place = tmp_path_factory.mktemp("own")
    corpus = people_corpus(6, "forget20", seed=3)
    rows = {"forget": corpus.forget, "retain": corpus.retain[:20]}
    tokenizer = demo_tokenizer(corpus, DemoConfig(vocab_size=512))
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_embd=128, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(shape)
    pairs = [(row.question, row.answer) for group in rows.values() for row in group]
    feed = Feed(Encoder(tokenizer, 128), {"all": pairs}, {"all": len(pairs)}, seed=0)
    term = Term("train", lambda given: nll(forward(model, given["all"]), given["all"].labels), "all", "tokens")
    fit(model, Objective([term]), feed, Schedule(150, 3e-3, warmup=10))
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name, group in rows.items():
        lines = [json.dumps({"question": row.question, "answer": row.answer}) for row in group]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (place / "all.jsonl").write_text((place / "forget.jsonl").read_text() + (place / "retain.jsonl").read_text())
    return place


def files(own, *names):
    return [text for name in names for text in (f"--{name}", own / f"{'all' if name == 'data' else name}.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("forget", "retain"), ("forget", "data")], ids="+".join)
def test_a_gpt2_with_files_of_its_own(own, tmp_path, names):
    settings = ["--methods=npo", "--learning-rate=1e-3", "--steps=25", "--recipes=rtn-w8a16-plain,rtn-w4a16-g64-plain"]
    done = remanence(
        "audit",
        "--model",
        own / "model",
        *files(own, *names),
        *settings,
        "--cache",
        tmp_path / "c",
        "--out",
        tmp_path / "o",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "o/audit.json").read_text())
    found = verdicts(document)
    assert found["target", "dense"] == "undecided"
    assert found["npo", "dense"] == "held"
    assert found["bucketed", "rtn-w4a16-g64-plain"] == "returned"
    assert found["bucketed", "rtn-w8a16-plain"] == "held"
    assert "negative" not in document["controls"]
    cell = document["cells"][0]
    assert cell["forget_quality"] is None
    assert cell["known_share"] is None
    assert cell["truth_ratio"] is None


@pytest.mark.slow
def test_unlearn_then_compress_from_the_command_line(own, tmp_path):
    done = remanence("unlearn", "--model", own / "model", "--method=npo", *files(own, "forget", "retain"),
                     "--learning-rate=1e-3", "--steps=25", "--out", tmp_path / "npo", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps_done"] == 25
    assert told["before"]["forget_probability"] > 0.9 > 0.2 > told["after"]["forget_probability"]
    assert json.loads((tmp_path / "npo/unlearning.json").read_text())["rows"] == {"forget": 5, "retain": 20}
    done = remanence("compress", tmp_path / "npo", "--recipe=rtn-w4-g64-plain", "--out", tmp_path / "w4", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["recipe"] == "rtn-w4a16-g64-plain"
    assert result["max_abs_logit_difference"] == 0
    shards = list((tmp_path / "w4").glob("remanence-*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) == result["size_bytes"]
    again = remanence("compress", tmp_path / "npo", "--recipe=rtn-w4-g64-plain", "--out", tmp_path / "w4")
    assert "not empty" in one_line(again, 2)


def test_report_shows_an_audit_again(audited, tmp_path):
    out = audited.out
    done = remanence("report", out, "--html", tmp_path / "page.html")
    assert done.returncode == 0
    assert "bucketed" in done.stdout
    assert (tmp_path / "page.html").read_text() == (out / "report.html").read_text()
    rows = remanence("report", out, "--markdown").stdout.splitlines()
    assert len(rows) == 14
    assert {row.count("|") for row in rows} == {10}
    assert any("bucketed" in row and "rtn-w4a16-g64-plain" in row and row.endswith("returned |") for row in rows)
    (tmp_path / "old.json").write_text('{"schema": "remanence.audit/0"}')
    (tmp_path / "cut.json").write_text('{"schema": "remanence.audit/2"}')
    assert "is incomplete" in one_line(remanence("report", tmp_path / "cut.json"), 1)
    assert "'remanence.audit/0' is not 'remanence.audit/2'" in one_line(remanence("report", tmp_path / "old.json"), 1)


# --- bad input: one clear line, the right code, nothing written -------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["audit", "--recipes", "rtn-w4a16-g46-plain"], 2, "group_size: 46"),
        (["audit", "--recipes", "rnt-w4a16-g64"], 2, "did you mean rtn-w4a16-g64"),
        (["audit", "--methods", "npoo"], 2, "did you mean npo"),
        (["audit", "--pressures", "relerning"], 2, "pressures: 'relerning' is unknown; did you mean relearning?"),
        (["audit", "--scalability", "2", "--sustainability", "2"], 2, "beside sustainability"),
        (["audit", "--people", "10", "--scalability", "2"], 2, "requests: 2: the forget set is of 1 people"),
        (["audit", "--sustainability", "2", "--methods", "icu"], 2, "sequential: icu leaves the weights alone"),
        (["evaluate", "nowhere", "--data", "people", "--pressures", "all,x"], 2, "pressures: 'x' is unknown"),
        (["evaluate", "nowhere", "--data", "people"], 2, "nowhere"),
        (["logs", "nowhere"], 2, "nowhere: no such file or directory"),
        (["audit", "--fail-on", "lost"], 2, "'lost' is not one of held, returned, damaged, undecided, unforgotten"),
        (["audit", "--arch", "bert"], 2, "arch: 'bert'"),
        (["audit", "--people", "1"], 2, "people: 1"),
        (["audit", "--people", "9", "--forget", "forget10"], 2, "forget10 of 9 people is 0"),
        (["audit", "--forget", "nothing.jsonl"], 2, "'nothing.jsonl' is neither a file nor"),
        (["audit", "--data", "tofu", "--data-dir", "{tmp}/none"], 2, "none: no such directory"),
        (["audit", "--data", "tofu", "--data-dir", "{tmp}"], 2, "full.json: no such file"),
        (["audit", "--model", "{tmp}/none", "--forget", "{f}", "--retain", "{r}"], 2, "none: no such model directory"),
        (["audit", "--model", "{m}"], 2, "needs --forget FILE with --retain FILE or --data FILE"),
        (["audit", "--model", "{m}", "--forget", "{f}", "--retain", "{tmp}/empty"], 2, "the retain set"),
        (["audit", "--model", "{m}", "--forget", "{f}", "--data", "{r}"], 2, "5 of 5 rows are not in the data"),
        (["audit", "--model", "{m}", "--forget", "{f}", "--data", "{f}"], 2, "own:forget.jsonl is empty"),
        (["audit", "--model", "{m}", "--forget", "{f}", "--retain", "{f}"], 2, "share 5 question(s)"),
        (["audit", "--model", "{m}", "--forget", "{tmp}/bad", "--retain", "{r}"], 2, "bad:2: not JSON"),
        (["audit", "--unlearned", "x"], 2, "'x' is not of the form NAME=DIR"),
        (["audit", "--unlearned", "x={tmp}/none"], 2, "none: no such model directory"),
        (
            ["audit", "--unlearned", "x={m}", "--recipes", "wanda-s50+order=prune-unlearn"],
            2,
            "prunes before anything is unlearned, and x is unlearned already",
        ),
        (
            ["compress", "{m}", "--recipe", "wanda-s50+order=prune-unlearn", "--out", "{tmp}/o"],
            2,
            "order: here nothing is unlearned",
        ),
        (["audit", "--bogus"], 2, "No such option: --bogus"),
        (["audit", "--out", "{f}"], 2, "is a file; a directory is needed"),
        (["audit", "--out", "/proc/nothing"], 2, "out: cannot write to /proc"),
        (["audit", "--recipes", ""], 2, "recipes: empty"),
        (["audit", "--unlearned", "a={m}", "--unlearned", "a={m}"], 2, "'a' is given twice"),
        (["audit", "--model", "{tmp}/broken", "--forget", "{f}", "--retain", "{r}"], 1, "broken: cannot be read"),
        (["audit", "--model", "{tmp}/packed", "--forget", "{f}", "--retain", "{r}"], 1, "is compressed already"),
        (["unlearn", "--model", "{m}", "--method", "magic", "--forget", "{f}", "--out=x"], 2, "'magic' is unknown"),
        (["compress", "{tmp}/none", "--recipe", "rtn-w4a16-g64", "--out", "{tmp}/o"], 2, "no such model directory"),
        (["compress", "{m}", "--recipe", "rtn-w4a16-g96", "--out", "{tmp}/o"], 1, "do not divide into groups of 96"),
        (["bench", "nothing"], 2, "'nothing' is not one of"),
        (["report", "{tmp}/none"], 2, "no such file"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line(own, tmp_path, arguments, code, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "bad").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(own / "model" / name, tmp_path / "broken")
    (tmp_path / "broken/tokenizer.json").write_text('{"version": "1.0"}')
    shutil.copytree(own / "model", tmp_path / "packed")
    config = json.loads((own / "model/config.json").read_text())
    (tmp_path / "packed/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    before = sorted(tmp_path.iterdir())
    names = {"tmp": tmp_path, "m": own / "model", "f": own / "forget.jsonl", "r": own / "retain.jsonl"}
    given = [text.format(**names) for text in arguments]
    if arguments[0] == "audit":
        given += ["--cache", str(tmp_path / "cache")]
        if "--out" not in arguments:
            given += ["--out", str(tmp_path / "o")]
    assert message in one_line(remanence(*given), code)
    left = [path for path in sorted(tmp_path.iterdir()) if path.name != "cache"]
    assert left == before
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and ".tmp-" in str(path)] == []


@pytest.mark.slow
def test_a_full_disk_stops_an_audit_in_one_line_and_it_goes_on_later(cache, tmp_path):
    """On a real file system too small for a cell's checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    script = f"""
mount -t tmpfs -o size=36m none "{disk}" || exit 99
cp -r "{cache}" "{disk}/cache"
run() {{
  set -- --people 10 --methods npo --recipes "$1" --cache "{disk}/cache" --out "{disk}/out"
  "{sys.executable}" -m remanence audit "$@"
}}
fill() {{ head -c $(( $(df --output=avail -B1 "{disk}" | tail -1) - 300000 )) /dev/zero > "{disk}/filler"; }}
fill
run rtn-w4a16-g32-plain >/dev/null; echo "code $?"
find "{disk}" -name '*.tmp-*' | wc -l
rm "{disk}/filler"
mount -o remount,size=200m "{disk}"
run rtn-w4a16-g32-plain >/dev/null 2>&1; echo "code $?"
"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["code 1", "0", "code 0"], done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("remanence: disk full while writing"), done.stderr


def test_help_names_every_verb_and_the_exit_codes():
    done = remanence("--help", env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0
    for word in ("audit", "unlearn", "compress", "report", "doctor", "bench", "Exit codes"):
        assert word in done.stdout


@pytest.mark.slow
def test_benchmarks_have_their_frame():
    done = remanence("bench", "startup", "--json")
    result = json.loads(done.stdout)
    assert set(result) == {"name", "environment", "rows", "checks"}
    assert result["name"] == "startup"
    assert result["rows"]
    assert all(set(check) == {"what", "limit", "value", "ok"} for check in result["checks"])
