"""What is shipped of a training: low-rank changes, tower and projector, in float16."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import nn

from vispco.utils.files import write_text


def export(changes: nn.ModuleDict, eyes: nn.Module, path: Path) -> None:
    """Write the file that `vispco.testbed.smollm.build` reads."""
    tensors = {name: weight.half().cpu().contiguous() for name, weight in eyes.state_dict().items()}
    for name, change in changes.items():
        matrix = name.replace("/", ".")
        for part, weight in (("A", change.A), ("B", change.B)):
            tensors[f"lora.{matrix}.{part}"] = weight.detach().half().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, save(tensors))
