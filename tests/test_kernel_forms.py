"""The forms of way 4 that are tried in studies, against their definitions written out."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys

import pytest
import torch

from bench.accuracy import kernel_forms, runs, study_file
from bench.accuracy.kernel_forms import parse, penalty
from imcl_fast import functional as F


def by_definition(weight, stride, phi, with_self):
    """Sums over pairs, shifts and overlapping positions, one number at a time."""
    n, _, *size = weight.shape
    norms = [float(w.norm()) for w in weight]
    total = 0.0
    for i, j in itertools.product(range(n), repeat=2):
        if not norms[i] or not norms[j]:
            continue
        for shift in itertools.product(*(range(1 - k, k) for k in size)):
            if any(d % s for d, s in zip(shift, stride, strict=True)):
                continue
            if i == j and (not with_self or not any(shift)):
                continue
            c = 0.0
            for p in itertools.product(*(range(k) for k in size)):
                q = [a + d for a, d in zip(p, shift, strict=True)]
                if all(0 <= a < k for a, k in zip(q, size, strict=True)):
                    c += float(weight[(i, slice(None), *p)] @ weight[(j, slice(None), *q)])
            total += phi(c / (norms[i] * norms[j]))
    return total / (n * (n - 1))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4, 2, 3, 3), (1, 1)), ((4, 2, 3, 3), (2, 2)), ((3, 2, 3, 2), (1, 2)), ((5, 3, 4), (1,)),
     ((3, 2, 1, 1), (1, 1)), ((2, 1, 2, 3, 2), (1, 2, 1))],
)  # fmt: skip
@pytest.mark.parametrize("dead", [False, True])
def test_shifts(shape, stride, dead):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    if dead:
        weight[0] = 0
    for words, phi in (("shifts", lambda c: c * c), ("shifts abs", abs)):
        for more, with_self in (("", True), (" without-self", False)):
            expected = by_definition(weight, stride, phi, with_self)
            got = penalty(weight, stride, parse(words + more))
            assert got == pytest.approx(expected, rel=1e-12)
            leaf = weight.clone().requires_grad_()
            of = functools.partial(penalty, stride=stride, form=parse(words + more))
            assert torch.autograd.grad(of(leaf), leaf)[0].isfinite().all()
            assert dead or torch.autograd.gradcheck(of, leaf)


def test_of_one_position_it_is_todays():
    weight = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(penalty(weight, (1,), parse("shifts")), F.kernel_similarity(weight))


def test_inputs_and_welch():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    of_inputs = F.kernel_similarity(weight.transpose(0, 1), impl="reference")
    torch.testing.assert_close(penalty(weight, (1, 1), parse("inputs")), of_inputs)
    grey = weight[:, :1]  # a layer of one input channel has no pair of inputs
    assert penalty(grey, (1, 1), parse("inputs")) == 0
    wide = torch.randn(12, 3, dtype=torch.float64)
    least = (12 - 3) / (3 * 11)
    excess = F.kernel_similarity(wide, impl="reference") - least
    torch.testing.assert_close(penalty(wide, (1,), parse("welch")), excess)
    frame = torch.eye(3, dtype=torch.float64).repeat(4, 1)  # as unlike as 12 can be
    assert penalty(frame, (1,), parse("welch")) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "words", ["", "shift", "abs", "inputs abs", "shifts falling=0", "shifts x"]
)
def test_words_that_are_no_form_are_named(words, capsys):
    with pytest.raises(ValueError, match="form: expected"):
        parse(words)
    assert kernel_forms.main([words]) == 2
    assert capsys.readouterr().err.startswith("form: expected")


FLAGS = [
    "--dataset", "digits", "--model", "resnet18", "--width", "2", "--train-images", "40",
    "--batch-size", "20", "--epochs", "2", "--threads", "1", "--ways", "kernel", "--log-every", "1",
    "--kernel-interval", "1", "--no-report", "--no-measure-ways", "--no-tensorboard",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_trained_with_it(tmp_path):
    """The first step sees the form's value on the same weights, and the weight falls."""
    rows = {}
    for form in ("", "shifts", "shifts falling=4"):
        folder = tmp_path / (form or "today")
        command = [*runs.FORMED, form] if form else list(runs.TRAIN)
        done = subprocess.run([*command, *FLAGS, "--run-dir", str(folder)], capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (folder / "steps.csv").read_text().splitlines()
        rows[form] = [dict(zip(lines[0].split(","), map(float, line.split(",")), strict=True))
                      for line in lines[1:]]  # fmt: skip
    term = "kernel_similarity"
    assert rows["shifts"][0][term] > 2 * rows[""][0][term]
    assert rows["shifts falling=4"][0] == rows["shifts"][0]
    assert rows["shifts"][3][term] < rows["shifts"][0][term]
    assert rows["shifts falling=4"][3][term] < 0.3 * rows["shifts"][3][term]


def test_a_studys_form_is_in_its_runs_and_their_fingerprints(tmp_path):
    study = study_file.load("kernel-shifts-screening")
    assert study.held_out == 5000
    assert {run.seed for run in study.runs} == {1, 2, 3}
    formed = {run.method: run.form for run in study.runs if run.form}
    assert {"shifts", "inputs", "welch"} == {parse(form).kind for form in formed.values()}
    assert not {"ce", "kernel", "imcl"} & set(formed)
    run = next(run for run in study.runs if run.method == "shifts-100")
    plain = dataclasses.replace(run, form="")
    assert run.fingerprint != plain.fingerprint
    assert {**plain.told, "form": "shifts"} == run.told
    execution = runs._Execution(study, None, runs.Options(tmp_path, None, False, 1, 1), None, 0)
    assert execution._command(run) == (*runs.FORMED, "shifts")
    assert execution._command(plain) == runs.TRAIN
    json.dumps(run.told)
    assert sys.executable == runs.FORMED[0]
