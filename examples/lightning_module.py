"""``IMCL`` around a network in a LightningModule, on scikit-learn's handwritten digits.

    pip install lightning
    python examples/lightning_module.py --epochs 5
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import imcl_fast
from imcl_fast.models import resnet18


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        network = resnet18(10, width=8, channels=1)
        self.imcl = imcl_fast.IMCL(network, torch.zeros(1, 1, 16, 16))

    def training_step(self, batch, index):
        output = self.imcl(*batch)
        self.log_dict(output.terms)
        return output.loss

    def validation_step(self, batch, index):
        images, labels = batch
        correct = self.imcl(images).argmax(1) == labels
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    lightning.seed_everything(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear")
    data = TensorDataset(images, torch.from_numpy(digits.target))
    train, test = train_test_split(range(len(data)), test_size=497, random_state=0)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
    )
    classifier = Classifier()
    trainer.fit(
        classifier,
        DataLoader(torch.utils.data.Subset(data, train), batch_size=64, shuffle=True),
        DataLoader(torch.utils.data.Subset(data, test), batch_size=512),
    )
    print(f"test accuracy {trainer.callback_metrics['accuracy']:.1%}")
    plain = classifier.imcl.remove_hooks()  # the network to deploy: nothing added
    print(f"{sum(p.numel() for p in plain.parameters()):,} parameters")


if __name__ == "__main__":
    main()
