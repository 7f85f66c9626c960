"""The list of methods: names and settings are checked in words, and each entry really runs and forgets."""

import copy
import math
from dataclasses import asdict, fields

import pytest
import torch
from remanence.unlearn.catalog import DEFAULT, METHODS, MethodConfig, method_named, needs_retain, settings, telling
from remanence.unlearn.data import QA
from remanence.unlearn.inference.builders import BUILDERS, DEMO
from remanence.unlearn.methods import Setup, unlearn
from remanence.unlearn.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = [name for name, method in METHODS.items() if method.kind == "training" and "moe" not in method.needs]


# --- names and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("npoo", "method: 'npoo' is unknown; did you mean npo[?]"),
        ("grad-diff", "did you mean graddiff[?]"),
        ("flat", "did you mean flat-"),
        ("qqqq", "method: 'qqqq' is unknown; known: ga, graddiff, .*, bucketed$"),
        ("", "known: ga,"),
    ],
)
def test_unknown_method(name, said):
    for call in (method_named, settings):
        with pytest.raises(ValueError, match=said):
            call(name)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"learning_rat": 1.0}, "setting: 'learning_rat' is unknown; did you mean learning_rate[?]"),
        ({"qqqq": 1}, "setting: 'qqqq' is unknown; steps, learning_rate, "),
        ({"steps": "ten"}, "steps: 'ten' is not of type int"),
        ({"steps": 10.0}, "steps: 10.0 is not of type int"),
        ({"steps": True}, "steps: True is not of type int"),
        ({"learning_rate": "1e-5"}, "learning_rate: '1e-5' is not of type float"),
        ({"learning_rate": True}, "learning_rate: True is not of type float"),
        ({"fila": 1}, "fila: 1 is not of type bool"),
        ({"mask": 3}, "mask: 3 is not of type str"),
        ({"against": None, "beta": [1]}, r"beta: \[1\] is not of type float"),
    ],
    ids=str,
)
def test_a_setting_of_another_name_or_type(asked, said):
    with pytest.raises(ValueError, match=said):
        settings("npo", **asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 0}, "steps: 0 is not above 0"),
        ({"steps": -3}, "steps: -3 is not above 0"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not above 0"),
        ({"learning_rate": math.nan}, "learning_rate: nan"),
        ({"learning_rate": math.inf}, "learning_rate: inf"),
        ({"gamma": math.nan}, "gamma: nan"),
        ({"forget_batch": 0}, "forget_batch: 0"),
        ({"retain_batch": -1}, "retain_batch: -1"),
        ({"beta": 0}, "beta: 0.0 is not above 0"),
        ({"check_every": 0}, "check_every: 0"),
        ({"clip": 0.0}, "clip: 0.0"),
        ({"warmup": -1}, "warmup: -1 is below 0"),
        ({"micro_batch": -1}, "micro_batch: -1 is below 0"),
        ({"lora_rank": -1}, "lora_rank: -1 is below 0"),
        ({"rho": -0.1}, "rho: -0.1 is below 0"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 is below 0"),
        ({"share": 1.5}, "share: 1.5 is not between 0 and 1"),
        ({"floor": -0.5}, "floor: -0.5 is not between 0 and 1"),
        ({"stop_below": 2.0}, "stop_below: 2.0 is not between 0 and 1"),
        ({"precision": "fp16"}, "precision: 'fp16' is not one of auto, fp32, bf16, pure-bf16"),
        ({"retain_loss": "mse"}, "retain_loss: 'mse' is not one of nll, kl, none"),
        ({"mask": "sure"}, "mask: 'sure' is not one of none, wagle, sure-row, sure-module"),
        ({"decay": "exponential"}, "decay: 'exponential' is not one of linear, cosine, constant"),
        ({"against": "dense"}, "against: dense is no quantizer without data"),
        ({"against": "gptq-w4a16-g64"}, "against: gptq-w4a16-g64 is no quantizer without data"),
        ({"against": "rnt-w4a16"}, "did you mean rtn-w4a16"),
        ({"fila": True}, "fila: .* set lora_rank"),
        ({"unmerged": True}, "unmerged: .* set lora_rank"),
    ],
    ids=str,
)
def test_a_value_out_of_range(asked, said):
    with pytest.raises(ValueError, match=said):
        settings("npo", **asked)


