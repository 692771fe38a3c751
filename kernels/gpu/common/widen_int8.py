"""int8 weights as floats, exactly; the hardware's conversion has an eighth of the rate of an addition.

Four at a time by bits, in 8 (bf16) or 6 (fp16) instructions: a bf16 has room for seven bits beside 128, so an
int8 is the difference of two, 128 + its lower bits and 128 + 128 if it is negative; an fp16 has room for all
eight beside 1024, the sign flipped, so it is 1152 less than one.
"""

import triton
import triton.language as tl

TO_BF16 = tl.constexpr("""{
.reg .b32 two, more, less, minus;
mov.b32 minus, 0xBF80BF80;
prmt.b32 two, $2, 0, 0x1100;
lop3.b32 more, two, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 less, two, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, less, minus, more;
prmt.b32 two, $2, 0, 0x3322;
lop3.b32 more, two, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 less, two, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, less, minus, more;
}""")
TO_FP16 = tl.constexpr("""{
.reg .b32 two, over;
mov.b32 over, 0x64806480;
prmt.b32 two, $2, 0, 0x1100;
lop3.b32 two, two, 0x00FF00FF, 0x64806480, 0x6A;
sub.rn.f16x2 $0, two, over;
prmt.b32 two, $2, 0, 0x3322;
lop3.b32 two, two, 0x00FF00FF, 0x64806480, 0x6A;
sub.rn.f16x2 $1, two, over;
}""")


@triton.jit
def widened(weight, dtype: tl.constexpr):
    """int8 as that type; a thread has a multiple of four of them."""
    if dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [weight], tl.bfloat16, True, 4)
    elif dtype == tl.float16:
        wide = tl.inline_asm_elementwise(TO_FP16, "=r,=r,r", [weight], tl.float16, True, 4)
    else:
        wide = (weight.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return wide
