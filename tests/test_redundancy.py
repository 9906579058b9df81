"""The redundancy profile against its definitions, written out in float64."""

import copy
import itertools
import json
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from imcl_fast import functional as F
from imcl_fast import redundancy
from imcl_fast.models import import_torchvision, resnet18
from imcl_fast.redundancy import profile
from imcl_fast.reports import inspect

BINS, CELLS = 40, 64


class Show(nn.Module):
    """Returns what it is given, in a layer whose output is a representation."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(1, 1, 1)  # one kernel, so no pair: it is left out
        self.layer = Same()

    def forward(self, x):
        return self.layer(x)


class Same(nn.Module):
    def forward(self, x):
        return x * 1


def naive(matrices, centred):
    """The profile of float64 matrices (B, N, D), by loops over the pairs of rows."""
    count, n, d = matrices.shape
    dead, ranks, histogram = 0, [], [0] * BINS
    cosines = torch.zeros(count, n, n, dtype=torch.float64)
    for b, x in enumerate(matrices):
        norm = x.norm(dim=1)
        x = x - x.mean(dim=1, keepdim=True) if centred else x
        live = (x.norm(dim=1) > 1e-12) & (x.norm(dim=1) > (1e-5 * norm if centred else 0))
        dead += int((~live).sum())
        for i, j in itertools.permutations(range(n), 2):
            if live[i] and live[j]:
                cosines[b, i, j] = (x[i] @ x[j] / (x[i].norm() * x[j].norm())).abs()
            if i < j:
                histogram[min(int(cosines[b, i, j] * BINS), BINS - 1)] += 1
        values = torch.linalg.svdvals(x * live.unsqueeze(1))
        share = values[values > 1e-7 * values.max()] / values.sum()
        ranks.append(float((-share * share.log()).sum().exp()) if len(share) else 0.0)
    size = min(n, CELLS)
    heat = torch.zeros(size, size, dtype=torch.float64)
    for a, c in itertools.product(range(size), repeat=2):
        rows = [i for i in range(n) if i * size // n == a]
        columns = [j for j in range(n) if j * size // n == c]
        pairs = [(i, j) for i in rows for j in columns if i != j]
        if pairs:
            heat[a, c] = sum(cosines[:, i, j].mean() for i, j in pairs) / len(pairs)
    pairs = count * n * (n - 1)
    return {
        "mean_abs_cos": float(cosines.sum()) / pairs,
        "mean_square_cos": float(cosines.square().sum()) / pairs,
        "dead_share": dead / (count * n),
        "effective_rank": sum(ranks) / count,
        "histogram": histogram,
        "heatmap": heat.tolist(),
    }


def check(found, expected, atol=1e-9):
    for key, value in expected.items():
        if key == "histogram":
            assert sum(found[key]) == sum(value)
            # A similarity on the border of two bins may be rounded into either.
            ups = [sum(found[key][:i]) - sum(value[:i]) for i in range(BINS + 1)]
            assert max(map(abs, ups)) <= 1
        else:
            torch.testing.assert_close(
                torch.tensor(found[key]), torch.tensor(value), rtol=1e-6, atol=atol, msg=key
            )


@hypothesis.given(
    count=st.integers(1, 3),
    rows=st.integers(2, 9),
    pixels=st.integers(2, 7),
    center=st.booleans(),
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
def test_representations_are_as_defined(count, rows, pixels, center, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, rows, pixels, 2, generator=generator, dtype=torch.float64)
    if dead:
        # Nearly constant, so that what centring leaves is far above 1e-12.
        x[0, 0] = 1e3 + 1e-4 * x[0, 0] if center else 0.0
    (layer,) = profile(Show().double(), x, center=center)
    assert (layer["name"], layer["kind"]) == ("layer", "representation")
    assert (layer["rows"], layer["columns"]) == (rows, 2 * pixels)
    assert layer["dead_share"] == (1 / (count * rows) if dead else 0)
    check(layer, naive(x.flatten(2), center))


@pytest.mark.parametrize("rows, columns", [(64, 9), (65, 30), (100, 4)])
def test_kernels_are_as_defined_in_blocks_of_any_size(rows, columns, monkeypatch):
    torch.manual_seed(rows)
    network = nn.Sequential(nn.Linear(columns, rows)).double()
    x = torch.randn(1, columns).double()
    expected = naive(network[0].weight.detach().unsqueeze(0), False)
    whole = profile(network, x)
    check(whole[0], expected)
    monkeypatch.setattr(redundancy, "BLOCK", 7 * rows)
    check(profile(network, x)[0], expected)


def test_it_measures_what_the_losses_penalise():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU())
    x = torch.randn(5, 3, 8, 8)
    for center in (False, True):
        kernels, features = profile(network, x, center=center, batch_size=2)
        for layer, similarity, of, options in (
            (features, F.representation_similarity, network(x), {"center": center}),
            (kernels, F.kernel_similarity, network[0].weight, {}),
        ):
            for key, penalty in (("mean_abs_cos", "abs"), ("mean_square_cos", "square")):
                loss = similarity(of.detach(), penalty=penalty, impl="reference", **options)
                assert layer[key] == pytest.approx(float(loss), rel=1e-5)


def test_known_matrices():
    weight = torch.eye(4, 6)
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8))
    network[0].weight.data = weight
    network[1].weight.data = torch.cat([torch.eye(4), -torch.eye(4)])
    orthogonal, doubled = profile(network, torch.randn(1, 6))
    assert orthogonal["mean_abs_cos"] == 0
    assert orthogonal["effective_rank"] == pytest.approx(4)
    assert orthogonal["welch_bound"] == 0
    # Two copies of an orthonormal basis are a tight frame: they reach the Welch bound.
    assert doubled["welch_bound"] == pytest.approx((8 - 4) / (4 * 7))
    assert doubled["mean_square_cos"] == pytest.approx(doubled["welch_bound"])
    assert doubled["histogram"][0] == 24 and doubled["histogram"][-1] == 4
    network[1].weight.data.zero_()
    zero = profile(network, torch.randn(1, 6))[1]
    assert zero["dead_share"] == 1 and zero["effective_rank"] == zero["mean_abs_cos"] == 0


def test_transposed_and_grouped_kernels_are_rows_of_output_channels():
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(6, 4, 2, groups=2)
    down = nn.Conv2d(4, 6, 3, groups=2)
    layers = profile(nn.Sequential(up, down), torch.randn(1, 6, 5, 5))
    kernels = {layer["name"]: layer for layer in layers if layer["kind"] == "kernel"}
    assert (kernels["0"]["rows"], kernels["0"]["columns"]) == (4, 3 * 4)
    assert (kernels["1"]["rows"], kernels["1"]["columns"]) == (6, 2 * 9)
    weight = up.weight.detach()  # (6, 2, 2, 2): inputs 0-2 lead to outputs 0 and 1
    rows = torch.stack([weight[3 * (o // 2) : 3 * (o // 2) + 3, o % 2].flatten() for o in range(4)])
    check(kernels["0"], naive(rows.double().unsqueeze(0), False))


def test_a_resnet_s_representations_are_its_activations_and_blocks():
    torch.manual_seed(0)
    layers = profile(resnet18(10, width=4), torch.randn(2, 3, 16, 16))
    found = [layer["name"] for layer in layers if layer["kind"] == "representation"]
    assert found[:4] == ["relu", "layer1.0.relu", "layer1.0", "layer1.1.relu"]
    assert len(found) == 1 + 4 * 4 + 3  # the stem, two of each block, three shortcuts
    kernels = [layer["name"] for layer in layers if layer["kind"] == "kernel"]
    assert len(kernels) == 21 and kernels[0] == "conv1" and kernels[-1] == "fc"
    json.dumps(layers, allow_nan=False)


def test_layers_that_run_twice_and_pools():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(self.relu(self.conv(self.relu(self.conv(x)))))

    layers = profile(Twice(), torch.randn(1, 3, 8, 8))
    assert [layer["name"] for layer in layers] == ["conv", "relu", "relu (call 2)"]


def test_an_activation_finishes_its_layer_however_it_is_called():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](x))

    layers = profile(Named(nn.Conv2d(3, 3, 3), nn.ReLU()), torch.randn(1, 3, 8, 8))
    assert [layer["name"] for layer in layers] == ["0", "1"]  # a kernel, and what came of it


def test_other_networks_are_profiled():
    torch.manual_seed(0)
    models = import_torchvision().models
    for network in (
        models.get_model("squeezenet1_1", weights=None, num_classes=3),
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 30, 2)),
    ):
        shape = (1, 2, 32) if isinstance(network, nn.Sequential) else (1, 3, 32, 32)
        layers = profile(network, torch.randn(shape))
        assert {layer["kind"] for layer in layers} == {"kernel", "representation"}
        for layer in layers:
            assert 0 <= layer["mean_square_cos"] <= layer["mean_abs_cos"] <= 1
            assert 0 <= layer["effective_rank"] <= min(layer["rows"], layer["columns"]) + 1e-6


def test_the_network_and_the_generators_are_left_as_they_were():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    network[3].eval()  # frozen by its user
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(2, 1, 8, 8)
    generator = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    try:
        first = profile(network, x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [module.training for module in network] == [True, True, True, False]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert profile(network, x) == first  # nor did the precision matter


def test_hooks_are_gone_after_an_error():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with pytest.raises(RuntimeError):
        profile(network, torch.randn(1, 2, 8, 8))
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and module.training


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_is_none(value):
    network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU())
    network[0].weight.data[0] = value
    kernels, features = profile(network, torch.rand(1, 1, 5, 5) + 1)
    assert kernels["mean_abs_cos"] is None and features["mean_abs_cos"] is None
    assert kernels["rows"] == 3
    json.dumps([kernels, features], allow_nan=False)
    network[0].weight.data[0] = 1
    assert profile(network, torch.rand(1, 1, 5, 5))[0]["mean_abs_cos"] is not None


def test_half_precision_is_measured_in_float32():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 40)).bfloat16()
    (layer,) = profile(network, torch.randn(1, 16).bfloat16())
    expected = naive(network[0].weight.detach().double().unsqueeze(0), False)
    check(layer, expected, atol=8 * torch.finfo(torch.float32).eps)


def test_a_wide_layer_never_needs_all_pairs_at_once(monkeypatch):
    monkeypatch.setattr(redundancy, "BLOCK", 1 << 16)
    largest = 0
    product = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        result = product(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    (layer,) = profile(nn.Sequential(nn.Linear(8, 3000)), torch.randn(1, 8))
    assert sum(layer["histogram"]) == 3000 * 2999 // 2
    assert 0 < largest <= 3000 * 64  # and not 3000 * 3000


def test_bad_images_are_named():
    network = nn.Sequential(nn.Conv2d(1, 3, 2))
    with pytest.raises(TypeError, match="images: expected a Tensor, got list"):
        profile(network, [1])
    with pytest.raises(ValueError, match=r"images: expected a batch .* got shape \(0, 1, 5, 5\)"):
        profile(network, torch.randn(0, 1, 5, 5))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        profile(network, torch.randn(1, 1, 5, 5), batch_size=0)


# imcl-inspect


def smaller():
    """A factory for --model."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def test_inspect_prints_a_table_and_writes_files(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    data, picture = tmp_path / "profile.json", tmp_path / "profile.svg"
    arguments = [f"{__name__}:smaller", "--data", "digits", "--images", "3"]
    assert inspect.main([*arguments, "--json", str(data), "--plot", str(picture)]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["layer", "kind"]
    assert [line.split()[:5] for line in lines] == [
        ["0", "kernel", "4", "x", "9"],
        ["1", "representation", "4", "x", "196"],
    ]
    layers = json.loads(data.read_text())
    assert f"{layers[1]['mean_abs_cos']:.4f}" in lines[1]
    assert picture.read_text().startswith("<?xml")
    assert inspect.main([*arguments, "--plot", str(tmp_path / "profile.png")]) == 0
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_reads_a_state_dict(tmp_path, capsys):
    network = smaller()
    network[0].weight.data = torch.ones(4, 1, 3, 3)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    path = str(tmp_path / "weights.pt")
    assert inspect.main([path, "--model", f"{__name__}:smaller", "--image-size", "8"]) == 0
    kernel = capsys.readouterr().out.splitlines()[2].split()
    assert kernel[:6] == ["0", "kernel", "4", "x", "9", "1.0000"]


def test_inspect_names_torchvision_s_networks(capsys):
    arguments = ["squeezenet1_1", "--classes", "4", "--image-size", "32", "--images", "1"]
    assert inspect.main(arguments) == 0
    last = [line for line in capsys.readouterr().out.splitlines() if "kernel" in line][-1]
    assert last.split()[:5] == ["classifier.1", "kernel", "4", "x", "512"]


class Evil:
    """What a pickle must not be allowed to build."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "case, message",
    [
        ("no_such_net", "neither a file nor a network of torchvision's"),
        ("nothing.pt", "there is no such file"),
        ("evil", "refused, for it could run code"),
        ("truncated", "can't be read as weights"),
        ("anonymous", "say which with --model"),
        ("other", "not the weights of this network"),
        ("json:loads", "can't be built"),
        ("json:JSONDecoder", "expected an nn.Module, got JSONDecoder"),
        ("no.module:x", "can't be built (ModuleNotFoundError"),
        ("empty", "it has no network.pt and no checkpoint"),
        ("squeezenet1_1", "try another --image-size"),
    ],
)
def test_inspect_s_errors_are_one_line(case, message, tmp_path, capsys):
    arguments, path = [case], tmp_path / case
    if case == "evil":
        torch.save({"a": Evil(tmp_path / "ran")}, path)
        arguments = [str(path)]
    elif case == "empty":
        path.mkdir()
        arguments = [str(path)]
    elif case in ("truncated", "anonymous", "other"):
        torch.save(nn.Linear(2, 3).state_dict(), path)
        arguments = [str(path)]
        if case == "truncated":
            path.write_bytes(path.read_bytes()[:100])
        elif case == "other":
            arguments += ["--model", f"{__name__}:smaller"]
    elif case == "squeezenet1_1":
        arguments += ["--image-size", "8"]
    assert inspect.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("imcl-inspect: ") and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--plot", "x.pdf"], ["--images", "0"], ["--image-size", "4"], ["--data", "cifar"],
        ["--plan", "--json", "x.json"], ["--plan", "--plot", "x.svg"],
    ],
)  # fmt: skip
def test_inspect_refuses_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        inspect.main(["resnet18", *flags])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("center", "bound"), [(True, 6 / (3 * 8)), (False, 5 / (4 * 8))])
def test_centred_rows_have_a_dimension_less(center, bound):
    layers = profile(nn.Sequential(nn.Conv2d(2, 9, 1)), torch.randn(2, 2, 2, 2), center=center)
    (layer,) = (layer for layer in layers if layer["kind"] == "representation")
    assert layer["welch_bound"] == pytest.approx(bound)


def test_one_direction_alone_has_an_effective_rank_of_one():
    linear = nn.Linear(300, 300)
    linear.weight.data = torch.outer(*2.0 ** torch.randint(-3, 4, (2, 300)))  # exactly
    (layer,) = profile(nn.Sequential(linear), torch.randn(2, 300))
    assert layer["effective_rank"] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_networks_are_profiled_as_they_are(how):
    images = torch.randn(3, 1, 12, 12)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )
    network(images)
    expected = profile(network, images)
    assert {layer["kind"] for layer in expected} == {"kernel", "representation"}
    if how == "wrapped":
        compiled = torch.compile(network, backend="eager")
    else:
        compiled = copy.deepcopy(network)
        compiled.compile(backend="eager")
    for batch in (images, images[:1]):
        compiled(batch)
    assert profile(compiled, images) == expected


def test_a_number_that_is_not_finite_counts_in_whatever_batch():
    images = torch.randn(3, 2, 4, 4)
    images[0, 0, 0, 0] = torch.nan
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    for size in (1, 3):
        (layer,) = (x for x in profile(model, images, batch_size=size) if x["kind"] != "kernel")
        assert layer["mean_abs_cos"] is None and layer["histogram"] is None


def test_what_the_network_draws_is_drawn_from_a_copy():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    model.register_forward_hook(lambda *args: args[-1] + torch.rand(1))
    before = torch.get_rng_state()
    profile(model, torch.randn(3, 2, 4, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_have_no_weights_yet_are_left_out():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    model.forward = model[0].forward
    model.append(nn.LazyLinear(4))
    assert [layer["name"] for layer in profile(model, torch.randn(2, 2, 4, 4))] == ["0"]


def test_what_never_ran_comes_last():
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1))
    model.forward = lambda x: model[2](model[1](x))
    kernels = [x["name"] for x in profile(model, torch.randn(2, 2, 4, 4)) if x["kind"] == "kernel"]
    assert kernels == ["1", "2", "0"]
