"""The measurement on models of our own, item by item, against every row alone."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from remanence.bench.forgetting import Scores, evaluate, rouge_recall, verbatim
from remanence.bench.memorisation import exact_memorisation, extraction_strength
from remanence.bench.privacy import ATTACKS
from remanence.bench.tofu import forget_truth_ratio, mean, model_utility
from remanence.bench.tokens import answers
from remanence.unlearn.data import QA, EvalSet

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rouge_counts_the_longest_common_subsequence_over_the_truth():
    assert rouge_recall(
        ["the cat sat", "", "sits a dog", "running"], ["the black cat sat", "x", "a dog sits", "runs"]
    ) == [
        3 / 4,
        0.0,
        2 / 3,
        1.0,  # stemmed
    ]
    with pytest.raises(ValueError, match="zip"):
        rouge_recall(["a"], ["a", "b"])


def test_verbatim():
    assert verbatim([" a b", "A b", "c\n", "d"], ["a b", "a b", "c", "e"]) == 0.5


def direct_nll(model, encoder, question, answer):
    """NLL per token of one answer, alone and in float64."""
    ids, labels = encoder.pair(question, answer)
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    picked = [log_p[t - 1, label].item() for t, label in enumerate(labels) if label >= 0]
    return -math.fsum(picked) / len(picked)


@pytest.fixture
def mixed(memorized):
    """Rows of unlike length and kind: known and unknown, with and without paraphrase, with none to five wrong ones."""
    corpus = memorized.corpus
    plain = [QA(row.question, row.answer) for row in corpus.retain[:2]]
    few = [QA(corpus.retain[-1].question, corpus.retain[-1].answer, perturbed_answers=("x", "on the y: z"))]
    return (*corpus.retain[-5:], *plain, *corpus.forget, *few, *corpus.holdout[:3])


@pytest.mark.parametrize("choices", [False, True], ids=["probability", "choices"])
def test_scores_are_those_of_each_row_alone(memorized, mixed, choices):
    exact = copy.deepcopy(memorized.target).double()
    found = evaluate(memorized.target, memorized.encoder, EvalSet(mixed, choices), batch_size=7)
    nll = lambda row, answer: direct_nll(exact, memorized.encoder, row.question, answer)  # noqa: E731
    for i, row in enumerate(mixed):
        wrong = [math.exp(-nll(row, answer)) for answer in row.perturbed_answers]
        probability = math.exp(-nll(row, row.answer))
        if choices and wrong:
            probability /= probability + sum(wrong)
        # The model runs in float32: about 1e-6 a logit, relative to logits of some tens.
        assert found.items.probability[i] == pytest.approx(probability, rel=1e-4, abs=1e-7)
        if wrong:
            base = math.exp(-nll(row, row.paraphrased_answer or row.answer))
            assert found.items.ratio(i) == pytest.approx(math.prod(wrong) ** (1 / len(wrong)) / base, rel=1e-3)
        else:
            assert found.items.ratio(i) is None
    assert found.items.rouge == rouge_recall(found.answers, [row.answer for row in mixed])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_results_keep_their_order_whatever_the_batches(memorized, mixed, batch_size):
    one = evaluate(memorized.target, memorized.encoder, EvalSet(mixed), batch_size=16)
    other = evaluate(memorized.target, memorized.encoder, EvalSet(mixed), batch_size)
    assert other.answers == one.answers
    assert other.items.rouge == one.items.rouge
    assert other.items.probability == pytest.approx(one.items.probability, rel=1e-4)
    assert other.items.truth_ratio() == pytest.approx(one.items.truth_ratio(), rel=1e-3)
    assert other.extraction_strength == one.extraction_strength
    assert other.exact_memorisation == one.exact_memorisation
    for name, values in one.attacks.items():
        assert other.attacks[name] == pytest.approx(values, rel=1e-3, abs=1e-4)


def test_order_of_rows_does_not_matter(memorized, mixed):
    one = evaluate(memorized.target, memorized.encoder, EvalSet(mixed))
    back = evaluate(memorized.target, memorized.encoder, EvalSet(mixed[::-1]))
    assert back.answers[::-1] == one.answers
    assert back.items.probability[::-1] == pytest.approx(one.items.probability, rel=1e-4)


def test_what_target_and_oracle_know(memorized):
    """The measurement tells them apart on the forget set, and nowhere else."""
    corpus, encoder = memorized.corpus, memorized.encoder
    forget = EvalSet(corpus.forget)
    target, oracle = (evaluate(model, encoder, forget) for model in (memorized.target, memorized.oracle))
    assert mean(target.items.probability) > 0.9
    assert mean(oracle.items.probability) < 0.1
    assert mean(target.items.rouge) > 0.9 > 0.5 > mean(oracle.items.rouge)
    assert verbatim(target.answers, [row.answer for row in corpus.forget]) >= 0.8
    assert verbatim(oracle.answers, [row.answer for row in corpus.forget]) <= 0.2
    for model in (memorized.target, memorized.oracle):
        assert mean(evaluate(model, encoder, corpus.utility["retain"]).items.probability) > 0.9


def test_memorisation_attacks_and_entropy_are_of_the_true_answers(memorized, mixed):
    found = evaluate(memorized.target, memorized.encoder, EvalSet(mixed))
    tokens = answers(memorized.target, memorized.encoder, [(r.question, r.answer) for r in mixed])
    assert found.extraction_strength == [extraction_strength(answer, with_end=False) for answer in tokens]
    assert found.exact_memorisation == [exact_memorisation(answer, with_end=False) for answer in tokens]
    assert found.attacks.keys() == ATTACKS.keys()
    for name, attack in ATTACKS.items():
        assert found.attacks[name] == pytest.approx([attack(a, r.answer) for a, r in zip(tokens, mixed, strict=True)])
    entropy = -np.concatenate([answer.mean for answer in tokens]).mean()
    assert found.entropy == pytest.approx(entropy, rel=1e-5)
    assert found.vocabulary == len(memorized.tokenizer)
    assert 0 < found.entropy < 0.5 * math.log(found.vocabulary)


def test_json_and_back(memorized, mixed):
    found = evaluate(memorized.target, memorized.encoder, EvalSet(mixed, choices=True))
    written = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert Scores.from_json(written) == found
    assert written["probability"] == found.items.probability
    assert written["truth_ratio"] == [found.items.ratio(i) for i in range(len(mixed))]


def test_without_generation(memorized, mixed):
    found = evaluate(memorized.target, memorized.encoder, EvalSet(mixed), generate=False)
    assert found.answers == [""] * len(mixed)
    assert found.items.nll == evaluate(memorized.target, memorized.encoder, EvalSet(mixed)).items.nll


def test_an_empty_set(memorized):
    with pytest.raises(ValueError, match="rows: none; an evaluation needs at least one"):
        evaluate(memorized.target, memorized.encoder, EvalSet(()))


@pytest.mark.parametrize("how", ["nan", "uniform", "constant"])
def test_collapsed_models_are_measured(memorized, how):
    """Everything stays a number, and nothing looks like knowledge."""
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        if how == "nan":
            model.model.norm.weight.fill_(math.nan)
        elif how == "uniform":
            model.lm_head.weight.zero_()
        else:  # one token, whatever comes before
            model.lm_head.weight.zero_()
            model.model.norm.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(memorized.tokenizer)))
            model.lm_head.bias[300] = 50.0
    found = evaluate(model, memorized.encoder, EvalSet(memorized.corpus.forget))
    json.dumps(found.as_json(), allow_nan=False)
    assert found.finite == (how != "nan")
    assert (found.entropy > 0.99 * math.log(found.vocabulary)) == (how != "constant")
    assert max(found.items.probability) < 0.02
    assert max(found.extraction_strength) == 0
    assert 0 <= forget_truth_ratio(found.items) <= 1
    utility = {name: evaluate(model, memorized.encoder, items) for name, items in memorized.corpus.utility.items()}
    assert model_utility({name: scores.items for name, scores in utility.items()}) < 0.02
