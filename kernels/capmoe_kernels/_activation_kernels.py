"""The activations between the two products, in float32, for Triton kernels."""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def times_sigmoid(x, z, INTERPRETED: tl.constexpr):
    """x * sigmoid(z) by one power of two and one division without a range check.

    The division errs by 2 in the last place, as the checked one. Where 1 + exp(-z) is above 2^126
    it gives 0, which is what is left of a float32 there.
    """
    divisor = 1.0 + tl.exp2(z * -LOG2_E)
    if INTERPRETED:  # which has no libdevice
        return x / divisor
    return libdevice.fast_dividef(x, divisor)


@triton.jit
def tanh(x):
    """tanh in float32. Near zero by its series: 2 * sigmoid(2x) - 1 cancels there."""
    x2 = x * x
    series = x * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def gelu(x):
    """x * Phi(x)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """0.5 * x * (1 + tanh(u)) with u = sqrt(2/pi) * (x + 0.044715 x^3); equals x * sigmoid(2u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate_one(x, ACT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Activation without a gate, float32."""
    if ACT == "silu":
        return times_sigmoid(x, x, INTERPRETED)
    elif ACT == "gelu":
        return gelu(x)
    elif ACT == "gelu_tanh":
        return gelu_tanh(x)
    else:
        tl.static_assert(ACT == "relu2", "unknown activation without a gate")
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def activate_pair(
    gate,
    up,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Activation of gate and up, float32. Definitions: vLLM 0.32, layers/activation.py.

    LIMIT is None where nothing is cut. For ``situ`` ALPHA is its beta and BETA its linear beta
    (up passes unchanged unless it is above 0).
    """
    if ACT == "gelu":
        return gelu(gate) * up
    elif ACT == "gelu_tanh":
        return gelu_tanh(gate) * up
    elif ACT == "situ":
        if BETA > 0.0:
            up = BETA * tanh(up / BETA)
        return ALPHA * tanh(gate / ALPHA) * tl.sigmoid(gate) * up
    elif ACT == "swiglustep":
        gate = tl.minimum(gate * tl.sigmoid(gate), LIMIT)
        return gate * tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    else:
        tl.static_assert(ACT == "silu", "unknown activation with a gate")
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        if BETA != 0.0:  # the compiler keeps an addition of zero, for the sake of -0
            up = up + BETA
        # The product first: it leaves one number less in a register (ptxas spilled on sm_100).
        return times_sigmoid(up * gate, gate if ALPHA == 1.0 else ALPHA * gate, INTERPRETED)
