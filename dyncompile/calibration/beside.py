"""A calibration beside a saved model, as long as that model is the one that was calibrated."""

import json
from pathlib import Path
from typing import Any

from dyncompile.calibration.result import Calibration
from dyncompile.drafts import drafted
from dyncompile.errors import RecipeError
from dyncompile.storage import RECIPE

FILE = "calibration.json"


def write_beside(calibration: Calibration, folder: Path) -> None:
    """Keep a calibration with the model that `dyncompile.save` has just written, thresholds set, into a folder."""
    kept = {"weights": _weights(folder), "calibration": calibration.to_dict()}
    with drafted(folder / FILE) as draft:
        draft.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def read_beside(folder: Path) -> dict[str, Any] | None:
    """What `Calibration.to_dict` gave of a saved model; None where it was saved anew since, or never calibrated.

    Raises:
        RecipeError: The file is corrupt.
    """
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        found: dict[str, Any] = kept["calibration"]
        return found if kept["weights"] == _weights(folder) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{folder / FILE} is corrupt: {type(error).__name__}: {error}; calibrate again") from error


def _weights(folder: Path) -> str:
    """The hash of the saved weights, knobs included."""
    return str(json.loads((folder / RECIPE).read_text(encoding="utf-8"))["weights"])
