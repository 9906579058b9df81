"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imcl_fast import IMCL

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_python_in_the_readme() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


# The table of what one writes for what one trains.

TABLE = dict(re.findall(r"^\| (.+?) \| (`imcl = .+`) \|$", README.read_text(), re.MULTILINE))
X, Y = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
IDS = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0], [8, 9, 3, 1], [2, 0, 0, 0]])


class Images(nn.Module):
    def __init__(self, pack=lambda logits: logits):
        super().__init__()
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((1, 8), (8, 12))
        ]
        self.stages, self.fc, self.pack = nn.Sequential(*stages), nn.Linear(12, 3), pack

    def forward(self, image, depth=0.0):
        return self.pack(self.fc(self.stages(image + depth).mean((2, 3))))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages, self.classifier = Images().stages, nn.Conv2d(12, 3, 1)

    def forward(self, image):
        return F.interpolate(self.classifier(self.stages(image)), scale_factor=4, mode="bilinear")


class Tokens(nn.Module):
    def __init__(self, pool=True):
        super().__init__()
        self.pool = pool
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])

    def forward(self, input_ids, attention_mask=None):
        x = self.blocks(self.embed(input_ids))
        return SimpleNamespace(logits=self.fc(x.mean(1) if self.pool else x))


def autoencoder():
    up = nn.Sequential(
        nn.ConvTranspose2d(12, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2)
    )
    return nn.Sequential(Images().stages, up)


SETTINGS = {
    "a classifier": {},
    "a model of several inputs": dict(image=X, depth=X.flip(0)),
    "a model of transformers, also in its Trainer": dict(
        model=Tokens, batch=dict(input_ids=IDS, attention_mask=IDS != 0, labels=Y)
    ),
    "segmentation, logits (B, K, H, W)": dict(
        model=Pixels, y=torch.where(X[:, 0] > 0.9, 255, (X[:, 0] > 0.5).long())
    ),
    "a class for each token, logits (B, T, K)": dict(
        model=lambda: Tokens(pool=False),
        batch=dict(input_ids=IDS, attention_mask=IDS != 0, labels=IDS % 3),
    ),
    "padded tokens (`attention_mask` is found)": dict(model=Tokens, ids=IDS),
    "a model with its logits elsewhere": dict(model=lambda: Images(lambda z: {"out": z})),
    "classes under another loss": dict(
        focal_loss=lambda z, y: F.cross_entropy(z, y, reduction="none").pow(2).mean()
    ),
    "many labels a sample": dict(
        binary_cross_entropy_with_logits=F.binary_cross_entropy_with_logits,
        labels=torch.eye(4, 3),
    ),
    "regression, an autoencoder, a detector: no logits": dict(
        model=autoencoder, mse_loss=F.mse_loss
    ),
    "contrastively, adversarially, in any loop": dict(
        contrastive_loss=lambda z: (z @ z.T).logsumexp(1).mean()
    ),
    "classes, in a loop of your own": dict(cross_entropy=F.cross_entropy),
    "with an optimizer that groups a model's parameters (timm's `layer_decay`)": dict(
        AdamW=torch.optim.AdamW, groups_of=lambda model: [{"params": model.parameters()}]
    ),
}


def test_every_row_of_the_table_has_a_setting():
    assert list(TABLE) == list(SETTINGS)


@pytest.mark.parametrize("row", SETTINGS)
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel")
def test_a_row_trains(row):
    torch.manual_seed(0)
    given = {"IMCL": IMCL, "model": Images, "x": X, "y": Y, **SETTINGS[row]}
    given["model"] = given["model"]()
    code = "\n".join(re.findall(r"`(.+?)`", TABLE[row]))
    exec(compile(code, str(README), "exec"), given)
    given["loss"].backward()
    imcl = given["imcl"]
    assert all(p.grad is not None for p in imcl.heads.parameters())
    assert bool(len(imcl.heads)) == ("multilayer_weight=0" not in code)
    assert given["loss"].isfinite()
