"""The pairwise penalties: representation_similarity and kernel_similarity."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from conftest import (
    DTYPES,
    HALVES,
    Impl,
    assert_same_bits,
    bits,
    cases,
    check_pairwise,
    dtype_name,
    leaf,
    threads,
    usable,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, PENALTIES, Matrices, features, layers, weights

from imcl_fast import calls
from imcl_fast import functional as F

# Shapes at which implementations change their course: 2D around N (primal or dual),
# around the widths of vectors and tiles, and larger than one tile.
FEATURE_SHAPES = [
    (2, 2, 1),
    (3, 2, 5),
    (1, 8, 4),
    (1, 8, 5),
    (2, 9, 2, 2),
    (3, 33, 4, 4),
    (2, 31, 4, 4),
    (2, 64, 9, 7),
    (1, 70, 20, 15),
    (2, 130, 10, 5),
    (1, 150, 10, 7),
    (1, 257, 3, 3),
    (1, 48, 2, 5, 6),
]
WEIGHT_SHAPES = [
    (2, 1),
    (96, 40, 3, 3),
    (70, 300, 1, 1),
    (130, 50),
    (65, 1, 3, 3),
    (24, 7, 3, 3),
    (33, 16, 5),
    (10, 513),
    (129, 67, 2),
    (18, 3, 3, 3, 3),
    (300, 37),
    (150, 70),
]
# Large enough for all threads of a CPU to work on one matrix: in halves of the columns, and not.
SHARED_SHAPES = [(180, 260, 2, 2), (330, 400)]


# --- the reference itself, from the definition


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_reference_is_the_definition(penalty: str, center: bool) -> None:
    xs = [
        Matrices((2, 5, 3, 2), True, dead=0.3, offset=0.5, seed=5).build(torch.float64),
        Matrices((1, 3, 4), True, seed=2).build(torch.float64),
    ]
    phi = {"square": lambda c: c * c, "abs": abs, "signed": lambda c: c}[penalty]
    layer_means = []
    for x in xs:
        total = 0.0
        for sample in x.flatten(2).tolist():
            for i, a in enumerate(sample):
                for j, b in enumerate(sample):
                    if i == j:
                        continue
                    if center:
                        a_c = [v - sum(a) / len(a) for v in a]
                        b_c = [v - sum(b) / len(b) for v in b]
                    else:
                        a_c, b_c = a, b
                    norms = math.dist(a_c, [0] * len(a)) * math.dist(b_c, [0] * len(b))
                    if norms > 1e-24:
                        dot = sum(p * q for p, q in zip(a_c, b_c, strict=True))
                        total += phi(dot / norms)
        batch, n = x.shape[:2]
        layer_means.append(total / (batch * n * (n - 1)))
    expected = sum(layer_means) / len(xs)
    got = F.representation_similarity(xs, penalty=penalty, center=center, impl="reference")
    assert got.item() == pytest.approx(expected, rel=1e-12)


# --- drawn


@given(specs=layers(features()), penalty=st.sampled_from(PENALTIES), center=st.booleans(),
       dtype=st.sampled_from(DTYPES))
def test_drawn_features(impl: Impl, specs, penalty, center, dtype) -> None:
    xs = [spec.build(dtype, impl.device) for spec in specs]
    check_pairwise(impl, xs, batched=True, penalty=penalty, center=center)


@given(specs=layers(weights()), penalty=st.sampled_from(PENALTIES), dtype=st.sampled_from(DTYPES))
def test_drawn_weights(impl: Impl, specs, penalty, dtype) -> None:
    xs = [spec.build(dtype, impl.device) for spec in specs]
    check_pairwise(impl, xs, batched=False, penalty=penalty)


@given(specs=st.lists(features(), min_size=2, max_size=3), dtypes=st.permutations(DTYPES))
def test_layers_of_different_dtypes(impl: Impl, specs, dtypes) -> None:
    xs = [s.build(t, impl.device) for s, t in zip(specs, dtypes, strict=False)]
    check_pairwise(impl, xs, batched=True)


@pytest.mark.parametrize("center", [False, True])
def test_dual_layers_of_one_tile_and_of_several(impl: Impl, center: bool) -> None:
    """GPU kernels take rows of one tile at once, as many as fit in shared memory, unless (Triton) a
    layer beside them has longer ones."""
    for dtype in (torch.bfloat16, torch.float16):
        for shapes in (
            [(2, 130, 10, 5), (1, 140, 7)],
            [(1, 130, 10, 5), (1, 150, 10, 7)],
            [(1, 290, 8, 5), (1, 290, 7, 4)],
        ):
            xs = [Matrices(s, True, dead=0.1, offset=0.3, seed=3).build(dtype, impl.device)
                  for s in shapes]  # fmt: skip
            check_pairwise(impl, xs, batched=True, center=center)


def test_the_order_of_layers_of_different_lengths_changes_no_bit(impl: Impl) -> None:
    """csrc/cuda launches the longest first, and adds up in that order."""
    if impl.name != "cuda":
        pytest.skip("only csrc/cuda sorts its layers")
    xs = [Matrices(s, True, seed=i).build(torch.float64, impl.device)
          for i, s in enumerate([(2, 8, 9), (1, 9, 40), (3, 7, 130), (1, 30, 5)])]  # fmt: skip
    losses = [F.representation_similarity(order, impl=impl.name)
              for order in (xs, xs[::-1], xs[1:] + xs[:1])]  # fmt: skip
    assert_same_bits(losses[:1] * 2, losses[1:])


# --- every combination at the shapes that matter


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", FEATURE_SHAPES, ids=str)
def test_feature_shapes(impl: Impl, shape, center: bool, penalty: str) -> None:
    among = product((torch.float32, torch.bfloat16), ("contiguous", "channels_last"))
    turn = FEATURE_SHAPES.index(shape) + PENALTIES.index(penalty) + 3 * center
    for dtype, layout in cases(impl, among, turn):
        spec = Matrices(shape, True, layout, dead=0.1, offset=0.3, seed=len(shape),
                        shared=3 * (penalty == "abs" and center))
        check_pairwise(
            impl, [spec.build(dtype, impl.device)], batched=True, penalty=penalty, center=center
        )


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_weight_shapes(impl: Impl, shape, penalty: str) -> None:
    turn = WEIGHT_SHAPES.index(shape) + PENALTIES.index(penalty)
    for dtype in cases(impl, DTYPES, turn):
        spec = Matrices(shape, False, dead=0.05, seed=len(shape))
        check_pairwise(impl, [spec.build(dtype, impl.device)], batched=False, penalty=penalty)


def test_all_weights_of_a_network_at_once(impl: Impl) -> None:
    xs = [Matrices(s, False, seed=i).build(torch.float32, impl.device)
          for i, s in enumerate(WEIGHT_SHAPES)]
    check_pairwise(impl, xs, batched=False)


def test_a_thousand_matrices(impl: Impl) -> None:
    """More than the last block of a launch adds up at once."""
    spec = Matrices((1100, 2, 3), True, seed=7)
    check_pairwise(impl, [spec.build(torch.float32, impl.device)], batched=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(impl: Impl, layout: str, dtype: torch.dtype) -> None:
    for shape in ((3, 20, 6, 5), (2, 40, 3, 3), (2, 19, 70), (2, 6, 3, 2, 5)):
        for center in cases(impl, (False, True), len(shape) + DTYPES.index(dtype)):
            spec = Matrices(shape, True, layout, offset=0.5, seed=3)
            check_pairwise(impl, [spec.build(dtype, impl.device)], batched=True, center=center)
    for shape in ((20, 6, 3, 3), (41, 17), (64, 1, 3, 3)):
        if layout == "channels_last" and len(shape) < 3:
            continue
        spec = Matrices(shape, False, layout, seed=4)
        check_pairwise(impl, [spec.build(dtype, impl.device)], batched=False)


# --- values known by hand


@pytest.mark.parametrize("shape", [(3, 40), (40, 3)], ids=str)
def test_known_values(impl: Impl, shape) -> None:
    n, d = shape
    same = torch.ones(shape, device=impl.device)
    opposite = same.clone()
    opposite[1] = -3
    share = 4 * (n - 1) / (n * (n - 1))  # what flipping one row takes from a mean over pairs
    for penalty, alike, flipped in (("square", 1, 1), ("abs", 1, 1), ("signed", 1, 1 - share)):
        for x, expected in ((same, alike), (opposite, flipped)):
            got = F.kernel_similarity(x, penalty=penalty, impl=impl.name)
            assert got.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_orthogonal_rows_have_no_penalty_and_no_gradient(impl: Impl, penalty: str) -> None:
    """With |c| the derivative at 0 is 0, so that exactly orthogonal rows are at rest."""
    x = leaf(torch.diag(torch.arange(1.0, 13)).to(impl.device))
    loss = F.kernel_similarity(x, penalty=penalty, impl=impl.name)
    (g,) = torch.autograd.grad(loss, x)
    assert loss.item() == pytest.approx(0, abs=1e-7)
    if penalty != "signed":
        assert torch.count_nonzero(g) == 0


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_does_not_depend_on_the_scale(impl: Impl, penalty: str, scale: float) -> None:
    """Squared norms of 1e-18 * D and 1e18 * D are both well inside float32."""
    for shape in ((9, 30), (30, 9)):
        x = Matrices(shape, False, seed=1).build(torch.float32, impl.device)
        check_pairwise(impl, [x * scale], batched=False, penalty=penalty)


# --- dead rows


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dead_rows(impl: Impl, dtype: torch.dtype, center: bool, penalty: str) -> None:
    turn = DTYPES.index(dtype) + PENALTIES.index(penalty) + center
    for shape in cases(impl, ((2, 9, 20), (2, 20, 9), (2, 20, 3)), turn):
        x = Matrices(shape, True, seed=7).build(dtype, impl.device)
        x[0, 2] = 0
        x[1, ::2] = 0
        x = leaf(x)
        loss = F.representation_similarity(x, penalty=penalty, center=center, impl=impl.name)
        (g,) = torch.autograd.grad(loss * 1024, x)
        assert torch.count_nonzero(g[0, 2]) == 0 and torch.count_nonzero(g[1, ::2]) == 0
        assert torch.count_nonzero(g[0, 3]) > 0 and torch.count_nonzero(g[1, 1]) > 0
        check_pairwise(impl, [x], batched=True, penalty=penalty, center=center)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_all_rows_dead(impl: Impl, center: bool, penalty: str) -> None:
    for shape in ((2, 6, 20), (2, 20, 6)):
        for value in (0.0, 3.3) if center else (0.0,):
            x = leaf(torch.full(shape, value, device=impl.device))
            loss = F.representation_similarity(x, penalty=penalty, center=center, impl=impl.name)
            (g,) = torch.autograd.grad(loss, x)
            assert loss.item() == 0
            assert torch.count_nonzero(g) == 0


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_few_live_rows(impl: Impl, dtype: torch.dtype, penalty: str) -> None:
    """So few that the dual form's subtraction has no Welch bound to keep it safe."""
    for i, shape in enumerate(((6, 20), (20, 6), (64, 16))):
        for live in cases(impl, (2, 3, 1), DTYPES.index(dtype) + i):
            x = torch.zeros(shape, dtype=dtype, device=impl.device)
            x[2 : 2 + live] = Matrices((live, shape[1]), False, seed=live).build(dtype, impl.device)
            check_pairwise(impl, [x], batched=False, penalty=penalty)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_eps_draws_the_line(impl: Impl, penalty: str) -> None:
    for shape in ((6, 20), (20, 6)):
        x = Matrices(shape, False, seed=3).build(torch.float32, impl.device)
        x[1] *= 0.05 / x[1].norm()
        x[2] *= 0.2 / x[2].norm()
        x = leaf(x)
        (g,) = torch.autograd.grad(
            F.kernel_similarity(x, penalty=penalty, eps=0.1, impl=impl.name), x
        )
        assert torch.count_nonzero(g[1]) == 0 and torch.count_nonzero(g[2]) > 0
        check_pairwise(impl, [x], batched=False, penalty=penalty, eps=0.1)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_rows_of_zeros_are_dead_without_eps(impl: Impl, center: bool, penalty: str) -> None:
    """A norm equal to eps is dead, or 0/0 would follow."""
    for shape in ((2, 6, 20), (2, 20, 6)):
        x = Matrices(shape, True, seed=4).build(torch.float32, impl.device)
        x[:, 3] = 0
        check_pairwise(impl, [x], batched=True, penalty=penalty, center=center, eps=0.0)


