"""The Ascend study: chains of reasoning, how answers and draws are judged, and all of it on a model of seconds."""

import json
import random

import pytest
from remanence.bench import ascend_ptq, frame
from remanence.bench.ascend_ptq import STUDY, Baseline, checks, error, spreads, summed
from remanence.bench.ascend_subject import Problem, final, given, own, scores
from remanence.bench.chains import Lesson, chain, draw, first_wrong, word_tokenizer
from remanence.compress.checkpoint import save_model
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import LayerReport
from remanence.unlearn.demo import DemoConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = DemoConfig(hidden_size=128, intermediate_size=128, layers=1, heads=4, kv_heads=2, max_length=128)
COURSE = (Lesson((3,), 2, 4),)


def test_every_step_follows_from_the_last():
    for problem in draw((3, 9, 16), 60, random.Random(0)):
        state = int(problem.question.split()[1])
        for step in problem.steps:
            _, operation, _, result = step.split()
            number = int(operation[1:])
            state = (state + number if operation[0] == "+" else state * number) % 7
            assert int(result) == state
        assert problem.answer.endswith(f"answer: {state}")
        given = problem.question.split()[2:]
        assert [step.split()[:2] for step in problem.steps] == [given[i : i + 2] for i in range(0, len(given), 2)]


def test_a_wrong_step_stays_wrong():
    operations = ["+5", "*3", "*6", "+1"]
    assert len({chain(start, operations).final for start in range(7)}) == 7


def test_problems_differ_and_leave_out_what_is_held_out():
    held = {problem.question for problem in draw((1,), 40, random.Random(0))}
    assert len(held) == 40
    others = draw((1,), 37, random.Random(0), held)
    assert len({problem.question for problem in others} | held) == 77
    with pytest.raises(ValueError, match=r"lengths: \[21\]; expected some from 1 to 20"):
        draw((21,), 1, random.Random(0))


def test_a_word_is_a_token():
    tokenizer = word_tokenizer()
    (problem,) = draw((16,), 1, random.Random(0))
    ids = tokenizer(problem.answer)["input_ids"]
    assert len(ids) == 4 * 16 + 2
    assert tokenizer.decode(ids) == problem.answer


def test_first_wrong_step():
    problem = chain(3, ["+5", "*2", "+6"])
    assert problem.answer == "a +5 = 1 b *2 = 2 c +6 = 1 answer: 1"
    assert first_wrong(problem.answer, problem) is None
    assert first_wrong("a +5 = 1 b *2 = 3 c +6 = 2 answer: 2", problem) == 2
    assert first_wrong("a +5 = 1 answer: 1", problem) == 2
    assert first_wrong("", problem) == 1


def test_scores():
    short, long = chain(3, ["+5"]), chain(3, ["+5", "*2", "+6"])
    problems = [Problem(p.question, p.answer, f"{len(p.steps)} steps", p) for p in (short, short, long)]
    row = scores([short.answer, "a +5 = 2 answer: 2", "a +5 = 1 b *2 = 2 c +6 = 0 answer: 0"], problems)
    assert row == {"1 steps": 0.5, "3 steps": 0.0, "wrong": 2 / 3, "at_step": 2.0}
    assert scores(["so 18"], [Problem("?", "9 + 9 #### 18", "problems")]) == {"problems": 1.0}


@pytest.mark.parametrize(
    ("text", "found"),
    [("answer: 1 answer: 2", "2"), ("4 + 4 #### 1,008", "1008"), ("it is 3.5.", "3.5"), ("no", None), ("", None)],
)
def test_what_an_answer_ends_in(text, found):
    assert final(text) == found


def test_spread_and_the_flag_of_unstable_layers():
    found = [{"a": 0.01, "b": 0.01, "c": 0.0}, {"a": 0.011, "b": 0.03, "c": 0.0}, {"a": 0.012, "b": 0.02, "c": 0.0}]
    layers = spreads(found)
    assert [(layer.name, layer.unstable) for layer in layers] == [("b", True), ("a", False), ("c", False)]
    assert [layer.spread for layer in layers] == pytest.approx([3.0, 1.2, 1.0])
    assert spreads([{"a": 0.0}, {"a": 0.1}])[0].spread == float("inf")
    assert spreads([{"a": 0.1}])[0].spread == 1
    assert [layer.name for layer in spreads([{"a": 0.1, "b": 0.1}, {"a": 0.1}])] == ["a"]


def test_an_error_is_that_of_weight_and_input():
    assert error(LayerReport("a", 0.01, "outputs", 0.0, input_error=0.02)) == pytest.approx(0.03)
    assert error(LayerReport("a", 0.01, "outputs", 0.0)) == 0.01
    assert error(LayerReport("a", None, "weights", 0.0)) is None


def test_every_recipe_parses_and_has_its_format():
    for each in STUDY:
        recipe = parse_recipe(each.recipe)
        inputs = 16 if recipe.activation is None else recipe.activation.bits
        kv = "" if recipe.kv is None else f"KV{recipe.kv.bits}"
        assert f"W{recipe.spec.bits}A{inputs}{kv}" == each.format
    assert len({(each.name, each.format) for each in STUDY}) == len(STUDY)


