"""Peers: environments are built once, jobs go out and come back as files, failures come back in words.

The peers themselves (gigabytes of wheels) run where REMANENCE_TEST_PEERS names the cache directory that holds their
environments, or may hold them; all else is tested with scripts that do as they do.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from remanence.bench import peers
from remanence.bench.peers import LayerJob, ModelJob, Peer
from remanence.bench.ptq_peers import activations, packed, peer_job
from safetensors.torch import load_file, save_file

SHARED = Path(peers.__file__).parent / "ptq_peers"


# --- what peers are fed


def test_activations_come_back_as_written_chunk_by_chunk(tmp_path):
    activations.write(tmp_path / "x.npy", features=24, sequences=3, tokens=5, seed=7)
    whole = np.load(tmp_path / "x.npy")
    assert whole.shape == (3, 5, 24)
    assert whole.dtype == np.float32
    chunks = list(activations.read(tmp_path / "x.npy"))
    assert len(chunks) == 3
    for chunk, part, made in zip(chunks, whole, activations.rows(24, 3, 5, seed=7), strict=True):
        assert np.array_equal(chunk, part)
        assert np.array_equal(chunk, made)
    other = next(activations.rows(24, 1, 5, seed=8))
    assert not np.array_equal(other, chunks[0])


def test_activations_are_correlated_and_channels_differ_in_size():
    x = np.concatenate(list(activations.rows(256, 16, 256, seed=0))).astype(np.float64)
    sizes = x.std(0)
    assert sizes.max() / sizes.min() > 20
    spectrum = np.linalg.eigvalsh(np.corrcoef(x.T))[::-1]
    # Independent channels would put 1/256 of the variance on each direction (with this many rows, below 1.6/256).
    assert spectrum[:8].sum() / spectrum.sum() > 0.3


def test_weight_has_the_variance_it_says():
    W = activations.weight(300, 400, seed=1)
    assert W.shape == (300, 400)
    assert W.dtype == np.float32
    assert W.var() * 400 == pytest.approx(1, rel=0.02)  # 120000 samples: 0.4% is one standard deviation


def test_calibration_keeps_order_and_shapes(tmp_path):
    batches = [torch.arange(i, i + 6).view(2, 3) if i != 4 else torch.arange(7).view(1, 7) for i in range(12)]
    peers.write_calibration(tmp_path / "c.safetensors", batches)
    back = peer_job.batches(str(tmp_path / "c.safetensors"))  # "batch.10" sorts before "batch.2"
    assert len(back) == 12
    for given, found in zip(batches, back, strict=True):
        assert torch.equal(given, found)


# --- what comes back


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes as int32 words, by one big integer: the format's definition, word by word."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_checkpoints_are_decoded(bits):
    generator = torch.Generator().manual_seed(bits)
    N, K, G = 32, 96, 32
    q = torch.randint(0, 2**bits, (N, K), generator=generator)
    zero = torch.randint(0, 2**bits, (N, K // G), generator=generator)  # zero 0 is stored as all ones
    scale = torch.rand(N, K // G, generator=generator).half()
    group_of = torch.arange(K).roll(5) // G  # as activation order leaves it
    qweight = torch.tensor([stream(row.tolist(), bits) for row in q], dtype=torch.int32).T
    stored = (zero - 1) % 2**bits
    qzeros = torch.tensor([stream(row.tolist(), bits) for row in stored.T], dtype=torch.int32)
    found = packed.decode_gptq(qweight, qzeros, scale.T, group_of.int(), bits)
    expected = (q - zero[:, group_of]).double() * scale.double()[:, group_of]
    assert torch.equal(found.double(), expected)  # 8 bits of code by 11 of scale: exact in float32


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_checkpoints_are_decoded(bits):
    generator = torch.Generator().manual_seed(bits)
    N, K, G = 64, 64, 32
    q = torch.randint(0, 2**bits, (K, N), generator=generator)
    zero = torch.randint(0, 2**bits, (K // G, N), generator=generator)
    scale = torch.rand(K // G, N, generator=generator).half()
    # Each 4-bit word holds columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight, the first lowest.
    order = [8 * w + i for w in range(N // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)] if bits == 4 else list(range(N))
    words = [torch.tensor([stream(row[order].tolist(), bits) for row in t], dtype=torch.int32) for t in (q, zero)]
    found = packed.decode_awq(*words, scale, bits)
    group = torch.arange(K) // G
    expected = ((q - zero[group]).double() * scale.double()[group]).T
    assert torch.equal(found.double(), expected)


def test_relative_error_is_the_error_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 8, generator=generator)
    Q = W + 0.1 * torch.randn(3, 8, generator=generator)
    outputs = X @ W.T.double(), X @ Q.T.double()
    expected = float((outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum())
    assert peer_job.relative_error(W, Q, X.T @ X * 0.3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_the_peak_beyond_what_was_there():
    size = 64 << 20
    held = torch.ones(size // 4)
    with peer_job.Memory() as memory:
        held.add_(1)
        for _ in range(2):  # one after the other: the peak holds one of them
            part = torch.ones(size // 4)
            del part
    slack = 16 << 20
    if memory.exact:
        assert size - slack < memory.bytes < size + slack
    else:  # an earlier peak may hide this one
        assert memory.bytes < size + slack


# --- environments and jobs


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(source) makes `source` the script of the peer "fake", run by this interpreter in place of a venv's."""
    monkeypatch.setattr(peers, "environment", lambda *_: Path(sys.executable))

    def make(source: str) -> None:
        script = tmp_path / "fake.py"
        script.write_text(f"import sys; sys.path.insert(0, {str(SHARED)!r})\n{source}")
        monkeypatch.setitem(peers.PEERS, "fake", Peer(str(script), (), variables={"FAKE": "yes"}))

    return make