# --- centring


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("columns", [50, 4])
def test_constant_rows_are_dead_when_centred(impl: Impl, columns: int, penalty: str) -> None:
    """Rounding noise about a large mean (1e-6 of it) is not a direction."""
    generator = torch.Generator().manual_seed(0)
    for dtype in [t for t in (torch.float64, torch.float32) if t in DTYPES]:
        x = torch.randn(2, 11, columns, generator=generator, dtype=torch.float64)
        x[:, 2] = 1000 + 1e-3 * x[:, 2]
        x[:, 5] = 1000.1
        x[:, 7] = -7e-3
        x = leaf(x.to(dtype).to(impl.device))
        loss = F.representation_similarity(x, center=True, penalty=penalty, impl=impl.name)
        (g,) = torch.autograd.grad(loss, x)
        assert torch.count_nonzero(g[:, [2, 5, 7]]) == 0
        assert (g[:, [0, 1, 3]] != 0).any(-1).all()
        check_pairwise(impl, [x], batched=True, penalty=penalty, center=True)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape", [(2, 11, 50), (2, 12, 4), (1, 20, 15, 16)], ids=str)
def test_nearly_constant_rows_are_accurate_when_centred(impl: Impl, shape, penalty: str) -> None:
    """Centring must come before squaring: 1e6 - 1e6 has lost a deviation of 1e-1."""
    for layout in ("contiguous", "channels_last"):
        x = Matrices(shape, True, seed=8).build(torch.float64)
        x[:, 1] = 1000 + 0.1 * x[:, 1]
        x[:, 3] = 50 + x[:, 3]
        x[:, -1] = 1000 - 3 * x[:, -1]
        x = x.float().to(impl.device)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        check_pairwise(impl, [x], batched=True, penalty=penalty, center=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("size", [32, 56, pytest.param(112, marks=pytest.mark.slow)])
def test_constant_maps_are_dead_when_centred(impl: Impl, size: int, layout: str) -> None:
    """However large they are: the error of a mean must not grow with the numbers in it."""
    if impl.interpreted and size > 32:
        pytest.skip("the interpreter takes minutes for maps of this size; those of 32 x 32 run")
    for dtype in (t for t in (torch.float32, torch.bfloat16) if t in DTYPES):
        levels = torch.tensor([0.1, 0.3, 0.7, 1.1, 1.9, 2.3]).to(dtype)
        x = laid_out(levels.view(1, -1, 1, 1).expand(1, 6, size, size), layout)
        x = x.to(impl.device)
        x = x.requires_grad_()
        for penalty in PENALTIES:
            loss = F.representation_similarity(x, center=True, penalty=penalty, impl=impl.name)
            (g,) = torch.autograd.grad(loss, x)
            assert loss.item() == 0 and not g.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("bordered", [False, True])
def test_nearly_constant_maps_are_accurate_when_centred(
    impl: Impl, layout: str, bordered: bool
) -> None:
    """Deviations of 1e-4 of the mean, with another row of pixels first or without."""
    if impl.interpreted:
        pytest.skip("the interpreter takes minutes for maps of this size")
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.1, 0.3, 0.7, 1.1, 1.9, 2.3]).view(1, -1, 1, 1)
    x = levels * (1 + 1e-4 * torch.randn(1, 6, 64, 64, generator=generator))
    if bordered:
        x[:, ::2, :4] = 0.0
    x = laid_out(x, layout).to(impl.device).requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()
    for penalty in PENALTIES:
        losses = [
            F.representation_similarity(each, center=True, penalty=penalty, impl=name)
            for each, name in ((x, impl.name), (wide, "reference"))
        ]
        got, truth = (torch.autograd.grad(loss, each)[0]
                      for loss, each in zip(losses, (x, wide), strict=True))  # fmt: skip
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=5e-3, abs=1e-6)
        assert (got.double().cpu() - truth).norm() <= 2e-2 * truth.norm()


