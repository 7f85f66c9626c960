"""Whole models: on the emulated device beside the CPU, and through the real torch-npu without numbers."""

import json
import subprocess
import sys

import pytest
import torch
from remanence.bench import ascend, ascend_dry_run, ascend_emulated, ascend_models
from remanence.bench.ascend_dry_run import FALLEN, LAUNCHED, RECIPES, fallen, launched, short_of

emulated = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no backend written in Python",
)


def run(*recipes):
    command = [sys.executable, "-m", "remanence.bench.ascend_models", *recipes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@emulated
@pytest.mark.parametrize("recipes", [("rtn-w4a16-g64", "rtn-w8a8+a_narrow=true")])
def test_llama_and_opt_on_the_emulated_npu(recipes):
    rows = run(*recipes)
    assert len(rows) == len(recipes) * 2 * 3
    assert {row["device"] for row in rows} == {"npu:0"}
    checks = ascend.device_checks(rows)
    asked = [check for check in checks if check["value"] == check["value"]]  # NaN: of recipes that are not there
    assert len(asked) >= 8
    assert [check for check in asked if not check["ok"]] == []
    for row in rows:
        layers = {"llama": 14, "opt": 12}[row["model"]]
        if row["dtype"] != "float32":
            wanted = "npu_weight_quant_batchmatmul" if "a16" in row["recipe"] else "npu_quant_matmul"
            assert row["operators"][wanted] == layers
        if row["dtype"] != "float32" and "narrow" in row["recipe"]:
            assert row["operators"]["npu_dynamic_quant"] == layers


@emulated
@pytest.mark.slow
def test_every_recipe_on_the_emulated_npu():
    rows = run()
    assert {row["recipe"] for row in rows} == set(ascend_models.RECIPES)
    assert [check for check in ascend.device_checks(rows) if not check["ok"]] == []


OFFLOADED = """
import torch
from remanence.bench import ascend_emulated, ascend_models
from remanence.compress.linear import QuantLinear
ascend_emulated.install()
model = ascend_models.compressed("llama", "rtn-w4a16-g64", torch.float16)
layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
x = torch.randn(3, layer.in_features).half()
wanted = layer(x)
# Weights that stay on the CPU serve an NPU; so does the op by itself; gradients pass.
far = layer(x.to("npu"))
assert far.device.type == "npu" and layer.packed.device.type == "cpu"
assert (far.cpu().float() - wanted.float()).norm() < 1e-3 * wanted.float().norm()
layer.to("npu")
leaf = x.to("npu").requires_grad_()
layer(leaf).float().sum().backward()
assert leaf.grad.device.type == "npu" and bool((leaf.grad.cpu() != 0).any())
assert layer.laid is not None and layer.packed.device.type == "npu"
# Another dtype, and a weight set by hand, are laid out anew.
assert layer(x.bfloat16().to("npu")).dtype == torch.bfloat16
layer.scale = layer.scale * 2
assert layer.laid is None
assert (layer(x.to("npu")).cpu().float() - 2 * wanted.float()).norm() < 1e-2 * wanted.float().norm()
# So are a model cast there, and a layer whose rounding of inputs is another.
model.to("npu").to(torch.bfloat16)
assert model(torch.arange(6).reshape(2, 3).to("npu")).logits.dtype == torch.bfloat16
assert model.lm_head.weight.held.dtype == torch.bfloat16
from remanence.compress.spec import ActivationSpec
with torch.no_grad():
    x16 = x.to("npu").bfloat16()
    before = layer(x16)
    layer.activation = ActivationSpec(4)
    assert not torch.equal(layer(x16).cpu(), before.cpu())
codes = torch.randint(0, 16, (5, 24), dtype=torch.uint8)
from remanence.kernels import ops
assert torch.equal(ops.unpack(ops.pack(codes.to("npu"), 4), 4, 24).cpu(), codes)
try:
    x.to("npu") + x
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise SystemExit("tensors of two devices went together")
print("done")
"""


@emulated
def test_a_layer_offloaded_moved_and_changed():
    done = subprocess.run([sys.executable, "-c", OFFLOADED], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


CACHED = """
import torch
from remanence.bench import ascend_emulated, ascend_models
from remanence.compress.kv_attach import attach_kv_
from remanence.compress.spec import KVSpec
ascend_emulated.install()
ids = torch.arange(3, 63).reshape(2, 30)
found = []
for device in ("cpu", "npu"):
    model = ascend_models.tiny("llama", torch.float32)
    attach_kv_(model, KVSpec(4, group_size=8, residual=4))
    model.to(device)
    found.append(model.generate(ids.to(device), max_new_tokens=8, do_sample=False, pad_token_id=0).cpu())
assert torch.equal(*found)
print("done")
"""


@emulated
def test_a_kv_cache_in_4_bits_on_the_emulated_npu():
    done = subprocess.run([sys.executable, "-c", CACHED], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


# The real torch-npu


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    if reason := ascend_dry_run.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("ascend")
    try:
        ascend_dry_run.prepare(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("chip", list(RECIPES))
def test_the_real_torch_npu_launches_these_kernels(chip, cache):
    found = ascend_dry_run.run(chip, cache)
    assert [check for check in ascend.wheel_checks(chip, found) if not check["ok"]] == []
    assert found["info"]["name"] == chip
    assert found["round_trip"]
    assert found["peak"] >= 2**20
    dtypes = 1 if chip == "Ascend310P3" else 2
    assert len(found["models"]) == len(RECIPES[chip]) * (dtypes + 1)
    for model in found["models"]:
        assert model["shapes"] == [[2, 7, 256], [2, 1, 256]]
        # Of float products the head's alone is left, and attention's where it is not fused.
        assert "Mm" not in model["kernels"]
    assert "multiple of 32" in found["refused"]["group 48"]


@pytest.mark.slow
def test_the_wheel_installed_and_no_cann(cache):
    """As users have it who installed the extra on a machine without an NPU."""
    import os

    site, _ = ascend_dry_run.prepare(cache)
    env = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    env["PYTHONPATH"] = f"{site}{os.pathsep}{env.get('PYTHONPATH', '')}"
    plain = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, env=env)
    assert "Failed to load the backend extension: torch_npu" in plain.stderr
    for command in (
        ["-c", "import remanence, torch; from transformers import LlamaForCausalLM"],
        ["-m", "remanence", "doctor"],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    assert "libhccl.so is not found" in done.stdout


def test_launches_are_counted_by_phase():
    text = (
        "[phase] one\n[aclnn] aclnnMm\n[aclnn] aclnnMmGetWorkspaceSize\n[aclnn] aclnnWeightQuantBatchMatmulV2\n"
        "[aclnn] aclnnWeightQuantBatchMatmulV2\n[phase] two\n[aclnn] aclnnMm\n"
        f"Warning: CAUTION: The operator 'aten::foo' is not currently supported on the NPU backend and will {FALLEN}\n"
    )
    assert launched(text) == {"one": {"Mm": 1, "WeightQuantBatchMatmulV2": 2}, "two": {"Mm": 1}}
    assert fallen(text) == ["aten::foo"]


def test_a_model_that_launches_too_few_is_noticed():
    model = {"recipe": "rtn-w4a16-g64", "layers": 2, "passes": 2, "kernels": {"WeightQuantBatchMatmulV2": 4}}
    assert short_of(model) == []
    assert short_of(model | {"kernels": {"Mm": 4}}) != []
    assert {recipe for recipes in RECIPES.values() for recipe in recipes} == set(LAUNCHED)


@emulated
def test_a_device_of_another_name_is_there_already(monkeypatch):
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "other")
    assert ascend_emulated.missing() == "this process has a device other already"


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="parts: 'kernels' is not one of operators, device, schemas, wheel"):
        ascend.run(0, ("kernels",))
