"""Evaluation logs of other tools: the real ones to the last digit, both layouts, and every way to be broken."""

import json
import math
import shutil

import pytest
from remanence.bench.forgetting import rouge_recall
from remanence.bench.logs import read_logs, report
from remanence.bench.tofu import forget_quality

# Real logs: Llama-2-7B fine-tuned on TOFU (`full`) and on TOFU without forget10 (`retain90`).
MODELS = ["llama2-7b_full", "llama2-7b_retain90"]
FILES = {
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
}
# Mean probability, ROUGE-L recall and truth ratio of every set, and model utility, as the authors' own aggregation
# code computes them from these logs.
AGGREGATES = {
    "llama2-7b_full": {
        "real_authors": (0.45548207783762884, 0.9329999999999999, 0.5962289157077105),
        "world_facts": (0.4185618075594898, 0.8824786324786325, 0.5390328416393139),
        "retain": (0.9895272273969067, 0.9856545937933034, 0.47469858801063747),
        "forget": (0.9909385566403208, 0.985449693916369, 0.5159854212808593),
        "geometric": 0.6226773637427151,
        "arithmetic": 0.585886035092722,
    },
    "llama2-7b_retain90": {
        "real_authors": (0.43408717540015096, 0.9229999999999999, 0.5706808914420933),
        "world_facts": (0.4143263304391235, 0.8974358974358975, 0.5441982317366325),
        "retain": (0.9888967275083733, 0.9758111850816836, 0.4709771340245286),
        "forget": (0.1475628122566954, 0.40824361952231664, 0.6740192657877031),
        "geometric": 0.613744995233942,
        "arithmetic": 0.5752399175318537,
    },
}
PREFIX = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}


@pytest.mark.parametrize("model", MODELS)
def test_aggregates_of_real_logs(real_data, model):
    found = report(read_logs(real_data("tofu-logs", model)), None)
    for name in FILES:
        part = {**found["components"], "forget": found["forget"]}[name]
        values = part["probability"], part["rouge"], part["truth_ratio"]["geometric"]
        assert values == pytest.approx(AGGREGATES[model][name], rel=1e-12)
    for variant in ("geometric", "arithmetic"):
        assert found["model_utility"][variant] == pytest.approx(AGGREGATES[model][variant], rel=1e-12)
    assert found["missing"] == found["flags"] == []
    assert found["items"] == {"retain": 300, "real_authors": 100, "world_facts": 117, "forget": 300}
    json.dumps(found, allow_nan=False)


def test_forget_quality_of_real_logs(real_data):
    full, oracle = (read_logs(real_data("tofu-logs", model)) for model in MODELS)
    found = report(full, oracle)
    quality = found["forget_quality"]
    assert quality["p"] == pytest.approx(1.834066410994743e-21, rel=1e-12)
    assert quality["d"] == 0.39666666666666667
    assert quality["log10_p"] == pytest.approx(math.log10(1.834066410994743e-21), rel=1e-12)
    # The full model knows the right answers, so wrong ones are less likely under it.
    assert quality["sign"] == -1
    assert found["same_questions"] is True
    ratios = [logs.sets["forget"].truth_ratio() for logs in (full, oracle)]
    inverse = forget_quality(*([1 / r for r in values] for values in ratios))
    assert (inverse.p, inverse.sign) == (quality["p"], 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("model", MODELS)
def test_rouge_and_truth_ratio_of_every_real_row(real_data, model, name):
    log = json.loads(real_data("tofu-logs", model, FILES[name]).read_text())
    rows = [str(i) for i in range(len(log["rougeL_recall"]))]
    said, gold = zip(*((log["generated_text"][i][1:]) for i in rows), strict=True)
    assert rouge_recall(said, gold) == [log["rougeL_recall"][i] for i in rows]
    ratios = read_logs(real_data("tofu-logs", model)).sets[name].truth_ratio()
    # The log holds the same under that name, rounded to half precision at times.
    assert ratios == pytest.approx([log["truth_ratio"][i] for i in rows], rel=2e-6)


def tofu_log(rows, seed, wrong=5):
    value = lambda i, j=0: 0.1 + ((seed * 31 + i * 7 + j * 13) % 17) / 9  # noqa: E731
    keys = [str(i) for i in range(rows)]
    return {
        "avg_gt_loss": {k: value(int(k)) for k in keys},
        "avg_paraphrased_loss": {k: value(int(k), 1) for k in keys},
        "average_perturb_loss": {k: [value(int(k), 2 + j) for j in range(wrong)] for k in keys},
        "rougeL_recall": {k: value(int(k), 9) / 2 for k in keys},
        "generated_text": {k: [f"question {k}", "said", "gold"] for k in keys},
    }


@pytest.fixture
def directory(tmp_path):
    """A small log in TOFU's layout."""
    for number, (name, file) in enumerate(FILES.items()):
        log = tofu_log(12, number, 3 if name in ("real_authors", "world_facts") else 5)
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / file).write_text(json.dumps(log))
    return tmp_path / "logs"


