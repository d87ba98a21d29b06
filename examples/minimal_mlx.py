"""Zeta in a loop of your own, with MLX: a model that guesses a file's next byte. minimal_torch.py does the same.

python examples/minimal_mlx.py
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import zeta
from zeta.backends.mlx import Zeta

CONTEXT = 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.hidden = nn.Linear(CONTEXT * 32, 128)
        self.head = nn.Linear(128, 256)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head(nn.silu(self.hidden(self.embedding(tokens).flatten(-2))))


def loss_of(model: Model, batch: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, -1], reduction="mean")


def main() -> None:
    text = mx.array(list(Path(__file__).read_bytes()))
    windows = text[mx.arange(len(text) - CONTEXT)[:, None] + mx.arange(CONTEXT + 1)]
    model = Model()
    optimizer = Zeta(learning_rate=6e-3, routes=zeta.routes(model))  # `hidden` to Zeta; the rest to AdamW
    loss_and_grad = nn.value_and_grad(model, loss_of)
    for step in range(100):
        batch = windows[mx.random.randint(0, len(windows), (64,))]
        loss, grads = loss_and_grad(model, batch)
        optimizer.update(model, grads)
        mx.eval(loss, model.parameters(), optimizer.state)
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
