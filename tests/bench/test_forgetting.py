"""What a model knows: the metrics on real logs of TOFU models, the measurement on models of our own, item by item."""

import copy
import json
import math

import pytest
import torch
from remanence.bench.forgetting import (
    Scores,
    choice_probability,
    evaluate,
    forget_quality,
    forget_truth_ratio,
    generate,
    harmonic_mean,
    mean,
    model_utility,
    rouge_recall,
    truth_ratio,
    utility_truth_ratio,
    verbatim,
)
from remanence.unlearn.data import QA, EvalSet
from remanence.unlearn.encode import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- Real logs: Llama-2-7B fine-tuned on TOFU (`full`) and on TOFU without forget10 (`retain90`).

FILES = {
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
}
MODELS = ["llama2-7b_full", "llama2-7b_retain90"]

# Mean probability, ROUGE-L recall and truth ratio of every set, and model utility, as the authors' own aggregation
# code computes them from these logs.
AGGREGATES = {
    "llama2-7b_full": {
        "real_authors": (0.45548207783762884, 0.9329999999999999, 0.5962289157077105),
        "world_facts": (0.4185618075594898, 0.8824786324786325, 0.5390328416393139),
        "retain": (0.9895272273969067, 0.9856545937933034, 0.47469858801063747),
        "forget": (0.9909385566403208, 0.985449693916369, 0.5159854212808593),
        "model_utility": 0.6226773637427151,
    },
    "llama2-7b_retain90": {
        "real_authors": (0.43408717540015096, 0.9229999999999999, 0.5706808914420933),
        "world_facts": (0.4143263304391235, 0.8974358974358975, 0.5441982317366325),
        "retain": (0.9888967275083733, 0.9758111850816836, 0.4709771340245286),
        "forget": (0.1475628122566954, 0.40824361952231664, 0.6740192657877031),
        "model_utility": 0.613744995233942,
    },
}


@pytest.fixture(scope="module")
def logs(real_data):
    """logs(model, set) -> {metric: values in row order}"""

    def read(model, name):
        log = json.loads((real_data("tofu-logs") / model / FILES[name]).read_text())
        return {key: [values[str(i)] for i in range(len(values))] for key, values in log.items()}

    return read


