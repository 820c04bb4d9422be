"""What is read of vLLM stands in a table, whole, and every name of it exists in this vLLM."""

import argparse
import ast
import asyncio
import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import io
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import numpy
import packaging.version
import prometheus_client
import pytest
import starlette.datastructures
import torch

import vllm_capmoe.integration
from vllm_capmoe.integration import experts, readings
from vllm_capmoe.integration.compat import SUPPORTED_TEXT, IncompatibleVLLMError, vllm_version
from vllm_capmoe.integration.readings import OF_CONFIGURATION, OF_FRONT_ENDS, OF_WORKERS, Reading

FOLDER = Path(vllm_capmoe.integration.__file__).parent
ALL = (*OF_CONFIGURATION, *OF_WORKERS, *OF_FRONT_ENDS)
# Whose attributes are no business of vLLM's. Types of ours are read from the source.
OTHERS: tuple[Any, ...] = (
    *(str, list, dict, tuple, set, Path, Exception, type, type(lambda: 0), staticmethod),
    *(torch, torch.Tensor, torch.nn.Module, torch.nn.functional, torch.compiler, numpy),
    *(numpy.ndarray, asyncio, asyncio.Task, argparse, argparse.ArgumentParser, dataclasses),
    *(functools, importlib, inspect, logging.Logger, re, re.Match, socket, time, zlib),
    *(packaging.version.Version, prometheus_client.Counter, os, sys, hashlib, collections.deque),
    *(io.TextIOBase, torch.ops, staticmethod(len), int),
    # What a web application is written with: vLLM's routes are, too.
    *(fastapi.FastAPI, fastapi.APIRouter, fastapi.Request, ipaddress, ipaddress.IPv4Address, json),
    *(starlette.datastructures.URL,),
)
# vLLM's API for its users, its log and its modules as such: what a release doesn't take away.
PUBLIC = {
    *("chat", "generate", "get_tokenizer", "from_engine_args", "collective_rpc", "llm_engine"),
    *("prompt_logprobs", "prompt_token_ids", "token_ids", "logprob", "outputs", "metrics", "text"),
    *(
        "__self__",
        "apply_chat_template",
        "info_once",
        "warning_once",
        "get_triton_kernels_version",
        "capmoe",
    ),
}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in (FOLDER.parent, FOLDER.parents[1] / "kernels"):
        for path in folder.rglob("*.py"):
            yield path, ast.parse(path.read_text())


def ours() -> set[str]:
    """Names that some module, class or object of ours has."""
    found = set()
    for path, tree in sources():
        found |= {path.stem, path.parent.name}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def read_in_integration() -> dict[str, str]:
    """Attributes that the folder reads, by a dot or by `getattr`, and a file that does."""
    found = {}
    for path, tree in sources():
        if FOLDER not in path.parents or path.name == "readings.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[node.attr] = path.name
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
                and isinstance(node.args[1], ast.Constant)
            ):
                found[node.args[1].value] = path.name
    return found


def test_every_name_exists_in_this_vllm():
    assert readings.missing(ALL) == []


def test_nothing_else_of_vllm_is_read():
    known = ours() | PUBLIC | set(readings.NOT_EVERYWHERE)
    known |= {name for reading in ALL for name in reading.names}
    known |= {name for other in OTHERS for name in dir(other)}
    unlisted = {name: file for name, file in read_in_integration().items() if name not in known}
    assert not unlisted, "say in readings.py what they tell us and what to do when they move"


def test_nothing_is_listed_that_nobody_reads():
    text = "".join(p.read_text() for p in FOLDER.glob("*.py") if p.name != "readings.py")
    words = set(re.findall(r"\w+", text))
    listed = [name for reading in ALL for name in reading.names] + [*readings.NOT_EVERYWHERE]
    assert [name for name in listed if name not in words] == []


def test_methods_that_touch_weights_are_listed():
    (of_workers,) = [row for row in OF_WORKERS if row.owner.endswith("gpu_worker:Worker")]
    assert of_workers.names == experts._OF_WORKERS
    listed = {name for row in OF_WORKERS for name in row.names}
    assert listed >= set(experts._OF_RUNNERS)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("vllm.forward_context:ForwardContext", "is_filling"),
        ("vllm.forward_context:BackwardContext", "is_padding"),
        ("vllm.backward_context:ForwardContext", "is_padding"),
        ("vllm.envs", "VLLM_SKIP_ALL"),
        # Only a method of another class assigns it.
        ("vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts", "input_batch"),
    ],
)
def test_what_is_gone_is_told_with_what_to_do(owner, name):
    row = Reading(owner, (name,), "which rows are padding", "look elsewhere")
    with pytest.raises(IncompatibleVLLMError) as caught:
        readings.check(OF_CONFIGURATION, [row])
    text = str(caught.value)
    assert f"{owner} has no {name} (which rows are padding; look elsewhere)" in text
    assert text.startswith(f"vLLM {vllm_version()}: ")
    assert text.endswith("leave --moe-capacity-mode off.")


def test_another_version_is_told_before_its_names(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "9.9.9")
    with pytest.raises(IncompatibleVLLMError, match=f"needs vLLM {SUPPORTED_TEXT}, but vLLM 9.9.9"):
        readings.check(OF_CONFIGURATION)
