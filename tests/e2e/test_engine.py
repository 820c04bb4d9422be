"""Offline engines: off is stock vLLM, gamma = inf is stock vLLM, a small gamma binds.

All engines run in float32 on weights of real scale, where a lost expert shows.
"""

import json
import math
import shutil
from collections import Counter
from typing import Any

import pytest
from comparing import assert_same, difference
from sharing import active, asked_load, check_shared, real_rows

pytestmark = pytest.mark.engine

TOPICS = (
    "The oldest bridge of the town",
    "Operating systems schedule",
    "A recipe for bread",
    "def fibonacci(n):",
    "In the winter of 1854",
    "Mixture of experts layers",
)
PROMPTS = [f"{topic} {ending}" for topic in TOPICS for ending in ("", "is", "and then", "because")]
LONG = "The quick brown fox jumps over the lazy dog while the experts wait for their tokens. " * 6

PER_REQUEST = {
    "moe_capacity_mode": "expanded",
    "moe_capacity_factor": 0.5,
    "moe_capacity_scope": "request",
    "moe_capacity_min_capacity": 1,
}


@pytest.fixture(scope="module")
def stock(run) -> dict[str, Any]:
    """vLLM without the plugin."""
    return run([PROMPTS], plugin=False)


def test_installed_and_off_is_stock_vllm_to_the_bit(run, stock):
    off = run([PROMPTS])
    assert off["batches"] == stock["batches"]
    assert off["patched"] == stock["patched"] == []
    assert "MoE capacity" not in off["log"]


@pytest.mark.parametrize("mode", ["drop", "expanded"])
def test_without_a_limit_is_stock_vllm_to_rounding(run, stock, mode):
    ours = run([PROMPTS], moe_capacity_mode=mode, moe_capacity_factor=math.inf)
    assert len(ours["patched"]) == 4, "the engine under test is not ours"
    assert_same(stock, ours)
    for layer in ours["counters"]:
        assert layer["load_before"] == layer["load_after"]
        assert sum(layer["load_before"]) > 0


BY_LAYER = {
    "moe_capacity_mode": "drop",
    "moe_capacity_factor": 0.5,
    "moe_capacity_min_capacity": 1,
    "moe_capacity_layers": {
        "0": {"level": "device"},
        "1": {"mode": "off"},
        "2-3": {"mode": "expanded", "factor": 0.75},
    },
}


def first_step(records: list[dict[str, Any]], layer: int) -> dict[str, Any]:
    return next(step for step in records if f".{layer}." in step["layer"])


def test_settings_by_layer(run):
    ours = run([PROMPTS], **BY_LAYER)
    loads = [(c["load_before"], c["load_after"]) for c in ours["counters"]]
    assert loads[1][0] == loads[1][1], "layer 1 is off"
    tokens = sum(output["prompt_tokens"] for output in ours["batches"][0])
    for layer in (2, 3):
        step = first_step(ours["records"][0], layer)
        assert step["capacity"] == [[math.ceil(0.75 * tokens * 2 / 8)]]
        assert max(step["load_after"]) <= step["capacity"][0][0] < max(step["load_before"])
    dropped, expanded = ([c[key] for c in ours["counters"]] for key in ("dropped", "expanded"))
    assert [n > 0 for n in dropped] == [True, False, True, True]
    assert [n > 0 for n in expanded] == [False, False, True, True]
    assert "own_settings={0, 1, 2-3}" in ours["log"]


def test_level_device_on_one_rank_is_a_budget_of_the_layer(run):
    """The device is the whole layer: half of all assignments stay, whichever experts they are of.

    An expert by itself has no limit, and decode tokens lose nothing.
    """
    ours = run([PROMPTS], **BY_LAYER)
    steps = [step for step in ours["records"][0] if ".0." in step["layer"]]
    kept = [(sum(step["load_before"]), sum(step["load_after"])) for step in steps]
    assignments = 2 * sum(output["prompt_tokens"] for output in ours["batches"][0])
    budget = math.ceil(0.5 * assignments)
    assert kept[0] == (assignments, budget) and steps[0]["capacity"] == [[budget]]
    assert max(steps[0]["load_after"]) > math.ceil(budget / 8)
    assert len(kept) == 8 and all(before == after for before, after in kept[1:])
    counted = ours["counters"][0]
    assert counted["dropped"] == assignments - budget
    assert sum(counted["load_after"]) == sum(after for _, after in kept)


