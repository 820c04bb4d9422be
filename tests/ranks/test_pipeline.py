"""A pipeline whose first stage has no MoE layer: it starts, bound where there are some."""

import shutil

import pytest
import transformers

pytestmark = [pytest.mark.engine, pytest.mark.cpu]


def test_a_stage_of_dense_layers_is_served(run_ranks, example_model, tmp_path):
    """A Qwen2-MoE: of others vLLM itself wants an MoE layer in every stage.

    Nothing is asked of it: without a warm-up, which eager engines leave out, vLLM's CPU build
    hands nothing from stage to stage, without us too.
    """
    transformers.Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        max_position_embeddings=512,
        mlp_only_layers=[0],
    ).save_pretrained(tmp_path)
    for file in example_model.glob("*token*"):
        shutil.copy(file, tmp_path)
    ours = run_ranks(
        [],
        model=str(tmp_path),
        load_format="dummy",
        pipeline_parallel_size=2,
        record="loads",
        moe_capacity_mode="drop",
    )
    ((first, second),) = ours["counters"]
    assert first == [] and [layer["layer"].split(".")[2] for layer in second] == ["1"]
