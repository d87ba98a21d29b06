"""Kills a process 200 times while it saves, and reads what is there after each: `killed_saves.py FOLDER [in-place]`.

A process of its own, with nothing but NumPy and safetensors in it, because it forks.
"""

import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from zeta import checkpoint

KILLS = 200


def main(folder: Path, how: str = "") -> None:
    if how == "in-place":
        os.replace = write_in_place
    os.fsync = lambda file: time.sleep(0.001)  # a disk as fast everywhere, which takes a third of a save
    path, rng, left = folder / "a.safetensors", random.Random(0), 0
    saved = memoryview(mmap.mmap(-1, 8)).cast("Q")  # the last step that `save` returned from, shared with the child
    checkpoint.save(path, arrays(0), {"step": 0})
    lived = 0.01  # seconds, of all savers: kills are spread over two saves' time on a machine of any speed and load
    for _ in range(KILLS):
        lived += kill_a_saver(path, saved, after=rng.uniform(0, 2 * lived / (saved[0] + 1)))
        left += part(path).exists()
        saved[0] = step_of(path, at_least=saved[0])
        assert set(folder.iterdir()) <= {path, part(path)}, list(folder.iterdir())
    checkpoint.save(path, arrays(1), {"step": 1})
    assert list(folder.iterdir()) == [path], "what a kill left outlived the next save"
    print(f"{KILLS} kills, {left} while writing, {saved[0]} saves")


def kill_a_saver(path: Path, saved: memoryview, after: float) -> float:
    """The seconds that a process lived which saves step after step, and is killed `after` seconds."""
    start, child = time.perf_counter(), os.fork()
    if not child:
        while True:
            step = saved[0] + 1
            checkpoint.save(path, arrays(step), {"step": step})
            saved[0] = step
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.perf_counter() - start


def step_of(path: Path, at_least: int) -> int:
    """The step of the checkpoint, which is whole: the last one saved, or the one that the kill interrupted."""
    found, settings = checkpoint.load(path)
    step = settings["step"]
    assert at_least <= step <= at_least + 1, f"step {step} is there, {at_least} was saved"
    for name, array in arrays(step).items():
        np.testing.assert_array_equal(found[name], array)
    return step


def arrays(step: int) -> checkpoint.Arrays:
    return {str(size): np.full(size, step, np.float32) for size in (1, 1000, 100_000)}


def part(path: Path) -> Path:
    return path.with_name(f".{path.stem}.part{path.suffix}")


def write_in_place(part: Path, path: Path) -> None:
    """The same bytes without a rename: what must not pass."""
    path.write_bytes(part.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
