"""The tests' own harness: missing data skips or fails as asked, a missing package is said in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def run_pytest(folder, *before, **environ):
    """Outcome of a one-line test that asks for real data, run beside a copy of conftest.py."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text("def test_it(real_data):\n    assert real_data('tofu').name == 'tofu'\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("REMANENCE_", "PYTEST_"))}
    code = f"import sys, pytest; {''.join(before)} sys.exit(pytest.main(['-rsf', '-p', 'no:cacheprovider', '.']))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=clean | environ, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("environ", "code", "said"),
    [
        ({}, 0, "1 skipped"),
        ({"REMANENCE_REQUIRE_DATA": "0"}, 0, "1 skipped"),
        ({"REMANENCE_REQUIRE_DATA": "1"}, 1, "1 failed"),
    ],
    ids=["skips", "0-skips", "1-fails"],
)
def test_missing_data(tmp_path, environ, code, said):
    result = run_pytest(tmp_path, REMANENCE_TEST_DATA=str(tmp_path / "nowhere"), **environ)
    assert (result.returncode, said in result.stdout) == (code, True), result.stdout + result.stderr
    assert "nowhere/tofu: no such test data; set REMANENCE_TEST_DATA" in result.stdout.replace("\n", "")


def test_data_is_found_where_the_variable_points(tmp_path):
    (tmp_path / "elsewhere" / "tofu").mkdir(parents=True)
    result = run_pytest(tmp_path, REMANENCE_TEST_DATA=str(tmp_path / "elsewhere"), REMANENCE_REQUIRE_DATA="1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_data_is_looked_for_beside_the_repository(tmp_path):
    """../shared/data, from the repository's root, without any variable."""
    (tmp_path / "shared" / "data" / "tofu").mkdir(parents=True)
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    result = run_pytest(tests, REMANENCE_REQUIRE_DATA="1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_missing_package_is_said_before_any_test(tmp_path):
    result = run_pytest(tmp_path, "sys.modules['remanence'] = None;")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "remanence is not installed: run `pip install -e .[test]` first" in result.stderr
    assert "Traceback" not in result.stderr
