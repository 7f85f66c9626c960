"""What a measurement finds is what was spent, in models in which a module sleeps.

Some sleep by the machine's clock: bounds hold where others use the machine, and still fail for a phase counted twice, a
step too many, a child's time in its parent's. Most sleep by a clock that nothing else moves: there numbers are exact.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from remanence.backends.cpu import CpuDevice, Stopwatch
from remanence.bench.roofline import module_times
from remanence.bench.roofline.measure import STEPS, measure
from remanence.bench.roofline.module_times import CALLS, HookCost, hook_cost, module_seconds
from remanence.bench.speed import held_bytes
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = CpuDevice()
SLEEP = 0.05
SHAPE = {"batch": 1, "prompt": 4, "new": 3}


class Sleeping(nn.Module):
    """Sleeps, and gives on what its child makes of x, called `times` times. took: seconds of each sleep."""

    def __init__(self, seconds, child=None, times=1):
        super().__init__()
        self.seconds, self.times, self.took = seconds, times, []
        if child is not None:
            self.child = child

    def forward(self, x):
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.took.append(time.perf_counter() - start)
        for _ in range(self.times if hasattr(self, "child") else 0):
            x = self.child(x)
        return x

    def slept(self, seconds, calls=1):
        """Whether that is what so many sleeps took; none is shorter than asked for."""
        return calls * self.seconds <= seconds <= 1.1 * calls * max(self.took)


@pytest.fixture
def model(untrained):
    return untrained("llama")


@pytest.fixture
def exact(monkeypatch):
    """A clock that sleep alone moves, in binary fractions of a second: no rounding. exact(found): its modules that took
    any time."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module_times, "HOST", module_times.HOST._replace(make=time.perf_counter))
    return lambda own: {name: seconds for name, seconds in own.items() if seconds}


def test_a_sleeping_module_is_found(model):
    leaf = model.model.layers[1].mlp.act_fn = Sleeping(SLEEP)
    found = measure(model, CPU, **SHAPE)
    for phase, whole in {"prefill": found.ttft_s, "decode": found.tpot_s}.items():
        assert leaf.slept(found.modules[phase]["model.layers.1.mlp.act_fn"])
        others = sum(s for name, s in found.modules[phase].items() if name != "model.layers.1.mlp.act_fn")
        assert others < 0.8 * SLEEP, "of a model of two layers, 32 wide"
        assert SLEEP <= whole < 1.8 * max(leaf.took)
        assert found.remainder_s[phase] < 0.8 * SLEEP
    assert found.tokens_per_s == pytest.approx(1 / found.tpot_s)
    assert found.ttft_spread >= 0
    assert found.tpot_spread >= 0


def test_time_of_a_child_is_not_its_parents(model):
    child = Sleeping(SLEEP / 2)
    parent = model.model.layers[0].mlp = Sleeping(SLEEP, child, times=2)
    found = measure(model, CPU, **SHAPE)
    for own in found.modules.values():
        assert parent.slept(own["model.layers.0.mlp"])
        assert child.slept(own["model.layers.0.mlp.child"], 2)
        assert own["model.layers.0"] < 0.8 * SLEEP


def test_own_times_and_the_remainder(model, exact):
    model.model.layers[0].mlp = Sleeping(0.25, Sleeping(0.5), times=2)
    own = {"model.layers.0.mlp": 0.25, "model.layers.0.mlp.child": 1.0}
    found = measure(model, CPU, **SHAPE)
    assert {phase: exact(each) for phase, each in found.modules.items()} == {"prefill": own, "decode": own}
    assert (found.ttft_s, found.tpot_s, found.tokens_per_s) == (1.25, 1.25, 0.8)
    assert (found.ttft_spread, found.tpot_spread) == (0, 0)
    # The parent has a child and no weights: nothing says that it works, unless the caller does.
    assert found.remainder_s == {"prefill": 0.25, "decode": 0.25}
    told = measure(model, CPU, **SHAPE, working=list(own))
    assert told.remainder_s == {"prefill": 0, "decode": 0}
    none = measure(model, CPU, **SHAPE, working=[])
    assert none.remainder_s == {"prefill": 1.25, "decode": 1.25}


