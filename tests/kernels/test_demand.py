"""What is counted in machine code, on lines as nvdisasm prints them."""

from __future__ import annotations

import pytest

from tests.support.demand import BYTES_PER_CYCLE, demand

CODE = """
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0030*/                   LDS.64 R8, [R1] ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   LDS R8, [R1] ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
"""


def test_the_loop_with_matrix_instructions_is_counted() -> None:
    """A turn: five instructions; 512 bytes written, 512 and 256 read by each of four warps."""
    found = demand(CODE, warps=4, weight_bytes=2048)
    assert found is not None
    cycles = 2048 / BYTES_PER_CYCLE
    assert found.shared == pytest.approx(4 * (512 + 512 + 256) / 128 / cycles, abs=0.005)
    assert found.issue == pytest.approx(4 * 5 / 4 / cycles, abs=0.005)


def test_a_loop_around_it_is_not_counted() -> None:
    around = CODE.replace("EXIT ;", "BRA `(.L_x_1) ;")
    assert demand(around, 4, 2048) == demand(CODE, 4, 2048)


def test_without_matrix_instructions_nothing_is_known() -> None:
    assert demand(CODE.replace("HMMA", "FFMA"), 4, 2048) is None
