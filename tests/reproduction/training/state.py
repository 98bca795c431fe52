"""The state that training goes on from after it was stopped: one file of tensors, one of JSON."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import torch
from safetensors.torch import load, save

from vispco.utils.files import brief, read_json, write_json, write_text

from .curriculum import Curriculum

#: What each optimiser keeps for a parameter.
KEPT = {
    torch.optim.Muon: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def save_state(
    folder: Path, step: int, modules: dict, optims: list, ladder: Curriculum, log: list
) -> None:
    """Write what `load_state` needs.

    The JSON names its tensors by their checksum. So if the process is killed between the two files,
    the last pair is still whole.
    """
    tensors = {
        f"{key}/{name}": value
        for key, module in modules.items()
        for name, value in module.state_dict().items()
    }
    for number, optim in enumerate(optims):
        for index, state in optim.state_dict()["state"].items():
            prefix = f"optimiser{number}/{index}"
            tensors |= {f"{prefix}/{key}": torch.as_tensor(v) for key, v in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    data = save({key: value.cpu().contiguous() for key, value in tensors.items()})
    check = _checksum(data)
    write_text(folder / f"{check}.safetensors", data)
    state = {"step": step, "tensors": check, "curriculum": ladder.state(), "log": log}
    write_json(folder / "state.json", state)
    for path in folder.glob("*.safetensors"):
        if path.stem != check:
            path.unlink()


def load_state(folder: Path, modules: dict, optims: list, ladder: Curriculum) -> tuple[int, list]:
    """Restore what `save_state` wrote; returns the next step and the log.

    Raises ValueError that names the folder if it is damaged, or of another training.
    """
    try:
        saved = read_json(folder / "state.json", _checked)
        tensors = _tensors(folder, saved["tensors"])
        for key, module in modules.items():
            own = {n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{key}/")}
            module.load_state_dict(own)
        for number, optim in enumerate(optims):
            _restore(optim, f"optimiser{number}", tensors)
        ladder.restore(saved["curriculum"])
    # Of safetensors, of JSON, of tensors that do not fit.
    except Exception as error:
        raise ValueError(
            f"{folder}: expected the state of this training, but {brief(error)}; "
            "train without --resume"
        ) from error
    return saved["step"], saved["log"]


def _tensors(folder: Path, check: str) -> dict[str, torch.Tensor]:
    data = (folder / f"{check}.safetensors").read_bytes()
    if _checksum(data) != check:
        raise ValueError(f"{check}.safetensors is damaged")
    return load(data)


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _restore(optim: torch.optim.Optimizer, prefix: str, tensors: dict) -> None:
    """Give an optimiser the tensors that are its own."""
    full = optim.state_dict()
    sizes = [p.shape for group in optim.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith(f"{prefix}/"):
            _, index, key = name.split("/")
            wanted = sizes[int(index)]
            if key != "step" and value.shape != wanted:
                shapes = f"shape {tuple(value.shape)}, expected {tuple(wanted)}"
                raise ValueError(f"{name} has {shapes}")
            full["state"].setdefault(int(index), {})[key] = value
    kept = KEPT[type(optim)]
    for index, state in full["state"].items():
        if set(state) != kept:
            raise ValueError(f"{prefix}/{index} has not {', '.join(sorted(kept))}")
    optim.load_state_dict(full)


def _checked(saved: dict) -> dict:
    """What `save_state` wrote as JSON, or ValueError."""
    if not isinstance(saved, dict) or type(saved.get("step")) is not int or saved["step"] < 0:
        raise ValueError("expected a step, a curriculum and a log")
    check, log = saved.get("tensors"), saved.get("log")
    if not isinstance(check, str) or not re.fullmatch("[0-9a-f]{8}", check):
        raise ValueError("expected the checksum of the tensors")
    if not isinstance(log, list) or not all(map(_is_entry, log)):
        raise ValueError("expected a log of entries with the accuracy of each task")
    return saved


def _is_entry(entry) -> bool:
    return isinstance(entry, dict) and "easy_vqa" in entry.get("tasks", ())