def test_skip_is_not_below_zero():
    with pytest.raises(ValueError, match="skip: -1 is below 0"):
        settings("ceu", skip=-1)


def test_what_is_asked_for_comes_on_top_of_demo_on_top_of_the_papers():
    assert settings("simnpo").beta == 4.5
    assert settings("graddiff", demo=True).gamma == METHODS["graddiff"].demo["gamma"] != 1.0
    assert settings("graddiff", demo=True, gamma=3).gamma == 3.0
    assert settings("graddiff", demo=True, gamma=None) == settings("graddiff", demo=True), "None: not asked"
    assert type(settings("npo", learning_rate=1).learning_rate) is float
    assert settings("npo", learning_rate=2e-5).steps == settings("npo").steps


def test_fewer_steps_are_warmed_up_for_a_tenth_of_them():
    assert settings("npo").warmup == 12
    assert settings("npo", steps=50).warmup == 5
    assert settings("npo", steps=3).warmup == 0
    assert settings("npo", steps=1000).warmup == 12
    assert settings("npo", steps=3, warmup=2).warmup == 2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"share": 0.5}, "share: has no effect without mask"),
        ({"mu": 1.0}, "mu: has no effect without mask"),
        ({"lora_alpha": 8}, "lora_alpha: has no effect without lora_rank"),
    ],
)
def test_what_would_have_no_effect_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        settings("npo", **asked)
    assert settings("npo", **asked, mask="wagle", lora_rank=0 if "share" in asked or "mu" in asked else 4)


def test_telling_names_the_methods_own_settings_and_what_is_not_usual():
    assert telling("npo", settings("npo")) == {"beta": 0.1}
    assert telling("graddiff", settings("graddiff")) == {}
    assert telling("simnpo", settings("simnpo")) == {"beta": 4.5, "gamma": 0.125, "delta": 0.0}
    assert telling("npo", settings("npo", rho=0.01, clip=7)) == {"beta": 0.1, "clip": 7.0, "rho": 0.01}
    assert telling("rocr", settings("rocr")) == {"layer": -1}
    assert telling("icu", settings("icu")) == {}


@pytest.mark.parametrize(
    ("method", "asked", "said"),
    [
        ("ga", {"beta": 0.1}, "beta: ga has no such setting; its own are none"),
        ("rmu", {"beta": 0.1}, "beta: rmu has no such setting; its own are layer, coefficient"),
        ("npo", {"coefficient": 2.0}, "coefficient: npo has no such setting; its own are beta"),
        ("icu", {"steps": 5}, "steps: icu does not train; its own settings are none"),
        ("rocr", {"learning_rate": 0.1}, "learning_rate: rocr does not train; its own settings are layer"),
        ("rmu", {"retain_loss": "kl"}, "retain_loss: rmu has a retain loss of its own"),
        ("jensun", {"retain_loss": "none"}, "retain_loss: jensun has a retain loss of its own"),
        ("pdu", {"retain_loss": "kl"}, "retain_loss: pdu has a retain loss of its own"),
        ("task-vector", {"retain_loss": "nll"}, "retain_loss: task-vector"),
    ],
)
def test_a_setting_that_the_method_does_not_have(method, asked, said):
    """It would be taken and have no effect."""
    with pytest.raises(ValueError, match=said):
        settings(method, **asked)


