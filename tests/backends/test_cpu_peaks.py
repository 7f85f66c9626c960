"""What CPUs are derived to do at most: by hand, from small trees of other machines' files."""

import pytest
from remanence.backends import cpu_peaks as module
from remanence.backends.cpu import CpuDevice
from remanence.backends.cpu_peaks import cpu_peaks, last_level_cache
from remanence.backends.device import PEAKS

ZEN = "fpu sse2 ssse3 fma f16c avx avx2 sha_ni rdpid"
SAPPHIRE = (
    "fma f16c avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx_vnni avx512_bf16 avx512_vnni avx512_fp16 "
    "amx_bf16 amx_tile amx_int8"
)
GRAVITON = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp sve i8mm bf16"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def caches(root, number, levels, shared):
    """levels: (level, type, size) of each index; the last one is shared by `shared`, the others by nobody."""
    for index, (level, kind, size) in enumerate(levels):
        place = root / f"sys/devices/system/cpu/cpu{number}/cache/index{index}"
        last = index == len(levels) - 1
        for name, text in (("level", level), ("type", kind), ("size", size)):
            write(place / name, text)
        write(place / "shared_cpu_list", shared if last else number)


LEVELS = [(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "512K")]


@pytest.fixture
def zen(tmp_path):
    """4 cores with two threads each on two complexes of 16 MiB; clocks by cpufreq. Processor n and n + 4 are a core."""
    blocks = []
    for number in range(8):
        core = number % 4
        blocks.append(
            f"processor\t: {number}\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD Zen: it\ncpu MHz\t\t: 1400.123\n"
            f"physical id\t: 0\ncore id\t\t: {core}\nflags\t\t: {ZEN}\n"
        )
        cpu = tmp_path / f"sys/devices/system/cpu/cpu{number}"
        write(cpu / "cpufreq/cpuinfo_max_freq", 4_000_000)
        write(cpu / "topology/thread_siblings_list", f"{core},{core + 4}")
        caches(tmp_path, number, [*LEVELS, (3, "Unified", "16384K")], "0-1,4-5" if core < 2 else "2-3,6-7")
    write(tmp_path / "proc/cpuinfo", "\n".join(blocks))
    return tmp_path