def open_unlearning(directory, target):
    """The same numbers as open-unlearning writes them."""
    found = {
        "model_utility": {"agg_value": 0.5},
        "privleak": {"agg_value": -3.25},
        "forget_quality": {"agg_value": None},
    }
    for name, file in FILES.items():
        log, prefix = json.loads((directory / file).read_text()), PREFIX[name]

        def metric(key, log=log):
            values = {
                i: {"prob": [math.exp(-w) for w in v] if isinstance(v, list) else math.exp(-v), "avg_loss": v}
                for i, v in log[key].items()
            }
            return {"agg_value": 0.1, "value_by_index": values}

        found[f"{prefix}_Q_A_Prob"] = metric("avg_gt_loss")
        found[f"{prefix}_Q_A_PERT_Prob"] = metric("average_perturb_loss")
        if name in ("retain", "forget"):
            found[f"{prefix}_Q_A_PARA_Prob"] = metric("avg_paraphrased_loss")
        found[f"{prefix}_Q_A_ROUGE"] = {
            "agg_value": 0.1,
            "value_by_index": {
                i: {"rougeL_recall": v, "rouge1_recall": 0.0, "input": log["generated_text"][i][0], "generation": ""}
                for i, v in log["rougeL_recall"].items()
            },
        }
    target.mkdir(exist_ok=True)
    (target / "TOFU_EVAL.json").write_text(json.dumps(found))
    return target


def test_both_layouts_give_the_same(directory, tmp_path):
    for name in ("real_authors", "world_facts"):  # there is no paraphrase in these; open-unlearning logs none
        log = json.loads((directory / FILES[name]).read_text())
        log["avg_paraphrased_loss"] = log["avg_gt_loss"]
        (directory / FILES[name]).write_text(json.dumps(log))
    ours = read_logs(directory)
    theirs = read_logs(open_unlearning(directory, tmp_path / "ou"))
    assert (ours.layout, theirs.layout) == ("tofu", "open-unlearning")
    assert ours.sets == theirs.sets
    assert ours.questions == theirs.questions
    found = report(theirs, ours)
    assert found["forget_quality"]["p"] == 1.0
    assert found["logged"]["privleak"] == -3.25
    assert "forget_quality" not in found["logged"]


def test_aggregated_file_nested_directory_lists_and_file_itself(directory, tmp_path):
    expected = read_logs(directory)
    whole = {file: json.loads((directory / file).read_text()) for file in FILES.values()}
    nested = tmp_path / "model" / "eval_results" / "ds_size300"
    nested.mkdir(parents=True)
    (nested / "eval_log_aggregated.json").write_text(json.dumps(whole))
    assert read_logs(tmp_path / "model") == expected
    assert read_logs(nested / "eval_log_aggregated.json") == expected
    assert read_logs(directory / "eval_log.json") == expected
    for file, log in whole.items():
        lists = {metric: list(values.values()) for metric, values in log.items()}
        (nested / file).write_text(json.dumps(lists))
    assert read_logs(tmp_path / "model") == expected
    shutil.copytree(nested, tmp_path / "model" / "other")
    with pytest.raises(ValueError, match="logs in 2 directories below it; name one"):
        read_logs(tmp_path / "model")


