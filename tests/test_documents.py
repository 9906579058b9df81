"""What the README and the site say: their Python runs as it stands there, their commands are
commands, and the site builds strictly and needs no network."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imcl_fast import IMCL, QualityAgnostic
from imcl_fast.models import import_torchvision
from imcl_fast.reports import compare, inspect
from imcl_fast.runs import flags

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [README, *DOCS.rglob("*.md")]}


def blocks(language: str) -> dict[str, list[str]]:
    """The fenced blocks of each page that has any, in order."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = {name: pattern.findall(text) for name, text in sorted(PAGES.items())}
    return {name: texts for name, texts in found.items() if texts}


PYTHON = blocks("python")
COMMANDS = [
    (name, line)
    for name, texts in blocks("sh").items()
    for line in "".join(texts).replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_there_is_python_in_the_documents() -> None:
    assert len(PYTHON["README.md"]) == 2
    assert {"docs/index.md", "docs/tutorials/own_loop.md"} <= PYTHON.keys()


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in re.findall(r"^% needs: (\w+)$", PAGES[page], re.MULTILINE):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}, which the page is about, isn't installed")
        import_torchvision()  # timm and transformers bring it in
    monkeypatch.chdir(tmp_path)
    given = {"__name__": "page"}  # one for all blocks: a page is read from its top
    for block in PYTHON[page]:
        exec(compile(block, page, "exec"), given)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_one(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words[: words.index("imcl_fast.train") + 1] = ["imcl-train"]
    program, *rest = words
    if program == "imcl-train":
        flags.parse(rest, program, "")
    elif program in ("imcl-compare", "imcl-inspect"):
        module = compare if program == "imcl-compare" else inspect
        module._parser().parse_args(rest)
    else:
        assert program in ("make", "pip")


def test_make_has_the_targets_that_documents_name() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text(),
             (ROOT / "CHANGELOG.md").read_text()]  # fmt: skip
    named = {name for text in texts for name in re.findall(r"`make ([a-z-]+)", text)}
    assert {"docs", "wheels"} <= named <= targets, named - targets


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'imcl_fast[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", str(folder / "doctrees"),
         str(DOCS), str(folder / "html")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / "html"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    # What a browser fetches by itself, unlike a link.
    fetched = re.compile(
        r"""<(?:script|img|iframe|source|embed)[^>]*\bsrc=["'](?:https?:)?//"""
        r"""|<link(?![^>]*rel=["'](?:canonical|next|prev))[^>]*\bhref=["'](?:https?:)?//"""
    )
    styled = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for path in [*pages, *site.rglob("*.css")]:
        found = (styled if path.suffix == ".css" else fetched).search(path.read_text())
        assert not found, f"{path.relative_to(site)} loads {found[0]}"
    assert "<math" in (site / "math.html").read_text()  # shown by the browser itself


def test_code_quotes_formulas_by_names_that_there_are() -> None:
    names = re.findall(r"^##+ (.*?)(?: \(.*\))?$", PAGES["docs/math.md"], re.MULTILINE)
    quoted = set()
    for folder in ("csrc", "imcl_fast", "kernels"):
        for path in (ROOT / folder).rglob("*.[chp]*"):
            if path.suffix in (".h", ".cpp", ".cu", ".py"):
                lines = re.sub(r"\n\s*(?://|#)?\s*", " ", path.read_text())
                quoted.update(re.findall(r'docs/math\.md, "(.*?)"', lines))
    assert len(quoted) >= 4
    assert quoted <= set(names)


def test_the_site_has_what_is_public(site: Path) -> None:
    import imcl_fast
    from imcl_fast import functional

    text = (site / "api.html").read_text()
    names = [f"imcl_fast.{name}" for name in imcl_fast.__all__ if name != "functional"]
    names += [f"imcl_fast.functional.{name}" for name in functional.__all__]
    assert [name for name in names if f'id="{name}"' not in text] == []


# The table of what one writes for what one trains.

ROW = re.compile(r"^\| (.+?) \| (`(?:imcl|qa) = .+`) \|$", re.MULTILINE)
TABLE = dict(ROW.findall(README.read_text()))
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
    "many labels a sample": dict(labels=torch.eye(4, 3)),
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
    "one network for images at several qualities": dict(blurred=F.avg_pool2d(X, 3, 1, 1)),
}


def test_every_row_of_the_table_has_a_setting():
    assert list(TABLE) == list(SETTINGS)


@pytest.mark.parametrize("row", SETTINGS)
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel")
def test_a_row_trains(row):
    torch.manual_seed(0)
    given = {"IMCL": IMCL, "QualityAgnostic": QualityAgnostic, "model": Images, "x": X, "y": Y}
    given |= SETTINGS[row]
    given["model"] = given["model"]()
    code = "\n".join(re.findall(r"`(.+?)`", TABLE[row]))
    exec(compile(code, str(README), "exec"), given)
    given["loss"].backward()
    assert given["loss"].isfinite()
    if "qa" in given:
        assert all(p.grad is not None for p in given["qa"].parameters())
        return
    imcl = given["imcl"]
    assert all(p.grad is not None for p in imcl.heads.parameters())
    assert bool(len(imcl.heads)) == ("multilayer_weight=0" not in code)
