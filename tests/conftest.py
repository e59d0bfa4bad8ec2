"""One thread, fixed seeds, the device under test, and what a skip means in CI."""

import importlib.util
import os
import random
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

# Reasons that no installation can remove; every other skip fails the run where CI=true.
PLATFORM_REASONS = ["needs CUDA", "needs two CUDA devices"]
if shutil.which("apt-get") is None or os.geteuid() != 0:
    PLATFORM_REASONS.append("needs the Debian package")

torch.set_num_threads(1)


def _declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision be imported where its compiled operators do not fit the installed torch.

    Its Python part registers fake kernels for `nms` and `qnms` unconditionally, and fails where
    those operators are unknown.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for extension in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(extension)
    except OSError:
        pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


TORCHVISION_OPERATORS = _declare_torchvision_operators()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the tests run on: cpu, cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test (`--device`)."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of the command line; its exit code, standard output and standard error."""
    from dyncompile.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def needs() -> Callable[[str], ModuleType]:
    """`needs("timm")` gives the module, or skips the test with the reason."""

    def needs(module: str) -> ModuleType:
        return pytest.importorskip(module, reason=f"needs {module}")

    return needs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: several processes should not wait for one of them in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _skip_is_failure(report: pytest.TestReport | pytest.CollectReport) -> bool:
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return False
    return not any(reason in str(report.longrepr) for reason in PLATFORM_REASONS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _skip_is_failure(report):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and CI skips nothing: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if _skip_is_failure(report):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and CI skips nothing: {report.longrepr}"
    return report
