"""Your networks, in torch or Keras. Each takes `n_inputs` and `n_outputs` from the data, and the keys of its file in conf/model/.

A network in torch can have two more methods. `loss(outputs, targets)` returns one loss per row; targets are the numbers of the
classes, or the target in standard deviations. `augment(inputs)` changes the rows of a batch, in training only.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Fully connected layers with GELU and dropout between them: (n, n_inputs) to (n, n_outputs), logits or a number."""

    def __init__(self, n_inputs: int, n_outputs: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(n_inputs, width), nn.GELU(), nn.Dropout(dropout)]
            n_inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(n_inputs, n_outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class DigitsCNN(nn.Module):
    """Two convolutions and a linear layer over a square image in grey, such as the digits of 8x8 pixels."""

    def __init__(self, n_inputs: int, n_outputs: int, channels: int, dropout: float, smoothing: float) -> None:
        super().__init__()
        self.side, self.smoothing = math.isqrt(n_inputs), smoothing
        if self.side**2 != n_inputs or self.side < 4:
            raise ValueError(
                f"it needs a square image of at least 16 numbers, and the features give {n_inputs} numbers"
            )
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.GELU()),
            *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.GELU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout)),
            nn.Linear(2 * channels * (self.side // 2) ** 2, n_outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.reshape(-1, 1, self.side, self.side))

    def augment(self, inputs: torch.Tensor) -> torch.Tensor:
        """Move the images of a batch by at most one pixel."""
        down, right = torch.randint(-1, 2, (2,)).tolist()
        images = F.pad(inputs.reshape(-1, self.side, self.side), (1, 1, 1, 1))
        images = images[:, 1 + down : 1 + down + self.side, 1 + right : 1 + right + self.side]
        return images.reshape(len(inputs), -1)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy with smoothed labels. The square of the error for regression."""
        if outputs.shape[1] == 1:
            return F.mse_loss(outputs[:, 0], targets, reduction="none")
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.smoothing)


def keras_mlp(n_inputs: int, n_outputs: int, hidden: list[int], dropout: float) -> Any:
    """The layers of MLP as a keras.Model."""
    import keras

    inputs = layer = keras.Input((n_inputs,))
    for width in hidden:
        layer = keras.layers.Dropout(dropout)(keras.layers.Dense(width, activation="gelu")(layer))
    return keras.Model(inputs, keras.layers.Dense(n_outputs)(layer))
