"""One real vLLM per model, in this process; the plugin's settings change between two runs.

What a setting costs is measured on the hidden states that vLLM's model returns for the prompts:
with the model's own output layer they give the log-probabilities of all tokens, so that whole
distributions can be compared. Loads and gate mass are counted at the routers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from settings import NONE, Setting
from torch import Tensor

STEP_TOKENS = 2048
CHUNK = 256  # rows whose distributions are held at a time


@dataclasses.dataclass
class Loads:
    """What the routers of all layers did in a run; sums over layers and steps.

    chosen, held: assignments by the model and after the limit; dropped: chosen and not held.
    mass, lost: Σ S over the chosen assignments, and over those of them that aren't held.
    peak_before, peak_after, mean: the busiest expert's load, and the mean load of the chosen.
    active: experts with a token after the limit. calls: layers times steps.
    """

    chosen: float = 0
    held: float = 0
    dropped: float = 0
    mass: float = 0
    lost: float = 0
    peak_before: float = 0
    peak_after: float = 0
    mean: float = 0
    active: float = 0
    calls: float = 0

    def add(self, scores: Tensor, chosen: Tensor, experts: Tensor) -> None:
        """Count one call of a router: S [T, E], the model's choice [T, k], what is held [T, W]."""
        T, E = scores.shape
        before = torch.zeros(T, E + 1).scatter_(1, chosen.long(), 1.0)[:, :E]
        after = torch.zeros(T, E + 1).scatter_(1, experts.long() % (E + 1), 1.0)[:, :E]
        load_before, load_after = before.sum(0), after.sum(0)
        refused = before * (1 - after)
        counted: dict[str, Tensor | float] = {
            "chosen": before.sum(),
            "held": after.sum(),
            "dropped": refused.sum(),
            "mass": (scores * before).sum(),
            "lost": (scores * refused).sum(),
            "peak_before": load_before.max(),
            "peak_after": load_after.max(),
            "mean": load_before.mean(),
            "active": (load_after > 0).sum(),
            "calls": 1.0,
        }
        for name, value in counted.items():
            setattr(self, name, getattr(self, name) + float(value))


