"""Triton kernels of capacity-aware mixture-of-experts inference.

This package needs torch and triton only. It knows nothing of vLLM and nothing of `vllm_capmoe`;
imports run one way, from `vllm_capmoe` to here.
"""