def test_observing_counts_what_the_mode_would_do_and_changes_nothing(run, stock):
    observed = run([PROMPTS], **BY_LAYER, moe_capacity_observe=True)
    assert observed["batches"] == stock["batches"], "to the bit"
    applied = run([PROMPTS], **BY_LAYER)
    # The first layer's input is the same in both runs: so is all that was decided there.
    ours, theirs = (first_step(of["records"][0], 0) for of in (observed, applied))
    assert ours == theirs
    assert ours["load_after"] != ours["load_before"]
    assert (
        "only observes" in observed["log"] and "without expert parallelism" not in observed["log"]
    )


def test_decode_keep_without_a_mode(run, stock):
    """Layer 0 keeps all of the top-2, the others the best one; a request alone shares nothing."""
    ours = run(
        [PROMPTS[:1], PROMPTS],
        moe_capacity_decode_keep=1,
        moe_capacity_layers={"0": {"decode_keep": 2}},
    )
    assert len(ours["patched"]) == 4 and "decode_keep=1" in ours["log"]
    assert "backend=vllm (auto)" in ours["log"]
    alone, batch = ours["records"]
    assert_same({"batches": [stock["batches"][0][:1]]}, ours)
    assert all(step["load_before"] == step["load_after"] for step in alone)

    saved = decodes = 0
    found = Counter[str]()
    for step in alone + batch:
        tokens = zip(step["is_padding"], step["is_decode"], strict=True)
        kind = "prompt" if (False, False) in tokens else "decode"
        for when in ("before", "after"):
            found[f"{kind}_active_{when}"] += active(step[f"load_{when}"])
    assert found == {key: sum(counted[key] for counted in ours["counters"]) for key in found}
    assert len(found) == 4 and all(counted["lost"] > 0 for counted in ours["counters"][1:])
    for step in batch:
        rows = [row for row, padding in enumerate(step["is_padding"]) if not padding]
        assert all(sorted(step["experts"][row])[0] >= 0 for row in rows)
        if ".0." in step["layer"] or not any(step["is_decode"][row] for row in rows):
            assert step["load_before"] == step["load_after"]
            continue
        check_shared(step, keep=1)
        assert active(step["load_after"]) <= active(step["load_before"])
        decodes += 1
        saved += active(step["load_before"]) - active(step["load_after"])
    assert decodes >= 12 and saved > 0


DRAFTS = {"method": "ngram", "num_speculative_tokens": 4}
DRAFTS |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}


def test_drafts_are_decode_tokens_that_share(run):
    """Keeping all is stock vLLM with the same drafts to the bit; keeping one, drafts share, too."""
    settings: dict[str, Any] = {"max_tokens": 48, "speculative_config": DRAFTS}
    stock = run([PROMPTS], plugin=False, **settings)
    everything = run([PROMPTS], moe_capacity_decode_keep=2, **settings)
    assert len(everything["patched"]) == 4 and everything["batches"] == stock["batches"]
    one = run([PROMPTS], moe_capacity_decode_keep=1, **settings)
    drafts = changed = 0
    for step in one["records"][0]:
        owners = [step["request"][row] for row in real_rows(step) if step["is_decode"][row]]
        drafts += len(owners) - len(set(owners))
        changed += check_shared(step, keep=1)
        assert active(step["load_after"]) <= active(step["load_before"])
    assert drafts >= 40 and changed >= 40


@pytest.mark.cpu
def test_vllms_own_kernels_under_our_routing_agree_with_ours(run, stock):
    """Also: a small gamma changes what the model says, whoever computes it."""
    # Per request: prompts that begin alike would tie across requests, and the last bit of either
    # kernel's sums would decide.
    ours = run([PROMPTS], **PER_REQUEST)
    theirs = run([PROMPTS], **PER_REQUEST, moe_capacity_backend="vllm")
    assert_same(ours, theirs)
    assert [c["load_after"] for c in ours["counters"]] == [
        c["load_after"] for c in theirs["counters"]
    ]
    assert difference(stock, ours) > 0.1
    assert "dropped assignments: they are computed with weight zero" in theirs["log"]
    wide = {"moe_capacity_max_experts": "none", "moe_capacity_backend": "vllm"}
    with pytest.raises(AssertionError, match="4 experts per token, but .* isn't known to skip"):
        run([PROMPTS], **PER_REQUEST, **wide)