@pytest.fixture
def sapphire(tmp_path):
    """2 sockets with 2 cores each, as cpuinfo alone tells (no topology, no cpufreq): the clock of now."""
    blocks = [
        f"processor\t: {number}\nmodel name\t: Intel(R) Xeon(R)\ncpu MHz\t\t: 2000.000\nphysical id\t: {number // 4}\n"
        f"core id\t\t: {number % 2}\nflags\t\t: {SAPPHIRE}\n"
        for number in range(8)
    ]
    write(tmp_path / "proc/cpuinfo", "\n".join(blocks))
    for number in range(8):
        levels = [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M"), (3, "Unified", "105M")]
        caches(tmp_path, number, levels, "0-3" if number < 4 else "4-7")
    return tmp_path


@pytest.fixture
def graviton(tmp_path):
    """2 cores; neither topology nor caches, and cpuinfo without a clock."""
    blocks = [f"processor\t: {number}\nBogoMIPS\t: 2100.00\nFeatures\t: {GRAVITON}\n" for number in range(2)]
    write(tmp_path / "proc/cpuinfo", "\n".join(blocks))
    return tmp_path


def values(peaks):
    return {kind: None if peak is None else peak.value for kind, peak in peaks.items()}


def test_avx2_and_two_threads_a_core(zen):
    peaks = cpu_peaks(zen, range(8))
    assert values(peaks) == {
        "float32": 4 * 4e9 * 8 * 2 * 2,
        "float16": None,
        "bfloat16": None,
        "int8": pytest.approx(4 * 4e9 * 32 * 2 * 2 * 2 / 3),
    }
    assert peaks["float32"].source.startswith("derived: 4 cores x 4.00 GHz (cpuinfo_max_freq) x 8 lanes x 2 FMA x 2")
    assert "two units assumed" in peaks["int8"].source


def test_the_cores_that_the_process_may_use(zen):
    assert cpu_peaks(zen, [0, 4])["float32"].value == 4e9 * 32, "two threads of one core"
    assert cpu_peaks(zen, [0, 1])["float32"].value == 2 * 4e9 * 32
    write(zen / "sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq", 2_000_000)
    slower = cpu_peaks(zen, [0, 1])["float32"]
    assert slower.value == (4e9 + 2e9) * 32
    assert "2.00-4.00 GHz" in slower.source


def test_avx512_and_amx(sapphire):
    assert values(cpu_peaks(sapphire, range(8))) == {
        "float32": 4 * 2e9 * 64,
        "float16": 4 * 2e9 * 128,
        "bfloat16": 4 * 2e9 * 1024,
        "int8": 4 * 2e9 * 2048,
    }
    assert "now, by /proc/cpuinfo" in cpu_peaks(sapphire, [0])["int8"].source
    text = (sapphire / "proc/cpuinfo").read_text()
    write(sapphire / "proc/cpuinfo", text.replace("amx_bf16 amx_tile amx_int8", ""))
    assert values(cpu_peaks(sapphire, [0, 1, 2, 3])) == {
        "float32": 2 * 2e9 * 64,
        "float16": 2 * 2e9 * 128,
        "bfloat16": 2 * 2e9 * 128,
        "int8": 2 * 2e9 * 256,
    }


def test_arm(graviton):
    assert values(cpu_peaks(graviton, [0, 1])) == dict.fromkeys(("float32", "float16", "bfloat16", "int8"))
    for number in range(2):
        write(graviton / f"sys/devices/system/cpu/cpu{number}/cpufreq/cpuinfo_max_freq", 2_600_000)
    assert values(cpu_peaks(graviton, [0, 1])) == {
        "float32": 2 * 2.6e9 * 16,
        "float16": 2 * 2.6e9 * 32,
        "bfloat16": 2 * 2.6e9 * 64,
        "int8": 2 * 2.6e9 * 128,
    }


def test_one_clock_missing_is_none_known(zen):
    (zen / "sys/devices/system/cpu/cpu2/cpufreq/cpuinfo_max_freq").write_text("unknown")
    assert cpu_peaks(zen, [0, 1])["float32"] is not None
    assert set(cpu_peaks(zen, [0, 2]).values()) == {None}


def test_flags_that_not_every_processor_has(zen):
    text = (zen / "proc/cpuinfo").read_text()
    write(zen / "proc/cpuinfo", text.replace(" fma ", " ", 1))
    assert cpu_peaks(zen, range(8))["float32"] is None


def test_no_files_at_all(tmp_path):
    assert set(cpu_peaks(tmp_path, [0]).values()) == {None}
    assert last_level_cache(tmp_path, [0]) is None


def test_last_level_caches_of_two_sockets(sapphire):
    assert last_level_cache(sapphire, range(8)) == 2 * 105 * 2**20
    assert last_level_cache(sapphire, [0, 1]) == 105 * 2**20


def test_caches_that_cores_share_count_once(zen):
    assert last_level_cache(zen, [0, 1, 4, 5]) == 16 * 2**20
    assert last_level_cache(zen, [0, 2]) == 32 * 2**20
    assert last_level_cache(zen, range(8)) == 32 * 2**20


def test_an_instruction_cache_holds_no_weights(tmp_path):
    caches(tmp_path, 0, [(1, "Data", "48K"), (2, "Instruction", "1M")], "0")
    assert last_level_cache(tmp_path, [0]) == 48 * 2**10


def test_this_machine(monkeypatch):
    peaks = CpuDevice().peaks()
    assert set(peaks) == set(PEAKS)
    assert peaks["memory"] is None
    assert {kind: peaks[kind] for kind in ("float32", "int8")} == {
        kind: cpu_peaks()[kind] for kind in ("float32", "int8")
    }
    one = min(module.usable_cpus())
    monkeypatch.setattr(module, "usable_cpus", lambda: [one])
    fewer = CpuDevice().peaks()["float32"]
    assert fewer is None or fewer.value <= peaks["float32"].value
