"""The names of a run's arrays, in every library: a parameter's own, and "optimizer.KEY.NAME" for what is kept of it."""

from collections.abc import Collection, Mapping
from typing import Any

from zeta.storage import lacked, writers

Shapes = Mapping[str, tuple[int, ...]]


def parameter_of(full: str, model: Collection[str]) -> str:
    """The name of the parameter that a saved array belongs to: its own, where the model has one of that name."""
    parts = full.split(".", 2)
    return parts[2] if full not in model and parts[0] == "optimizer" and len(parts) == 3 else full


def check_names(names: Collection[str]) -> None:
    """Raises ValueError for a parameter's name that would be read as another parameter's state."""
    for name in names:
        if parameter_of(name, {}) != name and parameter_of(name, {}) in names:
            raise ValueError(f"the parameter {name} has the name of the state of {parameter_of(name, {})}: rename it")


def check_parameters(saved: Shapes, model: Shapes) -> None:
    """Raises ValueError where the saved arrays are not those of the model's parameters."""
    for full, shape in saved.items():
        name = parameter_of(full, model)
        if name not in model:
            raise ValueError(f"the checkpoint has {full}, but the model no {name}: it belongs to another model")
        if full == name and shape != model[name]:
            shapes = f"{shape}, but the model's {model[name]}"
            raise ValueError(f"the checkpoint's {name} has shape {shapes}: it belongs to another model")
    missing = sorted(model.keys() - saved.keys())
    if missing:
        raise ValueError(f"the checkpoint lacks {missing}: it belongs to another model")


def check_state(saved: Shapes, model: Collection[str], needs: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Raises ValueError where the saved state is not what its optimizer keeps.

    `needs` is {name: (class, {key: shape})}. A parameter without needs may have any state, each may have a remainder.
    """
    states: dict[str, dict[str, tuple[int, ...]]] = {}
    for full, shape in saved.items():
        if full not in model and not full.startswith("optimizer.remainder."):
            states.setdefault(parameter_of(full, model), {})[full.split(".", 2)[1]] = shape
    for name, state in states.items():
        optimizer, needed = needs.get(name, ("", state))
        if state == {key: shape for key, shape in needed.items() if key not in lacked(state)}:
            continue
        cause = f"the checkpoint's state of {name} is {state}, but {optimizer} keeps {needed}: "
        if state.keys() == needed.keys():
            raise ValueError(f"{cause}it belongs to another model, or to other routes")
        raise ValueError(f"{cause}load it into the optimizer that wrote it, {writers(state)}, with the same routes")
