"""Addresses of Triton's kernels under its interpreter: each is in the tensor that it belongs to."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

NUMBER = 56  # the bit of a pointer from which on it holds the number of its tensor


class OutOfBoundsError(AssertionError):
    """An access outside of the tensor that its pointer came from."""


@dataclasses.dataclass
class Memory:
    """A tensor: its first address, the one past its end, and what was touched. It has no gaps."""

    begin: int
    end: int
    lowest: int = 2**64
    highest: int = 0


class Checker:
    """Within `with checker:` all programs of a launch run, and all their addresses are checked.

    Only the check takes the number out of a pointer. An access by a way that it doesn't know ends
    the process, so none goes unnoticed.
    """

    floats = True  # are read, written and computed
    short: tuple[str, str] | None = None  # kernel and tensor that is taken for an element shorter

    def __init__(self) -> None:
        self.kernel = ""
        self.memory: dict[str, Memory] = {}  # of the launch that runs; numbered from 1
        self.touched: dict[tuple[str, str], Memory] = {}  # by kernel and tensor, of the last launch

    def __enter__(self) -> Checker:
        self._stack = contextlib.ExitStack()
        self.patch(self._stack.enter_context(pytest.MonkeyPatch.context()))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store
        atomic = builder.create_atomic_rmw

        def masked_load(this: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            at = self.check("reads", pointers, mask)
            dtype = pointers.get_element_ty()
            if dtype.is_floating() and not self.floats:
                return zeros(dtype, at.data.shape)
            return load(this, at, mask, *rest, **options)

        def masked_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
            at = self.check("writes", pointers, mask)
            if self.floats or not pointers.get_element_ty().is_floating():
                store(this, at, value, mask, *rest)

        def atomic_rmw(this: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return atomic(this, op, self.check("updates", pointers, mask), value, mask, *rest)

        def launch(executor: Any, *args: Any, **options: Any) -> None:
            self.launch(executor, *args, **options)

        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        patch.setattr(builder, "create_atomic_rmw", atomic_rmw)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)

        # For speed: a function that a kernel calls doesn't prepare the language again, as `launch`
        # has done, and integers are not added again in 64 bits, for an assertion that is off.
        def call(function: Any, *args: Any, **options: Any) -> Any:
            return function.rewrite()(*args, **options)

        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        unsanitized = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", unsanitized)

    def launch(self, executor: Any, *args: Any, **options: Any) -> None:
        """In place of the interpreter's own, which copies tensors and runs all programs."""
        options = {name: value for name, value in options.items() if name in executor.arg_names}
        given = inspect.getcallargs(executor.fn, *args, **options)
        self.kernel, self.memory = executor.fn.__name__, {}
        scopes = [interpreter._patch_lang(function) for function in (executor.fn, tl.sum.fn)]
        scopes[0].set_attr(tl, "range", self.tiles)
        try:
            converted = {
                name: value if name in executor.constexprs else self.numbered(name, value)
                for name, value in given.items()
            }
            self.run(executor.fn, executor.grid, given, converted)
        finally:
            for scope in reversed(scopes):
                scope.restore()
        self.touched |= {(self.kernel, name): memory for name, memory in self.memory.items()}

    def tiles(self, first: Any, count: Any, step: Any, **options: Any) -> Iterable[int]:
        """In place of `tl.range`, which is the loop over the tiles of a program."""
        return range(first, count, step)

    def numbered(self, name: str, value: Any) -> Any:
        """An argument as the interpreter has it, its pointer with the number of its memory."""
        result = interpreter._implicit_cvt(value)
        is_descriptor = isinstance(value, TensorDescriptor)
        tensor = value.base if is_descriptor else value
        if isinstance(tensor, Tensor):
            handle = result.handle.base if is_descriptor else result.handle
            number = len(self.memory) + 1 << NUMBER
            handle.data = handle.data + np.uint64(number)
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            count = 1 + sum((n - 1) * s for n, s in steps) if tensor.numel() else 0
            count -= self.short == (self.kernel, name)
            begin = tensor.data_ptr() + number
            self.memory[name] = Memory(begin, begin + count * tensor.element_size())
        return result

    def check(self, verb: str, pointers: Any, mask: Any) -> Any:
        """The pointers without their number. OutOfBoundsError for one that leads outside."""
        at = pointers.data[mask.data]
        if at.size:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            lowest, highest = int(at.min()), int(at.max()) + size
            number = (lowest >> NUMBER) - 1
            names = list(self.memory)
            name = names[number] if 0 <= number < len(names) else "no tensor"
            memory = self.memory.get(name, Memory(0, 0))
            if lowest < memory.begin or highest > memory.end:
                raise OutOfBoundsError(
                    f"{self.kernel} {verb} {name} at elements {(lowest - memory.begin) / size:g} "
                    f"to {(highest - memory.begin) / size - 1:g}, but there are "
                    f"{(memory.end - memory.begin) / size:g}"
                )
            memory.lowest = min(memory.lowest, lowest)
            memory.highest = max(memory.highest, highest)
        return interpreter.TensorHandle(pointers.data & np.uint64(2**NUMBER - 1), pointers.dtype)

    def run(self, kernel: Any, grid: Any, given: Any, arguments: Any) -> None:
        self.run_programs(itertools.product(*map(range, grid)), kernel, grid, arguments)

    def run_programs(self, indices: Iterable[Any], kernel: Any, grid: Any, arguments: Any) -> None:
        sizes = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*sizes)
        for index in indices:
            interpreter.interpreter_builder.set_grid_idx(*(*index, 0, 0)[:3])
            kernel(**arguments)

    def assert_ends_reached(self, *left_out: tuple[str, str]) -> None:
        """The first and the last element of every tensor of the last launches were touched."""
        for key, memory in self.touched.items():
            if key not in left_out:
                reached = memory.lowest - memory.begin, memory.end - memory.highest
                assert reached == (0, 0), f"{key}: {reached} bytes at the ends are not touched"


def zeros(dtype: Any, shape: Any) -> Any:
    """A block of zeros without memory."""
    zero = np.zeros((), dtype=interpreter._get_np_dtype(dtype))
    return interpreter.TensorHandle(np.broadcast_to(zero, shape), dtype.scalar)


def few(count: int, rng: random.Random, drawn: int = 6) -> list[int]:
    """Some of range(count): the two first, the two last, others drawn at random."""
    found = {0, 1, count - 2, count - 1} & set(range(count))
    return sorted(found.union(rng.sample(range(count), min(drawn, count))))
