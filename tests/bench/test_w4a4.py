"""The benchmark of activations and cache in few bits, on a model of a few seconds."""

import pytest
import torch
from remanence.bench import w4a4
from remanence.compress.recipe import parse_recipe
from remanence.unlearn.demo import DemoConfig
from remanence.unlearn.people import people_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DemoConfig(vocab_size=400, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, max_length=64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    text = "\n".join(row.answer for row in people_corpus(30, "forget10", 0).retain)
    recipes = ["rtn-w8a8", "rtn-w4a4", "rtn-w4a4+r_kind=hadamard", "gptq-w4a4+a_fallback=0.02", "dense+kv_bits=4"]
    found = w4a4.quality(
        0, tmp_path_factory.mktemp("w4a4"), text, text[:4000], [parse_recipe(name) for name in recipes], SHAPE, 2
    )
    return {row["recipe"]: row for row in found}


def test_every_recipe_has_its_row(rows):
    assert rows["dense"]["kl"] == 0
    for name, row in rows.items():
        assert row["perplexity"] > 1
        assert (row["kl"] > 0) == (name != "dense")
    assert rows["rtn-w8a8"]["kl"] < 0.1 * rows["rtn-w4a4"]["kl"]
    assert rows["gptq-w4a4+a_fallback=0.02"]["worst_input"] <= 0.02
    assert 0 < rows["gptq-w4a4+a_fallback=0.02"]["eight"] <= 14
    # 16 sequences of 64 tokens: half of them are in the residual window, keys and values in 4 bits with scales.
    assert rows["dense+kv_bits=4"]["kv_bytes"] < 0.8 * rows["dense+kv_bits=4"]["kv_bytes_dense"]


def test_checks_can_fail(rows):
    checks = w4a4.quality_checks(rows)
    assert {check["what"] for check in checks} == {
        "rtn-w8a8: perplexity within 1% of full precision",
        "rotation loses less than none",
        "rtn-w4a4+r_kind=hadamard: logits changed by the rotation alone",
        "dense+kv_bits=4: generated tokens unlike those without a cache",
    }
    assert all(check["ok"] for check in checks)
    worse = rows | {"rtn-w8a8": rows["rtn-w4a4"] | {"perplexity": 2 * rows["dense"]["perplexity"]}}
    assert not w4a4.quality_checks(worse)[0]["ok"]
    found = {"unlearned_by": "bucketed", "recipe": "rtn-w4a16-g64-plain", "verdict": "held", "p_dense": 0.9}
    assert [check["ok"] for check in w4a4.recovery_checks([found])] == [False, False]
    forgotten = found | {"verdict": "returned", "p_dense": 0.1}
    assert [check["ok"] for check in w4a4.recovery_checks([forgotten])] == [True, True]


def test_integer_products_are_looked_at(monkeypatch):
    assert w4a4.integer_check(0)["ok"]
    exact = w4a4.integer_linear
    monkeypatch.setattr(w4a4, "integer_linear", lambda x, *args, **kwargs: exact(x.clamp(-7, 6), *args, **kwargs))
    assert not w4a4.integer_check(0)["ok"]


def test_outliers_change_inputs_and_not_the_function(untrained):
    model = untrained("llama")
    ids = torch.randint(2, 300, (2, 20))
    with torch.no_grad():
        before = model(ids).logits
        seen = []
        layer = model.model.layers[0]
        handle = layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        w4a4.with_outliers_(model, [ids], seed=0)
        after = model(ids).logits
        handle.remove()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    ratio = (seen[-1] / seen[0]).abs().median(1).values.median(0).values
    assert (ratio > 20).sum() == w4a4.OUTLIERS


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="parts: 'speed' is not one of quality, recovery"):
        w4a4.run(parts=("speed",))
