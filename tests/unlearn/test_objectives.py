"""What is minimized is what the papers say: every term of every objective against plain float64, one answer at a time.

The references here share no code with the losses: NumPy on the logits of a double-precision model that sees one
unpadded answer after the other.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from remanence.compress.knobs import PLAIN_RTN
from remanence.compress.recipe import parse_recipe
from remanence.compress.rtn import rtn
from remanence.compress.walk import linears, storage_dtype
from remanence.unlearn.catalog import MethodConfig
from remanence.unlearn.encode import IGNORE, Batch
from remanence.unlearn.feed import Feed
from remanence.unlearn.methods import unlearn
from remanence.unlearn.objectives import OBJECTIVES, Run, build, refusing, rmu_layer
from remanence.unlearn.refusals import REFUSALS
from remanence.unlearn.train import Guards, Schedule, fit
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FREE = Guards(math.inf, math.inf)  # no value is a divergence here


@pytest.fixture(scope="module")
def pairs(memorized):
    """(question, answer) by set: four to forget, each with a refusal, and six to keep."""
    corpus = memorized.corpus
    forget = [(row.question, row.answer) for row in corpus.forget[:4]]
    return {
        "forget": forget,
        "retain": [(row.question, row.answer) for row in corpus.retain[::9][:6]],
        "idk": [(question, line) for (question, _), line in zip(forget, REFUSALS)],
    }


def start_run(memorized, pairs, model, config, seed=0):
    """A Run whose updates have all rows of each set."""
    sizes = {"forget": config.forget_batch, "retain": config.retain_batch}
    feed = Feed(memorized.encoder, pairs, sizes, seed, {"idk": "forget"})
    return Run(model, model, feed, config, seed)


def config_for(**asked):
    return MethodConfig(**{"steps": 1, "forget_batch": 4, "retain_batch": 6, **asked})


def moved_(model, seed=1, scale=0.02):
    """Every weight a little elsewhere, so that the model is not its own reference any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * parameter.abs().mean() * noise * (parameter.dim() > 1) * 5


# --- float64, one answer at a time ------------------------------------------------------------------------------------


class Answer:
    """One answer as a double-precision model sees it: z [n, V] logits, y [n] targets, log_p, p, h [T, d] by layer."""

    def __init__(self, model, ids, labels):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        at = [t for t in range(1, len(labels)) if labels[t] != IGNORE]
        self.z = out.logits[0, [t - 1 for t in at]].double().numpy()
        self.y = np.array([labels[t] for t in at])
        self.log_p = self.z - logsumexp(self.z)
        self.p = np.exp(self.log_p)
        self.own = self.log_p[np.arange(len(at)), self.y]  # log-probability of each token
        self.h = [layer[0].double().numpy() for layer in out.hidden_states[1:]]

    @property
    def nll(self):
        return -self.own.sum()