def test_needs_retain():
    wanting = {name for name in METHODS if needs_retain(name, settings(name))}
    assert {"npo", "rmu", "uld", "rocr", "bucketed"} <= wanting
    assert not {"ga", "undial", "ceu", "flat-tv", "task-vector", "icu", "whp"} & wanting
    assert needs_retain("ga", settings("ga", retain_loss="kl"))


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_is_complete(name):
    method = METHODS[name]
    known = {"training": OBJECTIVES, "inference": BUILDERS, "weights": {"rocr": None}}[method.kind]
    assert method.objective in known
    assert method.title
    assert "this project" in method.paper or any(c.isdigit() for c in method.paper)
    assert set(method.needs) <= {"reference", "retain", "idk", "moe"}
    for demo in (False, True):
        config = settings(name, demo)
        assert isinstance(config, MethodConfig)
        if method.kind == "training":
            listed = ("retain" in method.needs) == (config.retain_loss != "none")
            assert listed or demo, "what --list says is what is done"
            assert config.retain_loss != "kl" or "reference" in method.needs
    assert all(key in asdict(MethodConfig()) for key in (*method.settings, *method.demo))


def test_each_setting_is_documented():
    for entry in fields(MethodConfig):
        assert entry.name in (MethodConfig.__doc__ or ""), entry.name


def test_defaults_are_methods():
    assert set(DEFAULT) <= set(METHODS)
    assert DEMO.keys() == BUILDERS.keys()


# --- every entry runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(memorized):
    """Four to forget, six to keep: (forget, retain)."""
    return memorized.corpus.forget[:4], memorized.corpus.retain[::9][:6]


def run(memorized, rows, method, model=None, seed=0, **asked):
    if METHODS[method].kind == "training":
        asked = {"steps": 2, "warmup": 0, "forget_batch": 3, "retain_batch": 4, **asked}
    config = settings(method, True, **asked)
    model = copy.deepcopy(memorized.target) if model is None else model
    return unlearn(model, memorized.encoder, *rows, method, config, seed)


@pytest.mark.parametrize("method", TRAINING)
def test_two_updates_forget_something_and_are_the_same_bits_again(memorized, rows, method):
    # RMU moves one matrix a layer, far from the head.
    asked = {"learning_rate": 1e-2} if method == "rmu" else {}
    first, again = run(memorized, rows, method, **asked), run(memorized, rows, method, **asked)
    assert first.record["steps_done"] == 2
    before, after = (first.record[when]["forget_probability"] for when in ("before", "after"))
    assert before > 0.9
    assert after < before
    start, weights = memorized.target.state_dict(), first.model.state_dict()
    if first.adapted is None:
        assert weights.keys() == start.keys()
        assert any(not torch.equal(weights[name], start[name]) for name in start)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in weights.items())
    assert again.record["after"] == first.record["after"]
    assert not first.model.training
    assert first.guard is None


