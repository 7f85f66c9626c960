"""Every loss against sums written out in float64, token by token."""

import math

import pytest
import torch
from remanence.unlearn.encode import IGNORE
from remanence.unlearn.losses import answer_nll, grad_diff, nll, npo

V = 11
# Prompt length and answer length of each row: answers of unlike length, one of a single token.
SHAPES = [(3, 4), (1, 9), (6, 1)]

# Losses are float32 sums of at most 14 terms of a few nats: some roundings of 2^-24 each.
RELATIVE = 1e-6


def example(shapes=SHAPES, seed=0, scale=3.0, pad=0):
    """(logits [B, T, V] float32, labels [B, T]) padded to the longest and by `pad` more."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, shapes)) + pad
    logits = scale * torch.randn(len(shapes), width, V, generator=generator)
    labels = torch.full((len(shapes), width), IGNORE)
    for row, (prompt, answer) in enumerate(shapes):
        labels[row, prompt : prompt + answer] = torch.randint(0, V, (answer,), generator=generator)
    return logits, labels


def by_hand(logits, labels):
    """[(summed NLL, tokens)] per row, with plain Python floats."""
    rows = []
    for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        total, tokens = 0.0, 0
        for t in range(1, len(row_labels)):
            if row_labels[t] != IGNORE:
                z = row_logits[t - 1]  # position t - 1 predicts token t
                peak = max(z)
                total += peak + math.log(math.fsum(math.exp(v - peak) for v in z)) - z[row_labels[t]]
                tokens += 1
        rows.append((total, tokens))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_answer_nll_is_the_sum_over_the_answer(dtype):
    logits, labels = example()
    logits = logits.to(dtype)
    total, tokens = answer_nll(logits, labels)
    expected = by_hand(logits.double(), labels)
    assert total.dtype == torch.float32, "half precision logits are summed in float32"
    assert tokens.tolist() == [4, 9, 1]
    assert total.tolist() == pytest.approx([value for value, _ in expected], rel=RELATIVE)


def test_first_token_has_no_prediction():
    """A label at position 0 is predicted by nothing: neither its loss nor its count."""
    logits, labels = example([(0, 5)])
    total, tokens = answer_nll(logits, labels)
    assert tokens.tolist() == [4]
    assert total.item() == pytest.approx(by_hand(logits, labels)[0][0], rel=RELATIVE)


def test_nll_is_the_mean_over_all_tokens():
    logits, labels = example()
    rows = by_hand(logits, labels)
    expected = sum(total for total, _ in rows) / sum(tokens for _, tokens in rows)
    assert nll(logits, labels).item() == pytest.approx(expected, rel=RELATIVE)
    # Not the mean over answers: the nine-token answer weighs nine times the one-token answer.
    assert nll(logits, labels).item() != pytest.approx(sum(a / b for a, b in rows) / len(rows), rel=0.01)


def test_long_answers_weigh_more():
    """Two answers, every token of the long one likely, the short one's not: the long one decides."""
    logits = torch.zeros(2, 11, V)
    labels = torch.full((2, 11), IGNORE)
    labels[0, 1:11], labels[1, 1] = 0, 0
    logits[0, :, 0] = 30.0
    short = math.log(V)
    assert nll(logits, labels).item() == pytest.approx(short / 11, rel=1e-5)


@pytest.mark.parametrize("pad", [1, 7])
@pytest.mark.parametrize("filler", [0.0, 50.0, -1e4], ids=["zeros", "peaks", "far"])
def test_padding_changes_nothing(pad, filler):
    logits, labels = example()
    wider = torch.cat([logits, torch.full((3, pad, V), filler)], 1)
    wider[:, logits.shape[1] :, 2] += 5.0
    more = torch.cat([labels, torch.full((3, pad), IGNORE)], 1)
    reference = torch.tensor([5.0, 20.0, 1.0])
    for value, padded in zip(answer_nll(logits, labels), answer_nll(wider, more), strict=True):
        torch.testing.assert_close(padded, value, rtol=RELATIVE, atol=0)
    torch.testing.assert_close(nll(wider, more), nll(logits, labels), rtol=RELATIVE, atol=0)
    torch.testing.assert_close(
        npo(answer_nll(wider, more)[0], reference), npo(answer_nll(logits, labels)[0], reference), rtol=RELATIVE, atol=0
    )


