"""Ranks of MLX on this machine."""

import os
import random
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest


def free_ports(count):
    """The first of so many free ports that follow one another."""
    while True:
        start = random.SystemRandom().randrange(10_000, 30_000)
        try:
            for port in range(start, start + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return start
        except OSError:
            continue


def launch(ranks, *command):
    """What `mlx.launch` prints while it runs a Python script on so many ranks."""
    read, write = os.pipe()  # mlx.launch 0.32 spins where its input has ended, or while a rank has room for more of it
    os.set_blocking(write, False)
    os.write(write, bytes(1 << 16))  # as much as a pipe holds, and no rank reads
    program = [Path(sys.executable).with_name("mlx.launch"), "-n", ranks, "--backend", "ring"]
    options = ["--starting-port", free_ports(ranks), sys.executable, *command]
    streams = dict(stdin=read, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([str(word) for word in program + options], **streams, start_new_session=True)
    try:
        return process.communicate(timeout=100)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
        pytest.fail(f"still running after 100 s: {process.communicate()[0]}")
    finally:
        os.close(read)
        os.close(write)


def results(script, temporary):
    """A function of a number of ranks, for [{case: {name: array}}] of each: what the script wrote."""

    @cache
    def of(ranks):
        folder = temporary.mktemp("ranks")
        printed = launch(ranks, script, folder)
        found = [{} for _ in range(ranks)]
        for rank, cases in enumerate(found):
            assert (folder / f"{rank}.npz").exists(), printed
            for key, array in np.load(folder / f"{rank}.npz").items():
                case, name = key.split("/")
                cases.setdefault(case, {})[name] = array
        return found

    return of
