"""Semantic segmentation with all four ways: which digit does each pixel belong to?

Two handwritten digits lie in each image. A pixel's class is its digit's, or 10 for the background;
faint pixels have the label 255, which counts for nothing.

    python examples/segmentation.py --epochs 5
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from imcl_fast import IMCL

BACKGROUND, IGNORED = 10, 255


class Network(nn.Module):
    """A fully convolutional network: three resolutions, a 1x1 convolution, interpolation."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((1, 16, 1), (16, 32, 2), (32, 64, 2))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
                    nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
                )
                for a, b, stride in widths
            )
        )  # fmt: skip
        self.classifier = nn.Conv2d(64, 11, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.classifier(self.stages(x))
        return F.interpolate(maps, x.shape[2:], mode="bilinear")


def pairs(images: torch.Tensor, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 16, 32) of two digits each, and labels (N, 16, 32)."""
    order = torch.randperm(len(digits))
    large = F.interpolate(images, scale_factor=2.0)
    x = torch.cat([large, large[order]], 3)
    classes = torch.stack([digits, digits[order]], 1).repeat_interleave(16, 1)  # of columns
    y = classes.unsqueeze(1).expand(-1, 16, -1).clone()
    y[x[:, 0] < 0.5] = IGNORED
    y[x[:, 0] < 0.1] = BACKGROUND
    return x, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.from_numpy(digits.target)
    test_x, test_y = pairs(images[1300:], labels[1300:])

    network = Network()
    imcl = IMCL(network, test_x, ignore_index=IGNORED)
    print(imcl.plan())
    optimizer = torch.optim.AdamW(imcl.parameters(), lr=5e-3)  # heads among them
    for epoch in range(epochs):
        imcl.train()
        x, y = pairs(images[:1300], labels[:1300])
        for batch in torch.randperm(len(x)).split(16):
            out = imcl(x[batch], y[batch])
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            found = network(test_x).argmax(1)
        ink = (test_y != BACKGROUND) & (test_y != IGNORED)
        right = (found == test_y)[ink].double().mean()
        terms = ", ".join(f"{name} {value:.3f}" for name, value in out.terms.items())
        print(f"epoch {epoch + 1}: test accuracy {right:.1%} of the pixels of digits; {terms}")


if __name__ == "__main__":
    main()
