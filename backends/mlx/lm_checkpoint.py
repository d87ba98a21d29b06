"""What `zeta mlx-lm lora` keeps beside mlx-lm's files, so that a run resumes bit for bit whenever it was killed.

Beside adapters.safetensors stands adapters.state.safetensors. It holds the same weights under their names, what the
optimizer keeps of NAME as "optimizer.KEY.NAME", and in its header the place in the data: whole by itself, so that a
kill between the two files costs nothing.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.optimizers import Optimizer
from mlx_lm.tuner import trainer

from zeta.checkpoint import replacing
from zeta.portable import check_parameters

from .portable import load_named_state, named_state
from .state import tree_flatten

HEADER = "zeta_mlx_lm_1"


class Refused(ValueError):
    """What cannot be done as asked: cause, value and remedy in one line."""


class Place(NamedTuple):
    """After an iteration: how far the pass through the data is, and the random numbers that come next."""

    iteration: int
    began: dict[str, Any]  # NumPy's random state before this pass: mlx-lm draws the order of each from the global one
    taken: int  # batches of this pass
    numpy: dict[str, Any]  # NumPy's now, after what validation drew
    mlx: int  # MLX's seed now, which dropout draws from


class Saved(NamedTuple):
    """A state file: {name: array}, what the run was that wrote it, and its place in the data."""

    file: Path
    arrays: dict[str, mx.array]
    facts: dict[str, Any]
    step: int  # the optimizer's: a schedule's place
    place: Place


def beside(weights: Path) -> Path:
    """Where the state of this file of weights is."""
    return weights.with_suffix(f".state{weights.suffix}")


class Batches:
    """mlx-lm's `iterate_batches` and its iterations, both from a place on."""

    def __init__(self, accumulate: int, place: Place | None) -> None:
        self.accumulate = accumulate
        self.iteration, self.taken, self.began = 0, 0, np.random.get_state(legacy=False)
        self.start = self._place = place or self._now()
        self.iteration = self.start.iteration

    def iterations(self, *bounds: int) -> range:
        """Python's range, but that of the trainer's iterations, which begins at 1, continues after the place."""
        first = len(bounds) == 2 and bounds[0] == 1
        return range(self.start.iteration + 1, bounds[1]) if first else range(*bounds)

    def __call__(self, *, loop: bool = False, **which: Any) -> Iterator[Any]:
        """A pass through validation data, or endless ones through training data."""
        if not loop:
            yield from trainer.iterate_batches(**which)
            return
        skip = self.start.taken
        np.random.set_state(self.start.began if skip else self.start.numpy)
        mx.random.seed(self.start.mlx)
        while True:
            self.began = np.random.get_state(legacy=False)
            for self.taken, batch in enumerate(trainer.iterate_batches(**which), 1):
                if self.taken > skip:
                    self.iteration += 1
                    yield batch
                    self.place()
                elif self.taken == skip:
                    np.random.set_state(self.start.numpy)
            skip = 0

    def place(self) -> Place:
        """That of the last iteration which ended a step: gradients that are summed halfway are taken anew."""
        if self.iteration > self._place.iteration and self.iteration % self.accumulate == 0:
            self._place = self._now()
        return self._place

    def _now(self) -> Place:
        high, low = next(iter(mx.random.state)).tolist()  # type: ignore[call-overload]  # the halves of a seed
        return Place(self.iteration, self.began, self.taken, np.random.get_state(legacy=False), high << 32 | low)


def save(
    write: Callable[..., None], optimizer: Optimizer, batches: Batches, facts: Any, file: str, weights: Any
) -> None:
    """Writes both files, each whole or not at all, the state first: with it alone a run resumes."""
    header = {"facts": facts, "step": optimizer.step.item(), "place": batches.place()._asdict()}
    with replacing(beside(Path(file))) as part:
        write(str(part), named_state(weights, optimizer), {HEADER: json.dumps(header, default=_plain)})
    with replacing(Path(file)) as part:
        write(str(part), weights)


def _plain(array: Any) -> Any:
    return array.tolist()


def load(weights: Path) -> Saved:
    """The state beside this file of weights. Raises Refused where there is none, or where one cannot be read."""
    file = beside(weights)
    if not file.is_file():
        raise Refused(
            f"there is no {file}, which --resume-adapter-file needs: give a file that {file.parent} has a .state of, "
            "or leave the flag out to begin anew"
        )
    try:
        arrays, header = _load(file)
        written = json.loads(header[HEADER])
        saved = Saved(file, arrays, written["facts"], written["step"], Place(**written["place"]))
        own = _load(weights)[0] if weights.is_file() else {}
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{file} cannot be read, or is none of this command's ({error}): use another copy") from error
    if not all(name in arrays and mx.array_equal(arrays[name], a) for name, a in own.items()):
        print(f"note: {weights} is not of the moment of {file}, whose weights are taken", file=sys.stderr)
    return saved


def _load(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """(arrays, header): the form of MLX's own that type checkers cannot tell from its others."""
    return mx.load(str(file), return_metadata=True)  # type: ignore[return-value]


def check_run(facts: dict[str, Any], iters: int, saved: Saved | None) -> None:
    """Raises Refused where the saved run was another, so that its state or its place would mean something else."""
    if not saved:
        return
    for key, value in facts.items():
        if json.loads(json.dumps(value)) != saved.facts.get(key, value):
            raise Refused(
                f"{saved.file} is of a run with {key} {saved.facts[key]}, and this one has {value}: resume with the "
                "same, or leave --resume-adapter-file out to begin anew"
            )
    if saved.place.iteration > iters:
        raise Refused(
            f"{saved.file} is of iteration {saved.place.iteration} already: --iters {iters} must be at least that"
        )


def check_model(saved: Saved, model: Any) -> None:
    """Raises Refused where the model's trainable parameters are not those of the saved run."""
    wanted = {name: tuple(p.shape) for name, p in tree_flatten(model.trainable_parameters())}
    try:
        check_parameters({name: tuple(a.shape) for name, a in saved.arrays.items()}, wanted)
    except ValueError as error:
        raise Refused(f"{saved.file}: {error}") from error


def restore(saved: Saved, model: Any, optimizer: Optimizer) -> None:
    """Moves the saved weights into the model, and the state into the optimizer."""
    trained = model.trainable_parameters()
    try:
        load_named_state(trained, optimizer, saved.arrays, saved.step)
    except ValueError as error:
        raise Refused(f"{saved.file}: {error}") from error
    model.update(trained)
    saved.arrays.clear()  # or they would take up memory for the whole run