def logsumexp(z):
    peak = z.max(-1, keepdims=True)
    return peak + np.log(np.exp(z - peak).sum(-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def answers(model, memorized, pairs, labels=None):
    """Answer of every pair, at a copy of `model` in double precision (which mixtures of experts cannot take)."""
    exact = copy.deepcopy(model).eval()
    exact = exact if model.config.model_type == "mixtral" else exact.double()
    encoded = [memorized.encoder.pair(*pair) for pair in pairs]
    return [Answer(exact, ids, labels[i] if labels else own) for i, (ids, own) in enumerate(encoded)]


def token_mean(values):
    return float(np.concatenate(values).mean())


def answer_mean(values):
    return float(np.mean(values))


def refusing_by_hand(memorized, pairs):
    """The labels of the forget answers, each token replaced by the refusal's in turn."""
    labels = []
    for forget, idk in zip(pairs["forget"], pairs["idk"]):
        own, refusal = memorized.encoder.pair(*forget)[1], memorized.encoder.pair(*idk)[1]
        tokens = [label for label in refusal if label != IGNORE]
        at = [t for t, label in enumerate(own) if label != IGNORE]
        labels.append([tokens[at.index(t) % len(tokens)] if t in at else IGNORE for t in range(len(own))])
    return labels


def js(p, q):
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left, right = (np.where(a > 0, a * np.log(a / m), 0.0).sum(-1) for a in (p, q))
    return (left + right) / 2


def expected(name, s):
    """Terms of objective `name` by hand. s: now and ref (answers by set, of both models), config, and a few more."""
    c, now, ref = s.config, s.now, s.ref
    b = c.beta

    def weighted(weight):
        return -token_mean([weight(np.exp(a.own)) * -a.own for a in now["forget"]])

    def sums(model, part="forget"):
        return np.array([a.nll for a in model[part]])

    def npo():
        return answer_mean(-(2 / b) * np.log(sigmoid(b * (sums(now) - sums(ref)))))

    def flat(g, conjugate):
        won, lost = (np.array([np.exp(a.own).mean() for a in now[part]]) for part in ("idk", "forget"))
        return answer_mean(conjugate(g(lost)) - g(won))

    def own(a, values):
        return values[np.arange(len(a.y)), a.y]

    def others(a):
        z = a.z.copy()
        z[np.arange(len(a.y)), a.y] = -np.inf
        return np.exp(z - logsumexp(z))

    def without(a):
        p = a.p.copy()
        p[np.arange(len(a.y)), a.y] = -1
        return p.max(1)

    def teacher(a, r):
        z = r.z.copy()
        z[np.arange(len(a.y)), a.y] -= b
        return np.exp(z - logsumexp(z))

    def onehot(a):
        return np.eye(a.z.shape[1])[a.y]

    nll_f, nll_r = (token_mean([-a.own for a in now[part]]) for part in ("forget", "retain"))
    K = max(0.0, float(np.mean(sums(ref, "idk") - sums(now, "idk"))))
    win, lose = (sums(ref, part) - sums(now, part) for part in ("idk", "forget"))
    forget = {
        "ga": lambda: -nll_f,
        "task-vector": lambda: nll_f,
        "idk": lambda: token_mean([-a.own for a in now["idk"]]),
        "npo": npo,
        "bucketed": npo,
        "quail": npo,
        "uoe": npo,
        "simnpo": lambda: answer_mean(
            [-(2 / b) * math.log(sigmoid(b * (a.nll / len(a.y) - c.delta))) for a in now["forget"]]
        ),
        "dpo": lambda: answer_mean(-(2 / b) * np.log(sigmoid(b * (win - lose)))),
        "kto": lambda: answer_mean(1 - sigmoid(b * (K - (sums(ref) - sums(now))))),
        "wga": lambda: weighted(lambda p: p**b),
        "satimp": lambda: weighted(lambda p: p**b * (1 - p) ** c.beta2),
        "undial": lambda: token_mean([-(teacher(a, r) * a.log_p).sum(1) for a, r in zip(now["forget"], ref["forget"])]),
        "ceu": lambda: token_mean([-(others(a) * a.log_p).sum(1)[c.skip :] for a in now["forget"]]),
        "pdu": lambda: token_mean([(a.z.max(1) - a.z.mean(1)) ** 2 for a in now["forget"]]),
        "flat-kl": lambda: flat(lambda P: P, lambda u: np.exp(u - 1)),
        "flat-tv": lambda: flat(lambda P: np.tanh(P) / 2, lambda u: u),
        "flat-js": lambda: flat(lambda P: np.log(2 / (1 + np.exp(-P))), lambda u: -np.log(2 - np.exp(u))),
        "flat-pearson": lambda: flat(lambda P: P, lambda u: u**2 / 4 + u),
        "ihl": lambda: token_mean([np.maximum(0, 1 + own(a, a.p) - without(a)) for a in now["forget"]]),
        "jensun": lambda: token_mean([js(onehot(a), a.p) for a in s.refusing]),
        "rmu": lambda: token_mean([((a.h[0] - s.direction) ** 2).mean(1) for a in now["forget"]]),
    }
    retain = {
        "rmu": lambda: token_mean([((a.h[0] - r.h[0]) ** 2).mean(1) for a, r in zip(now["retain"], ref["retain"])]),
        "jensun": lambda: token_mean([js(r.p, a.p) for a, r in zip(now["retain"], ref["retain"])]),
    }
    terms = {"forget": forget[name]()}
    if name != "task-vector":
        terms["retain"] = retain.get(name, lambda: nll_r)()
    return terms


def measured(memorized, pairs, name, config, *, moved, micro_batch, model=None):
    """(record of one update, what the hand says) with references from the start and weights `moved` since or not."""
    model = copy.deepcopy(memorized.target if model is None else model)
    start = copy.deepcopy(model)
    config = replace(config, micro_batch=micro_batch or 0)  # what is taken of the start model goes through it so too
    objective = build(name, start_run(memorized, pairs, model, config))
    if moved:
        moved_(model)
    now, ref = ({part: answers(m, memorized, pairs[part]) for part in pairs} for m in (model, start))
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(model.config.hidden_size, generator=generator).double()
    s = SimpleNamespace(
        config=config,
        now=now,
        ref=ref,
        start=start,
        model=copy.deepcopy(model),
        refusing=answers(model, memorized, pairs["forget"], refusing_by_hand(memorized, pairs)),
        direction=(config.coefficient * u / u.norm()).numpy(),
        answers=lambda other: answers(other, memorized, pairs["forget"]),
    )
    feed = start_run(memorized, pairs, model, config).feed
    record, *_ = fit(model, objective, feed, Schedule(1, 1e-12), micro_batch=micro_batch, guards=FREE)
    return record, s


# Not the usual values, so that each setting is seen to arrive.
ASKED = {"dpo": {"beta": 0.07}, "simnpo": {"beta": 4.5, "delta": 0.3}, "undial": {"beta": 10.0}, "ceu": {"skip": 2}}
ASKED |= {"wga": {"beta": 0.7}, "satimp": {"beta": 5.0, "beta2": 0.5}, "rmu": {"layer": 0}}


@pytest.mark.parametrize(
    ("moved", "micro_batch"), [(False, None), (True, None), (True, 3)], ids=["start", "on", "split"]
)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "uoe"])
def test_every_term_is_what_the_paper_says(memorized, pairs, name, moved, micro_batch):
    config = config_for(**ASKED.get(name, {}), gamma=0.7, alpha=1.5)
    record, s = measured(memorized, pairs, name, config, moved=moved, micro_batch=micro_batch)
    terms = expected(name, s)
    if name == "quail":
        margin = margin_by_hand(s, parse_recipe(config.against))
        hinge = [np.maximum(0, margin - np.abs(a.z - r.z)).mean(1) for a, r in zip(s.now["forget"], s.ref["forget"])]
        terms["margin"] = token_mean(hinge)
    assert record.keys() - {"loss", "gradient_norm"} == terms.keys()
    for term, value in terms.items():
        # The trained model runs in float32: 1e-6 a logit, and a summed NLL has tens of them.
        assert record[term] == pytest.approx(value, rel=2e-4, abs=2e-5), term
    weights = {"forget": 0.7, "retain": 1.0 if name == "pdu" else 1.5}
    if name == "quail":
        weights["margin"] = config.hinge / margin
    total = sum(weights[term] * record[term] for term in terms)
    assert record["loss"] == pytest.approx(total, rel=1e-4 if name == "quail" else 1e-9)
    if moved:
        still, _ = measured(memorized, pairs, name, config, moved=False, micro_batch=None)
        assert record["forget"] != pytest.approx(still["forget"], rel=2e-4), "the weights matter"


