"""A streamed run writes what compressing in memory makes; killed anywhere and resumed, it writes the same bytes."""

import copy
import gc
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from remanence.compress import stream
from remanence.compress.checkpoint import load_model, packed_state
from remanence.compress.files import read_json
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.shards import ShardReader
from remanence.compress.stream import Job, compress_streamed, unfinished
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(2, 300, shape, generator=GENERATOR) for shape in ((3, 40), (3, 40), (2, 17))]


class Tokenizer:
    """Writes what a tokenizer would."""

    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def saved(model, path):
    """The model as a checkpoint of several shards."""
    model.save_pretrained(path, max_shard_size="40KB")
    return path


@pytest.fixture
def llama(untrained, tmp_path):
    return saved(untrained("llama"), tmp_path / "dense")


def stem(directory):
    return "remanence" if list(directory.glob("remanence*.safetensors")) else "model"


def tensors(directory):
    reader = ShardReader(directory, stem(directory))
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118 (no mapping)


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def run(source, recipe, target, batches=BATCHES, **options):
    return compress_streamed(Job(source, parse_recipe(recipe), batches), Tokenizer(), target, **options)


# The same as in memory


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-w4a16-g16",
        "rtn-w3a16-asym+clip=false",
        "hqq-w4a16-g32-asym",
        "gptq-w4a16-g16-plain",
        "gptq-w4a16-g32+alpha=0.5+sequential=false",
        "magnitude-s50",
        "magnitude-s30+scope=global",
        "random-s60+seed=3",
        "wanda-s50",
        "sparsegpt-2:4",
        "gptq-w4a16-g16+p_sparsity=0.5+p_method=sparsegpt",
        "rtn-w4a16-g16+p_sparsity=0.5+p_scope=global",
    ],
)
def test_streamed_is_in_memory(arch, recipe, untrained, tmp_path):
    source = saved(untrained(arch), tmp_path / "dense")
    parsed = parse_recipe(recipe)
    made = run(source, recipe, tmp_path / "out")
    model = compress_(load_model(source), parsed, BATCHES if parsed.calibrated else ())
    expected = packed_state(model, "")
    written = tensors(tmp_path / "out")
    assert written.keys() <= expected.keys()
    assert expected.keys() - written.keys() <= {"lm_head.weight"}  # tied in OPT and GPT-2
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    assert made["max_abs_logit_difference"] == 0
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_bfloat16(untrained, tmp_path):
    source = saved(untrained("llama").bfloat16(), tmp_path / "dense")
    run(source, "gptq-w4a16-g16-plain", tmp_path / "out")
    expected = packed_state(compress_(load_model(source), parse_recipe("gptq-w4a16-g16-plain"), BATCHES), "")
    written = tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)


def test_reports_name_every_layer(llama, tmp_path):
    made = run(llama, "gptq-w4a16-g16-plain", tmp_path / "out")
    job = Job(llama, parse_recipe("gptq-w4a16-g16-plain"), BATCHES)
    assert [layer["name"] for layer in made["layers"]] == list(job.layers)
    assert all(layer["of"] == "outputs" and 0 < layer["error"] < 0.1 for layer in made["layers"])
    # The head stays dense, and its unit has no layers to report.
    assert len(made["layers"]) == 14


def test_reports_of_pruned_layers(llama, tmp_path):
    made = run(llama, "wanda-s50", tmp_path / "out")
    assert [layer["name"] for layer in made["layers"]] == list(Job(llama, parse_recipe("wanda-s50"), BATCHES).layers)
    for layer in made["layers"]:
        assert (layer["of"], layer["note"], layer["bits"]) == ("outputs", "50% zero", None)
        assert 0 < layer["error"] < 0.5
    assert made["stock_readable"]
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    made = run(llama, "magnitude-s30", tmp_path / "by-size")
    assert all(layer["of"] == "weights" and 0 < layer["error"] < 0.1 for layer in made["layers"])