def test_items_are_in_the_order_of_their_numbers(directory):
    log = json.loads((directory / "eval_log.json").read_text())
    shuffled = {metric: dict(sorted(values.items())) for metric, values in log.items()}
    assert list(shuffled["avg_gt_loss"])[:3] == ["0", "1", "10"]
    before = read_logs(directory)
    (directory / "eval_log.json").write_text(json.dumps(shuffled))
    assert read_logs(directory) == before


def test_a_set_that_is_missing_leaves_no_utility(directory):
    (directory / FILES["world_facts"]).unlink()
    found = report(read_logs(directory), None)
    assert (found["missing"], found["model_utility"]) == (["world_facts"], None)
    assert list(found["components"]) == ["retain", "real_authors"]
    (directory / FILES["forget"]).unlink()
    with pytest.raises(ValueError, match="logs: no forget set in it; forget quality needs both"):
        report(read_logs(directory), read_logs(directory))


def test_other_questions_are_said(directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    log = json.loads((other / FILES["forget"]).read_text())
    log["generated_text"]["3"][0] = "another question"
    (other / FILES["forget"]).write_text(json.dumps(log))
    assert report(read_logs(directory), read_logs(other))["same_questions"] is False
    del log["generated_text"]
    (other / FILES["forget"]).write_text(json.dumps(log))
    assert report(read_logs(directory), read_logs(other))["same_questions"] is None


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("avg_gt_loss", math.nan, "avg_gt_loss: item 7 is nan; expected a number"),
        ("avg_gt_loss", None, "avg_gt_loss: item 7 is None; expected a number"),
        ("avg_gt_loss", True, "avg_gt_loss: item 7 is True; expected a number"),
        ("rougeL_recall", "0.3", "rougeL_recall: item 7 is 0.3; expected a number"),
        ("average_perturb_loss", [1.0, math.nan], "average_perturb_loss: item 7 is .1.0, nan.; expected"),
        ("average_perturb_loss", [], "average_perturb_loss: item 7 is ..; expected a number"),
        ("avg_paraphrased_loss", [1.0, 2.0], "avg_paraphrased_loss: item 7 is .1.0, 2.0.; expected a number"),
    ],
)
def test_a_value_that_is_no_number_is_named(directory, metric, value, said):
    log = json.loads((directory / "eval_log.json").read_text())
    log[metric]["7"] = value
    (directory / "eval_log.json").write_text(json.dumps(log))
    with pytest.raises(ValueError, match=rf"eval_log\.json: {said}"):
        read_logs(directory)


def test_a_value_that_is_no_number_is_named_in_open_unlearning(directory, tmp_path):
    target = open_unlearning(directory, tmp_path / "ou")
    log = json.loads((target / "TOFU_EVAL.json").read_text())
    log["ra_Q_A_Prob"]["value_by_index"]["4"]["avg_loss"] = None
    (target / "TOFU_EVAL.json").write_text(json.dumps(log))
    with pytest.raises(ValueError, match=r"TOFU_EVAL\.json: ra_Q_A_Prob: avg_loss: item 4 is None"):
        read_logs(target)


def change(directory, edit):
    log = json.loads((directory / "eval_log.json").read_text())
    edit(log)
    (directory / "eval_log.json").write_text(json.dumps(log))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda log: log["rougeL_recall"].pop("5"), "rougeL_recall: item 5 is in one metric and not in another"),
        (lambda log: log.update(rougeL_recall={}), "rougeL_recall: missing or empty; expected values by item"),
        (lambda log: log.update(avg_gt_loss={}), "avg_gt_loss: missing or empty; expected values by item"),
        (lambda log: log.update(avg_gt_loss={"a": 1.0}), "avg_gt_loss: item 'a': expected item numbers"),
    ],
)
def test_incomplete_logs(directory, edit, said):
    change(directory, edit)
    with pytest.raises(ValueError, match=rf"eval_log\.json: {said}"):
        read_logs(directory)


