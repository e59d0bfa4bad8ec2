"""What a check found, as plain data."""

from typing import Literal

import pydantic

from dyncompile.checking.baseline import Snapshot

Status = Literal["passed", "failed", "skipped"]


class Result(pydantic.BaseModel):
    """One check of one conversion.

    Attributes:
        check: Its name.
        status: "skipped" where it could not be made; the message says why.
        message: What is wrong and what would do, or why it was skipped; else what was found.
        seconds: How long it took.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    check: str
    status: Status
    message: str = ""
    seconds: float = 0.0


class Report(pydantic.BaseModel):
    """All checks of one conversion.

    Attributes:
        model: Its name, as the baseline has it.
        strategy: The passes, joined by commas.
        results: In order.
        snapshot: What was rewritten where; None where nothing was.
    """

    model: str
    strategy: str
    results: list[Result] = []
    snapshot: Snapshot | None = None

    @property
    def failed(self) -> list[Result]:
        """The checks that failed."""
        return [result for result in self.results if result.status == "failed"]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed
