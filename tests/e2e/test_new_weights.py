"""New weights in a running engine: the CPU's experts are repacked, and say so to nobody."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines import environment
from safetensors.torch import load_file

pytestmark = [pytest.mark.engine, pytest.mark.cpu]


def test_an_engine_takes_new_weights_and_the_old_ones_again(example_model, make_mixtral, tmp_path):
    """Exactly: as the same checkpoint gives. Afterwards the experts are held once, as before."""
    other = make_mixtral.make_checkpoint(tmp_path / "other", seed=1)
    engine = {
        "model": str(example_model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "enable_prefix_caching": False,
        "additional_config": {"moe_capacity": {"mode": "drop", "factor": 1.0}},
    }
    spec, result, saved = tmp_path / "engine.json", tmp_path / "result.json", tmp_path / "saved"
    spec.write_text(json.dumps(engine))
    script = Path(__file__).with_name("change_weights.py")
    done = subprocess.run(
        [sys.executable, script, spec, other, saved, result],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    said = json.loads(result.read_text())
    held = said.pop("held")
    assert len(set(held.values())) == 1 and held["own"] < 1000
    for start in ("own", "other, reloaded"):
        same = [said[step] for step in said if step.startswith(start.split(",")[0] + ",")]
        assert len(same) >= 2 and all(each == said[start] for each in same)
    different = ("own", "other, reloaded", "own experts in the other", "one tensor of the other")
    assert all(said[a] != said[b] for a, b in itertools.combinations(different, 2))

    tensors = {name: tensor for path in saved.iterdir() for name, tensor in load_file(path).items()}
    (name,) = [n for n in tensors if "layers.1" in n and n.endswith("w2_weight")]
    expected = load_file(other / "model.safetensors")
    for expert, tensor in enumerate(tensors[name]):
        key = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        assert tensor.equal(expected[key].float())
