"""Held-out loss of nanoGPT's CPU recipe, cut to 300 steps: AdamW at six rates, Zeta and Eta at the advised one.

    python bench/nanogpt.py                # five seeds; --seeds 1 for a look

A GPT of four layers, four heads and 128 channels reads 12 windows of 64 bytes of Python's standard library a step, in
place of Shakespeare; 300 steps and a warm-up of 15 stand for 2,000 and 100. All else is the recipe's: two groups by
decay (0.1 and none), betas (0.9, 0.99), clipping at 1, a cosine to a tenth. Between optimizers only the class and its
rate differ.
"""

import argparse
import sys
from math import cos, pi, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from trainer import text

from zeta.backends.torch import Eta, Zeta

STEPS, WARMUP, BATCH, CONTEXT, WIDTH, HEADS, LAYERS = 300, 15, 12, 64, 128, 4, 4
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # of AdamW: the recipe's is 1e-3
ADVISED = 8  # times AdamW's rate: what zeta's docstrings say of language models
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_fc, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """Logits (batch, time, 256) of bytes (batch, time); the table is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.ln_f = nn.ModuleList([Block() for _ in range(LAYERS)]), nn.LayerNorm(WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.ndim > 1:
                last = name.endswith(("c_proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def run(make: Any, lr: float, seed: int) -> float:
    """The held-out loss at the end."""
    torch.manual_seed(seed)
    train, held_out = (np.frombuffer(part, np.uint8) for part in text.load())
    model = GPT()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    for step in range(STEPS):
        done = (step - WARMUP) / (STEPS - WARMUP)
        share = (step + 1) / (WARMUP + 1) if step < WARMUP else 0.1 + 0.45 * (1 + cos(pi * done))
        for group in optimizer.param_groups:
            group["lr"] = share * lr
        rows = torch.from_numpy(text.batch(train, step, BATCH, CONTEXT + 1, seed)).long()
        loss(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return loss(model, torch.from_numpy(text.windows(held_out, 256, CONTEXT + 1)).long()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=(1, *STUDENT))
    seeds = range(parser.parse_args(arguments).seeds)
    torch.set_num_threads(1)
    means: dict[float, float] = {}
    print("| optimizer | lr | held-out loss |\n|---|---|---|", flush=True)
    for rate in RATES:
        means[rate] = report("AdamW", torch.optim.AdamW, rate, seeds)
    best = min(means, key=means.__getitem__)
    for make in (Zeta, Eta):
        for rate in dict.fromkeys((ADVISED * 1e-3, ADVISED * best)):
            report(make.__name__, make, rate, seeds)


def report(name: str, make: Any, rate: float, seeds: Any) -> float:
    losses = [run(make, rate, seed) for seed in seeds]
    interval = f" ± {STUDENT[len(losses)] * stdev(losses) / sqrt(len(losses)):.3f}" if len(losses) > 1 else ""
    print(f"| {name} | {rate:g} | {mean(losses):.3f}{interval} |", flush=True)
    return mean(losses)


if __name__ == "__main__":
    main()