def test_a_border_of_a_few_columns_is_no_guess_at_a_mean(impl: Impl) -> None:
    """GPU kernels take off a guess while loading; one of the border alone is off by all that the
    others' mean is, and the rounding with it."""
    x = 10 + torch.randn(1, 4, 1, 3136, generator=torch.Generator().manual_seed(0))
    x[..., :16] = 0
    x = x.to(impl.device).requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()
    got, truth = (
        torch.autograd.grad(F.representation_similarity(each, center=True, impl=name), each)[0]
        for each, name in ((x, impl.name), (wide, "reference"))
    )
    assert (got.double().cpu() - truth).norm() <= 5e-5 * truth.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("row", [0, -1])
def test_a_row_of_pixels_unlike_the_others_is_centred_as_they_are(
    impl: Impl, dtype: torch.dtype, row: int
) -> None:
    """As a border is: what rounds a shifted row must be what its correction sums."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.03 * torch.randn(1, 8, 32, 32, generator=generator)
    x[:, :, row] += 0.3 * torch.randn(1, 8, 1, generator=generator) - 0.6
    x = x.to(dtype).to(impl.device).requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()
    got, truth = (
        torch.autograd.grad(F.representation_similarity(each, center=True, impl=name), each)[0]
        for each, name in ((x, impl.name), (wide, "reference"))
    )
    assert (got.double().cpu() - truth).norm() <= 3e-2 * truth.norm()  # docs/gpu.md


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_errors_do_not_grow_with_the_length_of_a_row(impl: Impl, layout: str) -> None:
    """Of numbers that are nearly alike each addition rounds the same way."""
    if impl.name != "cpp":
        pytest.skip("PyTorch's sums are its own, and interpreters take minutes for such maps")
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.1, 0.7, 1.9]).view(1, -1, 1, 1)
    x = levels * (1 + 3e-5 * torch.randn(1, 3, 192, 192, generator=generator))
    x[:, :, 0] = 0.0
    x = laid_out(x, layout).requires_grad_()
    wide = x.detach().double().requires_grad_()
    got, truth = (
        torch.autograd.grad(F.representation_similarity(each, center=True, impl=name), each)[0]
        for each, name in ((x, "cpp"), (wide, "reference"))
    )
    assert (got.double() - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "penalty, rows, columns",
    [("square", 1000, 900), ("abs", 1000, 900),  # in tiles
     ("square", 900, 1000), ("abs", 900, 1000),
     ("square", 4096, 8), ("signed", 4096, 8), ("signed", 8, 65536)],
)  # fmt: skip
def test_errors_do_not_grow_with_how_many_are_alike(
    impl: Impl, penalty: str, rows: int, columns: int, layout: str
) -> None:
    """The gradient is what two sums over all rows, or over a whole one, differ by."""
    if impl.name == "torch" or (impl.name == "triton" and impl.interpreted):
        pytest.skip("PyTorch's sums are its own, and Triton's interpreter takes minutes")
    spread = 1e-2
    generator = torch.Generator().manual_seed(0)
    row = torch.rand(1, 1, columns, 1, generator=generator) + 0.5
    x = row + spread * torch.randn(1, rows, columns, 1, generator=generator)
    x = laid_out(x, layout).to(impl.device).requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()
    got, truth = (
        torch.autograd.grad(
            F.representation_similarity(each, penalty=penalty, impl=name), each)[0]
        for each, name in ((x, impl.name), (wide, "reference"))
    )  # fmt: skip
    # On a GPU the sums of many threads are added up, each a chain of a hundredth of the numbers.
    times = 10 if impl.name == "cpp" else 30
    assert (got.cpu().double() - truth).norm() <= times * 2.0**-24 / spread * truth.norm()


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """(1, C, H, W) as it is, channels_last, or without the border of a larger map."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        return x.contiguous()
    rows, columns = x.shape[2:]
    larger = torch.full((*x.shape[:2], rows + 2, columns + 4), torch.nan, dtype=x.dtype)
    larger[..., 1:-1, 2:-2] = x
    return larger[..., 1:-1, 2:-2]