def forced_tokens() -> type:
    """A logits processor that makes a request say the tokens of its `extra_args["say"]`."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class ForcedTokens(LogitsProcessor):
        def __init__(self, *_: Any) -> None:
            self.said: dict[int, tuple[list[int], list[int]]] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is None:
                return
            for row in batch_update.removed:
                self.said.pop(row, None)
            for row, params, _, output in batch_update.added:
                self.said.pop(row, None)
                if params.extra_args:
                    self.said[row] = (params.extra_args["say"], output)
            for one, other, way in batch_update.moved:
                here, there = self.said.pop(one, None), self.said.pop(other, None)
                if here is not None:
                    self.said[other] = here
                if there is not None and way.name == "SWAP":
                    self.said[one] = there

        def apply(self, logits: Tensor) -> Tensor:
            for row, (tokens, output) in self.said.items():
                logits[row] = float("-inf")
                logits[row, tokens[len(output)]] = 0.0
            return logits

    return ForcedTokens


class Engine:
    """vLLM with the plugin, float32 and eager; rows wide enough for every setting.

    threads: of this process; vLLM would take all cores.
    """

    def __init__(self, model: Path, *, threads: int, most_requests: int = 64) -> None:
        os.environ.update(
            HF_HUB_OFFLINE="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1",
        )
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        from vllm import LLM

        self.llm = LLM(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_seqs=most_requests,
            max_num_batched_tokens=2 * STEP_TOKENS,  # room for the prompts of a decode run
            async_scheduling=False,
            additional_config={
                "moe_capacity": {"mode": "expanded", "factor": 1.0, "max_experts": "none"}
            },
            logits_processors=[forced_tokens()],
        )
        self.loads: dict[int, Loads] = {}
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._groups: tuple[int, ...] = ()
        self._worker: Any = self.llm.llm_engine.model_executor.driver_worker.worker
        self._model = self._worker.model_runner.model
        self._model.register_forward_hook(self._keep_hidden, with_kwargs=True)
        from vllm_capmoe.integration.layers import moe_layers

        self.routers = [layer.router for layer in moe_layers(self._worker.vllm_config)]
        for router in self.routers:
            router.route = self._watched(router, router.route)
        self.set(NONE)

    @property
    def top_k(self) -> int:
        return int(self.routers[0].top_k)

    def set(self, setting: Setting) -> None:
        """From here on the routers follow this setting."""
        from vllm_capmoe import CapacityConfig
        from vllm_capmoe.plan import resolve

        config = CapacityConfig.from_dict(setting.config)
        for router in self.routers:
            E = router.num_logical_experts
            router.plan = resolve(
                config,
                num_experts=E,
                top_k=router.top_k,
                expert_device=[0] * E,
                renormalize=router.renormalize,
            )

    def _watched(self, router: Any, route: Any) -> Any:
        from vllm_capmoe.integration.step import Shard

        def in_groups(logits: Tensor, topk_ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
            parts = zip(logits.split(rows), topk_ids.split(rows), strict=True)
            routed = []
            for number, part in enumerate(parts):
                router.shard = Shard(number, len(logits) // rows)
                routed.append(route(*part))
            router.shard = Shard()
            return torch.cat([w for w, _ in routed]), torch.cat([e for _, e in routed])

        def watching(logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
            chosen = topk_ids
            if chosen is None:
                chosen = logits.float().topk(router.top_k, dim=1).indices
            if not (self._groups and self._seen):  # a step of prompts
                weights, experts = route(logits, topk_ids)
                if not self._groups:
                    self.loads[0].add(router._scores(logits), chosen, experts)
                return weights, experts
            weights, experts = in_groups(logits, chosen, self._groups[0])
            for rows in self._groups:
                every = (router._scores(logits), chosen, experts)
                for part in zip(*(each.split(rows) for each in every), strict=True):
                    self.loads[rows].add(*part)
            return weights, experts

        return watching

    def _keep_hidden(self, _model: Any, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if torch.is_tensor(out) and len(out):
            self._seen.append(
                (kwargs["input_ids"].clone(), kwargs["positions"].clone(), out.clone())
            )

    def _begin(self, groups: Sequence[int]) -> None:
        self._seen.clear()
        self._groups = tuple(groups)
        self.loads = {rows: Loads() for rows in groups or (0,)}

    def hidden(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states [tokens, H] of each sequence, from one step.

        Raises RuntimeError where vLLM didn't run them as one step.
        """
        from vllm import SamplingParams

        self._begin(())
        self.llm.generate(
            [{"prompt_token_ids": list(sequence)} for sequence in sequences],
            SamplingParams(max_tokens=1, temperature=0, detokenize=False),
            use_tqdm=False,
        )
        (ids, positions, out), *rest = self._seen
        starts = (positions == 0).nonzero().flatten().tolist()
        parts = {
            tuple(ids[a:b].tolist()): out[a:b]
            for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)
        }
        wanted = [tuple(sequence) for sequence in sequences]
        if rest or set(parts) != set(wanted):
            raise RuntimeError(f"vLLM ran {len(self._seen)} steps; the prompts were not one step.")
        return [parts[sequence] for sequence in wanted]

    def decode_hidden(
        self, sequences: Sequence[Sequence[int]], prompt: int, groups: Sequence[int]
    ) -> list[Tensor]:
        """Hidden states of each sequence's tokens after the first `prompt`, without the last one.

        Every token is a decode step of its own, of all sequences side by side. The sequences have
        one length. groups: the routers see so many of a step's sequences at a time (the first
        number), as if only these were in the step; all else of a step knows no neighbours. `loads`
        then counts decode steps only, by each of these numbers, which divide the sequences.

        Raises RuntimeError where vLLM ran other steps.
        """
        from vllm import SamplingParams

        self._begin(groups)
        steps = len(sequences[0]) - prompt
        self.llm.generate(
            [{"prompt_token_ids": list(sequence[:prompt])} for sequence in sequences],
            [
                SamplingParams(
                    max_tokens=steps,
                    temperature=0,
                    detokenize=False,
                    ignore_eos=True,
                    extra_args={"say": list(sequence[prompt:])},
                )
                for sequence in sequences
            ],
            use_tqdm=False,
        )
        _, *decoded = self._seen
        if [len(ids) for ids, _, _ in decoded] != [len(sequences)] * (steps - 1):
            raise RuntimeError(f"vLLM ran {len(self._seen)} steps, but {steps} were expected.")
        ids_BN = torch.stack([ids for ids, _, _ in decoded], dim=1)
        out_BNH = torch.stack([out for _, _, out in decoded], dim=1)
        rows = {tuple(ids.tolist()): out for ids, out in zip(ids_BN, out_BNH, strict=True)}
        return [rows[tuple(sequence[prompt:-1])] for sequence in sequences]

    def answers(self, instructions: Sequence[str], most_tokens: int) -> list[Any]:
        """vLLM's outputs: the greedy answers of a chat to each instruction, side by side."""
        from vllm import SamplingParams

        self._begin(())
        tokenizer = self.llm.get_tokenizer()
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in instructions
        ]
        ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        outputs = self.llm.generate(
            [{"prompt_token_ids": each} for each in ids],
            SamplingParams(max_tokens=most_tokens, temperature=0),
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]

    def distributions(self, hidden: Tensor) -> Iterator[Tensor]:
        """Log-probabilities float32 [rows, V] of the next tokens for hidden [T, H], in chunks."""
        for rows in hidden.split(CHUNK):
            yield self._model.compute_logits(rows).float().log_softmax(-1)


@dataclasses.dataclass
class Reference:
    """What a sequence's tokens are predicted with where there is no limit.

    chunks: per chunk of `CHUNK` rows, probabilities p [rows, V], Σ p log p, and the best tokens.
    """

    tokens: Sequence[int]
    chunks: list[tuple[Tensor, float, Tensor]]

    @classmethod
    def of(cls, engine: Engine, tokens: Sequence[int], hidden: Tensor) -> Reference:
        chunks = []
        for logs in engine.distributions(hidden):
            p = logs.exp()
            chunks.append((p, dot(p, logs), logs.argmax(1)))
        return cls(tokens, chunks)

    def compare(self, engine: Engine, hidden: Tensor) -> dict[str, float]:
        """Sums over the predicted tokens, for the hidden states [T - 1, H] under a setting.

        Returns nll, nats, under the setting; kl, Σ p (log p - log q) with p from this reference and
        q from the setting; agree, how often the best tokens are the same.
        """
        total = dict.fromkeys(("nll", "kl", "agree"), 0.0)
        wanted = torch.tensor(self.tokens[1:]).split(CHUNK)
        ours = engine.distributions(hidden)
        for (p, information, best), target, q in zip(self.chunks, wanted, ours, strict=True):
            total["nll"] -= float(q.gather(1, target[:, None]).double().sum())
            total["kl"] += information - dot(p, q)
            total["agree"] += float((best == q.argmax(1)).sum())
        return total


def dot(one_TV: Tensor, other_TV: Tensor) -> float:
    """Σ of the products: rows in float32, their sum in float64."""
    return float(torch.linalg.vecdot(one_TV, other_TV).double().sum())
