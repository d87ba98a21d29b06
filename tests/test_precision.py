"""Whatever this CPU multiplies natively, every test can be told either answer, and so can the processes it starts."""

import subprocess
import sys

import numpy as np
import precision
import pytest

from zeta.parity.checks import TOLERANCE, relative_error, spectral_polynomial

X = np.random.default_rng(0).standard_normal((16, 24))


def test_the_default_is_what_it_is_told_to_be(default_run):
    """Its error is that dtype's: too large for the next better one, which shows that it is not that."""
    run = default_run({"up.weight": X}, {"lr": 1.0, "weight_decay": 0.0})
    run.step({"up.weight": X})
    u = spectral_polynomial(np.sign(X))
    want = X - 0.2 * np.sqrt(X.size) * u / np.linalg.norm(u)
    error = relative_error(run.read()["up.weight"], want, X)
    better = {"float32": 1e-9, "float16": TOLERANCE["float32"].step, "bfloat16": TOLERANCE["float16"].step}
    assert better[default_run.dtype] < error <= default_run.bound()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_children_are_told_before_zeta_is_imported(dtype):
    pytest.importorskip("torch")
    code = (
        "from zeta.backends.torch.orthogonalize import working_dtype; import torch; print(working_dtype(torch.ones(1)))"
    )
    environment = precision.environment(dtype)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"torch.{dtype}"