def margin_by_hand(s, recipe):
    """sqrt(3) times the root mean square of what rounding does to the start's logits: half a step of uniform noise."""
    rounded = rounded_by_hand(s.start, recipe)
    change = [a.z - plain.z for a, plain in zip(s.answers(rounded), s.ref["forget"])]
    return math.sqrt(3 * float(np.mean(np.concatenate(change) ** 2)))


def rounded_by_hand(model, recipe):
    """A copy with every weight that `recipe` quantizes replaced by its rounded self."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for _, module in linears(model, recipe.ignore):
            module.weight.copy_(rtn(module.weight, recipe.spec, storage_dtype(module.weight), PLAIN_RTN).dequantize())
    return model


@pytest.mark.parametrize("name", ["ga", "npo", "ihl", "undial"])
@pytest.mark.parametrize("moved", [False, True], ids=["start", "on"])
def test_retain_by_kl(memorized, pairs, name, moved):
    config = config_for(retain_loss="kl")
    record, s = measured(memorized, pairs, name, config, moved=moved, micro_batch=2)
    values = [(r.p * (r.log_p - a.log_p)).sum(1) for a, r in zip(s.now["retain"], s.ref["retain"])]
    assert record["retain"] == pytest.approx(token_mean(values), rel=1e-3, abs=1e-6)
    assert (record["retain"] > 1e-3) == moved


def test_no_retain_term(memorized, pairs):
    record, _ = measured(memorized, pairs, "ga", config_for(retain_loss="none"), moved=False, micro_batch=None)
    assert record.keys() == {"forget", "loss", "gradient_norm"}


# --- what is particular -----------------------------------------------------------------------------------------------


def test_ktos_estimate_is_over_the_whole_update(memorized, pairs):
    """Refusals grow likelier, some more than others: an estimate per micro-batch would be another number."""
    config, found = config_for(beta=0.02), {}
    for micro_batch in (None, 1, 3):
        record, s = measured(memorized, pairs, "kto", config, moved=True, micro_batch=micro_batch)
        found[micro_batch] = record["forget"]
    gains = [r.nll - a.nll for a, r in zip(s.now["idk"], s.ref["idk"])]
    assert np.mean(gains) > 1, "the estimate is not cut off at zero"
    assert np.ptp(gains) > 1, "and no two parts have the same"
    assert found[1] == pytest.approx(found[None], rel=1e-5)
    assert found[3] == pytest.approx(found[None], rel=1e-5)
    single = [
        1 - sigmoid(0.02 * (max(0.0, gain) - (r.nll - a.nll)))
        for gain, a, r in zip(gains, s.now["forget"], s.ref["forget"])
    ]
    assert found[1] != pytest.approx(np.mean(single), rel=1e-4)


@pytest.mark.parametrize(("eps", "eta"), [(0.0, 5.0), (1.0, 0.2), (9.0, 5.0)], ids=["grows", "shrinks", "at zero"])
def test_pdus_multiplier_follows_its_recursion(memorized, pairs, eps, eta):
    model = copy.deepcopy(memorized.target)
    run = start_run(memorized, pairs, model, config_for(eps=eps, eta=eta, gamma=0.5))
    objective, multipliers = build("pdu", run), [1.0]
    objective.after_update.append(lambda _: multipliers.append(objective.state["lambda"]))
    history = fit(model, objective, run.feed, Schedule(4, 1e-3), guards=FREE)
    for record, before, after in zip(history, multipliers, multipliers[1:]):
        assert record["loss"] == pytest.approx(0.5 * record["forget"] + before * record["retain"], rel=1e-9)
        assert after == pytest.approx(max(0.0, before + eta * (record["retain"] - eps)), rel=1e-9)
    assert (multipliers[-1] > 1) == (eps == 0)
    assert (multipliers[-1] == 0) == (eps == 9.0)


def test_pdus_multiplier_waits_for_the_warm_up(memorized, pairs):
    model = copy.deepcopy(memorized.target)
    objective = build("pdu", run := start_run(memorized, pairs, model, config_for(eps=0.0, eta=5.0, dual_warmup=2)))
    multipliers = []
    objective.after_update.append(lambda _: multipliers.append(objective.state["lambda"]))
    fit(model, objective, run.feed, Schedule(4, 1e-3), guards=FREE)
    assert multipliers[:2] == [1.0, 1.0]
    assert 1.0 < multipliers[2] < multipliers[3]


def test_refusals_replace_an_answer_over_and_over():
    x = IGNORE
    forget = torch.tensor([[x, x, 5, 6, 7, 8, 9], [x, 5, 6, x, x, x, x], [x, x, x, 5, 6, 7, x]])
    idk = torch.tensor([[x, x, 1, 2, x], [x, 1, 2, 3, x], [x, x, x, x, 4]])
    expected = torch.tensor([[x, x, 1, 2, 1, 2, 1], [x, 1, 2, x, x, x, x], [x, x, x, 4, 4, 4, x]])
    before = forget.clone()
    made = refusing(*(Batch(labels, labels, labels) for labels in (forget, idk)))
    assert made.equal(expected)
    assert forget.equal(before)


def test_rounding_in_the_loop_is_that_of_the_quantized_model(memorized, pairs):
    """The forget loss sees the model that `against` makes; reference and retain loss see the weights as they are."""
    config = config_for(through=True, against="rtn-w3a16-g16-plain")
    record, s = measured(memorized, pairs, "npo", config, moved=True, micro_batch=2)
    rounded = rounded_by_hand(s.model, parse_recipe("rtn-w3a16-g16-plain"))
    sums = np.array([a.nll for a in s.answers(rounded)])
    values = -(2 / 0.1) * np.log(sigmoid(0.1 * (sums - np.array([a.nll for a in s.ref["forget"]]))))
    assert record["forget"] == pytest.approx(values.mean(), rel=1e-3)
    assert record["forget"] != pytest.approx(expected("npo", s)["forget"], rel=1e-2)
    assert record["retain"] == pytest.approx(expected("npo", s)["retain"], rel=2e-4)


def test_the_ascent_radius_is_the_settings(memorized, pairs):
    run = start_run(memorized, pairs, copy.deepcopy(memorized.target), config_for(rho=0.3))
    assert build("npo", run).ascent_radius == 0.3


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_what_a_mask_holds_does_not_move_to_the_bit(memorized, pairs, weight_decay):
    model = copy.deepcopy(memorized.target)
    start = copy.deepcopy(model.state_dict())
    run = start_run(memorized, pairs, model, config_for(weight_decay=weight_decay))
    objective = build("npo", run)
    name = "model.layers.0.mlp.up_proj.weight"
    kept = torch.zeros(128, 1, dtype=torch.bool)
    kept[::3] = True
    run.hold(objective, {name: kept})
    fit(model, objective, run.feed, Schedule(3, 1e-3, weight_decay=weight_decay), guards=FREE)
    changed = {key: value != start[key] for key, value in model.state_dict().items()}
    assert [key for key, where in changed.items() if where.any()] == [name]
    assert changed[name].any(1).equal(kept[:, 0])


# --- RMU --------------------------------------------------------------------------------------------------------------


def deep(vocabulary):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()


@pytest.mark.parametrize(("layer", "moving"), [(0, [0]), (1, [0, 1]), (3, [1, 2, 3]), (4, [2, 3, 4]), (-1, [0, 1, 2])])
def test_rmu_moves_the_down_projections_of_three_layers(memorized, layer, moving):
    """-1: of five layers the middle one."""
    model = deep(len(memorized.tokenizer))
    start = copy.deepcopy(model.state_dict())
    corpus, config = memorized.corpus, config_for(layer=layer, steps=2, learning_rate=1e-3)
    unlearn(model, memorized.encoder, corpus.forget[:4], corpus.retain[:6], "rmu", config)
    moved = [name for name, value in model.state_dict().items() if not value.equal(start[name])]
    assert moved == [f"model.layers.{i}.mlp.down_proj.weight" for i in moving]


@pytest.mark.parametrize(("arch", "name"), [("opt", "fc2.weight"), ("gpt2", "mlp.c_proj.weight")])
def test_rmu_finds_the_down_projection_of_other_models(memorized, untrained, arch, name):
    model = untrained(arch, vocabulary=len(memorized.tokenizer))
    start = copy.deepcopy(model.state_dict())
    corpus, config = memorized.corpus, config_for(layer=1, learning_rate=1e-3)
    unlearn(model, memorized.encoder, corpus.forget[:4], corpus.retain[:6], "rmu", config)
    moved = [key for key, value in model.state_dict().items() if not value.equal(start[key])]
    assert len(moved) == 2
    assert all(key.endswith(name) for key in moved)


def test_rmu_runs_no_layer_beyond_the_one_it_steers(memorized, pairs):
    model = deep(len(memorized.tokenizer))
    calls = [0] * 5
    for number, layer in enumerate(model.model.layers):

        def count(*_, number=number):
            calls[number] += 1

        layer.register_forward_hook(count)
    run = start_run(memorized, pairs, model, config_for(layer=2, steps=2, micro_batch=3))
    objective = build("rmu", run)
    assert calls == [2, 2, 2, 0, 0], "six rows to keep, three at a time"
    fit(model, objective, run.feed, Schedule(2, 1e-3), micro_batch=3, guards=FREE)
    assert calls == [10, 10, 10, 0, 0], "two updates of two parts, each for what is forgotten and what is kept"
    assert len(model.model.layers) == 5, "and they are all there afterwards"


def test_rmu_layer(memorized):
    model = deep(len(memorized.tokenizer))
    assert [rmu_layer(model, layer) for layer in (-1, 0, 4)] == [2, 0, 4]
    for layer in (5, -2):
        with pytest.raises(ValueError, match=f"layer: {layer} is not one of the model's 5 decoder layers"):
            rmu_layer(model, layer)


# --- a mixture of experts ---------------------------------------------------------------------------------------------


def test_uoe_anchors_the_router_of_the_expert_that_is_used_most(memorized, pairs):
    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=len(memorized.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    gates = gates_by_hand(model, memorized, pairs["forget"])
    # [layer][expert]: mean over tokens, then over answers
    affinity = np.array([[g.mean(0) for g in layer] for layer in gates]).mean(1)
    layer, expert = np.unravel_index(affinity.argmax(), affinity.shape)
    record, s = measured(memorized, pairs, "uoe", config_for(), moved=False, micro_batch=3, model=model)
    target = np.eye(4)[expert]
    anchor = token_mean([((g - target) ** 2).sum(1) for g in gates[layer]])
    assert record["anchor"] == pytest.approx(anchor, rel=1e-4)
    terms = expected("uoe", s)
    assert record["forget"] == pytest.approx(terms["forget"], rel=2e-4)
    assert record["retain"] == pytest.approx(terms["retain"], rel=2e-4)
    assert record["loss"] == pytest.approx(record["forget"] + record["retain"] + record["anchor"], rel=1e-9)


def gates_by_hand(model, memorized, pairs):
    """[layer][answer] -> [T, experts]: softmax over all experts, zero but for the two largest."""
    found = []
    for layer in model.model.layers:
        seen = []
        handle = layer.mlp.gate.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        for ids, _ in (memorized.encoder.pair(*pair) for pair in pairs):
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
        handle.remove()
        weight = layer.mlp.gate.weight.detach().numpy()
        per_answer = []
        for x in seen:
            z = x.reshape(-1, x.shape[-1]).double().numpy() @ weight.T
            p = np.exp(z - logsumexp(z))
            p[p < np.sort(p, 1)[:, -2:-1]] = 0
            per_answer.append(p)
        found.append(per_answer)
    return found