def test_centred_is_correlation(impl: Impl) -> None:
    x = torch.randn(1, 6, 40, device=impl.device) + 2
    got = F.representation_similarity(x, center=True, penalty="signed", impl=impl.name)
    r = torch.corrcoef(x[0])
    assert got.item() == pytest.approx((r.sum().item() - 6) / 30, abs=1e-5)


# --- precision


@pytest.mark.parametrize("shape", [(70, 300), (96, 40, 3, 3), (130, 50), (256, 320)], ids=str)
def test_matmul_precision(impl: Impl, shape) -> None:
    """"medium" may round products like bfloat16; "high" and "highest" may not."""
    x = Matrices(shape, False, seed=2).build(torch.float32, impl.device)
    check_pairwise(impl, [x], batched=False, precision="highest")
    check_pairwise(impl, [x], batched=False, precision="high")
    check_pairwise(impl, [x], batched=False, precision="medium")


def test_matmul_precision_is_about_float32(impl: Impl) -> None:
    x = Matrices((96, 200), False).build(torch.float64, impl.device)
    check_pairwise(impl, [x], batched=False, precision="medium")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_half_precision_accumulates_in_float32(impl: Impl, dtype: torch.dtype) -> None:
    """In float16 a sum of squares of 300 overflows, and a sum of 4096 ones stops at 2048."""
    x = torch.full((3, 9000), 300.0, dtype=dtype, device=impl.device)
    x[1, ::2] = -300
    x[2, 5000:] = 0
    got = F.kernel_similarity(x, impl=impl.name)
    truth = F.kernel_similarity(x.double(), impl="reference")
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(truth.item(), rel=1e-5)