def test_medians_and_spreads(model, exact):
    """Each forward takes longer than the one before."""
    layer = model.model.layers[0].mlp.act_fn = Sleeping(0)
    model.register_forward_pre_hook(lambda *_: setattr(layer, "seconds", layer.seconds + 0.5))
    found = measure(model, CPU, **SHAPE | {"new": 4})
    assert found.ttft_s == pytest.approx(0.5 * (1 + 2 * 4))  # the warm-up, two requests of four forwards
    assert found.ttft_spread == pytest.approx(0.5 * 2 * 4 / found.ttft_s)
    assert found.tpot_s == pytest.approx(0.5 * (3 + 2 * 4)), "the second of three steps of the second request"
    assert found.tpot_spread == pytest.approx(0.5 * 2 * 4 / found.tpot_s)
    assert exact(found.modules["prefill"]) == {"model.layers.0.mlp.act_fn": pytest.approx(0.5 * (1 + 5 * 4))}
    assert exact(found.modules["decode"]) == {"model.layers.0.mlp.act_fn": pytest.approx(0.5 * (3 + 5 * 4))}


def test_attention_works_itself_and_layers_do_not(model, exact):
    for place in ("self_attn", ""):
        layer = model.model.layers[1].get_submodule(place)
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.25))  # its hooks are its own time
    found = measure(model, CPU, **SHAPE)
    assert exact(found.modules["decode"]) == {"model.layers.1": 0.25, "model.layers.1.self_attn": 0.25}
    assert found.remainder_s == {"prefill": 0.25, "decode": 0.25}


def test_what_has_weights_of_its_own_works(model, exact):
    """A layer that turns its input has a child, and is no container."""
    layer = model.model.layers[0].mlp.down_proj
    layer.transform = Sleeping(0.5)
    layer.register_forward_pre_hook(lambda module, args: (time.sleep(0.25), module.transform(*args))[1:])
    found = measure(model, CPU, **SHAPE)
    name = "model.layers.0.mlp.down_proj"
    assert exact(found.modules["decode"]) == {name: 0.25, f"{name}.transform": 0.5}
    assert found.remainder_s == {"prefill": 0, "decode": 0}


def test_a_module_that_calls_itself(exact):
    class Recursive(Sleeping):
        def forward(self, x, depth=2):
            super().forward(x)
            return self(x, depth - 1) if depth else x

    module = Recursive(0.25)
    assert exact(module_seconds(module, CPU, lambda: module(torch.zeros(1)))) == {"": 0.75}


def test_a_module_with_two_names_counts_once(model, exact):
    layers = model.model.layers
    layers[0].mlp.act_fn = layers[1].mlp.act_fn = Sleeping(0.25)
    found = measure(model, CPU, **SHAPE, working=["model.layers.1.mlp.act_fn"])  # its second name
    assert exact(found.modules["decode"]) == {"model.layers.0.mlp.act_fn": 0.5}
    assert "model.layers.1.mlp.act_fn" not in found.modules["decode"]
    assert found.remainder_s == {"prefill": 0, "decode": 0}


def test_an_empty_module_takes_nothing():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = nn.Identity()

        def forward(self, x):
            for _ in range(CALLS):
                x = self.empty(x)
            return x

    def bare():
        with CPU.timed() as timer:
            module(0)
        return timer.seconds

    module = Parent()
    cost = hook_cost()
    whole = min(bare() for _ in range(20))
    rounds = [module_seconds(module, CPU, lambda: module(0)) for _ in range(20)]
    assert cost.inside > 0
    assert min(each["empty"] for each in rounds) < CALLS * cost.inside / 2
    # Hooks and marks, left in, make it 2.1 of the whole; those around the marks alone 1.6.
    assert 0.6 < min(each[""] for each in rounds) / whole < 1.35
    assert all(seconds >= 0 for each in rounds for seconds in each.values())


class Counting(CpuDevice):
    """Notes the blocks that were timed."""

    def __init__(self):
        self.timers = []

    def timed(self):
        self.timers.append(Stopwatch())
        return self.timers[-1]


