"""Tell the weights of one network from those of another: a calibration belongs to the weights that it was measured on.

A sample of the weights is four values of each parameter, at fixed places. Half precision changes no value by more than
2^-8 of itself. A network was changed where a value differs by more: it was fine-tuned, or a LoRA is fused into it. A
LoRA that stands beside the weights (PEFT) has parameters of its own, and a sample of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .networks import unwrap

VALUES = 4
ROUNDING, SMALLEST = 2.0**-8, 2.0**-24
_LORA = ("lora_A.", "lora_B.", "lora_embedding_", "lora_magnitude_vector.")


def sample_of(model: Any, lora: bool = False) -> Tensor:
    """Return the sample of a network's weights, (parameters, 4), in the order of the parameters' names; on the CPU.

    It is empty, (0, 4), where there are no values to be read: of functions, and of weights that are offloaded.

    Args:
        model: wrapped or not.
        lora: the parameters of active adapters, and not those of the network itself.
    """
    parameters = [parameter for _, parameter in _parameters(model, lora)]
    readable = all(p.device.type != "meta" and p.is_floating_point() and p.numel() > 0 for p in parameters)
    if not parameters or not readable:
        return torch.zeros(0, VALUES)
    rows = []
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, VALUES, dtype=torch.float64).round().long()
        rows.append(flat[places.to(flat.device)].float())
    return torch.stack(rows).cpu()


def other_weights(model: Any, sample: Tensor, lora_sample: Tensor) -> str | None:
    """Say how the weights of a network differ from the samples of another one; `None` if they do not, or if one of them
    could not be read."""
    own = sample_of(model)
    if not len(own) or not len(sample):
        return None
    name = type(unwrap(model)).__name__
    if own.shape != sample.shape:
        return f"the {name} has {len(own)} parameters, that one had {len(sample)}"
    if changed := _changed(model, own, sample, lora=False):
        return (
            f"{len(changed)} of {len(own)} parameters of the {name} have other values, the first is {changed[0]}: it "
            f"was fine-tuned, or has a LoRA fused into it"
        )
    active, lora = ", ".join(adapters(model)), sample_of(model, lora=True)
    if len(lora) and not len(lora_sample):
        return f"the {name} has an active LoRA, {active}, and that one had none"
    if lora.shape != lora_sample.shape or _changed(model, lora, lora_sample, lora=True):
        return f"the {name} has {f'another LoRA, {active}' if len(lora) else 'no LoRA, and that one had one'}"
    return None


def adapters(model: Any) -> list[str]:
    """Return the names of the adapters (PEFT) that a network uses."""
    return sorted({name for layer in _lora_layers(model) for name in layer.active_adapters})


def _lora_layers(model: Any) -> list[Any]:
    network = unwrap(model)
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return [m for m in modules if hasattr(m, "lora_A") and not getattr(m, "disable_adapters", True)]


def _parameters(model: Any, lora: bool) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a network by name, without or only those of adapters."""
    network, active = unwrap(model), adapters(model) if lora else []
    named = list(network.named_parameters()) if isinstance(network, nn.Module) else []
    if lora:
        chosen = [(n, p) for n, p in named if any(part in n for part in _LORA) and set(n.split(".")) & set(active)]
    else:
        chosen = [(n.replace(".base_layer.", "."), p) for n, p in named if not any(part in n for part in _LORA)]
    return sorted(chosen, key=lambda pair: pair[0])


def _changed(model: Any, own: Tensor, sample: Tensor, lora: bool) -> list[str]:
    differ = ((own - sample).abs() > ROUNDING * sample.abs() + SMALLEST).any(1).tolist()
    return [name for (name, _), one in zip(_parameters(model, lora), differ, strict=True) if one]
