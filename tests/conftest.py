"""Fixtures that several test files share."""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("ANERT_CACHE", "off")  # tests compile what they test
pytest.register_assert_rewrite("fake_ane", "token_runs")
from fake_ane import fake_ane  # noqa: E402, F401

# Two cores shared with other work: time is no property of a result. CI draws the same examples every time.
hypothesis.settings.register_profile(
    "anert",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("anert")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=1.0, metavar="N", help="of the soak test [1]")
    parser.addoption("--soak", type=int, default=0, metavar="N", help="kills of the crash test [25]")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizer, checkpoint and texts that lie beside the repository; skips where they do not."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no test data at {path}")
    return path
