"""The auto-encoder of EfficientAD (Batzner et al., WACV 2024, table 8): it sees the whole image through one vector.

Owns the architecture.  Leaves its loss to ``student_losses`` and its normalization to ``scores``.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT = 0.2
_BETWEEN = (3, 8, 15, 32, 63, 127)
"""Sides to which the decoder enlarges before each of its first six convolutions."""


class AutoEncoder(nn.Module):
    """Normalized pixels (N, 3, 256, 256) -> (N, channels, side, side): the teacher's answer, guessed from 64 numbers.

    ``side`` is the teacher's grid: 56 for PDN without padding.  No skip connections; dropout while training only.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        widths = (3, 32, 32, 64, 64, 64)
        self.encoder = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.encoder.extend([nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()])
        self.encoder.append(nn.Conv2d(64, 64, 8))
        self.decoder = nn.ModuleList(nn.Conv2d(64, 64, 4, padding=2) for _ in _BETWEEN)
        self.dropout = nn.Dropout(DROPOUT)
        self.last = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, channels, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.encoder(pixels)
        for side, conv in zip(_BETWEEN, self.decoder, strict=True):
            x = self.dropout(F.relu(conv(_enlarged(x, side))))
        answer: Tensor = self.last(_enlarged(x, self.side))
        return answer


def _enlarged(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
