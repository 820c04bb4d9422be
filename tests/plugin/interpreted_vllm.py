"""Import this first in a process of its own: vLLM's Triton kernels are then interpreted."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends  # noqa: E402 (Triton looks at the environment when it is imported)


class Driver:
    """vLLM asks whether a backend has a driver before it imports Triton."""

    class driver:
        @staticmethod
        def is_active() -> bool:
            return True


triton.backends.backends.setdefault("cpu", Driver)
