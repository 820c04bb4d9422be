"""Gives a running engine new weights and the old ones again, in every way that vLLM has.

    python change_weights.py ENGINE.json OTHER_MODEL FOLDER RESULT.json

ENGINE: keywords of LLM(...). FOLDER: where the sharded state of the other weights is saved. RESULT:
what the engine says after each change, a step's name -> what `prompts` get, and "held": the bytes
behind the experts' parameters after each.
"""

import json
import sys
from pathlib import Path
from typing import Any

from run_engine import as_dict

ONE = "layers.1.block_sparse_moe.experts.2.w2"
PROMPTS = ["The oldest bridge of the town", "def fibonacci(n):", "In the winter of 1854 " * 4]


def load_weights(worker: Any, folder: str, only: str) -> None:
    """What a training loop sends to the workers: some tensors of a checkpoint, one by one.

    Of the experts only: vLLM's linear layers on the CPU keep nothing to load into.
    """
    from safetensors.torch import load_file

    for path in Path(folder).glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if only in name:
                worker.model_runner.get_model().load_weights([(name, tensor)])


def held(worker: Any) -> int:
    """Bytes behind the experts' parameters."""
    from vllm_capmoe.integration.layers import moe_layers

    return sum(
        parameter.untyped_storage().nbytes()
        for layer in moe_layers(worker.vllm_config)
        for parameter in layer.routed_experts.parameters()
    )


def main() -> None:
    engine = json.loads(Path(sys.argv[1]).read_text())
    other, folder, result = sys.argv[2], sys.argv[3], Path(sys.argv[4])
    from vllm import LLM, SamplingParams

    llm = LLM(**engine)
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=0)
    said: dict[str, Any] = {"held": {}}

    def say(step: str) -> None:
        said[step] = [as_dict(output) for output in llm.generate(PROMPTS, sampling)]
        said["held"][step] = llm.collective_rpc(held)[0]

    def load(model: str, only: str = ".experts.") -> None:
        llm.collective_rpc(load_weights, args=(model, only))

    own = engine["model"]
    say("own")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    say("other, reloaded")
    load(own)
    say("own experts in the other")
    load(other)
    say("other, loaded")
    Path(folder).mkdir()
    llm.collective_rpc("save_sharded_state", args=(folder,))
    say("other, saved")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": own})
    say("own, reloaded")
    load(other, ONE)
    say("one tensor of the other")
    load(own, ONE)
    say("own, loaded")
    result.write_text(json.dumps(said))


if __name__ == "__main__":
    main()