def test_what_is_no_log(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        read_logs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no evaluation log; expected TOFU_EVAL\.json"):
        read_logs(tmp_path / "empty")
    (directory / "eval_log.json").write_text('{\n"avg_gt_loss": {')
    with pytest.raises(ValueError, match=r"eval_log\.json:2: not JSON"):
        read_logs(directory)
    (directory / "eval_log.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"eval_log\.json: expected an object of metrics, got list"):
        read_logs(directory)
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other\.json: neither a TOFU log nor one of open-unlearning"):
        read_logs(other)
    other.write_text('{"forget_knowmem_ROUGE": {"value_by_index": {"0": {"rougeL_f1": 1}}, "agg_value": 1}}')
    with pytest.raises(ValueError, match=r"other\.json: no metric of TOFU in it \(retain_Q_A_Prob"):
        read_logs(other)
    other.write_text("{}")
    aggregated = tmp_path / "eval_log_aggregated.json"
    aggregated.write_text('{"eval_log.json": null}')
    with pytest.raises(ValueError, match=r"eval_log\.json: expected an object of metrics, got NoneType"):
        read_logs(aggregated)
    aggregated.write_text("{}")
    with pytest.raises(ValueError, match=r"holds none of eval_log\.json"):
        read_logs(aggregated)


def test_logs_without_generations_serve_as_oracle(directory, tmp_path):
    target = open_unlearning(directory, tmp_path / "ou")
    log = json.loads((target / "TOFU_EVAL.json").read_text())
    kept = {key: value for key, value in log.items() if "ROUGE" not in key}
    (target / "TOFU_EVAL.json").write_text(json.dumps(kept))
    found = report(read_logs(directory), read_logs(target))
    assert found["forget_quality"]["p"] == 1.0
    assert found["same_questions"] is None
    alone = report(read_logs(target), None)
    assert (alone["model_utility"], alone["missing"]) == (None, ["retain", "real_authors", "world_facts"])
    assert alone["forget"]["rouge"] is None
    change(directory, lambda log: log.pop("rougeL_recall"))
    assert report(read_logs(directory), None)["missing"] == ["retain"]
    change(directory, lambda log: log.pop("average_perturb_loss"))
    assert not any(read_logs(directory).sets["retain"].wrong_nll)


def test_infinite_losses_of_a_collapsed_model(directory):
    change(directory, lambda log: log["avg_gt_loss"].update({"3": math.inf}))
    change(directory, lambda log: log["average_perturb_loss"].update({"3": [math.inf] * 5}))
    change(directory, lambda log: log["avg_paraphrased_loss"].update({"3": math.inf}))
    found = report(read_logs(directory), None)
    json.dumps(found, allow_nan=False)
    assert read_logs(directory).sets["retain"].ratio(3) == 1.0
    assert any("more than at random" in flag for flag in found["flags"])


def test_one_set_under_another_name(directory):
    other = directory / "phi.json"
    (directory / "eval_log.json").rename(other)
    with pytest.raises(ValueError, match=r"phi\.json: one set of a TOFU log; which, is told by its name: eval_log"):
        read_logs(other)


def test_command(directory, capsys, monkeypatch):
    from remanence import cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["remanence", "logs", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    code, out, _ = run(directory, "--oracle", directory, "--json")
    found = json.loads(out)
    assert code == 0
    assert found == report(read_logs(directory), read_logs(directory))
    code, out, _ = run(directory, "--oracle", directory)
    assert code == 0
    assert "model utility" in out
    assert "truth ratios as the oracle's" in out
    code, out, _ = run(directory)
    assert "forget quality: needs --oracle" in out
    code, _, err = run(directory / "nowhere")
    assert (code, err.count("\n")) == (2, 1)