class Seeing(nn.Module):
    """Notes each call: hooks on it, an op looked at, rows and positions."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        looked = _get_current_dispatch_mode() is not None
        self.calls.append((bool(self._forward_hooks), looked, *x.shape[:2]))
        return x


def test_every_pass_has_its_own_work(model):
    """Nothing is hooked or looked at while the clock runs."""
    seeing = model.model.layers[0].mlp.act_fn = Seeing()
    machine = Counting()
    new = STEPS + 4
    found = measure(model, machine, 3, 5, new, repeats=4)
    steps = new - 1
    skipped = (steps - STEPS) // 2

    def request(hooked, looked, skip, then):
        steps = [(False, looked, 3, 1)] * skip + [(hooked, looked, 3, 1)] * then
        return [(hooked, looked, 3, 5), *steps]

    warm, timed = request(False, False, 0, steps), request(False, False, 0, steps) * 4
    watched = request(True, False, skipped, STEPS) * 4
    assert seeing.calls == [*warm, *timed, *watched, *request(False, True, 0, steps)]
    # Warm-up, four that count, the one for memory.
    assert len(machine.timers) == 6 * (1 + steps)
    firsts = sorted(timer.seconds for timer in machine.timers[1 + steps : 5 * (1 + steps) : 1 + steps])
    assert found.ttft_s == pytest.approx((firsts[1] + firsts[2]) / 2)
    assert (found.steps, found.repeats, found.batch, found.prompt, found.new) == (steps, 4, 3, 5, new)
    assert found.context == 5 + (steps - 1) / 2


class Event:
    """As an accelerator's: read after a wait alone."""

    def __init__(self, enable_timing):
        assert enable_timing
        self.read = None

    def record(self, stream):
        assert stream == "stream"
        self.at = time.perf_counter()
        Accelerator.pending.append(self)

    def elapsed_time(self, end):
        assert self.read, "an event was read before the device was waited for"
        assert end.read
        return 1e3 * (end.at - self.at)


class Accelerator(CpuDevice):
    kind = "accelerator"
    pending: list = []  # noqa: RUF012 (events that nobody waited for)

    def __init__(self):
        self.waits = []
        self.pending.clear()

    def synchronize(self):
        self.waits.append(len(self.pending))
        for event in self.pending:
            event.read = True
        self.pending.clear()

    def timed(self):
        self.waits.append("timed")
        return Stopwatch()


def test_an_accelerator_is_not_waited_for_in_between(model, exact, monkeypatch):
    model.model.layers[1].mlp.act_fn = Sleeping(0.25)
    fake = SimpleNamespace(Event=Event, current_stream=lambda _: "stream")
    monkeypatch.setattr(module_times, "module_of", lambda _: fake)
    monkeypatch.setattr(module_times, "hook_cost", lambda: pytest.fail("is about the host's clock"))
    machine = Accelerator()
    found = measure(model, machine, **SHAPE)
    assert (found.ttft_s, found.tpot_s) == (0.25, 0.25), "a step's, not that of all"
    assert [exact(own) for own in found.modules.values()] == [{"model.layers.1.mlp.act_fn": 0.25}] * 2
    called = 2 * len(found.modules["prefill"])
    request = [0, "timed", "timed"]  # the steps of a request in one block
    assert machine.waits == [*request * 4, *[called, 2 * called] * 3, *request]


def test_the_tokens_are_those_of_generate(untrained):
    for arch in ("llama", "opt", "gpt2"):
        model = untrained(arch)
        fed = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs, fed=fed: fed.append(kwargs["input_ids"]),  # noqa: ARG005
            with_kwargs=True,
        )
        measure(model, CPU, 2, 6, 5, seed=3)
        handle.remove()
        request = torch.cat(fed[:5], 1)  # prompt, and all tokens but the last
        assert request.shape == (2, 10)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            expected = model.generate(request[:, :6], attention_mask=torch.ones(2, 6), **options)
        assert torch.equal(request, expected), arch
        fed.clear()


def moe():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def lora(model):
    peft = pytest.importorskip("peft", reason="comes with the extra `train`")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


