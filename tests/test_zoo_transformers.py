"""Model types of Transformers: where their parameters go, as in mlx-lm where both have them.

`make zoo` takes all types. After a change: `python tests/helpers/zoo_table.py transformers transformers_all`.
"""

import os
import warnings

import pytest
import zoo_mlx
import zoo_table
import zoo_transformers

transformers = pytest.importorskip("transformers")
TORCH = "output head", "embedding"  # one table where they are tied: torch names it twice


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compared(name: str, types: list[str]) -> None:
    assert zoo_table.table(zoo_transformers, types) == (zoo_table.TABLES / f"{name}.txt").read_text()


def test_types_of_every_kind_are_routed_as_their_table_says():
    compared("transformers", zoo_transformers.some_types())


@pytest.mark.skipif("ZOO" not in os.environ, reason="a minute: make zoo")
def test_every_type_is_routed_as_its_table_says():
    compared("transformers_all", zoo_transformers.types())


def by_name(zoo, type_name):
    """{name: how its arrays of that name are treated}, of all that are no convolution."""
    told: dict[str, set[str]] = {}
    for line in filter(None, zoo_table.lines(zoo, type_name)):
        name, axes, treatment, reason, *_ = line.split("  ")
        if "convolution" not in reason:
            told.setdefault(f"{name} {axes}", set()).add("output head" if reason in TORCH else f"{treatment} {reason}")
    return told


@pytest.mark.parametrize("name", zoo_transformers.in_both())
def test_the_same_type_is_treated_alike_in_both_libraries(name):
    pytest.importorskip("mlx_lm")
    torch, mlx = (by_name(zoo, name) for zoo in (zoo_transformers, zoo_mlx))
    common = torch.keys() & mlx.keys()
    assert common and {n: torch[n] for n in common} == {n: mlx[n] for n in common}