# --- what is not a number, and what is not there


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_non_finite_input_gives_non_finite_loss(
    impl: Impl, center: bool, penalty: str, bad: float
) -> None:
    for i, shape in enumerate(((2, 5, 19), (2, 19, 5), (2, 2, 1), (1, 40, 40))):
        for dtype in cases(impl, (torch.float32, *HALVES), PENALTIES.index(penalty) + i):
            x = Matrices(shape, True, seed=1).build(dtype, impl.device)
            x[-1, 1, -1] = bad
            loss = F.representation_similarity(x, penalty=penalty, center=center, impl=impl.name)
            assert not torch.isfinite(loss), (shape, dtype)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_a_norm_whose_square_overflows_is_not_a_quiet_number(
    impl: Impl, center: bool, penalty: str
) -> None:
    """Not 1/n = 0, as if the row were dead."""
    for i, shape in enumerate(((2, 5, 19), (2, 19, 5), (1, 40, 40))):
        for dtype in cases(impl, (torch.float32, torch.bfloat16), PENALTIES.index(penalty) + i):
            x = Matrices(shape, True, seed=1).build(dtype, impl.device).detach()
            x[-1, 1] *= 1e19
            options = {"penalty": penalty, "center": center, "impl": impl.name}
            assert F.representation_similarity(x, **options).isnan(), (shape, dtype)
            x[-1, 1] = 1e19
            assert F.representation_similarity(x, **options).isnan(), (shape, dtype)
            x[-1, 1] = x[-1, 0] * 1e15
            assert F.representation_similarity(x, **options).isfinite(), (shape, dtype)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (0, 12, 2), (2, 4, 0), (2, 4, 3, 0)], ids=str)
