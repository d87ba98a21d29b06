"""Code that people already have: what is killed there and resumes equals the run that was not."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import killed_runs  # noqa: E402
import recipes  # noqa: E402


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_killed_run_resumes_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        whole = recipes.train(recipe, tmp_path)
        (tmp_path / "saved.pt").unlink()
        assert killed_runs.is_killed(recipes.train, recipe, tmp_path, False, True)
        resumed = recipes.train(recipe, tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)
    start = dict(recipes.Model().named_parameters())
    assert whole.keys() == resumed.keys() == start.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]) and not torch.equal(whole[name], start[name])