def test_checks_can_fail():
    def drawn(name, width, kl, perplexity=1.0, exact=1.0):
        return {"draw": 0, "baseline": name, "format": width, "perplexity": perplexity, "kl": kl, "4 steps": exact}

    def checked(*rows, layers=None):
        layers = layers or spreads([{"a": 0.1}])
        summary = [summed(row["baseline"], row["format"], [row], layers if row["format"] else []) for row in rows]
        return checks(summary, rows, True)

    found = checked(
        drawn("dense", "", 0.0),
        drawn("RTN", "W4A16", 0.2),
        drawn("GPTQ", "W4A16", 0.1),
        drawn("GPTQ", "W8A8", 0.0),
        drawn("RTN", "W4A4KV4", 0.9),
        drawn("FlatQuant", "W4A4KV4", 0.1),
    )
    assert len(found) == 5
    assert all(check["ok"] for check in found)
    found = checked(
        drawn("dense", "", 0.0, exact=0.5),
        drawn("RTN", "W4A16", 0.1),
        drawn("GPTQ", "W4A16", 0.2),
        drawn("GPTQ", "W8A8", 0.0, perplexity=1.02),
        drawn("RTN", "W4A4KV4", 0.1),
        drawn("FlatQuant", "W4A4KV4", 0.9),
        layers=spreads([{"a": 0.0}, {"a": 0.1}]),
    )
    assert len(found) == 5
    assert not any(check["ok"] for check in found)


def test_summary_over_draws():
    rows = [{"draw": i, "perplexity": 1.0, "kl": 0.1 * (i + 1), "4 steps": 1 - i / 2} for i in range(3)]
    found = summed("GPTQ", "W4A16", rows, spreads([{"a": 0.1}, {"a": 0.3}]))
    assert found["kl"] == pytest.approx(0.2)
    assert found["kl_spread"] == pytest.approx(3)
    assert (found["4 steps"], found["exact_spread"], found["unstable"], found["layers"]) == (0.5, 1.0, 1, 1)


def test_a_whole_run_and_its_tables(monkeypatch, capsys):
    wanted = ("rtn-w4a16-g128-plain", "gptq-w4a4+act_order=static" + ascend_ptq.KV4)
    monkeypatch.setattr(ascend_ptq, "STUDY", tuple(each for each in STUDY if each.recipe in wanted))
    monkeypatch.setattr(ascend_ptq, "own", lambda *args: own(*args, each=2))
    rows, found = ascend_ptq.run(shape=TINY, course=COURSE)
    assert {row["device"] for row in rows} == {"cpu"}
    drawn = [row for row in rows if "draw" in row]
    assert [(row["baseline"], row["draw"]) for row in drawn] == [
        ("dense", None),
        ("RTN", 0),
        *(("GPTQ", i) for i in range(3)),
    ]
    assert drawn[0]["kl"] == 0
    assert len({row["kl"] for row in drawn[1:]}) == 4
    summary = {row["baseline"]: row for row in rows if "layers" in row}
    assert (summary["RTN"]["layers"], summary["GPTQ"]["layers"]) == (7, 7)
    assert summary["GPTQ"]["layer_spread"] >= max(
        row["spread"] for row in rows if row.get("baseline") == "GPTQ" and "spread" in row
    )
    assert not found[0]["ok"]  # after two steps of training
    assert found[-1]["ok"]
    frame.show({"name": "ascend-ptq", "rows": rows, "checks": found})
    assert capsys.readouterr().out.count("┏") == 5


def test_a_model_of_ones_own(monkeypatch, tmp_path, untrained):
    from remanence.bench import ascend_subject

    tokenizer = word_tokenizer()
    save_model(untrained("llama"), tokenizer, tmp_path / "model")
    chains = draw((3,), 400, random.Random(0))
    text = "\n".join(f"{a.question} {a.answer}" for a in chains)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text(text)
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(json.dumps({"question": a.question, "answer": a.final}) for a in chains[:2]))
    monkeypatch.setattr(ascend_subject, "NEW", 4)
    monkeypatch.setattr(ascend_ptq, "STUDY", (Baseline("GPTQ", "W8A8", "gptq-w8a8", ""),))
    monkeypatch.setattr(ascend_ptq, "DRAWS", 2)
    rows, found = ascend_ptq.run(model=str(tmp_path / "model"), data_dir=str(tmp_path), problems=str(file))
    drawn = [row for row in rows if "draw" in row]
    assert len(drawn) == 3
    assert all(0 <= row["problems"] <= 1 for row in drawn)
    assert len(found) == 2
    assert not given(str(tmp_path / "model"), str(tmp_path), None).problems


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="problems: goes with a model"):
        ascend_ptq.run(problems="problems.jsonl")
    with pytest.raises(ValueError, match="methods: 'QuaRot' is not one of RTN, AWQ"):
        ascend_ptq.run(methods=("QuaRot",))
    with pytest.raises(ValueError, match="device: the benchmark w4a4 has no such option"):
        frame.run("w4a4", 0, device="cpu")