def test_another_seed_gives_other_bits(memorized, rows):
    first, other = (run(memorized, rows, "rmu", seed=seed).model.state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_uoe_needs_a_mixture_and_moves_one_expert(memorized, rows):
    with pytest.raises(ValueError, match="expert"):
        run(memorized, rows, "uoe")
    model = mixtral(len(memorized.tokenizer))
    start = copy.deepcopy(model.state_dict())
    done = run(memorized, rows, "uoe", model)
    moved = [name for name, value in done.model.state_dict().items() if not torch.equal(value, start[name])]
    experts = [name for name in moved if ".experts." in name]
    (block,) = {name.split(".experts.")[0] for name in experts}
    assert [name for name in moved if name not in experts] == [f"{block}.gate.weight"], "its router learns to stay"
    changed = {name: (done.model.state_dict()[name] != start[name]).flatten(1).any(1) for name in experts}
    assert {tuple(which.nonzero().flatten().tolist()) for which in changed.values()} in ({(i,)} for i in range(4))


def mixtral(vocabulary):
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()


def test_rocr_edits_one_matrix_without_training(memorized, rows):
    done = run(memorized, rows, "rocr")
    start = memorized.target.state_dict()
    moved = [name for name, value in done.model.state_dict().items() if not torch.equal(value, start[name])]
    assert len(moved) == 1
    assert done.record["steps_done"] == 0
    assert torch.linalg.matrix_rank(done.model.state_dict()[moved[0]] - start[moved[0]], atol=1e-4) >= 1


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.kind == "inference"])
def test_a_guard_leaves_the_weights_alone(memorized, rows, method, tmp_path):
    model = copy.deepcopy(memorized.target)
    guard = DEMO[METHODS[method].objective]
    config = settings(method, True)
    done = unlearn(model, memorized.encoder, *rows, method, config, setup=Setup(guard=guard))
    assert done.guard is not None
    start = memorized.target.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in done.model.state_dict().items())
    done.save(tmp_path, memorized.tokenizer)
    assert (tmp_path / "guard.json").is_file()
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "left_out", "said"),
    [
        ("npo", "forget", "forget: no rows; npo needs at least one"),
        ("npo", "retain", "retain: no rows; npo needs at least one"),
        ("rmu", "retain", "retain: no rows; rmu needs"),
        ("ga", "forget", "forget: no rows; ga needs"),
    ],
)
def test_missing_rows(memorized, rows, method, left_out, said):
    given = tuple(() if name == left_out else part for name, part in zip(("forget", "retain"), rows))
    with pytest.raises(ValueError, match=said):
        run(memorized, given, method)


@pytest.mark.parametrize("method", [name for name in TRAINING if not needs_retain(name, settings(name, True))])
def test_methods_without_a_retain_term_take_no_retain_rows(memorized, rows, method):
    done = run(memorized, (rows[0], ()), method)
    assert done.record["before"].keys() == done.record["after"].keys() == {"forget_probability"}


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if "idk" in entry.needs])
def test_a_text_cannot_be_refused(memorized, rows, method):
    text = (QA("", "Some running text that is to be forgotten."),)
    with pytest.raises(ValueError, match="forget: has rows of text without a question"):
        run(memorized, (text, rows[1]), method)


def test_what_an_adapter_cannot_be_combined_with(memorized, rows):
    for asked in ({"mask": "wagle"}, {"floor": 0.1}, {"through": True}):
        with pytest.raises(ValueError, match="lora_rank: 4 trains adapters"):
            run(memorized, rows, "npo", lora_rank=4, **asked)
    with pytest.raises(ValueError, match="lora_rank: 4"):
        run(memorized, rows, "bucketed", lora_rank=4)


def test_trainable_parameters_are_those_of_before(memorized, rows):
    model = copy.deepcopy(memorized.target)
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for method in ("rmu", "bucketed"):
        run(memorized, rows, method, model)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("precision", "dtype", "result", "moves"),
    [
        ("auto", torch.float32, torch.float32, True),
        ("auto", torch.bfloat16, torch.bfloat16, True),
        ("bf16", torch.float32, torch.float32, True),
        ("fp32", torch.bfloat16, torch.bfloat16, True),
        ("pure-bf16", torch.float32, torch.bfloat16, False),
    ],
)
def test_precision(memorized, rows, precision, dtype, result, moves):
    """Pure bf16 cannot make a small update to a large weight; master weights in fp32 add such updates up."""
    model = copy.deepcopy(memorized.target).to(dtype)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)  # half an ulp below 1 is 0.002 in bf16
    done = run(memorized, rows, "ga", model, precision=precision, steps=12, learning_rate=1e-3, gamma=1.0)
    assert {parameter.dtype for parameter in done.model.parameters()} == {result}
    assert bool((done.model.model.norm.weight != 1).any()) == moves


def test_stop_below(memorized, rows):
    done = run(memorized, rows, "ga", steps=60, learning_rate=2e-3, stop_below=0.5, check_every=3, forget_batch=4)
    assert 0 < done.record["steps_done"] < 60
    assert done.record["steps_done"] % 3 == 0
    assert done.record["after"]["forget_probability"] < 0.5
