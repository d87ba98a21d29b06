"""Trains a small Llama with Zeta through Hugging Face's Trainer, or in a loop of your own with Accelerate.

    python examples/finetune_hf.py                         # about 20 seconds on two CPU cores
    python examples/finetune_hf.py --resume                # continues from the last checkpoint, also after a kill

The model comes from a config and reads bytes, so that nothing is downloaded; `AutoModelForCausalLM.from_pretrained`
and your own data set take the same places. There are two ways to hand Zeta over, `--through`:

trainer     `Trainer(optimizer_cls_and_kwargs=for_trainer(Zeta, lr=...))`, with `model_init` and under FSDP, too.
            Without it Trainer makes an AdamW of its own and says nothing. The rate and decay are those given to Zeta:
            of its arguments Trainer then reads neither `learning_rate` nor `weight_decay` nor `optim`, but the
            schedule. Given the class Zeta itself, it would pass parameters without names, and Zeta warns of it.
            DeepSpeed clips what Zeta has made of the gradients: set its gradient_clipping to 0.
accelerate  `accelerator.prepare(optimizer)` keeps Zeta inside a wrapper: make it before, from the bare model, whose
            names it reads. A prepared scheduler moves once a process and step, so its length is counted in both.

A checkpoint holds Zeta's state, unless `save_only_model=True`. Resume with the same `--steps`: they set the schedule.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from trainer import text
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from zeta.backends.torch import Zeta, for_trainer, param_groups


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    args = parser().parse_args(arguments)
    set_seed(0)
    torch.set_num_threads(1)  # in matrices this small a second thread only waits
    shape: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, **shape))
    data = [{"input_ids": row, "labels": row} for row in windows(args.steps * args.batch, length=64)]
    train = with_accelerate if args.through == "accelerate" else with_trainer
    losses = train(args, model, data)
    if losses:
        print(f"the loss went from {np.mean(losses[:10]):.2f} to {np.mean(losses[-10:]):.2f} nats a byte")
    return losses


def with_trainer(args: argparse.Namespace, model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]]) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        save_steps=args.save_every,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    pair = for_trainer(Zeta, lr=args.lr)
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=pair)
    trainer.train(resume_from_checkpoint=last_checkpoint(args)[0] if args.resume else None)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def with_accelerate(
    args: argparse.Namespace, model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]]
) -> list[float]:
    accelerator = Accelerator()
    optimizer = Zeta(param_groups(model), lr=args.lr)
    moves = args.steps * accelerator.num_processes
    scheduler = get_cosine_schedule_with_warmup(optimizer, moves // 10, moves)
    loader = DataLoader(data, batch_size=args.batch)  # whose order is random already
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    done = 0
    if args.resume:
        folder, done = last_checkpoint(args)
        accelerator.load_state(folder)

    losses = []
    for step, batch in enumerate(skip_first_batches(loader, done), done + 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print({"step": step, "loss": losses[-1], "learning_rate": scheduler.get_last_lr()[0]})
        if step % args.save_every == 0:
            accelerator.save_state(str(args.out / f"checkpoint-{step}"))
    return losses


def last_checkpoint(args: argparse.Namespace) -> tuple[str, int]:
    """(folder, step) of the last checkpoint. Raises ValueError where there is none, or --steps are fewer."""
    last = get_last_checkpoint(str(args.out)) if args.out.exists() else None
    if last is None:
        raise ValueError(f"there is no checkpoint in {args.out}: leave --resume out to start anew")
    done = int(last.rpartition("-")[2])
    if done > args.steps:
        raise ValueError(f"{last} is of step {done} already: --steps {args.steps} must be at least that")
    return last, done


def windows(count: int, length: int) -> torch.Tensor:
    """(count, length) bytes of the Python library's own source, each row from anywhere in it."""
    source = np.frombuffer(text.load().train, np.uint8)
    return torch.tensor(text.batch(source, 0, count, length, seed=0), dtype=torch.long)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--through", choices=("trainer", "accelerate"), default="trainer")
    p.add_argument("--steps", type=int, default=150, help="of the whole run, before and after a --resume (150)")
    p.add_argument("--batch", type=int, default=16, help="windows of 64 bytes a step (16)")
    p.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate (0.003)")
    p.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="steps between checkpoints (50)")
    p.add_argument("--out", type=Path, default=Path("runs/finetune_hf"), help="folder of the checkpoints")
    p.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    return p


if __name__ == "__main__":
    main()