def test_empty_features(impl: Impl, shape, center: bool, penalty: str) -> None:
    x = torch.zeros(shape, requires_grad=True, device=impl.device)
    loss = F.representation_similarity(x, penalty=penalty, center=center, impl=impl.name)
    (g,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert g.shape == x.shape


def test_an_empty_layer_still_counts_in_the_mean(impl: Impl) -> None:
    x = torch.randn(2, 4, 3, 3, device=impl.device)
    alone = F.representation_similarity(x, impl=impl.name)
    beside = F.representation_similarity([x, x[:0]], impl=impl.name)
    assert beside.item() == pytest.approx(alone.item() / 2, rel=1e-6)


# --- determinism


LARGE = ((4, 130, 10, 5), (3, 64, 33, 9), (1, 300, 8, 8))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_runs_are_bitwise_equal(impl: Impl, penalty: str) -> None:
    xs = [leaf(Matrices(s, True, seed=i).build(torch.float32, impl.device))
          for i, s in enumerate(LARGE)]

    def run():
        loss = F.representation_similarity(xs, penalty=penalty, center=True, impl=impl.name)
        return [loss, *torch.autograd.grad(loss, xs)]

    first = run()
    for _ in range(2):
        assert_same_bits(run(), first)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("batched", [True, False])
def test_thread_count_changes_no_bit(impl: Impl, batched: bool, penalty: str) -> None:
    if impl.name != "cpp":
        pytest.skip(f"{impl.name}: PyTorch doesn't promise this of its own CPU kernels")
    function = F.representation_similarity if batched else F.kernel_similarity
    for dtype in (torch.float32, torch.bfloat16):
        xs = [leaf(Matrices(s, batched, seed=i).build(dtype))
              for i, s in enumerate(LARGE if batched else [*WEIGHT_SHAPES, *SHARED_SHAPES])]
        results = []
        for count in (1, 2, 3):
            with threads(count):
                loss = function(xs, penalty=penalty, impl=impl.name)
                results.append([loss, *torch.autograd.grad(loss, xs)])
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
def test_matrices_that_threads_share(impl: Impl, shape: tuple[int, ...], layout: str) -> None:
    if impl.interpreted:
        pytest.skip(f"{impl.name}: shares out tiles of any matrix, and would take a minute for it")
    x = Matrices(shape, False, layout).build(torch.float32, impl.device)
    for count in (1, 2, 3):
        with threads(count):
            check_pairwise(impl, [x], batched=False)
            check_pairwise(impl, [x[None]], batched=True, center=True, penalty="abs")


def test_a_tensor_is_a_list_of_one(impl: Impl) -> None:
    x = torch.randn(2, 5, 4, 4, device=impl.device)
    for function in (F.representation_similarity, F.kernel_similarity):
        one, listed, tupled = (function(v, impl=impl.name) for v in (x, [x], (x,)))
        assert bits(one).equal(bits(listed)) and bits(one).equal(bits(tupled))


def test_the_same_tensor_twice(impl: Impl) -> None:
    """Tied weights: each place contributes its share to the one gradient."""
    x = leaf(torch.randn(5, 7, device=impl.device))
    (once,) = torch.autograd.grad(F.kernel_similarity(x, impl=impl.name), x)
    (twice,) = torch.autograd.grad(F.kernel_similarity([x, x], impl=impl.name), x)
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_to_bfloat16_alone_rounds_products(dtype):
    with torch.autocast("cpu", dtype=dtype):
        got = calls._precision("cpu")
    assert calls.PRECISIONS[got] == ("medium" if dtype == torch.bfloat16 else "highest")


# --- layouts that don't collapse, eps beside centring, threads


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 3, 1), (3, 1, 2, 0), (2, 3, 1, 0)], ids=str)
def test_rows_between_their_columns(impl: Impl, order: tuple[int, ...]) -> None:
    back = [order.index(i) for i in range(4)]
    for shape in cases(impl, ((2, 9, 6, 5), (2, 20, 3, 3), (2, 40, 5, 9)), order[0]):
        x = Matrices(shape, True, offset=0.5).build(torch.float32, impl.device)
        x = x.permute(order).contiguous().permute(back)
        for penalty in PENALTIES:
            check_pairwise(impl, [x], batched=True, penalty=penalty)


