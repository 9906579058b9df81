"""transformers' models and Trainer, and accelerate, around an IMCL; models without weights."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from imcl_fast import IMCL
from imcl_fast.models import import_torchvision

import_torchvision()  # which transformers looks for, and which may be built for another torch
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
from accelerate import Accelerator  # noqa: E402

CLASSES, TOKENS = 3, 10
WAYS = dict(dropout=0.0, representation_weight=1.0, kernel_weight=1.0)


class Sentences(Dataset):
    """Random token ids of random lengths, and a class that a token in them tells."""

    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(count):
            ids = torch.randint(5, 20, (TOKENS,), generator=generator)
            ids[1] = i % CLASSES
            mask = (torch.arange(TOKENS) < 4 + i % 6).long()
            self.rows.append(dict(input_ids=ids * mask, attention_mask=mask, labels=i % CLASSES))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def bert(classes=CLASSES):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, num_labels=classes, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def batch(count=4):
    return next(iter(DataLoader(Sentences(), count)))


def vision(name):
    settings = {
        "ViT": dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                    intermediate_size=24, image_size=32, patch_size=8),
        "Swin": dict(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2],
                     window_size=4),
        "ResNet": dict(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1],
                       layer_type="basic"),
        "ConvNextV2": dict(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1]),
    }[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=CLASSES)
    return getattr(transformers, f"{name}ForImageClassification")(config)


@pytest.mark.parametrize("name", ["ViT", "Swin", "ResNet", "ConvNextV2"])
def test_a_vision_model_trains_as_it_is(name):
    torch.manual_seed(0)
    model = vision(name)
    batch = dict(pixel_values=torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 2]))
    imcl = IMCL(model, batch)
    out = imcl(**batch)
    assert len(out.terms) == 5 and all(term.isfinite() for term in out.terms.values())
    out.loss.backward()
    assert all(p.grad is not None for p in imcl.heads.parameters())
    reference = model.eval()(**batch)
    evaluated = imcl.eval()(**batch)
    torch.testing.assert_close(evaluated.logits, reference.logits)
    torch.testing.assert_close(evaluated.loss, reference.loss)


def test_bert_trains_on_defaults():
    imcl = IMCL(bert(), batch())
    assert imcl.layers == [f"bert.encoder.layer.{i}" for i in range(4)]
    assert imcl.classifier == "classifier"
    imcl(**batch()).loss.backward()
    assert all(p.grad is not None for p in imcl.heads.parameters())


def trainer(imcl, folder, **settings):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=8,
        num_train_epochs=1, learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", logging_strategy="no", seed=0,
    ) | settings  # fmt: skip
    return transformers.Trainer(
        imcl, transformers.TrainingArguments(**settings), train_dataset=Sentences(),
        eval_dataset=Sentences(8),
    )  # fmt: skip


def test_a_token_classifier_in_the_trainer(tmp_path):
    class Tagged(Sentences):
        def __getitem__(self, index):
            row = self.rows[index]
            labels = torch.where(row["attention_mask"] == 1, row["input_ids"] % CLASSES, -100)
            return {**row, "labels": labels}

    torch.manual_seed(0)
    imcl = IMCL(transformers.BertForTokenClassification(bert().config),
                next(iter(DataLoader(Tagged(), 2))), representation_interval=1,
                kernel_interval=1)  # fmt: skip
    assert imcl.class_dim == -1 and len(imcl.heads) == 3 and imcl.classifier == "classifier"
    rows = next(iter(DataLoader(Tagged(), 8)))
    assert len(imcl(**rows).terms) == 5
    of_trainer = trainer(imcl, tmp_path, num_train_epochs=3, learning_rate=1e-2,
                         per_device_eval_batch_size=24)  # fmt: skip
    of_trainer.train_dataset = of_trainer.eval_dataset = Tagged()
    before = of_trainer.evaluate()["eval_loss"]
    of_trainer.train()
    found = of_trainer.evaluate()["eval_loss"]
    assert found < 0.9 * before
    rows = next(iter(DataLoader(Tagged(), 24)))
    assert found == pytest.approx(imcl.model.eval()(**rows).loss.item(), rel=1e-5)


def cross_entropy(model, data):
    model.eval()
    rows = next(iter(DataLoader(data, len(data))))
    labels = rows.pop("labels")
    with torch.no_grad():
        return F.cross_entropy(model(**rows).logits, labels)


def test_the_trainer_trains_evaluates_saves_and_resumes(tmp_path):
    imcl = IMCL(bert(), batch(), **WAYS)
    before = {name: p.detach().clone() for name, p in imcl.named_parameters()}
    run = trainer(imcl, tmp_path, save_strategy="epoch", num_train_epochs=2)
    run.train()
    for name, p in imcl.named_parameters():  # the heads too
        if "key.bias" not in name:  # which no softmax notices
            assert not torch.equal(p, before[name]), name
    metrics = run.evaluate()
    # Not the objective, which is larger.
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(imcl.model, Sentences(8)).item())
    assert imcl.train()(**batch(8)).loss > 1.5 * metrics["eval_loss"]
    prediction = run.predict(Sentences(8))
    assert prediction.predictions.shape == (8, CLASSES)

    again = IMCL(bert(), batch(), **WAYS)
    run = trainer(again, tmp_path, save_strategy="no", num_train_epochs=2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, imcl.state_dict()[key], msg=key)
    imcl.model.save_pretrained(tmp_path / "plain")
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert list(plain.state_dict()) == list(bert().state_dict())


def test_the_trainers_accumulated_gradient_is_that_of_the_mean(tmp_path):
    """It leaves the division by the number of parts to models that take any keyword argument."""
    norms = []
    for size, parts in ((8, 1), (4, 2)):
        imcl = IMCL(bert(), batch(), **WAYS)
        run = trainer(
            imcl, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            max_steps=1, logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        run.train()
        norms.append(run.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_accelerate_trains_saves_and_loads(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    imcl = IMCL(bert(), batch(), **WAYS)
    optimizer = torch.optim.AdamW(imcl.parameters(), lr=1e-3)
    loader = DataLoader(Sentences(), 8)
    imcl, optimizer, loader = accelerator.prepare(imcl, optimizer, loader)
    head = imcl.heads[0].linear.weight.detach().clone()
    for rows in loader:
        with accelerator.accumulate(imcl):
            accelerator.backward(imcl(**rows).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(tmp_path))
    trained = {key: value.clone() for key, value in imcl.state_dict().items()}
    assert not torch.equal(imcl.heads[0].linear.weight, head)
    with torch.no_grad():
        for p in imcl.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    torch.testing.assert_close(dict(imcl.state_dict()), trained, rtol=0, atol=0)