def test_padding_gets_no_gradient():
    logits, labels = example(pad=4)
    logits.requires_grad_()
    total, _ = answer_nll(logits, labels)
    (nll(logits, labels) + npo(total, torch.zeros(3))).backward()
    for row, (prompt, answer) in enumerate(SHAPES):
        used = torch.zeros(logits.shape[1], dtype=torch.bool)
        used[prompt - 1 : prompt + answer - 1] = True
        assert (logits.grad[row][~used] == 0).all()
        assert (logits.grad[row][used].abs().sum(1) > 0).all()


@pytest.mark.parametrize("gamma", [1.0, 0.15])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_grad_diff(gamma, alpha):
    forget, retain = example(seed=1), example([(2, 3), (4, 8)], seed=2)
    rows_f, rows_r = by_hand(*forget), by_hand(*retain)
    mean_f, mean_r = (sum(a for a, _ in rows) / sum(b for _, b in rows) for rows in (rows_f, rows_r))
    value = grad_diff(nll(*forget), nll(*retain), gamma, alpha)
    assert value.item() == pytest.approx(-gamma * mean_f + alpha * mean_r, rel=RELATIVE, abs=1e-5)


def npo_by_hand(values, reference, beta):
    """-(2/beta) mean log sigmoid(beta (l - l_ref)) = (2/beta) mean log(1 + (pi / pi_ref)^beta)."""
    terms = []
    for l, l_ref in zip(values, reference, strict=True):
        x = -beta * (l - l_ref)
        terms.append(x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)))
    return 2 / beta * math.fsum(terms) / len(terms)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_npo(beta):
    values, reference = [0.3, 12.0, 55.0, 7.0], [2.0, 11.0, 1.0, 7.0]
    value = npo(torch.tensor(values, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64), beta)
    assert value.item() == pytest.approx(npo_by_hand(values, reference, beta), rel=1e-13)


def test_npo_takes_the_sum_of_each_answer_not_its_mean():
    """From logits, with answers of 4, 9 and 1 tokens: a token mean would give another number."""
    logits, labels = example()
    start, _ = example(seed=3)
    rows, reference = by_hand(logits, labels), by_hand(start, labels)
    value = npo(answer_nll(logits, labels)[0], answer_nll(start, labels)[0], beta=0.5).item()
    assert value == pytest.approx(npo_by_hand([a for a, _ in rows], [a for a, _ in reference], 0.5), rel=RELATIVE)
    means = npo_by_hand([a / b for a, b in rows], [a / b for a, b in reference], 0.5)
    assert value != pytest.approx(means, rel=0.05)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_npo_starts_at_two_over_beta_log_two_with_the_gradient_of_ascent(beta):
    """At theta = ref every answer pulls with weight 2 sigmoid(0) = 1, whatever beta."""
    values = torch.tensor([3.0, 40.0, 0.1], dtype=torch.float64, requires_grad=True)
    value = npo(values, values.detach().clone(), beta)
    value.backward()
    assert value.item() == pytest.approx(2 / beta * math.log(2), rel=1e-14)
    assert values.grad.tolist() == pytest.approx([-1 / 3] * 3, rel=1e-14)


@pytest.mark.parametrize("start", [0.0, -5.0, 30.0])
def test_npo_becomes_gradient_ascent_for_small_beta(start):
    """Away from the start too: with beta -> 0 the gradient is that of -mean(l), by 1 - beta (l - l_ref) / 2."""
    values = torch.tensor([3.0, 40.0, 9.0], dtype=torch.float64, requires_grad=True)
    for beta in (1e-2, 1e-4, 1e-6):
        (gradient,) = torch.autograd.grad(npo(values, values.detach() - start, beta), values)
        assert gradient.tolist() == pytest.approx([-1 / 3] * 3, rel=abs(beta * start) + 1e-12)


def test_npo_is_bounded_below_and_its_pull_fades():
    """Unlike gradient ascent: an answer that is forgotten is left alone."""
    reference = torch.zeros(1, dtype=torch.float64)
    last = math.inf
    for gone in (0.0, 10.0, 100.0, 1e3, 1e6):
        value = torch.tensor([gone], dtype=torch.float64, requires_grad=True)
        loss = npo(value, reference)
        loss.backward()
        assert 0 <= loss.item() <= last
        assert value.grad.item() == pytest.approx(-2 / (1 + math.exp(min(700, 0.1 * gone))), rel=1e-9, abs=1e-40)
        last = loss.item()
    assert last == pytest.approx(0.0, abs=1e-30)


def test_npo_stays_finite_far_away():
    for difference in (-1e5, 1e5):
        value = torch.tensor([difference], requires_grad=True)
        loss = npo(value, torch.zeros(1))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(value.grad).all()