def model_job(tmp_path: Path, **more) -> ModelJob:
    peers.write_calibration(tmp_path / "c.safetensors", [torch.arange(6).view(2, 3)])
    given = {"method": "rtn", "bits": 4, "group_size": None, "out": tmp_path / "out"} | more
    return ModelJob(tmp_path, tmp_path / "c.safetensors", **given)


ANSWER = """
import os, torch
from peer_job import CannotDo, Memory, Seconds, batches, run, save
def model(job):
    with (clock := Seconds()):
        ids = batches(job["calibration"])
    save(job["out"], {"layer.weight": torch.full((2, 2), job["bits"], dtype=torch.float16).T})
    names = ("FAKE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH")
    return {"seconds": clock.total, "ids": ids[0].tolist(), "variables": {n: os.environ.get(n) for n in names}}
run({"model": model}, ("numpy",))
"""


def test_a_job_goes_out_and_comes_back(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/ours")
    fake(ANSWER)
    done = peers.run_model("fake", model_job(tmp_path, bits=3), tmp_path / "cache")
    assert done.reason is None
    assert done.result["ids"] == [[0, 1, 2], [3, 4, 5]]
    expected = {"FAKE": "yes", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": None}
    assert done.result["variables"] == expected
    assert done.result["threads"] == 1
    assert done.result["versions"]["torch"] == torch.__version__
    assert done.weights is not None
    weights = load_file(done.weights)
    assert weights["layer.weight"].dtype == torch.float32
    assert torch.equal(weights["layer.weight"], torch.full((2, 2), 3.0))
    asked = json.loads((tmp_path / "out" / "job.json").read_text())
    assert (asked["kind"], asked["group_size"], asked["symmetric"]) == ("model", None, True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "from peer_job import CannotDo, run\n"
            "def model(job): raise CannotDo('no kernel for 96 rows')\n"
            "run({'model': model}, ())",
            "^no kernel for 96 rows$",
        ),
        (
            "from peer_job import run\ndef model(job): return {'x': [][1]}\nrun({'model': model}, ())",
            "^IndexError: list index out of range$",
        ),
        ("import gone_with_the_wind", "exit status 1: ModuleNotFoundError.*gone_with_the_wind"),
        (
            # As GPTQModel's worker threads do.
            "import os, traceback\ntry: assert 96 % 64 == 0\nexcept AssertionError: traceback.print_exc(); os._exit(1)",
            "exit status 1: AssertionError, at `.*assert 96 % 64 == 0`",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9: it said nothing"),
        ("import time\ntime.sleep(60)", "longer than 3 s"),
    ],
)
def test_failures_come_back_in_words(fake, tmp_path, source, reason):
    (tmp_path / "out").mkdir()
    save_file({"old": torch.zeros(1)}, tmp_path / "out" / "weights.safetensors")
    (tmp_path / "out" / "result.json").write_text('{"seconds": 1}')
    fake(source)
    done = peers.run_model("fake", model_job(tmp_path), tmp_path / "cache", timeout=3 if "sleep" in source else 60)
    assert done.weights is None, "of an earlier run"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(done.reason)


@pytest.mark.slow
def test_an_environment_is_built_once(monkeypatch, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(peers.PEERS, "fake", Peer("fake.py", (), bare=("a-peer==1.0",)))
    with pytest.raises(RuntimeError, match=r"fake: its environment cannot be built: pip install .*a-peer==1\.0"):
        peers.environment("fake", tmp_path)
    wheel(wheels, "a_peer", "print('I am the peer')", requires="torch==0.0")  # which nobody can have: it goes in bare
    python = peers.environment("fake", tmp_path)  # what failed is no environment
    said = subprocess.run([python, "-m", "a_peer"], capture_output=True, text=True, check=True).stdout
    assert said == "I am the peer\n"
    assert "a-peer==1.0" in (python.parent.parent / "installed.txt").read_text().replace("_", "-")
    (wheels / "a_peer-1.0-py3-none-any.whl").unlink()
    assert peers.environment("fake", tmp_path) == python  # a second build would fail
    monkeypatch.setitem(peers.PEERS, "fake", Peer("fake.py", (), bare=("a-peer==2.0",)))
    monkeypatch.setattr(peers.venv, "create", lambda home, **_: pytest.fail(f"{home}"))
    with pytest.raises(pytest.fail.Exception) as found:
        peers.environment("fake", tmp_path)  # other pins, another place
    assert str(found.value) != str(python.parent.parent)


def wheel(folder: Path, name: str, source: str, requires: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", source)
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: {requires}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_unknown_peers_are_named():
    with pytest.raises(ValueError, match=r"peer: 'autogptq' is not one of gptqmodel, llmcompressor"):
        peers.environment("autogptq", Path("/nowhere"))


# --- the peers themselves


@pytest.fixture
def real_cache() -> Path:
    if not (folder := os.environ.get("REMANENCE_TEST_PEERS")):
        pytest.skip("REMANENCE_TEST_PEERS names no cache directory for the peers' environments (3 GB)")
    return Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptqmodel", "llmcompressor"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64), (2, 32)])
def test_rounding_by_peers_is_rounding(real_cache, tmp_path, memorized, name, bits, group_size):
    """Both round to max|w| / (2^(b-1) - 1/2): decoding and names are right, to the rounding of a scale to float16."""
    memorized.target.save_pretrained(tmp_path / "model")
    memorized.tokenizer.save_pretrained(tmp_path / "model")
    peers.write_calibration(tmp_path / "c.safetensors", [torch.arange(20).view(1, 20)])
    out = tmp_path / "out"
    job = ModelJob(tmp_path / "model", tmp_path / "c.safetensors", "rtn", bits, group_size, out)
    done = peers.run_model(name, job, real_cache)
    assert done.reason is None
    assert done.weights is not None
    weights, dense = load_file(done.weights), memorized.target.state_dict()
    layers = [n for n, m in memorized.target.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert sorted(done.result["quantized"]) == sorted(layers)
    assert set(weights) >= set(dense) - {"lm_head.weight"}  # which may be the embedding's
    for key, found in weights.items():
        W = dense[key].double()
        if key.removesuffix(".weight") not in layers:
            assert torch.equal(found.double(), W)
            continue
        groups = W.view(len(W), -1, group_size)
        scale = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
        steps = groups / scale
        expected = (steps.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view_as(W)
        close = (found.double() - expected).abs() <= 2**-11 * expected.abs() + 1e-7
        tie = ((steps.abs() % 1 - 0.5).abs() < 1e-5).view_as(W)  # every group's largest: to either side in float32
        assert (close | tie).all()
        bound = (0.5 + 2 ** (bits - 1) * 2**-11) * scale + 1e-7
        assert ((found.double() - W).view_as(groups).abs() <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptqmodel", "llmcompressor"])
def test_layers_are_solved_and_measured(real_cache, tmp_path, name):
    activations.write(tmp_path / "x.npy", features=256, sequences=6, tokens=128, seed=0)
    np.save(tmp_path / "w.npy", W := activations.weight(96, 256, seed=1))
    out = tmp_path / "out"
    done = peers.run_layer(name, LayerJob(tmp_path / "w.npy", tmp_path / "x.npy", 3, 64, out, threads=1), real_cache)
    assert done.reason is None
    assert done.weights is not None
    Q = load_file(done.weights)["weight"].numpy().astype(np.float64)
    assert all(len(np.unique(row[:64])) <= 8 for row in Q)
    X = np.load(tmp_path / "x.npy").reshape(-1, 256).astype(np.float64)
    error = np.square(X @ (W - Q).T).sum() / np.square(X @ W.T.astype(np.float64)).sum()
    assert done.result["relative_error"] == pytest.approx(error, rel=1e-4)  # H is accumulated in float32
    groups = W.reshape(96, -1, 64)
    scale = np.abs(groups).max(2, keepdims=True) / 3.5
    rounded = (np.clip(np.round(groups / scale), -4, 3) * scale).reshape(W.shape)
    assert error < 0.5 * np.square(X @ (W - rounded).T).sum() / np.square(X @ W.T).sum()
    assert done.result["seconds"]["hessian"] > 0
    assert done.result["seconds"]["solve"] > 0
    assert done.result["peak_rss"] > 256 * 256 * 4
    assert done.result["failures"] == []
