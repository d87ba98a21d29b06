"""Trains a small vision transformer with Zeta in PyTorch Lightning, on scikit-learn's 1,797 handwritten digits.

    python examples/lightning_vit.py                       # about 20 seconds on two CPU cores, 97 % right
    python examples/lightning_vit.py --resume              # continues from the last checkpoint, also after a kill

What to know about Lightning and optimizers:

- It trains with what `configure_optimizers` returns, and with nothing else. An optimizer made elsewhere is not used.
- `param_groups(self)` there reads the whole module: make every layer in `__init__`, not in a later hook.
- A scheduler moves once an *epoch* unless its "interval" is "step": a schedule counted in steps would hardly begin.
- `trainer.fit(model, ckpt_path=...)` restores optimizer and scheduler; `load_from_checkpoint` restores weights alone.
- A checkpoint with `save_weights_only=True` has no optimizer in it.
- A resumed epoch sees the data in the uninterrupted run's order only if the order depends on the epoch's number, as
  that of `DistributedSampler` does, and not on how many random numbers were drawn before.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from vit import ViT, digits

from zeta.backends.torch import Zeta, param_groups


class Classifier(L.LightningModule):
    """The vision transformer and how it is trained."""

    def __init__(self, width: int, depth: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.losses: list[float] = []
        self.vit = ViT(width, depth)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, digits = batch
        loss = nn.functional.cross_entropy(self.vit(images), digits)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        images, digits = batch
        self.log("accuracy", (self.vit(images).argmax(1) == digits).float().mean())

    def on_train_epoch_end(self) -> None:  # which is after the epoch's validation
        accuracy = float(self.trainer.callback_metrics["accuracy"])
        self.print(
            f"epoch {self.current_epoch + 1}: loss {self.losses[-1]:.3f}, {accuracy:.1%} of held-out digits right"
        )

    def configure_optimizers(self) -> dict:
        optimizer = Zeta(param_groups(self), lr=self.hparams.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.lr, steps, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(arguments: list[str] | None = None) -> tuple[list[float], float]:
    """(the loss of every step that this call took, the accuracy at the end)."""
    args = parser().parse_args(arguments)
    last = args.out / "last.ckpt"
    if args.resume and not last.exists():
        raise ValueError(f"there is no {last} to continue from: leave --resume out to start anew")
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # in matrices this small a second thread only waits
    train, held_out = (TensorDataset(*part) for part in digits())
    sampler = DistributedSampler(train, num_replicas=1, rank=0)  # Lightning sets the epoch
    model = Classifier(args.width, args.depth, args.lr)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        callbacks=[ModelCheckpoint(args.out, save_last=True, enable_version_counter=False)],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(train, args.batch, sampler=sampler), DataLoader(held_out, len(held_out))
    trainer.fit(model, *loaders, ckpt_path=last if args.resume else None)
    if trainer.current_epoch > args.epochs:
        raise ValueError(
            f"{last} has {trainer.current_epoch} epochs already: --epochs {args.epochs} must be at least that"
        )
    return model.losses, trainer.validate(model, loaders[1], verbose=False)[0]["accuracy"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=15, help="of the whole run, before and after a --resume (15)")
    p.add_argument("--batch", type=int, default=64, help="images a step (64)")
    p.add_argument("--width", type=int, default=64, help="of the transformer (64)")
    p.add_argument("--depth", type=int, default=3, help="layers of the transformer (3)")
    p.add_argument("--lr", type=float, default=1e-2, help="the highest learning rate (0.01)")
    p.add_argument("--accelerator", default="auto", help="what Lightning calls a device: cpu, gpu, mps or auto (auto)")
    p.add_argument("--out", type=Path, default=Path("runs/lightning_vit"), help="folder of the checkpoints")
    p.add_argument("--resume", action="store_true", help="continue from last.ckpt in --out")
    return p


if __name__ == "__main__":
    main()