@pytest.mark.cpu
def test_a_draft_model_is_let_alone_and_changes_no_token(run, example_model, tmp_path):
    """The target's own weights as a draft of three experts per token, not the target's two.

    Some drafts are accepted, some aren't, so the requests end in different steps.
    """
    draft = tmp_path / "draft"
    shutil.copytree(example_model, draft)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 3}))
    alone = run([PROMPTS], **PER_REQUEST)
    drafted = run(
        [PROMPTS],
        **PER_REQUEST,
        moe_capacity_max_experts=2,  # of the target, as by default
        speculative_config={
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": 3,
        },
    )
    for one, other in zip(alone["batches"][0], drafted["batches"][0], strict=True):
        assert one["token_ids"] == other["token_ids"]
    assert [c["layer"] for c in drafted["counters"]] == [c["layer"] for c in alone["counters"]]
    requests = {len(set(step["request"])) for step in drafted["records"][0]}
    assert len(requests) > 1, "all requests ended in one step: no draft was accepted"


SHARING = {"moe_capacity_layers": {"3": {"decode_keep": 1}}}


def check_steps(records: list[dict[str, Any]], factor: float) -> dict[str, int]:
    """Check every recorded step of a run with SHARING and min_capacity 1, and count what came up.

    Decode rows hold their top-k, in layer 3 as decode keep has it; no load passes its limit or the
    largest before, no row holds more than two experts, padding holds nothing.
    """
    seen = {"prompt": 0, "decode": 0, "mixed": 0, "limited": 0, "given": 0, "shared": 0}
    for step in records:
        shares = ".3." in step["layer"]
        seen["shared"] += check_shared(step, keep=1) if shares else 0
        asked = asked_load(step)
        decode_load = [0] * len(step["load_before"])
        kinds = set()
        for row, held in enumerate(step["experts"]):
            held = sorted(expert for expert in held if expert >= 0)
            if step["is_padding"][row]:
                assert held == []
                continue
            decode = step["is_decode"][row]
            kinds.add(decode)
            seen["decode" if decode else "prompt"] += 1
            assert len(held) <= 2
            if not decode:
                seen["given"] += len(set(held) - set(step["topk"][row]))
                continue
            assert shares or held == sorted(step["topk"][row])
            for expert in held:
                decode_load[expert] += 1
        seen["mixed"] += kinds == {True, False}
        tokens = sum(not padding for padding in step["is_padding"])
        ((capacity,),) = step["capacity"]
        if False not in kinds:
            assert shares or asked == step["load_before"]
            assert step["load_after"] == asked
            assert active(asked) <= active(step["load_before"])
            continue
        assert capacity == max(1, math.ceil(factor * tokens * 2 / 8))
        for load, decode in zip(step["load_after"], decode_load, strict=True):
            assert load <= max(capacity, decode)
        assert max(step["load_after"]) <= max(asked)
        seen["limited"] += step["load_after"] != asked
    return seen


# Reroute needs free seats to give: at 0.25 there are hardly any.
@pytest.mark.parametrize(("mode", "factor"), [("drop", 0.25), ("expanded", 0.25), ("reroute", 1.0)])
def test_no_load_passes_its_limit_and_decode_keeps_its_experts(run, mode, factor):
    """Small steps, so that prompts are cut into chunks and share steps with decoding requests."""
    ours = run(
        [[LONG, *PROMPTS[:6], LONG + LONG[:99]]],
        max_tokens=24,
        max_num_batched_tokens=64,
        moe_capacity_mode=mode,
        moe_capacity_factor=factor,
        moe_capacity_min_capacity=1,
        **SHARING,
    )
    outputs, layers = ours["batches"][0], len(ours["counters"])
    seen = check_steps(ours["records"][0], factor)
    assert seen["mixed"] >= 8 and seen["limited"] >= 8, (
        "the run had no steps of the kind under test"
    )
    assert (seen["given"] > 0) == (mode != "drop") and seen["shared"] >= 8
    # What a prompt is, counted without the plugin: all its tokens, once. The last token that a
    # request generates is never fed back.
    assert seen["prompt"] == layers * sum(output["prompt_tokens"] for output in outputs)
    assert seen["decode"] == layers * sum(len(output["token_ids"]) - 1 for output in outputs)


