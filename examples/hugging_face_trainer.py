"""``IMCL`` in the Trainer of transformers, on scikit-learn's handwritten digits.

    pip install transformers accelerate
    python examples/hugging_face_trainer.py --epochs 5
"""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import imcl_fast


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear")
    rows = [dict(pixel_values=x, labels=int(y)) for x, y in zip(images, digits.target, strict=True)]
    train, test = train_test_split(rows, test_size=497, random_state=0)

    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1],
        layer_type="basic", downsample_in_first_stage=False, num_labels=10,
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    imcl = imcl_fast.IMCL(model, default_data_collator(train[:2]))  # the one line that is new
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            imcl, settings, train_dataset=train, eval_dataset=test, compute_metrics=accuracy
        )
        trainer.train()
        found = trainer.evaluate()
    print(f"test accuracy {found['eval_accuracy']:.1%}, cross entropy {found['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
