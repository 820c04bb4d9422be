"""The options of capacity-aware routing: one frozen dataclass, standard library only.

`CapacityConfig` is the only list of options. Each field carries its help text, its accepted
values and its check in the field's metadata, and `OPTIONS` is the same list as a table, from
which the engine arguments build their command line group.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from vllm_capmoe import layer_settings
from vllm_capmoe.layer_settings import LayerSettings, shown

FLAG_PREFIX = "--moe-capacity-"
MOST = 2**63 - 1

AUTO_KEEP = ((1, Fraction(7, 8)), (8, Fraction(3, 4)), (16, Fraction(5, 8)))
"""Decode keep `auto`: from so many decode tokens in a step on, the share of the top-k that each
keeps, rounded up. Few tokens load few experts for each other, so each must keep more of its own:
meant to cost at most 0.005 nats a token (64 experts, top-8, measured at 2 to 32 tokens, see
*Quality* in benchmarks/README.md).
"""


class ConfigError(ValueError, ArgumentTypeError):
    """A bad option.

    It is a ValueError for callers, and an ArgumentTypeError so that argparse prints the whole
    sentence instead of "invalid value".
    """


@dataclass(frozen=True)
class Option:
    """One option, as the command line needs it.

    key: field of `CapacityConfig` and key of `additional_config["moe_capacity"]`.
    default: the value when nothing is said.
    values: what is accepted, as text.
    help: the meaning, as text (without the accepted values and the default).
    choices: the accepted words where there is nothing else, or None.
    normalise: value -> value as stored; raises ValueError for a value that is not accepted.
    """

    key: str
    default: Any
    values: str
    help: str
    choices: tuple[str, ...] | None
    normalise: Callable[[Any], Any]

    @property
    def flag(self) -> str:
        """The flag of the command line, for example `--moe-capacity-min-tokens`."""
        return FLAG_PREFIX + self.key.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as a user would write it."""
        if self.default is False:  # but 0 is a number
            return "off"
        return str({None: "auto", (): "none"}.get(self.default, self.default))

    def check(self, value: Any, came: Any = None) -> Any:
        """Return the value as stored, or raise `ConfigError` naming flag, value, accepted.

        came: how the value was written, where that isn't the value itself.
        """
        try:
            return self.normalise(value)
        except ValueError as error:
            written = value if came is None else came
            problem = str(error) or f"is {shown(written)}, but it must be {self.values}"
            raise ConfigError(f"{self.flag} {problem}.") from None

    def parse(self, text: str) -> Any:
        """Read the option from the text of a command line (an argparse `type`)."""
        return self.check(_number(text), came=text)


def _number(text: str) -> int | float | str:
    """The number that a text spells (int before float), else the text itself."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # "nan" and the long spellings of infinity stay text: only "inf" is accepted.
        return number if isinstance(number, int) or math.isfinite(number) else text
    return text


def _refuse_unless(accepted: bool) -> None:
    if not accepted:
        raise ValueError


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(*choices: str) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _words(*choices: str, help: str) -> dict[str, Any]:
    """Metadata of an option that takes one of a few words."""

    def normalise(value: Any) -> str:
        if value is False and "off" in choices:  # what YAML makes of the word off
            value = "off"
        _refuse_unless(isinstance(value, str) and value in choices)
        return str(value)

    return {
        "values": _one_of(*choices),
        "help": help,
        "choices": choices,
        "normalise": normalise,
    }


def _integer(
    least: int, *, help: str, words: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Metadata of an option that takes an int >= least, or a word (with the value it stores).

    What is sent between processes has 64 bits: an int above MOST, which means no other, becomes it.
    """
    stored = dict(words or {})

    def normalise(value: Any) -> int | str | None:
        if value is False and "off" in stored:  # what YAML makes of the word off
            value = "off"
        if isinstance(value, str):
            _refuse_unless(value in stored)
            return stored[value]
        if value is None:
            _refuse_unless(None in stored.values())
            return None
        _refuse_unless(_is_int(value) and value >= least)
        return min(int(value), MOST)

    return {
        "values": _one_of(f"an integer >= {least}", *stored),
        "help": help,
        "choices": None,
        "normalise": normalise,
    }


def _factor(value: Any) -> int | float:
    """A factor as stored: "inf" becomes the float, other numbers stay as written."""
    if isinstance(value, str):
        _refuse_unless(value == "inf")
        return math.inf
    _refuse_unless(_is_int(value) or isinstance(value, float))
    _refuse_unless(value > 0)  # false for NaN, too
    if _is_int(value) and value > 2**53:  # no number of 64 bits, and no limit either
        _refuse_unless(value < 10**300)
        value = float(value)
    return int(value) if isinstance(value, int) else float(value)


def _boolean(value: Any) -> bool:
    _refuse_unless(isinstance(value, bool))
    return bool(value)


# What a layer can't have of its own: what holds for whole steps, tokens or processes.
_GENERAL = ("scope", "priority", "backend", "layers", "observe")


