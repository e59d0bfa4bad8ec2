"""The pytest plug-in: `--dyncompile-update` for `dyncompile.testing.assert_convertible`.

A module of its own at the top level, since pytest imports it in every run, and importing `dyncompile` imports torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_configs: "list[pytest.Config]" = []


def pytest_addoption(parser: "pytest.Parser") -> None:
    """Declare the option."""
    group = parser.getgroup("dyncompile")
    group.addoption(
        "--dyncompile-update",
        action="store_true",
        help="write the baselines of assert_convertible instead of comparing with them",
    )


def pytest_configure(config: "pytest.Config") -> None:
    """Note the run; a run inside a run, as of pytest's own tests, is the one that counts."""
    if config.getoption("dyncompile_update") and config.getoption("numprocesses", None):
        import pytest

        raise pytest.UsageError(
            "--dyncompile-update: several processes would overwrite each other's baseline; use -n 0"
        )
    _configs.append(config)


def pytest_unconfigure(config: "pytest.Config") -> None:
    """Forget the run."""
    if config in _configs:
        _configs.remove(config)


def updating() -> bool:
    """Whether the present run of pytest writes baselines; False outside of pytest."""
    return bool(_configs and _configs[-1].getoption("dyncompile_update"))
