"""Checkpoints: what is written comes back, and nothing else does."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imcl_fast.runs import checkpoint, files
from imcl_fast.runs.checkpoint import CheckpointStore, load, save
from imcl_fast.runs.errors import CheckpointError, DiskFullError

CONTENT = {
    "weights": {"a": torch.arange(600.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)},
    "position": {"epoch": 3, "step": 17},
    "rows": [{"epoch": 1, "loss": 0.1}],
    "random": ("python", (1, 2, 3), None),
}


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "some.pt", CONTENT)
    return tmp_path / "some.pt"


def assert_content(content):
    assert list(content) == list(CONTENT)
    for name, value in CONTENT["weights"].items():
        assert torch.equal(content["weights"][name], value)
        assert content["weights"][name].dtype == value.dtype
    assert all(content[name] == CONTENT[name] for name in ("position", "rows", "random"))


def test_what_is_saved_comes_back(path):
    assert_content(load(path))
    assert [p.name for p in path.parent.iterdir()] == ["some.pt"]


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("truncated")
    save(folder / "some.pt", CONTENT)
    whole = (folder / "some.pt").read_bytes()
    (folder / "some.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="some.pt: truncated, corrupt or no checkpoint"):
        load(folder / "some.pt")


@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_bit_is_noticed_or_does_no_harm(tmp_path_factory, place, mask):
    folder = tmp_path_factory.mktemp("flipped")
    save(folder / "some.pt", CONTENT)
    damaged = bytearray((folder / "some.pt").read_bytes())
    damaged[int(place * len(damaged))] ^= mask
    (folder / "some.pt").write_bytes(damaged)
    try:
        content = load(folder / "some.pt")
    except CheckpointError as error:
        assert "\n" not in str(error) and "some.pt" in str(error)
    else:
        assert_content(content)  # it hit the padding between the records


def test_a_damaged_tensor_is_noticed(path):
    damaged = bytearray(path.read_bytes())
    place = damaged.find(torch.tensor(599.0).numpy().tobytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"corrupt \(checksum of 'archive/data/0'\)"):
        load(path)


def test_no_code_of_a_file_is_run(tmp_path):
    path, trace = tmp_path / "some.pt", tmp_path / "trace"
    content = {"kind": checkpoint.KIND, "version": 1, "content": Malicious(trace)}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="refused, for it holds objects other than tensors"):
        load(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it was malicious


def test_another_format_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    save(tmp_path / "some.pt", CONTENT)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format version 99, this imcl_fast reads 1"):
        load(tmp_path / "some.pt")


def test_another_file_of_torch_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "some.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        load(tmp_path / "some.pt")
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        load(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="can't be read"):
        load(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in range(5):
        store.save(step, {"step": step}, best=step == 1)
    assert [path.name for path in store.paths()] == ["step-00000004.pt", "step-00000003.pt"]
    assert load(tmp_path / "checkpoints" / "best.pt") == {"step": 1}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_damaged_one_is_not_kept_for_a_good_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    CheckpointStore(tmp_path, keep=2).save(50, {"step": 50})
    (tmp_path / "step-00000100.pt").write_bytes(b"PK")
    assert store.load_newest([].append) == {"step": 50}
    store.save(60, {"step": 60})
    assert [path.name for path in store.paths()] == ["step-00000060.pt"]


def test_a_damaged_one_falls_back_with_a_warning(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    warnings = []
    assert store.load_newest(warnings.append) is None
    for step in range(3):
        store.save(step, {"step": step})
    store.paths()[0].write_bytes(b"PK")
    (tmp_path / ".step-00000009.pt.123.tmp").write_bytes(b"what a killed run left")
    assert store.load_newest(warnings.append) == {"step": 1}
    assert len(warnings) == 1 and "step-00000002.pt" in warnings[0]
    assert len(list(tmp_path.iterdir())) == 3
    for path in store.paths():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints can be read"):
        store.load_newest(warnings.append)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_bytes()
    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(DiskFullError, match="no room left on the disk to write .*some.pt"):
        save(path, {"other": 1})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["some.pt"]


def test_what_a_user_wants_somewhere_goes_through_links_and_into_pipes(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    link.symlink_to(target)
    for content in (b"first", b"second"):
        files.deliver(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.deliver(pipe, b"third")
        assert pipe.is_fifo() and os.read(reader, 9) == b"third"
    finally:
        os.close(reader)
    files.deliver(Path(os.devnull), b"fourth")


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1]
        )
    files.write(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_where_links_cannot_be_the_best_checkpoint_is_a_copy(monkeypatch, tmp_path):
    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2):
        store.save(step, {"step": step}, best=True)
        assert load(tmp_path / "best.pt") == {"step": step}
