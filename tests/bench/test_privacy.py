"""Membership inference against plain NumPy; the AUC against all pairs; what its interval and PrivLeak claim."""

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from remanence.bench.privacy import (
    ATTACKS,
    auc,
    auc_interval,
    gradient_norm,
    min_k,
    min_k_plus_plus,
    privleak,
    reference,
)
from remanence.bench.tofu import FLOOR
from remanence.bench.tokens import Answer, answers
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_
from remanence.unlearn.encode import IGNORE
from remanence.unlearn.people import people_corpus
from scipy import stats

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the amber lantern, on kites; größer als 7"


def made_up(rng, n):
    """An answer of n tokens, one of them where the model was certain (deviation 0)."""
    log_p, mean = (torch.tensor(-rng.exponential(2, n), dtype=torch.float32) for _ in range(2))
    deviation = torch.tensor(rng.exponential(1, n), dtype=torch.float32)
    deviation[0] = 0
    return Answer(log_p, log_p > -0.5, mean, deviation, True)


def plain_scores(log_p, mean, deviation, text, share=0.4):
    """All attacks of the table, in NumPy float64."""
    lowest = max(1, int(share * len(log_p)))
    z = (log_p - mean) / np.maximum(deviation, 1e-3)
    return {
        "loss": log_p.sum() / len(log_p),
        "zlib": log_p.sum() / len(log_p) / len(zlib.compress(text.encode("utf-8"))),
        "min_k": sum(sorted(log_p)[:lowest]) / lowest,
        "min_k_plus_plus": sum(sorted(z)[:lowest]) / lowest,
    }


@pytest.mark.parametrize("n", [1, 2, 3, 5, 40])
def test_attacks_are_the_plain_formulas(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        answer = made_up(rng, n)
        columns = [column.double().numpy() for column in (answer.log_p, answer.mean, answer.deviation)]
        expected = plain_scores(*columns, TEXT)
        assert {name: attack(answer, TEXT) for name, attack in ATTACKS.items()} == pytest.approx(expected, rel=1e-12)
        fifth = plain_scores(*columns, TEXT, 0.2)
        assert min_k(answer, share=0.2) == pytest.approx(fifth["min_k"], rel=1e-12)
        assert min_k_plus_plus(answer, share=0.2) == pytest.approx(fifth["min_k_plus_plus"], rel=1e-12)
        other = made_up(rng, n)
        difference = -other.log_p.double().mean() - -answer.log_p.double().mean()
        assert reference(answer, other) == pytest.approx(float(difference), rel=1e-12)


def test_a_text_that_compresses_well_must_be_likelier():
    answer = made_up(np.random.default_rng(0), 6)
    assert ATTACKS["zlib"](answer, "ab" * 50) < ATTACKS["zlib"](answer, "".join(map(chr, range(200, 300))))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_refuse_an_answer_without_tokens(attack):
    with pytest.raises(ValueError, match="answer: no tokens"):
        ATTACKS[attack](made_up(np.random.default_rng(0), 1).__class__(*[torch.zeros(0)] * 4, True), "")


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_min_k_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match=r"share: .* is not in \(0, 1\]"):
        min_k(made_up(np.random.default_rng(0), 5), share=share)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_scores_of_a_model_in_plain_numpy_whatever_the_batch(untrained, memorized, arch):
    # Not sharply wrong: log-probabilities of -100 would leave float32 little to agree on.
    model = untrained(arch, vocabulary=512, std=0.08)
    rows = memorized.corpus.forget[:3] + memorized.corpus.retain[:12]
    pairs = [(row.question, row.answer) for row in rows] + [("", row.question) for row in rows]
    expected = []
    for question, text in pairs:
        ids, labels = memorized.encoder.pair(question, text)
        with torch.no_grad():
            z = model(torch.tensor([ids])).logits[0].double().numpy()
        log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        p = np.exp(log_p)
        mean = (p * log_p).sum(1)
        deviation = np.sqrt((p * log_p**2).sum(1) - mean**2)
        at = [i for i in range(1, len(ids)) if labels[i] != IGNORE]
        before = [i - 1 for i in at]
        expected.append(plain_scores(log_p[before, [ids[i] for i in at]], mean[before], deviation[before], text))
    for batch_size in (1, 4, 64):
        for (_, text), one, plain in zip(
            pairs, answers(model, memorized.encoder, pairs, batch_size), expected, strict=True
        ):
            for name, attack in ATTACKS.items():
                # 1e-4 nats is what a batch may change in float32 (see bench/tokens.py), here as a share of several.
                assert attack(one, text) == pytest.approx(plain[name], rel=1e-4), name