KINDS = {
    "llama": (lambda untrained: untrained("llama"), "model.layers.1.self_attn.v_proj"),
    "opt": (lambda untrained: untrained("opt"), "model.decoder.layers.1.fc2"),
    "gpt2": (lambda untrained: untrained("gpt2"), "transformer.h.1.mlp.c_fc"),
    "moe": (lambda _: moe(), "model.layers.1.mlp.experts"),
    "lora": (lambda untrained: lora(untrained("llama")), "base_model.model.model.layers.1.self_attn.q_proj.lora_A"),
    "packed": (
        lambda untrained: compress_(untrained("llama"), parse_recipe("rtn-w4a16-g32"), ()).eval(),
        "model.layers.1.mlp.down_proj",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_causal_model(kind, untrained):
    build, name = KINDS[kind]
    model = build(untrained)
    found = measure(model, CPU, 2, 6, 4)
    names = [name for name, _ in model.named_modules()]
    for own in found.modules.values():
        assert list(own) == [each for each in names if each in own]
        assert any(each.startswith(name) for each in own)
        assert all(seconds >= 0 for seconds in own.values())
        assert sum(own.values()) > 0
    assert min(found.ttft_s, found.tpot_s) > 0
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * 2 * heads * head_dim * 4 * (6 + 3)
    assert found.peak_memory_bytes > held_bytes(model) + cache
    assert found.as_json()["dtype"] == "float32"


def test_last_logits_alone(untrained):
    for model in (untrained("llama"), lora(untrained("llama"))):
        head, rows = model.get_output_embeddings(), []
        head.register_forward_hook(lambda module, args, out, rows=rows: rows.append(out.shape[1]))  # noqa: ARG005
        measure(model, CPU, **SHAPE)
        assert set(rows) == {1}


def state(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    return hooks, model.generation_config.to_dict(), model.config.to_dict(), torch.get_rng_state().tolist()


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(model.training))
    before = state(model)
    measure(model, CPU, **SHAPE)
    assert state(model) == before
    assert set(seen) == {False}
    assert torch.is_grad_enabled()


def test_hooks_are_gone_after_an_exception(model):
    class Failing(nn.Module):
        def forward(self, x):
            if self._forward_hooks:
                raise RuntimeError("in the pass with hooks")
            return x

    model.model.layers[1].mlp.act_fn = Failing()
    model.train()
    before = state(model)
    with pytest.raises(RuntimeError, match="in the pass with hooks"):
        measure(model, CPU, **SHAPE)
    assert state(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": 0}, "batch: 0 is below 1"),
        ({"prompt": 0}, "prompt: 0 is below 1"),
        ({"new": 1}, "new: 1 is below 2"),
        ({"repeats": 2}, "repeats: 2 is below 3"),
        ({"prompt": 126}, r"prompt \+ new: 126 \+ 3 tokens, the model has positions for 128"),
        ({"working": ["lm_head", "nonsense"]}, "working: 'nonsense' is no module of this model"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, asked, message):
    with pytest.raises(ValueError, match=message):
        measure(model, CPU, **SHAPE | asked)


def test_the_last_position_can_be_used(model):
    assert measure(model, CPU, 1, 125, 3).context == 125.5


def test_a_model_elsewhere_is_refused(model):
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"model: lm_head.weight is on meta, what is measured is cpu"):
        measure(model, CPU, **SHAPE)


def test_a_model_without_a_cache_is_refused(model):
    model.forward = lambda input_ids, **_: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 300))
    with pytest.raises(ValueError, match="model: LlamaForCausalLM gives no past_key_values to decode with"):
        measure(model, CPU, **SHAPE)


def test_cost_is_taken_off_the_module_and_its_caller():
    marks = module_times.HOST
    tape = [("parent", 0.0), ("child", 1.0), (None, 3.0), ("child", 4.0), (None, 6.0), (None, 10.0)]
    assert module_times._own(tape, marks, HookCost(0.0, 0.0)) == {"child": 4.0, "parent": 6.0}
    assert module_times._own(tape, marks, HookCost(0.5, 0.25)) == {"child": 3.0, "parent": 5.0}
    assert module_times._own(tape, marks, HookCost(9.0, 0.0)) == {"child": 0.0, "parent": 0.0}
