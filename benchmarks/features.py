"""Features for distances between small images: the last hidden layer of a classifier that is trained on the spot."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A small convolutional network for images (B, C, H, W) in [-1, 1]; `features` gives (B, 64)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise((channels, 32, 64, 64)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(images: Tensor, labels: Tensor, classes: int, epochs: int = 15) -> Classifier:
    """The same classifier for the same images, whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(images.shape[1], classes).to(images.device)
        steps = epochs * (len(images) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            i = torch.randint(len(images), (64,), device=images.device)
            x = images[i] + 0.1 * torch.randn_like(images[i])
            nn.functional.cross_entropy(model(x), labels[i]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval().requires_grad_(False)
