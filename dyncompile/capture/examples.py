"""Example inputs: what the user passed, else what the model itself tells."""

from typing import Any

import torch
from torch import Tensor, nn

from dyncompile.errors import ArgumentError

CALL = "dynamize(model, strategy, example_inputs=torch.randn(2, 3, 224, 224))"


def infer_inputs(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """Arguments of an example call.

    Args:
        model: The static model.
        given: A tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or
            None.

    Returns:
        args, kwargs, and in words where they came from.

    Raises:
        ArgumentError: Nothing was given and the model does not tell; the message shows the call to
            write.
    """
    if given is not None:
        if isinstance(given, Tensor):
            return (given,), {}, "given"
        if isinstance(given, tuple | list):
            return tuple(given), {}, "given"
        if hasattr(given, "keys"):
            return (), {k: given[k] for k in given.keys()}, "given"  # noqa: SIM118
        raise ArgumentError(
            "example_inputs",
            found=type(given).__name__,
            expected=f"a tensor, tuple or dict: {CALL}",
        )
    parameter = next(model.parameters(), torch.zeros(()))
    where: dict[str, Any] = {"device": parameter.device}
    dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        # Layers that embed patches know the size that the model was made for, where it is not the default.
        sizes = (getattr(layer, "img_size", None) for layer in model.modules())
        size = next((tuple(s) for s in sizes if isinstance(s, tuple)), tuple(config["input_size"][1:]))
        shape = (2, config["input_size"][0], *size)
        return (torch.randn(shape, dtype=dtype, **where),), {}, f"timm default_cfg {list(shape)}"
    if getattr(model, "main_input_name", None) == "pixel_values":
        side = getattr(model.config, "image_size", None) or 224
        size = tuple(side) if isinstance(side, tuple | list) else (side, side)
        images = torch.randn(2, getattr(model.config, "num_channels", 3), *size, dtype=dtype, **where)
        return (), {"pixel_values": images}, f"Hugging Face pixel_values {list(images.shape)}"
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict) and dummy and getattr(model, "main_input_name", None) in (None, *dummy):
        kwargs = {k: v.to(parameter.device) for k, v in dummy.items() if isinstance(v, Tensor)}
        if model.__module__.startswith("transformers.") and "input_ids" in kwargs:
            vocabulary = int(getattr(model.config, "vocab_size", 2))
            kwargs["input_ids"] = kwargs["input_ids"] % vocabulary
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        return (), kwargs, f"Hugging Face dummy_inputs {sorted(kwargs)}"
    for name, layer in model.named_modules():
        tensor = _for_layer(layer, dtype, where)
        if tensor is not None:
            return (
                (tensor,),
                {},
                f"first layer `{name or type(layer).__name__}`: {list(tensor.shape)}",
            )
        if next(layer.parameters(recurse=False), None) is not None and layer is not model:
            break
    raise ArgumentError("example_inputs", found="None, and the model does not tell", expected=f"a call like {CALL}")


def _for_layer(layer: nn.Module, dtype: torch.dtype, where: dict[str, Any]) -> Tensor | None:
    """Input of a layer that tells its channels; images of 64 pixels, sequences of 16 steps."""
    sizes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    for kind, dims in sizes.items():
        if isinstance(layer, kind):
            return torch.randn(2, layer.in_channels, *[64 if dims < 3 else 16] * dims, dtype=dtype, **where)
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features, dtype=dtype, **where)
    if isinstance(layer, nn.RNNBase) and layer.batch_first:
        return torch.randn(2, 16, layer.input_size, dtype=dtype, **where)
    if isinstance(layer, nn.Embedding):
        return torch.arange(32, device=where["device"]).reshape(2, 16) % layer.num_embeddings
    return None