def test_a_tied_head_is_stored_once(untrained, tmp_path):
    source = saved(untrained("opt"), tmp_path / "dense")
    job = Job(source, parse_recipe("rtn-w4a16-g16"))
    assert job.repeated == {"lm_head.weight"}
    run(source, "rtn-w4a16-g16", tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert "lm_head.weight" not in written
    model = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_tied_head_is_not_quantized_apart_from_its_embedding(untrained, tmp_path):
    source = saved(untrained("opt"), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"lm_head: its weight is also model\.decoder\.embed_tokens\.weight"):
        Job(source, parse_recipe("rtn-w4a16-g16+ignore="))


def test_a_head_is_quantized_where_that_is_asked_for(llama, tmp_path):
    made = run(llama, "gptq-w4a16-g16-plain+ignore=", tmp_path / "out")
    (head,) = [layer for layer in made["layers"] if layer["name"] == "lm_head"]
    assert head["of"] == "weights"
    assert "outside the decoder blocks" in head["note"]
    assert "lm_head.weight_packed" in tensors(tmp_path / "out")


# One block at a time


def live_bytes():
    """Of all tensors that are there and not hollow."""
    storages = {}
    for thing in gc.get_objects():
        plain = isinstance(thing, torch.Tensor) and thing.layout == torch.strided  # others have no such storage
        if plain and not thing.is_meta and thing.numel():
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    "recipe",
    ["rtn-w4a16-g64-plain", "gptq-w4a16-g64-plain", "magnitude-s50+scope=global", "wanda-s50", "sparsegpt-s50"],
)
def test_nothing_is_left_of_what_is_done(recipe, tmp_path):
    """At the start of every unit, no more tensors are alive than before the first."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    source = saved(AutoModelForCausalLM.from_config(config), tmp_path / "dense")
    job = Job(source, parse_recipe(recipe), BATCHES)
    job.small = False
    gc.collect()
    before, seen = live_bytes(), []

    def watch(title, layer):
        if layer is None:
            gc.collect()
            seen.append((title, live_bytes() - before))

    compress_streamed(job, Tokenizer(), tmp_path / "out", notify=watch)
    block = 4 * (4 * 64**2 + 3 * 64 * 128)
    assert len(seen) == 1 + 3
    # Calls of the blocks (masks, rotary angles) stay; weights do not.
    assert max(extra for _, extra in seen) < block / 2, seen


# Killed


FATAL = ("fsync", "replace", "rename", "unlink")


def counted(count, action):
    """Have `action` called before the file operation number `count` of this process, from 0; the names in order."""
    done = []
    for name in FATAL:
        original = getattr(os, name)

        def operation(*args, _name=name, _original=original, **kwargs):
            done.append(_name)
            if len(done) - 1 == count:
                action()
            return _original(*args, **kwargs)

        setattr(os, name, operation)
    return done


def forked(work):
    """What the process ends with that calls `work`: its exit code, or minus the signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    "recipe",
    ["rtn-w4a16-g16-plain", pytest.param("gptq-w4a16-g16-plain+alpha=0.5", marks=pytest.mark.slow)],
)
def test_killed_at_any_operation_and_resumed(recipe, llama, tmp_path):
    """SIGKILL before a file operation: between all that a run does to its files."""
    run(llama, recipe, tmp_path / "whole")
    expected = digests(tmp_path / "whole")

    def go():
        run(llama, recipe, tmp_path / "out", resume=True)

    def count():
        done = counted(-1, lambda: None)
        run(llama, recipe, tmp_path / "counted")
        (tmp_path / "operations").write_text(" ".join(done))

    assert forked(count) == 0
    operations = (tmp_path / "operations").read_text().split()
    syncs = [number for number, name in enumerate(operations) if name == "fsync"]
    others = [number for number, name in enumerate(operations) if name != "fsync"]
    assert len(others) > 10
    resumed = 0
    for number in [*others, *random.Random(0).sample(syncs, 3)]:

        def killed(number=number):
            counted(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            go()

        assert forked(killed) == -signal.SIGKILL
        resumed += (unfinished(tmp_path / "out") / stream._JOURNAL).is_file()
        if not (tmp_path / "out").exists():
            assert forked(go) == 0
        assert digests(tmp_path / "out") == expected, f"killed before operation {number}, {operations[number]}"
        assert not unfinished(tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out")
    assert resumed > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_and_resumed(llama, tmp_path):
    recipe = "gptq-w4a16-g16-plain"
    made = run(llama, recipe, tmp_path / "whole")
    chosen = random.Random(1)
    killed = 0
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(llama, recipe, tmp_path / "out", resume=True)
                code = 0
            finally:
                os._exit(code)
        if attempt < 5:
            time.sleep(chosen.uniform(0.05, 0.6) * made["seconds"])
            os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        killed += 1
    assert killed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


class _Stop(BaseException):
    """What a person does with Control-C."""


def interrupted(source, recipe, target, units, batches=BATCHES):
    """Leave an unfinished run in which `units` units are done."""
    seen = []

    def stop(_title, layer):
        if layer is None:
            seen.append(layer)
            if len(seen) > units:
                raise _Stop

    with pytest.raises(_Stop):
        run(source, recipe, target, batches, notify=stop)
    assert read_json(unfinished(target) / stream._JOURNAL)["done"] == units


def test_an_unfinished_run_is_not_gone_over_without_being_asked(llama, tmp_path):
    interrupted(llama, "rtn-w4a16-g16-plain", tmp_path / "out", 2)
    with pytest.raises(ValueError, match=r"unfinished run lies in .*--resume"):
        run(llama, "rtn-w4a16-g16-plain", tmp_path / "out")
    made = run(llama, "rtn-w4a16-g16-plain", tmp_path / "out", resume=True)
    assert made["max_abs_logit_difference"] is None  # what was done before is no longer in memory
    assert len(made["layers"]) == 14


@pytest.mark.parametrize(
    "recipe",
    ["magnitude-s50+scope=global", "wanda-s50", "sparsegpt-s50", "gptq-w4a16-g16+p_sparsity=0.5+p_method=sparsegpt"],
)
@pytest.mark.parametrize("units", [1, 2])
def test_pruning_goes_on_to_the_same_bytes(recipe, units, llama, tmp_path):
    run(llama, recipe, tmp_path / "whole")
    interrupted(llama, recipe, tmp_path / "out", units)
    run(llama, recipe, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_another_job_does_not_go_on_with_it(llama, untrained, tmp_path):
    interrupted(llama, "gptq-w4a16-g16-plain", tmp_path / "out", 2)
    before = digests(unfinished(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"resume: recipe: .* had 'gptq-w4a16-g16-plain', this one has 'gptq-w3"):
        run(llama, "gptq-w3a16-g16-plain", tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="resume: inputs: "):
        run(llama, "gptq-w4a16-g16-plain", tmp_path / "out", BATCHES[::-1], resume=True)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"resume: threads: .* had 1, this one has 2"):
            run(llama, "gptq-w4a16-g16-plain", tmp_path / "out", resume=True)
    finally:
        torch.set_num_threads(1)
    saved(untrained("llama", seed=1), llama)
    with pytest.raises(ValueError, match="resume: inputs: "):
        run(llama, "gptq-w4a16-g16-plain", tmp_path / "out", resume=True)
    assert digests(unfinished(tmp_path / "out")) == before


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-w3a16-plain",
        "gptq-w3a16-plain",
        "signround-w3a16+iterations=2",
        "magnitude-s50",
        "magnitude-s50+scope=global",
        "wanda-s50",
        "rtn-w4a16+p_sparsity=0.5+p_method=sparsegpt",
    ],
)
def test_layers_in_front_of_the_blocks(recipe, tmp_path):
    """OPT-350m projects its embeddings: what enters the first block is the compressed projection's."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    config = OPTConfig(vocab_size=300, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3, **shape)
    config.do_layer_norm_before = False
    source = saved(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "dense")
    made = run(source, recipe, tmp_path / "out")
    assert made["max_abs_logit_difference"] == 0
    entered = []
    model = load_model(source)
    with torch.no_grad():
        compressed = compress_(copy.deepcopy(model), parse_recipe(recipe), BATCHES)
        for other in (compressed, load_model(tmp_path / "out")):
            other.model.decoder.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
            entered.append(other(BATCHES[0]).logits)
    assert torch.equal(entered[0], entered[2])
    assert torch.equal(entered[1], entered[3])


def test_a_failure_of_the_machine_leaves_what_is_done(llama, tmp_path):
    def full(text, layer):
        if text.startswith("block 2") and layer is None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="what is done stays, to be resumed"):
        run(llama, "gptq-w4a16-g16-plain", tmp_path / "out", notify=full)
    assert not (tmp_path / "out").exists()
    begun = []
    run(llama, "gptq-w4a16-g16-plain", tmp_path / "out", resume=True, notify=lambda text, _: begun.append(text))
    assert begun[0] == "block 2 of 2"
    run(llama, "gptq-w4a16-g16-plain", tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_current_directory_as_output(llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(llama, "rtn-w4a16-g16-plain", Path("."))
    assert load_model(tmp_path / "here") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "here"]


# Refused


@pytest.mark.parametrize("recipe", ["rtn-w4a16-g16-plain", "gptq-w4a16-g16-plain", "magnitude-s50"])
def test_nan_in_a_block_leaves_nothing(recipe, untrained, tmp_path):
    model = untrained("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    source = saved(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: contains NaN or infinity"):
        run(source, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_is_there_is_not_written_over(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="out: exists and is not empty"):
        run(llama, "rtn-w4a16-g16-plain", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("batches", [(), [torch.zeros(3, 0, dtype=torch.long)], [torch.zeros(3, dtype=torch.long)]])
def test_calibration_data_is_needed(batches, llama):
    with pytest.raises(ValueError, match="calibration: "):
        Job(llama, parse_recipe("gptq-w4a16-g16"), batches)


def test_data_that_is_not_asked_for_is_not_looked_at(llama):
    assert Job(llama, parse_recipe("rtn-w4a16-g16"), BATCHES).batches == ()
    same = [Job(llama, parse_recipe("rtn-w4a16-g16"), batches).identity() for batches in ((), BATCHES)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rtn-w4a16-g48", r"self_attn\.q_proj: 32 input features do not divide into groups of 48"),
        ("rtn-w4a16-g16+ignore=lm_hood", "'lm_hood' names no module of LlamaForCausalLM"),
        ("wanda-s50+t_groups=bias", "retrain: goes through all of the model, and wanda-s50.* is not streamed"),
        ("sparsegpt-s50+g_draws=2", "gate: keeps blocks at 8 bits"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read(recipe, message, llama, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(llama, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