@pytest.mark.parametrize("shape", [(2, 9, 1, 7), (2, 30, 1, 5)], ids=str)
def test_a_dimension_that_is_repeated_in_the_middle(impl: Impl, shape: tuple[int, ...]) -> None:
    """The strides of the gradient are in another order."""
    x = Matrices(shape, True).build(torch.float32, impl.device).expand(-1, -1, 4, -1)
    for penalty in PENALTIES:
        check_pairwise(impl, [x], batched=True, penalty=penalty)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_eps_draws_the_line_when_centred_too(impl: Impl, penalty: str) -> None:
    for shape in ((1, 6, 20), (1, 20, 6)):
        x = Matrices(shape, True, seed=3).build(torch.float32, impl.device)
        x[0, 1] *= 0.01
        x = leaf(x)
        loss = F.representation_similarity(
            x, penalty=penalty, center=True, eps=0.1, impl=impl.name
        )
        (g,) = torch.autograd.grad(loss, x)
        assert not g[0, 1].any() and g[0, 2].any()
        check_pairwise(impl, [x.detach()], batched=True, penalty=penalty, center=True, eps=0.1)


def test_a_signed_matrix_that_threads_share() -> None:
    usable(Impl("cpp", "cpu"))
    x, results = leaf(torch.randn(4000, 8192)), []
    for count in (1, 2):
        with threads(count):
            loss = F.kernel_similarity(x, penalty="signed", impl="cpp")
            results.append([loss, *torch.autograd.grad(loss, x)])
    assert_same_bits(*results)
