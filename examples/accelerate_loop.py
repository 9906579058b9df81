"""``IMCL`` in a loop of Hugging Face Accelerate, on scikit-learn's handwritten digits.

    pip install accelerate
    python examples/accelerate_loop.py --epochs 5
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Subset, TensorDataset

import imcl_fast
from imcl_fast.models import resnet18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    set_seed(0)
    accelerator = Accelerator()
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear")
    data = TensorDataset(images, torch.from_numpy(digits.target))
    train, test = train_test_split(range(len(data)), test_size=497, random_state=0)

    network = resnet18(10, width=8, channels=1)
    imcl = imcl_fast.IMCL(network, images[:1])
    optimizer = torch.optim.SGD(imcl.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    imcl, optimizer, train_loader, test_loader = accelerator.prepare(
        imcl,
        optimizer,
        DataLoader(Subset(data, train), batch_size=64, shuffle=True),
        DataLoader(Subset(data, test), batch_size=512),
    )
    for epoch in range(epochs):
        imcl.train()
        for x, y in train_loader:
            output = imcl(x, y)
            optimizer.zero_grad()
            accelerator.backward(output.loss)
            optimizer.step()
        imcl.eval()
        correct = []
        for x, y in test_loader:
            with torch.no_grad():
                guess = imcl(x).argmax(1)
            correct.append(accelerator.gather_for_metrics(guess == y))
        accuracy = torch.cat(correct).float().mean()
        accelerator.print(f"epoch {epoch + 1}: test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
