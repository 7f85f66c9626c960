"""The evaluation harness: what is said without it; with it, real runs on a local task, counted by hand."""

import copy
import json
import random
import sys

import numpy as np
import pytest
import torch
from remanence.bench.harness import harness

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: options
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def test_without_the_harness(memorized, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'remanence\[eval\]'"):
        harness(memorized.target, memorized.tokenizer, ["hellaswag"])


@pytest.fixture
def task(tmp_path, memorized, monkeypatch):
    """A task of this test's own, and its documents."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = []
    for number, row in enumerate([*memorized.corpus.forget, *memorized.corpus.retain[:7]]):
        options = list(row.perturbed_answers[:3])
        label = number % 4
        options.insert(label, row.answer)
        documents.append({"question": row.question, "options": options, "label": label})
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "people.yaml").write_text(TASK.format(name="remanence_people", file=file))
    return folder, documents


def by_hand(model, tokenizer, documents):
    """Share of documents whose true option has the largest log-likelihood; and that per character."""
    right, per_character = [], []
    for document in documents:
        scores = []
        for option in document["options"]:
            prompt = f"Question: {document['question']}\nAnswer:"
            whole = tokenizer(f"{prompt} {option}")["input_ids"]
            begin = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                z = model(torch.tensor([whole])).logits[0].double().numpy()
            z = z - z.max(1, keepdims=True)
            log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
            scores.append(sum(log_p[i - 1, whole[i]] for i in range(begin, len(whole))))
        right.append(int(np.argmax(scores)) == document["label"])
        lengths = [len(option) for option in document["options"]]
        per_character.append(int(np.argmax(np.array(scores) / lengths)) == document["label"])
    return np.mean(right), np.mean(per_character)


def test_a_task_of_ones_own(task, memorized):
    folder, documents = task
    for model in (memorized.target, memorized.oracle):
        found = harness(model, memorized.tokenizer, ["remanence_people"], batch_size=5, include_path=folder)
        scores = found["remanence_people"]
        accuracy, normalised = by_hand(model, memorized.tokenizer, documents)
        assert set(found) == {"remanence_people"}
        assert scores["acc"].value == pytest.approx(accuracy)
        assert scores["acc_norm"].value == pytest.approx(normalised)
        assert scores["acc"].documents == 12
        assert scores["acc"].stderr == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 11))
        if model is memorized.target:
            assert accuracy > 0.9
        else:
            assert 7 / 12 <= accuracy < 0.9


def test_limit_and_patterns(task, memorized):
    folder, documents = task
    found = harness(memorized.oracle, memorized.tokenizer, ["remanence_p*"], limit=5, include_path=folder)
    score = found["remanence_people"]["acc"]
    assert score.documents == 5
    assert score.value == pytest.approx(by_hand(memorized.oracle, memorized.tokenizer, documents[:5])[0])


def test_nothing_is_disturbed(task, memorized):
    """Not the random state, nor the mode; nor a head that is no longer tied, whatever the config says."""
    folder, _ = task
    model = copy.deepcopy(memorized.target).train()
    model.config.tie_word_embeddings = True
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    model.lm_head.weight = head
    tokenizer = copy.deepcopy(memorized.tokenizer)
    tokenizer.pad_token = None
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    harness(model, tokenizer, ["remanence_people"], limit=2, include_path=folder)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted
    assert model.training
    assert model.lm_head.weight is head
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token is None


@pytest.mark.slow  # reads the whole index of the harness
def test_unknown_tasks(task, memorized, tmp_path):
    folder, _ = task
    with pytest.raises(ValueError, match="does not know 'no_such_task'"):
        harness(memorized.target, memorized.tokenizer, ["remanence_people", "no_such_task"], include_path=folder)
    with pytest.raises(ValueError, match="tasks: none"):
        harness(memorized.target, memorized.tokenizer, [])
    with pytest.raises(FileNotFoundError, match="include-path"):
        harness(memorized.target, memorized.tokenizer, ["remanence_people"], include_path=tmp_path / "missing")