def _layers(value: Any) -> tuple[LayerSettings, ...]:
    """Settings by layer as stored; a problem is told after the word "has" or "names"."""
    accepted = [option.key for option in OPTIONS if option.key not in _GENERAL]
    try:
        return layer_settings.parse(value, accepted)
    except ValueError as error:
        raise ValueError(f"can't be used: {error}") from None


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How the load of experts is bounded. Checked when built; every error is a ValueError.

    The letters in the comments (gamma, m, k, C) are those of the paper, arXiv 2503.05066.
    An error is one sentence with the flag, the value that came, and what is accepted.

        >>> CapacityConfig(mode="drop", factor=1.1).gamma
        Fraction(11, 10)
        >>> CapacityConfig(factor=0)
        Traceback (most recent call last):
        ...
        vllm_capmoe.config.ConfigError: --moe-capacity-factor is 0, but it must be a number > 0 \
or inf.
    """

    mode: str = field(
        default="off",
        metadata=_words(
            "off",
            "drop",
            "expanded",
            "reroute",
            help="Bound the load of experts: drop is Token Drop, expanded is Expanded Drop, "
            "reroute is Token Drop with what was lost given back by experts with free seats",
        ),
    )
    factor: int | float | str = field(  # gamma; never a str once built
        default=1.5,
        metadata={
            "values": "a number > 0 or inf",
            "help": "Capacity factor: the limit as a multiple of the mean load of an expert",
            "choices": None,
            "normalise": _factor,
        },
    )
    metric: str = field(
        default="score",
        metadata=_words(
            "score",
            "order",
            "reverse-order",
            "random",
            help="Whom an overloaded expert keeps: the highest scores, the earliest tokens, "
            "the latest tokens, or a random choice that is the same everywhere",
        ),
    )
    level: str = field(
        default="expert",
        metadata=_words(
            "expert",
            "device",
            help="Bound each expert, or the sum over the experts of one expert parallel rank",
        ),
    )
    scope: str = field(
        default="batch",
        metadata=_words(
            "batch",
            "request",
            help="Count tokens and set limits over the whole step, or for each request on its "
            "own, so that no request changes the experts of another",
        ),
    )
    candidates: str = field(
        default="auto",
        metadata=_words(
            "auto",
            "local",
            "global",
            help="Where the extra candidates of Expanded Drop and of reroute come from: the rank "
            "that owns the token, or anywhere; auto is local where each rank routes its own tokens",
        ),
    )
    expanded_experts: int | str | None = field(  # m; None is the default of the candidates
        default=None,
        metadata=_integer(
            1,
            words={"all": "all", "auto": None},
            help="Extra candidates per token in Expanded Drop; auto is all of the local "
            "candidates, or as many as the top-k of the global ones",
        ),
    )
    fill: str = field(
        default="auto",
        metadata=_words(
            "auto",
            "busiest",
            "capacity",
            help="How far Expanded Drop fills an expert: never above the largest load that there "
            "was before, or up to the capacity; auto is busiest",
        ),
    )
    max_experts: int | str = field(
        default="auto",
        metadata=_integer(
            1,
            words={"none": "none", "auto": "auto"},
            help="The most experts that one token may hold in Expanded Drop, at least the "
            "top-k; auto is none under expert parallelism and the top-k without it",
        ),
    )
    renormalize: str = field(
        default="auto",
        metadata=_words(
            "auto",
            "always",
            "never",
            help="Rescale the weights of the experts that a token keeps to the sum of one; "
            "auto does it where the model does it",
        ),
    )
    priority: str = field(
        default="uniform",
        metadata=_words(
            "uniform",
            "image-first",
            "text-first",
            help="Which tokens are dropped first: all alike, image tokens, or text tokens",
        ),
    )
    min_capacity: int = field(
        default=4,
        metadata=_integer(1, help="No limit of an expert is set below this"),
    )
    min_tokens: int = field(
        default=0,
        metadata=_integer(0, help="Steps with fewer tokens than this have no limit"),
    )
    backend: str = field(
        default="auto",
        metadata=_words(
            "auto",
            "triton",
            "torch",
            "vllm",
            help="Who computes the experts: this plugin's Triton kernels, plain PyTorch, or "
            "vLLM's own kernels",
        ),
    )
    layers: Any = field(  # tuple[LayerSettings, ...] once built
        default=(),
        metadata={
            "values": "a JSON object by layer, or @ and the name of a file with one",
            "help": 'Settings by layer, over the general ones: {"0-3": {"mode": "off"}, '
            '"17": {"factor": 1.2}}',
            "choices": None,
            "normalise": _layers,
        },
    )
    decode_keep: int | str = field(  # k0
        default="off",
        metadata=_integer(
            1,
            words={"off": "off", "auto": "auto"},
            help="Each decode token keeps this many of its top-k, at most all, and takes the rest "
            "from the experts that the step loads anyway, in every mode; auto keeps "
            + ", ".join(f"{share} of them from {n} decode tokens on" for n, share in AUTO_KEEP),
        ),
    )
    observe: bool = field(
        default=False,
        metadata={
            "values": "true or false",
            "help": "Decide and count, and change nothing: tokens are those of mode off",
            "choices": None,
            "normalise": _boolean,
        },
    )

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = option.check(getattr(self, option.key))
            object.__setattr__(self, option.key, value)
        if self.decode_keep != "off" and self.scope == "request":
            raise ConfigError(
                f"{FLAG_PREFIX}decode-keep is {self.decode_keep!r}, but {FLAG_PREFIX}scope is "
                "'request', under which no request changes the experts of another: 'off', or "
                "scope 'batch', is accepted."
            )
        for entry in self.layers:
            try:
                self.for_layer(entry.first)
            except ConfigError as error:
                raise ConfigError(f"{FLAG_PREFIX}layers, layer {entry.name!r}: {error}") from None

    def for_layer(self, layer: int) -> "CapacityConfig":
        """What is in effect in the model's decoder layer of this number; it has no `layers`."""
        for entry in self.layers:
            if entry.first <= layer <= entry.last:
                return replace(self, layers=(), **dict(entry.values))
        return replace(self, layers=())

    @property
    def variants(self) -> "tuple[CapacityConfig, ...]":
        """All that may be in effect in some layer: the general settings, then those by layer."""
        own = [self.for_layer(entry.first) for entry in self.layers]
        return tuple(dict.fromkeys([replace(self, layers=()), *own]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CapacityConfig":
        """Build from the keys of `additional_config["moe_capacity"]`.

        Raises ValueError for an unknown key (with the accepted keys) and for a bad value.
        """
        accepted = ", ".join(option.key for option in OPTIONS)
        if not isinstance(values, Mapping):
            message = f"moe_capacity is {shown(values)}, but it must be a mapping with keys of "
            raise ConfigError(message + f"{accepted}.")
        known = {option.key for option in OPTIONS}
        unknown = [key for key in values if key not in known]
        if unknown:
            names = ", ".join(map(shown, unknown[:4]))
            message = f"moe_capacity has the unknown key {names}, but the accepted keys are "
            raise ConfigError(message + f"{accepted}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values (an infinite factor is the text "inf").

        `CapacityConfig.from_dict(config.to_dict()) == config`.
        """
        values = {option.key: getattr(self, option.key) for option in OPTIONS}
        if self.factor == math.inf:
            values["factor"] = "inf"
        values["layers"] = layer_settings.to_dict(self.layers)
        return values

    @property
    def gamma(self) -> Fraction | None:
        """The capacity factor as an exact fraction of the decimal as written; None for inf.

        1.1 is 11/10, although the float is a little more: a rounding must not add a seat.
        """
        if self.factor == math.inf:
            return None
        return Fraction(repr(self.factor))

    @property
    def enabled(self) -> bool:
        """Whether anything is asked for at all, in any layer."""
        return any(variant.acts for variant in self.variants)

    @property
    def acts(self) -> bool:
        """Whether the general settings ask for anything."""
        return self.mode != "off" or self.decode_keep != "off"

    @property
    def drops(self) -> bool:
        """Whether a mode is applied in any layer: if not, every token holds exactly its k."""
        return not self.observe and any(variant.mode != "off" for variant in self.variants)

    @property
    def asked(self) -> str:
        """What was asked for, as refusals begin: `--moe-capacity-mode is 'drop'`."""
        if self.layers and not self.acts:
            names = ", ".join(repr(entry.name) for entry in self.layers)
            return f"{FLAG_PREFIX}layers names the layers {names}"
        if self.mode == "off" and self.decode_keep != "off":
            return f"{FLAG_PREFIX}decode-keep is {self.decode_keep!r}"
        return f"{FLAG_PREFIX}mode is {self.mode!r}"

    def keeps(self, top_k: int) -> tuple[int, ...]:
        """k0, what a decode token keeps of its k experts, in a step of 0, 1, ... decode tokens.

        The last number holds for all larger steps; () where all is kept.

            >>> CapacityConfig(decode_keep=3).keeps(top_k=8)
            (3,)
            >>> auto = CapacityConfig(decode_keep="auto").keeps(top_k=8)
            >>> len(auto), [auto[n] for n in (1, 7, 8, 15, 16)]
            (17, [7, 7, 6, 6, 5])

        Raises ValueError for more than k.
        """
        if isinstance(self.decode_keep, int):
            if self.decode_keep > top_k:
                raise ConfigError(
                    f"{FLAG_PREFIX}decode-keep is {self.decode_keep}, but a token has {top_k} "
                    f"experts: an integer from 1 to {top_k}, 'off' or 'auto' is accepted."
                )
            keeps = [self.decode_keep]
        elif self.decode_keep == "auto":
            last = AUTO_KEEP[-1][0]
            shares = [[share for n, share in AUTO_KEEP if n <= max(d, 1)] for d in range(last + 1)]
            keeps = [math.ceil(share[-1] * top_k) for share in shares]
        else:
            keeps = []
        return tuple(keeps) if min(keeps, default=top_k) < top_k else ()


OPTIONS: tuple[Option, ...] = tuple(
    Option(key=item.name, default=item.default, **item.metadata) for item in fields(CapacityConfig)
)
