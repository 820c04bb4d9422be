"""The activations between the two products, in float32, for Triton kernels."""

# Arguments of Triton kernels are pointers and blocks of the kernel language: no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


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
def activate_one(x, ACT: tl.constexpr):
    """Activation without a gate, float32."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
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
    gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr
):
    """Activation of gate and up, float32. Definitions: vLLM 0.32, layers/activation.py.

    LIMIT is None where nothing is cut. For ``situ`` ALPHA is its beta and BETA its linear beta
    (0: up passes unchanged).
    """
    if ACT == "gelu":
        return gelu(gate) * up
    elif ACT == "gelu_tanh":
        return gelu_tanh(gate) * up
    elif ACT == "situ":
        if BETA != 0.0:
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
        return (up + BETA) * (gate * tl.sigmoid(ALPHA * gate))
