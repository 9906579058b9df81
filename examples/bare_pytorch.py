"""The fused losses in a training loop of one's own, on scikit-learn's handwritten digits.

Two convolutions, whose kernels and whose channels are kept from being alike, and a
classifier that must say the same of two dropout views of an image.

    python examples/bare_pytorch.py --epochs 5
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from imcl_fast import functional as F


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.norm2 = nn.BatchNorm2d(64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images):
        first = self.norm1(self.conv1(images)).relu()
        second = self.norm2(self.conv2(first)).relu()
        return first, second, second.mean(dim=(2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=497, random_state=0)

    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for epoch in range(epochs):
        network.train()
        for batch in torch.tensor(train)[torch.randperm(len(train))].split(64):
            x, y = images[batch], labels[batch]
            first, second, features = network(x)
            views = [network.classifier(nn.functional.dropout(features, 0.3)) for _ in range(2)]
            loss = (
                # The cross entropy of each view, and what they disagree in.
                F.collaborative_consistency(views, y, teacher="pairwise", temperature=1.0) / 2
                + 1.0 * F.representation_similarity([first, second], center=True)
                + 10.0 * F.kernel_similarity([network.conv1.weight, network.conv2.weight])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            logits = network.classifier(network(images[test])[-1])
        accuracy = (logits.argmax(1) == labels[test]).float().mean()
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
