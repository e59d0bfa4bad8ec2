"""`export`: from a dynamic model to a file that skips without dyncompile."""

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dyncompile.errors import ArgumentError, InvalidExportError, require
from dyncompile.lowering import lower
from dyncompile.module import DynamicModule

if TYPE_CHECKING:
    from dyncompile.calibration import Calibration
    from dyncompile.lowering import LoweredModule

Routing = Literal["batch", "sample", "stages"]

_ROUTINGS = ("batch", "sample", "stages")

LIMIT = 2**31 - 2**20
"""Bytes above which weights lie in a file of their own: protobuf's limit, with room for what is not weights."""


def export(
    dyn: DynamicModule,
    path: str | os.PathLike[str],
    *,
    routing: Routing = "sample",
    decisions: bool = False,
    calibration: "Calibration | Mapping[str, Any] | None" = None,
) -> Path:
    """Write a model that skips without dyncompile. It is run and compared before it has its name.

    The thresholds, temperatures and switches of enabled exits and gates stay changeable in an ONNX file
    (`dyncompile set-threshold`); disabled ones are left out.

    Args:
        dyn: The dynamic model, in eval mode.
        path: `*.onnx`; `*.pt2`, a `torch.export` program with nested `torch.cond`; `*.aoti.pt2`, compiled by
            AOTInductor; or a folder for `routing="stages"`. A program is called as the example inputs were given: by
            position, or by keyword where they were a dict. What is there is replaced, once the new is complete.
        routing: "sample": within a batch each arm runs on the rows that take it. "batch": an arm runs on the whole
            batch as soon as one row takes it; for batch 1, and what `*.pt2` always does. "stages": an ONNX file for
            each segment, a manifest, and the host (`dyncompile.exporting.stages.StagedModel`) between them.
        decisions: ONNX outputs beside the model's own: `decisions.NAME` int64 for each decision, -1 for rows that did
            not come to it, and `exit`, the number of the exit that a sample took: its place among the model's exits,
            disabled ones counted; how many these are where it took none.
        calibration: Kept in the file's metadata, with the recipe and the costs; or what its `to_dict` gave.

    Returns:
        The path.

    Raises:
        ArgumentError: No dynamic model, or a path or routing that does not fit.
        ExportError: An operation has no counterpart.
        InvalidExportError: The exported model does not run or computes something else; no file is left.
        LoweringError: The model is in training mode.
    """
    if not isinstance(dyn, DynamicModule):
        raise ArgumentError("dyn", found=type(dyn).__name__, expected="what `dyncompile.dynamize` returned")
    if routing not in _ROUTINGS:
        raise ArgumentError("routing", found=repr(routing), expected=f"one of {_ROUTINGS}")
    path = Path(path)
    if (path.suffix in (".onnx", ".pt2")) == (routing == "stages"):
        expected = "a folder for routing='stages', else *.onnx, *.pt2 or *.aoti.pt2"
        raise ArgumentError("path", found=f"{path} with routing={routing!r}", expected=expected)
    _check_free(path, folder=routing == "stages")
    if path.suffix == ".pt2":
        from dyncompile.exporting.programs import export_program

        if decisions:
            raise ArgumentError("decisions", found="True", expected="False: only ONNX files have them as outputs")
        plain = lower(dyn, backend="eager", decline=False)
        with staged(path) as draft:
            metadata = _metadata(dyn, plain, "batch", calibration)
            export_program(plain, draft, metadata, compiled=path.name.endswith(".aoti.pt2"))
        return path
    for module in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        require(module, extra="export")
    plain = lower(dyn, backend="eager", decline=False)
    metadata = _metadata(dyn, plain, routing, calibration)
    with staged(path) as draft:
        if routing == "stages":
            from dyncompile.exporting.stages_writer import write_stages

            write_stages(plain, draft, metadata)
        else:
            _write(plain, draft, metadata, routing, decisions=decisions)
    return path


def _check_free(path: Path, *, folder: bool) -> None:
    """Refuse to replace a folder that `export` did not write, or a file by a folder."""
    if path.is_dir():
        from dyncompile.exporting.stages import MANIFEST

        if not folder or (any(path.iterdir()) and not (path / MANIFEST).is_file()):
            expected = "a new path, or a folder that export wrote"
            raise ArgumentError("path", found=f"{path}, a folder of something else", expected=expected)
    elif folder and path.exists():
        raise ArgumentError("path", found=f"{path}, a file", expected="a folder for routing='stages'")


def _write(
    plain: "LoweredModule",
    path: Path,
    metadata: dict[str, str],
    routing: Literal["batch", "sample"],
    *,
    decisions: bool,
) -> None:
    from dyncompile.exporting.checking import compare, on_arrays, running, session
    from dyncompile.exporting.pieces import Pieces
    from dyncompile.exporting.routing import Writer

    pieces = Pieces(plain.plan, plain.dynamic, plain.examples(5))
    model = Writer(plain.plan, plain.dynamic, pieces, routing=routing, decisions=decisions).model()
    model.metadata_props.update(metadata)
    save(model, path)
    compare(on_arrays(running(session(path))), plain.dynamic)


def save(model: Any, path: Path) -> None:
    """Write an ONNX model, large weights beside it, and check it.

    Raises:
        InvalidExportError: The checker or shape inference finds fault with it.
    """
    import onnx
    import onnx_ir

    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    large = sum(t.nbytes for t in tensors if t is not None) > LIMIT
    # A name that no other export has, so that the file that names it always finds its own.
    beside = f"{path.name}.{os.urandom(4).hex()}.data" if large else None
    onnx_ir.save(model, path, external_data=beside)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidExportError(f"the exported model is not valid ONNX: {error}") from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path in a folder beside the real one, to which all that was written moves at the end.

    What has another name than the path moves first; what it replaces is deleted only after that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft / path.name
        stale = list(path.parent.glob(f"{path.name}.*.data"))
        for part in draft.iterdir():
            if part.name != path.name:
                part.replace(path.parent / part.name)
        before = draft / "before"
        if path.is_dir():
            path.replace(before)
        try:
            (draft / path.name).replace(path)
        except OSError:
            if before.is_dir():
                before.replace(path)
            raise
        for part in stale:
            part.unlink()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _metadata(
    dyn: DynamicModule, plain: "LoweredModule", routing: str, calibration: "Calibration | Mapping[str, Any] | None"
) -> dict[str, str]:
    """What the file says of itself: recipe, costs and calibration, as JSON."""
    model = dyn.cost_model()
    regions = dict(zip((r.name for r in model.regions), (float(w) for w in model.weights), strict=True))
    costs = {"flops": model.static, "regions": regions, "exits": dyn.exit_costs(), "dense": plain.plan.dense}
    found = {
        "dyncompile.version": importlib.metadata.version("dyncompile"),
        "dyncompile.routing": routing,
        "dyncompile.recipe": dyn.recipe.model_dump_json(),
        "dyncompile.costs": json.dumps(costs),
    }
    if calibration is not None:
        plain_values = calibration if isinstance(calibration, Mapping) else calibration.to_dict()
        found["dyncompile.calibration"] = json.dumps(plain_values)
    return found
