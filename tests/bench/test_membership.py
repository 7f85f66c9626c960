"""Membership inference on the default demo models: the target gives its training data away, the oracle does not."""

import pytest
from remanence.bench.privacy import ATTACKS, auc_interval, gradient_norm, reference
from remanence.bench.tokens import answers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def demo():
    """The models of `make audit` (seed 0): corpus, encoder, target and oracle; a minute and a half each."""
    from types import SimpleNamespace

    from remanence.unlearn.demo import DemoConfig, demo_tokenizer, train_demo
    from remanence.unlearn.encode import Encoder
    from remanence.unlearn.people import people_corpus

    corpus, config = people_corpus(80, "forget10", seed=0), DemoConfig()
    tokenizer = demo_tokenizer(corpus, config)
    target, oracle = (train_demo(corpus, config, tokenizer, 0, seen)[0] for seen in (True, False))
    return SimpleNamespace(
        forget=[(row.question, row.answer) for row in corpus.forget],
        holdout=[(row.question, row.answer) for row in corpus.holdout],
        encoder=Encoder(tokenizer, config.max_length),
        target=target,
        oracle=oracle,
    )


def attacked(demo, model):
    """AUC with its interval, by attack."""
    sets = {}
    for name, pairs in (("forget", demo.forget), ("holdout", demo.holdout)):
        scored, expected = (answers(m, demo.encoder, pairs) for m in (model, demo.oracle))
        sets[name] = {
            attack: [of(answer, pair[1]) for answer, pair in zip(scored, pairs, strict=True)]
            for attack, of in ATTACKS.items()
        }
        sets[name]["gradient_norm"] = gradient_norm(model, demo.encoder, pairs)
        sets[name]["reference"] = [reference(*both) for both in zip(scored, expected, strict=True)]
    return {attack: auc_interval(sets["forget"][attack], sets["holdout"][attack]) for attack in sets["forget"]}


def test_the_target_gives_its_members_away(demo):
    for attack, found in attacked(demo, demo.target).items():
        print(f"target, {attack}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")
        # Held-out people have the members' answers: against the oracle these too are likelier than they should be.
        least = 0.75 if attack == "reference" else 0.9
        assert found.value >= least, attack
        assert found.low > least - 0.1, attack


def test_the_oracle_does_not(demo):
    for attack, found in attacked(demo, demo.oracle).items():
        print(f"oracle, {attack}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")
        assert 0.45 <= found.value <= 0.55, attack
        assert found.low < 0.5 < found.high, attack
