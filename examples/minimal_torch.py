"""Zeta in a loop of your own, with torch: a model that guesses a file's next byte. minimal_mlx.py does the same.

python examples/minimal_torch.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeta.backends.torch import Zeta, param_groups

CONTEXT = 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.hidden = nn.Linear(CONTEXT * 32, 128)
        self.head = nn.Linear(128, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.silu(self.hidden(self.embedding(tokens).flatten(-2))))


def main() -> None:
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = text.unfold(0, CONTEXT + 1, 1)
    model = Model()
    optimizer = Zeta(param_groups(model), lr=6e-3)  # `hidden` to Zeta; `embedding`, `head` and biases to AdamW
    for step in range(100):
        batch = windows[torch.randint(len(windows), (64,))]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
