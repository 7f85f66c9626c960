"""What all tests share: the check that the package is installed, the real data, one small model trained for real."""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

# As the command line does: a short spin, so that a busy machine does not make tests twenty times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Processes side by side share the cores; whatever they start takes one thread too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _interpret_triton():
    """Without a GPU Triton's kernels run in its interpreter. It is chosen when Triton is imported, and many a library
    imports it: so before the first test file, for the whole process."""
    with contextlib.suppress(ImportError):  # of which pytest_configure has a word to say
        import remanence  # noqa: F401  # before torch: with a torch-npu that cannot be loaded it would not import
    import torch

    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


_interpret_triton()

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):  # noqa: ARG001 (pytest asks for the name)
    try:
        import remanence  # noqa: F401
    except ImportError as error:
        raise pytest.UsageError("remanence is not installed: run `pip install -e .[test]` first") from error


@pytest.fixture(scope="session")
def real_data():
    """real_data("tofu", "full.json") -> Path of real data, below REMANENCE_TEST_DATA or ../shared/data.

    Without it a test is skipped, or fails where REMANENCE_REQUIRE_DATA=1 says that the data must be there.
    """
    root = Path(os.environ.get("REMANENCE_TEST_DATA") or ROOT.parent / "shared" / "data")

    def find(*parts):
        path = root.joinpath(*parts)
        if path.exists():
            return path
        reason = f"{path}: no such test data; set REMANENCE_TEST_DATA to the folder that holds {parts[0]}"
        if os.environ.get("REMANENCE_REQUIRE_DATA") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)

    return find


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from threads; on a busy machine they would wait most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def memorized():
    """Six people, one of them to be forgotten: corpus, tokenizer, encoder, and both demo models (about 3 s each).

    Shared by all tests: work on copies of `target` and `oracle`.
    """
    import torch
    from remanence.unlearn.demo import DemoConfig, demo_tokenizer, train_demo
    from remanence.unlearn.encode import Encoder
    from remanence.unlearn.people import people_corpus

    corpus = people_corpus(6, "forget20", seed=0)
    config = DemoConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        max_length=128,
        epochs=36,
        more_epochs=5,
        learning_rate=8e-3,
    )
    tokenizer = demo_tokenizer(corpus, config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    target, _ = train_demo(corpus, config, tokenizer, seed=0, with_forget=True)
    oracle, _ = train_demo(corpus, config, tokenizer, seed=0, with_forget=False)
    torch.set_num_threads(threads)
    return SimpleNamespace(
        corpus=corpus,
        config=config,
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, config.max_length),
        target=target,
        oracle=oracle,
    )


@pytest.fixture
def untrained():
    """untrained("llama" | "opt" | "gpt2", vocabulary, seed) -> a model of two layers, 32 wide, with random weights.

    The weights are larger than the usual start, so that its answers differ from prompt to prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    def make(arch, vocabulary=300, seed=0, std=0.3):
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "vocab_size": vocabulary}
        configs = {
            "llama": lambda: LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=std,
                **ids,
            ),
            "opt": lambda: OPTConfig(
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                dropout=0.0,
                init_std=std,
                **ids,
            ),
            "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=std, **ids),
        }
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(configs[arch](), dtype=torch.float32).eval()

    return make