def plain_gradient_norm(model, encoder, pair):
    """By backward(), on a copy of the model in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    ids, labels = encoder.pair(*pair)
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(1)
    at = [i for i in range(1, len(ids)) if labels[i] != IGNORE]
    (-sum(log_p[i - 1, ids[i]] for i in at) / len(at)).backward()
    return np.mean([np.sqrt((p.grad.numpy() ** 2).sum()) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_gradient_norm_is_autograds(untrained, memorized, arch):
    model = untrained(arch, vocabulary=512, std=0.08)
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget[:3]] + [("", "Some running text of our own")]
    expected = [-plain_gradient_norm(model, memorized.encoder, pair) for pair in pairs]
    assert gradient_norm(model, memorized.encoder, pairs) == pytest.approx(expected, rel=1e-4)


def test_gradient_norm_leaves_the_model_as_it_was(untrained, memorized):
    model = untrained("gpt2", vocabulary=512)
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget[:2]]
    plain = gradient_norm(model, memorized.encoder, pairs)
    model.train()
    model.transformer.h[1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        # Dropout (GPT-2 has it) and a frozen embedding must not show.
        assert gradient_norm(model, memorized.encoder, pairs) == plain
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert bool((parameters[1].grad == 1).all())
    assert all(p.grad is None for i, p in enumerate(parameters) if i != 1)


def test_gradient_norm_goes_through_quantized_layers(memorized):
    pairs = [(row.question, row.answer) for row in [*memorized.corpus.forget, *memorized.corpus.holdout]]
    model = copy.deepcopy(memorized.target)
    quantize_(model, parse_recipe("rtn-w4-g32-plain"))
    scores = gradient_norm(model, memorized.encoder, pairs)
    half = len(memorized.corpus.forget)
    assert auc(scores[:half], scores[half:]) > 0.9


def test_gradient_norm_without_gradients_says_so(memorized):
    class Constant(torch.nn.Module):
        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 512, requires_grad=True)
            return type("Output", (), {"logits": logits})

        def parameters(self, recurse=True):  # noqa: ARG002
            yield from [torch.nn.Parameter(torch.zeros(2))]

    with pytest.raises(ValueError, match="no parameter has a gradient"):
        gradient_norm(Constant(), memorized.encoder, [("Who?", "nobody")])


def test_a_model_that_broke_tells_nothing(memorized):
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    members, others = (
        [(row.question, row.answer) for row in rows] for rows in (memorized.corpus.forget, memorized.corpus.holdout)
    )
    assert set(gradient_norm(model, memorized.encoder, members)) == {FLOOR}
    scored = [answers(model, memorized.encoder, pairs) for pairs in (members, others)]
    for name in ("loss", "min_k", "min_k_plus_plus"):
        sides = [[ATTACKS[name](a, "") for a in side] for side in scored]
        assert auc(*sides) == 0.5, name


def all_pairs(members, others):
    return np.mean([[(a > b) + (a == b) / 2 for b in others] for a in members])


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (8, 1), (13, 29), (40, 40)])
def test_auc_is_over_all_pairs(m, n):
    rng = np.random.default_rng(m * 100 + n)
    for step in (0, 0.5, 2):  # more and more ties
        members, others = rng.normal(0.5, 1, m), rng.normal(0, 1, n)
        if step:
            members, others = np.round(members / step), np.round(others / step)
        found = auc(members.tolist(), others.tolist())
        assert found == pytest.approx(all_pairs(members, others), abs=1e-14)
        assert found == pytest.approx(stats.mannwhitneyu(members, others).statistic / (m * n), abs=1e-14)
        assert auc(others, members) == pytest.approx(1 - found, abs=1e-14)
        assert auc(np.exp(members), np.exp(others)) == found, "only the order counts"


def test_auc_at_its_ends():
    assert auc([0.3] * 9, [0.3] * 4) == 0.5
    assert auc([1, 2, 3], [0, -1]) == 1
    assert auc([-math.inf], [0, math.inf]) == 0
    assert auc([-math.inf], [-math.inf]) == 0.5
    # More pairs than memory would hold as a matrix.
    assert auc(np.arange(300_000), np.arange(300_000) - 0.5) == pytest.approx(0.5 + 0.5 / 300_000, abs=1e-15)


@pytest.mark.parametrize("measure", [auc, auc_interval])
def test_auc_says_what_it_cannot_take(measure):
    with pytest.raises(ValueError, match="non_members: none"):
        measure([1.0], [])
    with pytest.raises(ValueError, match=r"^members: none"):
        measure([], [1.0])
    with pytest.raises(ValueError, match="non_members: item 1 is NaN"):
        measure([1.0], [0.0, math.nan])


def normal(rng, m, n, truth, spread):
    return rng.normal(stats.norm.ppf(truth) * math.hypot(1, spread), spread, m), rng.normal(0, 1, n)


def partly_forgotten(rng, m, n, truth):
    forgotten = rng.random(m) < 2 * (1 - truth)
    return np.where(forgotten, rng.normal(0, 1, m), 50), rng.normal(0, 1, n)


@pytest.mark.parametrize("truth", [0.5, 0.75, 0.95, 0.99])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (40, 200)])
def test_the_interval_covers(truth, m, n):
    rng = np.random.default_rng(5)
    draws = 400
    for make in (
        lambda: normal(rng, m, n, truth, 1),
        lambda: normal(rng, m, n, truth, 3),
        lambda: partly_forgotten(rng, m, n, truth),
    ):
        covered = 0
        for _ in range(draws):
            interval = auc_interval(*make())
            assert 0 <= interval.low <= interval.value <= interval.high <= 1
            covered += interval.low <= truth <= interval.high
        # 0.95 less three standard errors of 400 draws.
        assert covered / draws > 0.917


def test_the_interval_is_the_textbook_one_for_many_rows():
    rng = np.random.default_rng(3)
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 2, 2000)
    wins = members[:, None] > others
    deviation = math.sqrt(wins.mean(1).var(ddof=1) / 3000 + wins.mean(0).var(ddof=1) / 2000)
    found = auc_interval(members, others)
    assert found.value == auc(members, others)
    assert [found.low, found.high] == pytest.approx(
        [found.value - 1.96 * deviation, found.value + 1.96 * deviation], abs=5e-4
    )


def test_the_interval_never_claims_certainty():
    previous = 0.0
    for rows in (2, 5, 10, 40, 200):
        separated = auc_interval(range(rows, 2 * rows), range(rows))
        assert (separated.value, separated.high) == (1, 1)
        # A share of 1 - 0.025^(1/n) of forgotten members goes unseen among n of them with a chance of 2.5 %.
        assert previous < separated.low <= 0.025 ** (1 / rows)
        mirrored = auc_interval(range(rows), range(rows, 2 * rows))
        assert (mirrored.low, mirrored.value) == (0, 0)
        assert mirrored.high == pytest.approx(1 - separated.low, abs=1e-12)
        previous = separated.low
    assert previous > 0.97, "nor does it say nothing"
    one_lost = auc_interval([-1, *range(40, 79)], range(40))
    assert one_lost.low < auc_interval(range(40, 80), range(40)).low, "a pair out of order cannot make it surer"


def test_the_interval_of_ties_and_of_one_row():
    for rows in (2, 40):
        same = auc_interval([7] * rows, [7] * rows)
        assert same.low < same.value == 0.5 < same.high
    for members, others, value in (([1], [0] * 50, 1), ([1] * 50, [2], 0), ([3], [3], 0.5)):
        interval = auc_interval(members, others)
        assert (interval.low, interval.value, interval.high) == (0, value, 1)


def muse_auc(forget, held_out):
    """As MUSE has it: a ROC curve over -loss in which held-out rows are the positive ones."""
    return np.mean([[(-b > -a) + (a == b) / 2 for b in held_out] for a in forget])


def test_privleak_is_muses():
    rng = np.random.default_rng(0)
    for shift in (-2, 0, 0.3, 3):
        # Losses, as in MUSE: lower is more likely a member.
        unlearned, oracle, held_out = rng.normal(shift, 1, 30), rng.normal(0.2, 1, 30), rng.normal(0, 1, 25)
        theirs = [muse_auc(side, held_out) for side in (unlearned, oracle)]
        expected = 100 * (theirs[0] - theirs[1]) / theirs[1]
        ours = [auc(-side, -held_out) for side in (unlearned, oracle)]
        assert privleak(*ours) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("oracle", "published"),
    [
        (0.47719999999999996, {9: -99.81, 668: -86.00, 663: -86.11, 9221: 93.23}),
        (0.5392999999999999, {2305: -57.26, 2468: -54.24, 2467: -54.26, 3355: -37.79, 5357: -0.67}),
    ],
    ids=["news", "books"],
)
def test_privleak_gives_published_values(oracle, published):
    """MUSE's AUC of the retrained model, and the values of open-unlearning's table (the target, NPO, SimNPO, GradDiff
    or GA) beside the number of pairs, of 100 x 100 texts, that gives them; the AUCs themselves are not published."""
    for pairs, value in published.items():
        assert round(privleak(1 - pairs / 10_000, 1 - oracle), 2) == value


def test_privleaks_sign():
    assert privleak(0.7, 0.7) == 0
    assert privleak(1.0, 0.5) == -100, "all of it is still known"
    assert privleak(0.0, 0.5) == 100, "less likely than what was never seen"


def test_privleak_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="auc_oracle: 1; MUSE's AUC of the oracle is 0"):
        privleak(0.5, 1.0)
    with pytest.raises(ValueError, match=r"auc_unlearned: 47.7 is not in 0\.\.1"):
        privleak(47.7, 0.5)
    with pytest.raises(ValueError, match=r"auc_oracle: nan is not in 0\.\.1"):
        privleak(0.5, math.nan)


def test_the_target_gives_its_members_away_and_the_oracle_does_not(memorized):
    # The same world's two strangers instead of the corpus's one.
    strangers = people_corpus(6, "forget34", seed=0).holdout
    assert strangers[:5] == memorized.corpus.holdout
    sides = [[(row.question, row.answer) for row in rows] for rows in (memorized.corpus.forget, strangers)]
    for name, model in (("target", memorized.target), ("oracle", memorized.oracle)):
        scored = [answers(model, memorized.encoder, pairs) for pairs in sides]
        found = {
            attack: [
                [score(answer, text) for answer, (_, text) in zip(side, pairs, strict=True)]
                for side, pairs in zip(scored, sides, strict=True)
            ]
            for attack, score in ATTACKS.items()
        }
        found["gradient_norm"] = [gradient_norm(model, memorized.encoder, pairs) for pairs in sides]
        for attack, (members, others) in found.items():
            interval = auc_interval(members, others)
            if name == "target":
                assert interval.value >= 0.9, attack
            else:
                assert interval.low < 0.5 < interval.high, attack
