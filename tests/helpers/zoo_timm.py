"""timm's models, the first of each of its modules, without memory. timm needs torchvision, which needs its own torch:
this is run by hand, in an environment with them and the packages that zeta needs.

    PYTHONPATH=. python tests/helpers/zoo_timm.py    # writes tests/zoo/timm.txt
"""

from importlib.metadata import version
from typing import Any

import zoo_table


def types() -> list[str]:
    import timm

    return [timm.list_models(module=module)[0] for module in timm.list_modules()]


def build(name: str) -> Any:
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name)


if __name__ == "__main__":
    import sys

    text = f"timm {version('timm')}: {zoo_table.table(sys.modules[__name__], types())}"
    (zoo_table.TABLES / "timm.txt").write_text(text)
    print(text.splitlines()[0])
