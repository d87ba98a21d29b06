"""Every model type of mlx-lm: where its parameters go. After a change: `python tests/helpers/zoo_table.py mlx`."""

import pytest
import zoo_mlx
import zoo_table

pytest.importorskip("mlx_lm")


def test_every_type_is_routed_as_its_table_says():
    assert zoo_table.table(zoo_mlx, zoo_mlx.types()) == (zoo_table.TABLES / "mlx.txt").read_text()
