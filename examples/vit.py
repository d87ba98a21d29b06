"""A small vision transformer, and scikit-learn's 1,797 handwritten digits for it."""

import torch
from torch import Tensor, nn


class ViT(nn.Module):
    """Classifies images (batch, 8, 8) by attention between their 16 patches of 2 x 2: (batch, 10) scores."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images.unsqueeze(1)).flatten(2).mT + self.position
        return self.head(self.norm(self.encoder(patches)).mean(1))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (n, 8, 8) between 0 and 1, their digits (n,)): those to train on, then those held out, a fifth."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images.reshape(-1, 8, 8) / 16, dtype=torch.float32), torch.tensor(labels)
    held_out = torch.arange(len(y)) % 5 == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])