@pytest.fixture(scope="module")
def scores(logs):
    """scores(model, set) -> Scores, from the losses and generations of the log."""

    def build(model, name):
        log = logs(model, name)
        choices = name in ("real_authors", "world_facts")
        return Scores(
            probability=[
                choice_probability(right, wrong) if choices else math.exp(-right)
                for right, wrong in zip(log["avg_gt_loss"], log["average_perturb_loss"], strict=True)
            ],
            rouge=log["rougeL_recall"],
            truth_ratio=[
                truth_ratio(right, wrong)
                for right, wrong in zip(log["avg_paraphrased_loss"], log["average_perturb_loss"], strict=True)
            ],
            answers=[generated for _, generated, _ in log["generated_text"]],
        )

    return build


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("model", MODELS)
def test_aggregates_of_real_logs(scores, model, name):
    found = scores(model, name)
    ratio = forget_truth_ratio if name == "forget" else utility_truth_ratio
    aggregates = (mean(found.probability), mean(found.rouge), ratio(found.truth_ratio))
    # Only the order of summation may differ: some units of 2^-53.
    assert aggregates == pytest.approx(AGGREGATES[model][name], rel=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_model_utility_of_real_logs(scores, model):
    sets = {name: scores(model, name) for name in ("real_authors", "world_facts", "retain")}
    assert model_utility(sets) == pytest.approx(AGGREGATES[model]["model_utility"], rel=1e-15, abs=2e-16)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("model", MODELS)
def test_rouge_of_real_generations_is_reproduced_exactly(logs, model, name):
    log = logs(model, name)
    _, generated, gold = zip(*log["generated_text"], strict=True)
    assert rouge_recall(generated, gold) == log["rougeL_recall"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("model", MODELS)
def test_truth_ratio_of_every_row(logs, model, name):
    """The log holds the inverse, exp(paraphrase - mean wrong) in the name of R, rounded to half precision at times."""
    log = logs(model, name)
    for right, wrong, logged in zip(
        log["avg_paraphrased_loss"], log["average_perturb_loss"], log["truth_ratio"], strict=True
    ):
        assert truth_ratio(right, wrong) == pytest.approx(logged, rel=2e-6)


def test_forget_quality_of_real_logs(scores):
    full, oracle = (scores(model, "forget").truth_ratio for model in MODELS)
    quality = forget_quality(full, oracle)
    assert quality.p_value == pytest.approx(1.834066410994743e-21, rel=1e-9)
    assert quality.statistic == pytest.approx(0.39666666666666667, rel=1e-15)
    assert quality.log10_p == pytest.approx(math.log10(1.834066410994743e-21), rel=1e-9)
    # The full model knows the right answers, so wrong ones are less likely under it.
    assert quality.shift == "lower"
    assert sorted(full)[150] < sorted(oracle)[150]


def test_forget_quality_does_not_change_under_inversion_but_for_its_sign(scores):
    full, oracle = (scores(model, "forget").truth_ratio for model in MODELS)
    quality = forget_quality(full, oracle)
    inverse = forget_quality([1 / r for r in full], [1 / r for r in oracle])
    swapped = forget_quality(oracle, full)
    assert inverse.p_value == swapped.p_value == quality.p_value
    assert inverse.shift == swapped.shift == "higher"


# ---- Formulas at their edges.


@pytest.mark.parametrize("n", [3, 40, 200, 400])
def test_forget_quality_floor(n):
    """Two lists without overlap: D = 1, p = 2 / C(2n, n)."""
    low, high = [i / n for i in range(n)], [2 + i / n for i in range(n)]
    quality = forget_quality(low, high)
    assert quality.statistic == 1.0
    assert quality.p_value == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9)
    assert quality.shift == "lower"
    assert forget_quality(high, low).shift == "higher"


def test_forget_quality_below_the_smallest_float():
    n = 700
    quality = forget_quality([0.0] * n, [1.0] * n)
    assert quality.p_value == 0.0
    assert quality.log10_p == -math.inf


def test_forget_quality_of_the_oracle_itself():
    ratios = [0.1 * i for i in range(40)]
    quality = forget_quality(ratios, ratios[::-1])
    assert (quality.p_value, quality.log10_p, quality.statistic, quality.shift) == (1.0, 0.0, 0.0, "none")


@pytest.mark.parametrize(("ratios", "oracle"), [([], [1.0]), ([1.0], []), ([], [])])
def test_forget_quality_needs_rows(ratios, oracle):
    with pytest.raises(ValueError, match="truth ratios: empty"):
        forget_quality(ratios, oracle)


def test_truth_ratio_is_the_geometric_mean_over_the_right_answer():
    right, wrong = 0.7, [1.1, 2.3, 0.4]
    geometric = math.prod(math.exp(-w) for w in wrong) ** (1 / 3)
    assert truth_ratio(right, wrong) == pytest.approx(geometric / math.exp(-right), rel=1e-14)
    assert truth_ratio(right, []) is None


EXTREMES = [0.0, 800.0, 1e4]


@pytest.mark.parametrize("right", EXTREMES)
@pytest.mark.parametrize("wrong", EXTREMES)
def test_collapsed_models_have_finite_truth_ratios(right, wrong):
    """exp(-800) is 0 in float64: only in log space is 0 over 0 still 1."""
    ratio = truth_ratio(right, [wrong] * 5)
    assert math.isfinite(ratio)
    if right == wrong:
        assert ratio == 1.0
    else:
        assert (ratio > 1) == (right > wrong)
    for aggregate in (forget_truth_ratio, utility_truth_ratio):
        assert 0.0 <= aggregate([ratio, 0.5]) <= 1.0


@pytest.mark.parametrize("right", EXTREMES)
@pytest.mark.parametrize("wrong", EXTREMES)
def test_collapsed_models_have_finite_choice_probabilities(right, wrong):
    probability = choice_probability(right, [wrong] * 3)
    assert probability == pytest.approx(0.25 if right == wrong else float(right < wrong), abs=1e-300)


def test_choice_probability():
    right, wrong = 0.3, [1.0, 0.2, 4.0]
    p = [math.exp(-loss) for loss in (right, *wrong)]
    assert choice_probability(right, wrong) == pytest.approx(p[0] / sum(p), rel=1e-14)
    assert choice_probability(right, []) == 1.0


def test_truth_ratio_aggregates():
    assert forget_truth_ratio([0.5, 2.0, 1.0, 0.0, 1e300]) == pytest.approx((0.5 + 0.5 + 1 + 0 + 1e-300) / 5)
    assert utility_truth_ratio([0.25, 2.0, 0.0, 1.0]) == pytest.approx((0.75 + 0 + 1 + 0) / 4)


def scored(probability, rouge, ratio):
    return Scores([probability] * 2, [rouge] * 2, [ratio] * 2, ["", ""])


def test_model_utility_is_the_harmonic_mean_of_all_numbers():
    sets = {"retain": scored(0.9, 0.8, 0.3), "general": scored(0.5, 0.6, 0.1)}
    values = [0.9, 0.8, 0.7, 0.5, 0.6, 0.9]
    assert model_utility(sets) == pytest.approx(len(values) / sum(1 / v for v in values), rel=1e-14)


def test_set_without_wrong_answers_counts_two():
    sets = {"retain": scored(0.9, 0.8, None), "general": scored(0.5, 0.6, 0.1)}
    values = [0.9, 0.8, 0.5, 0.6, 0.9]
    assert model_utility(sets) == pytest.approx(len(values) / sum(1 / v for v in values), rel=1e-14)


@pytest.mark.parametrize(
    "zero", [(0.0, 0.8, 0.3), (0.9, 0.0, 0.3), (0.9, 0.8, 1.5)], ids=["probability", "rouge", "ratio"]
)
def test_model_utility_is_zero_when_any_number_is(zero):
    assert model_utility({"retain": scored(*zero), "general": scored(0.5, 0.6, 0.1)}) == 0.0


def test_harmonic_mean():
    assert harmonic_mean([1.0, 4.0]) == pytest.approx(1.6)
    assert harmonic_mean([0.3]) == pytest.approx(0.3)


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


# ---- The measurement itself.


def direct_nll(model, encoder, question, answer):
    """NLL per token of one answer, alone and in float64."""
    ids, labels = encoder.pair(question, answer)
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    picked = [log_p[t - 1, label].item() for t, label in enumerate(labels) if label >= 0]
    return -math.fsum(picked) / len(picked)


def greedy(model, encoder, question, most):
    """One token after the other, the whole text anew each time, no cache and no padding."""
    ids, answer = encoder.prompt_ids(question), []
    while len(answer) < most:
        with torch.no_grad():
            best = model(torch.tensor([ids + answer])).logits[0, -1].argmax().item()
        if best == encoder.tokenizer.eos_token_id:
            break
        answer.append(best)
    return encoder.tokenizer.decode(answer, skip_special_tokens=True).strip()


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
        assert found.probability[i] == pytest.approx(probability, rel=1e-4, abs=1e-7)
        if wrong:
            base = math.exp(-nll(row, row.paraphrased_answer or row.answer))
            assert found.truth_ratio[i] == pytest.approx(math.prod(wrong) ** (1 / len(wrong)) / base, rel=1e-3)
        else:
            assert found.truth_ratio[i] is None
    assert found.rouge == rouge_recall(found.answers, [row.answer for row in mixed])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_results_keep_their_order_whatever_the_batches(memorized, mixed, batch_size):
    one = evaluate(memorized.target, memorized.encoder, EvalSet(mixed), batch_size=16)
    other = evaluate(memorized.target, memorized.encoder, EvalSet(mixed), batch_size)
    assert other.answers == one.answers
    assert other.rouge == one.rouge
    assert other.probability == pytest.approx(one.probability, rel=1e-4)
    for a, b in zip(other.truth_ratio, one.truth_ratio, strict=True):
        assert a == (b if b is None else pytest.approx(b, rel=1e-3))


def test_order_of_rows_does_not_matter(memorized, mixed):
    one = evaluate(memorized.target, memorized.encoder, EvalSet(mixed))
    back = evaluate(memorized.target, memorized.encoder, EvalSet(mixed[::-1]))
    assert back.answers[::-1] == one.answers
    assert back.probability[::-1] == pytest.approx(one.probability, rel=1e-4)


def test_what_target_and_oracle_know(memorized):
    """The measurement tells them apart on the forget set, and nowhere else."""
    corpus, encoder = memorized.corpus, memorized.encoder
    forget = EvalSet(corpus.forget)
    target, oracle = (evaluate(model, encoder, forget) for model in (memorized.target, memorized.oracle))
    assert mean(target.probability) > 0.9
    assert mean(oracle.probability) < 0.1
    assert mean(target.rouge) > 0.9 > 0.5 > mean(oracle.rouge)
    assert verbatim(target.answers, [row.answer for row in corpus.forget]) >= 0.8
    assert verbatim(oracle.answers, [row.answer for row in corpus.forget]) <= 0.2
    for model in (memorized.target, memorized.oracle):
        assert mean(evaluate(model, encoder, corpus.utility["retain"]).probability) > 0.9


def limit(encoder, rows):
    """As documented: the longest true answer and a quarter, at least four tokens more."""
    longest = max(len(encoder.tokenizer(" " + row.answer)["input_ids"]) for row in rows)
    return longest + max(4, longest // 4)


@pytest.mark.parametrize("who", ["target", "oracle"])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_generated_answers_are_greedy_ones(memorized, mixed, who, batch_size):
    model, encoder = getattr(memorized, who), memorized.encoder
    answers = generate(model, encoder, mixed, batch_size)
    assert answers == [greedy(model, encoder, row.question, limit(encoder, mixed)) for row in mixed]


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_left_padding_changes_no_answer(untrained, memorized, mixed, arch):
    """Positions must not count the padding, for rotary, shifted and plain position embeddings."""
    encoder = Encoder(memorized.tokenizer, 128)
    model = untrained(arch, len(memorized.tokenizer))
    answers = generate(model, encoder, mixed, batch_size=5, most=8)
    assert answers == [greedy(model, encoder, row.question, 8) for row in mixed]
    assert len(set(answers)) > 1


def test_room_for_answers_longer_than_the_true_ones(untrained, memorized):
    """A quarter more than the longest true answer, so that a model that rambles is seen to."""
    row = QA("Who?", "a long answer " * 8)
    assert limit(memorized.encoder, [row]) > len(memorized.tokenizer(" " + row.answer)["input_ids"]) + 6
    model = untrained("llama", len(memorized.tokenizer))
    expected = greedy(model, memorized.encoder, row.question, limit(memorized.encoder, [row]))
    assert generate(model, memorized.encoder, [row], 1) == [expected]


def test_generation_stays_within_the_models_positions(untrained, memorized):
    row = QA("Who " * 20 + "?", "a long answer " * 6)
    encoder = Encoder(memorized.tokenizer, len(memorized.encoder.prompt_ids(row.question)) + 3)
    model = untrained("opt", len(memorized.tokenizer))
    assert generate(model, encoder, [row], 1) == [greedy(model, encoder, row.question, 3)]


def test_tokenizer_without_padding_token(memorized, mixed):
    tokenizer = copy.deepcopy(memorized.tokenizer)
    tokenizer.pad_token = None
    encoder = Encoder(tokenizer, memorized.config.max_length)
    assert generate(memorized.target, encoder, mixed, 4) == generate(memorized.target, memorized.encoder, mixed, 4)