def test_tokens_computed_again_after_a_preemption_keep_their_rights(run):
    """A cache too small for all requests: some are thrown out, and begin anew."""
    ours = run(
        [[LONG[:170] + str(n) * 3 for n in range(8)]],
        max_tokens=90,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        block_size=32,
        num_gpu_blocks_override=18,
        moe_capacity_mode="expanded",
        moe_capacity_factor=0.2,
        moe_capacity_min_capacity=1,
        **SHARING,
    )
    outputs, layers = ours["batches"][0], len(ours["counters"])
    seen = check_steps(ours["records"][0], 0.2)
    generated = layers * sum(len(output["token_ids"]) - 1 for output in outputs)
    assert seen["decode"] > generated, "no request was preempted"
    assert seen["prompt"] > layers * sum(output["prompt_tokens"] for output in outputs)
    # In one step, one request: prompt tokens that compete and generated ones that don't.
    assert any(
        len({d for d, r in zip(s["is_decode"], s["request"], strict=True) if r == request}) == 2
        for s in ours["records"][0]
        for request in set(s["request"])
    )


def test_scope_request_leaves_nothing_for_the_next_request(run):
    """A beginning that two prompts share must not carry the first one's limit to the second."""
    first, second = LONG + "zebra " * 30, LONG + "1 2 3 4 5 6 7 8 9 " * 9
    ours = run(
        [[second], [first], [second]],
        enable_prefix_caching=None,  # vLLM's default, which is on
        moe_capacity_mode="expanded",
        moe_capacity_factor=0.5,
        moe_capacity_scope="request",
    )
    fresh, _, after = ours["batches"]
    assert fresh == after


def rows_of(records: list[dict[str, Any]], number: int) -> list[Any]:
    """The prompt rows of one request: its position in the batch, over all layers."""
    return [
        held
        for step in records
        if not any(step["is_decode"])
        for held, request, padding in zip(
            step["experts"], step["request"], step["is_padding"], strict=True
        )
        if request == number and not padding
    ]


@pytest.mark.parametrize(("scope", "alike"), [("request", True), ("batch", False)])
def test_who_shares_the_batch_matters_only_in_scope_batch(run, scope, alike):
    """The routing of a request's prompt, in company and alone."""
    company = [LONG, LONG[100:400], LONG[::-1][:300]]
    ours = run(
        [company, *[[prompt] for prompt in company]],
        max_tokens=1,
        moe_capacity_mode="expanded",
        moe_capacity_factor=0.5,
        moe_capacity_scope=scope,
    )
    together, *alone = ours["records"]
    same = [rows_of(together, n) == rows_of(alone[n], 0) for n in range(len(company))]
    assert all(len(rows_of(together, n)) > 100 for n in range(len(company)))
    assert all(same) if alike else not any(same)


@pytest.mark.cpu
def test_compiled_is_eager_to_rounding(run):
    settings: dict[str, Any] = {"moe_capacity_mode": "expanded", "moe_capacity_factor": 1.0}
    eager = run([[LONG]], **settings)
    # Given by the configuration dict this time, which is how settings reach workers anyway.
    compiled = run(
        [[LONG]],
        enforce_eager=False,
        additional_config={"moe_capacity": {"mode": "expanded", "factor": 1.0}},
    )
    assert "Warming up model for the compilation" in compiled["log"]
    assert_same(eager, compiled)
    assert [c["load_after"] for c in eager["counters"]] == [
        c["load_after"] for c in compiled["counters"]
    ]


@pytest.mark.cpu
def test_triton_kernels_agree_with_plain_torch(run):
    """Both kernels in a real engine, by Triton's interpreter: the wiring and the numbers."""
    # Per request: all prompts begin with the same token, which would tie across requests, and the
    # last bit of either kernel's sums would decide.
    settings: dict[str, Any] = {
        "max_tokens": 2,
        "moe_capacity_mode": "expanded",
        "moe_capacity_factor": 0.5,
        "moe_capacity_scope": "request",
        "moe_capacity_min_capacity": 1,
    }
    torch = run([[*TOPICS, LONG[:120]]], **settings)
    triton = run(
        [[*TOPICS, LONG[:120]]],
        env={"TRITON_INTERPRET": "1"},
        **settings,
        moe_capacity_backend="triton",
    )
    assert "Using TritonExperts MoE backend" in triton["log"]
    assert_same(torch, triton)
    for ours, theirs in zip(torch["records"][0], triton["records"][0], strict=True):
        assert ours["experts"] == theirs["experts"]
    for ours, theirs in zip(torch["counters"], triton["counters"], strict=True):
        masses = ("mass", "lost")  # of scores that differ by their last bits
        assert all(ours[each] == pytest.approx(theirs[each], rel=1e-4) for each in masses)
        assert all(ours[each] == theirs[each] for each in ours if each not in masses)
