"""What wgmma.py finds in TTGIR: planted faults, and none where there is none."""

from __future__ import annotations

import pytest
import wgmma

MEMORY = "!ttg.memdesc<{}x64x64xbf16, #shared, #smem, mutable>"


def kernel(*, buffers: int = 3, running: int = 1, warps: int = 4, ahead: int = 2) -> str:
    """A loop as Triton writes it: loads ``ahead`` steps ahead into as many ``buffers``, products
    of which ``running`` may be left when the next load begins."""
    memory = MEMORY.format(buffers)
    before = "\n".join(
        f"    %a_{i} = ttg.memdesc_index %ring[%c{i}_i32] : {memory}\n"
        f"    %load_{i} = ttg.async_copy_global_to_local %where, %a_{i} mask %inside : tensor"
        for i in range(ahead)
    )
    return f"""
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = {warps} : i32}} {{
    %ring = ttg.local_alloc : () -> {memory}
{before}
    %sums:2 = scf.for %k = %c0 to %d step %c64 iter_args(%acc = %zero, %slot = %c0) -> (tensor) {{
      %now = ttg.memdesc_index %ring[%slot] : {memory}
      %turned = ttg.memdesc_trans %now {{order = array<i32: 1, 0>}} : {memory}
      %y = ttng.warp_group_dot %now, %turned, %acc {{isAsync = true}} : {memory} * {memory}
      %y_1:3 = ttng.warp_group_dot_wait %y, %now, %turned {{pendings = {running} : i32}} : tensor
      %next = ttg.memdesc_index %ring[%free] : {memory}
      %load = ttg.async_copy_global_to_local %where, %next mask %inside : tensor
      scf.yield %y_1#0, %free : tensor
    }}
}}
"""


def test_a_buffer_more_than_loads_are_ahead_is_enough() -> None:
    assert wgmma.races(kernel()) == []
    assert wgmma.races(kernel(buffers=4, ahead=3)) == []


def test_as_many_buffers_as_loads_ahead_are_too_few_for_products_that_go_on() -> None:
    (told,) = wgmma.races(kernel(buffers=2))
    assert "%ring: of 2 buffers step 0 loads what step 2 takes" in told
    assert wgmma.races(kernel(buffers=2, running=0)) == []


@pytest.mark.parametrize("buffers", [3, 4])
def test_each_product_that_goes_on_takes_a_buffer(buffers: int) -> None:
    assert bool(wgmma.races(kernel(buffers=buffers, running=2))) == (buffers == 3)


def test_two_groups_of_warps_do_not_wait_for_each_other() -> None:
    assert wgmma.races(kernel(warps=8)) == ["wgmma in 8 warps"]
    without = kernel(warps=8).replace("warp_group_dot", "other")
    assert wgmma.races(without) == []
