"""Peak memory is counted to the byte; a decode measurement has numbers that can be true. No test reads the clock."""

import copy
import gc

import pytest
import torch
from remanence.backends.cpu import PeakMemory
from remanence.bench.speed import decode_speed
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_

pytestmark = pytest.mark.usefixtures("one_thread")

KB = 1024


def floats(kilobytes):
    """A fresh tensor of that size."""
    return torch.zeros(kilobytes * KB // 4)


def test_allocations_and_frees_are_counted_exactly():
    with PeakMemory(held=0) as memory:
        a = floats(4)
        assert memory.peak_bytes == 4 * KB
        b = floats(8)
        assert memory.peak_bytes == 12 * KB
        del a
        c = floats(2)  # 10 KB live
        assert memory.peak_bytes == 12 * KB
        d = floats(3)  # 13 KB live
        assert memory.peak_bytes == 13 * KB
        del b, c, d
        e = floats(13)
        assert memory.peak_bytes == 13 * KB
        f = floats(1)
    assert memory.peak_bytes == 14 * KB
    del e, f


def test_held_memory_is_the_floor():
    with PeakMemory(held=100 * KB) as memory:
        assert memory.peak_bytes == 100 * KB
        floats(1)
        floats(1)
    assert memory.peak_bytes == 101 * KB


def test_results_of_operations_count_inputs_from_outside_do_not():
    weight, x = torch.ones(32, 64), torch.ones(16, 64)
    with PeakMemory(held=0) as memory:
        y = x @ weight.T
        z = torch.relu(y)
    assert memory.peak_bytes == 2 * 16 * 32 * 4
    del z


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[2:5],
        lambda x: x.view(-1),
        lambda x: x.T.reshape(64, 16).t(),
        lambda x: x.split(4),
        lambda x: x.expand(3, 16, 64),
        lambda x: x.unbind(0),
        lambda x: x.add_(1),
        lambda x: x.fill_(2),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.detach(),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.resize_(8, 64),
    ],
    ids=[
        "slice",
        "view",
        "transpose-twice",
        "split",
        "expand",
        "unbind",
        "in-place",
        "fill",
        "out",
        "detach",
        "contiguous",
        "same-dtype",
        "smaller",
    ],
)
@pytest.mark.parametrize("inside", [True, False], ids=["made-inside", "made-before"])
def test_views_and_writes_in_place_are_free(use, inside):
    outside = torch.ones(16, 64)
    with PeakMemory(held=0) as memory:
        x = torch.ones(16, 64) if inside else outside
        kept = use(x)
        after = floats(4)
    assert memory.peak_bytes == (4 * KB if inside else 0) + 4 * KB
    del kept, after


def test_second_tensor_on_the_same_storage_is_free():
    with PeakMemory(held=0) as memory:
        x = floats(8)
        y = torch.empty(0).set_(x.untyped_storage())
        assert memory.peak_bytes == 8 * KB
        del x
        z = floats(1)  # y still holds the eight
    assert memory.peak_bytes == 9 * KB
    del y, z


def test_views_keep_memory_alive():
    with PeakMemory(held=0) as memory:
        part = floats(8)[:1]  # the whole is gone, its memory is not
        floats(4)
        assert memory.peak_bytes == 12 * KB
        del part
        floats(9)
    assert memory.peak_bytes == 12 * KB


def test_memory_of_a_loop_does_not_add_up():
    with PeakMemory(held=0) as memory:
        x = floats(4)
        for _ in range(50):
            x = x + 1
    assert memory.peak_bytes == 8 * KB, "old and new side by side, no more"


def test_memory_in_a_cycle_is_given_back_when_collected():
    with PeakMemory(held=0) as memory:
        loop = [floats(4)]
        loop.append(loop)
        del loop
        gc.collect()
        floats(6)
    assert memory.peak_bytes == 6 * KB


def test_what_autograd_keeps_is_counted():
    w = torch.ones(KB // 4, requires_grad=True)
    with PeakMemory(held=0) as memory:
        y = w.exp()  # 1 KB, kept for the gradients of both
        z = y * y  # 2 KB
        del y
        u = z + 1  # 3 KB; without a graph y would be gone
        del z, u
        floats(4)  # the graph went with them
    assert memory.peak_bytes == 4 * KB
    with torch.no_grad(), PeakMemory(held=0) as memory:
        y = w.exp()
        z = y * y
        del y
        u = z + 1
    assert memory.peak_bytes == 2 * KB
    del z, u


def test_two_runs_of_the_same_work_agree(untrained):
    model, ids = untrained("llama"), torch.arange(20)[None]
    peaks = []
    for _ in range(3):
        with torch.no_grad(), PeakMemory(held=0) as memory:
            model(ids)
        peaks.append(memory.peak_bytes)
    assert peaks[0] == peaks[1] == peaks[2] > 0


def bytes_of(model):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_decode(untrained, arch):
    model = untrained(arch)
    first, again = (decode_speed(model, [5, 6, 7, 8], pad=0, new_tokens=4, repeats=2) for _ in range(2))
    assert first.tokens_per_s > 0
    assert first.spread >= 0
    assert (first.repeats, first.new_tokens) == (2, 4)
    assert first.peak_memory_bytes == again.peak_memory_bytes
    held = bytes_of(model)
    assert held < first.peak_memory_bytes < held + 200 * KB, "two layers, 32 wide, 9 tokens"


def test_tied_weights_are_held_once(untrained):
    model = untrained("opt")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    peak = decode_speed(model, [5, 6, 7, 8], pad=0, new_tokens=2, repeats=1).peak_memory_bytes
    separate = copy.deepcopy(model)
    separate.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    extra = separate.lm_head.weight.untyped_storage().nbytes()
    assert decode_speed(separate, [5, 6, 7, 8], 0, new_tokens=2, repeats=1).peak_memory_bytes == peak + extra


def test_weights_in_one_storage_are_held_once(untrained):
    """As a loader may leave them: many parameters, each a slice of one buffer."""
    model = untrained("llama")
    peak = decode_speed(model, [5, 6, 7, 8], pad=0, new_tokens=2, repeats=1).peak_memory_bytes
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert decode_speed(model, [5, 6, 7, 8], 0, new_tokens=2, repeats=1).peak_memory_bytes == peak


def test_packed_weights_take_less(untrained):
    model = untrained("llama")
    small = quantize_(copy.deepcopy(model), parse_recipe("rtn-w4a16-g16-plain"))
    dense, packed = (
        decode_speed(m, [5, 6, 7, 8], 0, new_tokens=4, repeats=1).peak_memory_bytes for m in (model, small)
    )
    saved = bytes_of(model) - bytes_of(small)
    assert saved > 0
    # What an op unpacks inside itself is not seen; the tensors between layers are the same.
    assert dense - packed == pytest.approx(saved, abs=2 * KB)


def test_answers_do_not_end_early(untrained):
    """Every run decodes as many tokens as asked, even if the model would stop at once."""
    model, lengths = untrained("llama"), []
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely: the first wins, and it is the end token
    model.generation_config.eos_token_id = 0
    forward = model.forward
    model.forward = lambda *args, **kwargs: lengths.append(1) or forward(*args, **kwargs)
    decode_speed(model, [5, 6, 7, 8], pad=0, new_tokens=3, repeats=1)
    assert len(lengths) == 2 + 1 + 4 + 4
