"""The choice of a replica for a request. Pure: replicas and their loads in, a replica out."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmserve.registry.spec import ModelSpec

_CHARACTERS = 4  # of text in a token, about
_PROMPTS = ("system", "instructions", "messages", "prompt", "input")  # as engines read them

_BLOCK_TOKENS = 128  # the unit of a prefix
_DEEPEST = 64  # blocks of a prefix that are compared
_KEPT_BLOCKS = 8192
_UNEVEN_TOKENS = 8192  # so many more tokens in flight are accepted for a known prefix,
_UNEVEN_RATIO = 1.5  # or this many times as many


@dataclass(slots=True)
class Load:
    """The requests and estimated tokens that a replica has not finished."""

    requests: int = 0
    tokens: int = 0

    def add(self, tokens: int) -> None:
        self.requests += 1
        self.tokens += tokens

    def remove(self, tokens: int) -> None:
        self.requests -= 1
        self.tokens -= tokens


class Target(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def load(self) -> Load: ...


T = TypeVar("T", bound=Target)
Text = str | list[int]  # what a client wrote, or the ids of its tokens


class DispatchRequest(NamedTuple):
    """The part of a request that determines its replica."""

    model: str  # the public name: an adapter has a KV cache of its own
    texts: list[Text]
    tokens: int  # an estimate of prompt and answer

    @classmethod
    def from_body(cls, model: str, body: dict[str, Any], answer: int) -> DispatchRequest:
        """Each answer counts as `answer` tokens; 0: the request writes no text.

        The length of an answer is unknown, and `max_tokens` would overestimate it: one request
        with a high limit would keep a dozen short ones from a replica that can take them.
        """
        texts = _texts(body)
        tokens = answer * (_count(body.get("n")) or 1)
        for text in texts:
            tokens += len(text) // _CHARACTERS if type(text) is str else len(text)
        return cls(model, texts, tokens)


def _texts(body: dict[str, Any]) -> list[Text]:
    """The texts of a body, in the order in which an engine reads them.

    The body has not been validated; values that are no texts are skipped.
    """
    texts: list[Text] = []
    left = [body[key] for key in _PROMPTS if key in body]
    left.reverse()
    while left:
        value = left.pop()
        kind = type(value)
        if kind is str:
            texts.append(value)
        elif kind is dict:  # a message, or a part of one
            text = value.get("content") or value.get("text") or value.get("output")
            if type(text) is str:
                texts.append(text)
            else:
                left.append(text)
        elif kind is list and value:
            if type(value[0]) is int:
                texts.append(value)
            else:
                left.extend(reversed(value))
    return texts


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


class Policy(Protocol):
    def choose(self, ready: Sequence[T], ask: DispatchRequest) -> T:
        """Choose one of the ready replicas; there is at least one."""

    def forget(self, number: int) -> None:
        """Forget a replica whose engine, and so its KV cache, has ended."""


class Lottery:
    """A random choice by weight."""

    def __init__(self, weights: Sequence[float], chance: random.Random) -> None:
        self._weights = weights
        self._chance = chance

    def choose(self, ready: Sequence[T], ask: DispatchRequest) -> T:
        weights = [self._weights[replica.number] for replica in ready]
        return self._chance.choices(ready, weights)[0]

    def forget(self, number: int) -> None: ...


class ShortestQueue:
    """The fewest tokens in flight, then the fewest requests, then round robin."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, ready: Sequence[T], ask: DispatchRequest) -> T:
        chosen = min(ready, key=self._queue)
        self._last = chosen.number
        return chosen

    def _queue(self, replica: Target) -> tuple[int, int, bool, int]:
        load, number = replica.load, replica.number
        return load.tokens, load.requests, number <= self._last, number

    def forget(self, number: int) -> None: ...


class PrefixAffinity:
    """A replica that has seen the prefix of the request, unless that makes the load uneven.

    The prefixes that a replica has seen stand for its KV cache. Each block of a prefix has a
    hash that includes all blocks before it, so the longest known prefix is found block by
    block. Of several holders, the one with the shortest queue is chosen. Its queue may exceed
    the shortest one by the prefill that it saves and a margin: _UNEVEN_TOKENS or _UNEVEN_RATIO.
    """

    def __init__(self, kept_blocks: int = _KEPT_BLOCKS) -> None:
        self._seen: OrderedDict[int, int] = OrderedDict()  # block's hash: a bit per replica
        self._kept_blocks = kept_blocks
        self._shortest = ShortestQueue()

    def choose(self, ready: Sequence[T], ask: DispatchRequest) -> T:
        blocks = _blocks(ask)
        holders, known = self._holders(ready, blocks)
        chosen = self._shortest.choose(holders or ready, ask)
        if holders and _uneven(chosen, ready, known * _BLOCK_TOKENS):
            chosen = self._shortest.choose(ready, ask)
        self._note(blocks, 1 << chosen.number)
        return chosen

    def _holders(self, ready: Sequence[T], blocks: list[int]) -> tuple[list[T], int]:
        """The replicas that have seen the longest known prefix, and its blocks."""
        here = sum(1 << replica.number for replica in ready)
        bits = known = 0
        # A replica that has seen a block has seen those before it.
        for block in blocks:
            seen = self._seen.get(block, 0) & here
            if not seen:
                break
            bits, known = seen, known + 1
        return [replica for replica in ready if bits >> replica.number & 1], known

    def _note(self, blocks: list[int], bit: int) -> None:
        seen = self._seen
        # The last block first, so that the end of a prefix is forgotten first.
        for block in reversed(blocks):
            seen[block] = seen.get(block, 0) | bit
            seen.move_to_end(block)
        while len(seen) > self._kept_blocks:
            seen.popitem(last=False)

    def forget(self, number: int) -> None:
        others = ~(1 << number)
        left = ((block, seen & others) for block, seen in self._seen.items())
        self._seen = OrderedDict((block, seen) for block, seen in left if seen)


def _uneven(chosen: Target, ready: Sequence[Target], saved: int) -> bool:
    least = min(replica.load.tokens for replica in ready)
    return chosen.load.tokens - saved > max(least + _UNEVEN_TOKENS, least * _UNEVEN_RATIO)


def _blocks(ask: DispatchRequest) -> list[int]:
    """A hash for each whole block of the prefix, which includes the blocks before it."""
    prefix = _prefix(ask.texts)
    size = _BLOCK_TOKENS * (_CHARACTERS if type(prefix) is str else 1)
    blocks: list[int] = []
    before = hash(ask.model)
    for end in range(size, min(len(prefix), _DEEPEST * size) + 1, size):
        block = prefix[end - size : end]
        before = hash((before, block if type(block) is str else repr(block)))
        blocks.append(before)
    return blocks


def _prefix(texts: list[Text]) -> Text:
    """The texts as one, up to the longest prefix; token ids are a prompt by themselves."""
    if texts and type(texts[0]) is list:
        return texts[0]
    longest = _DEEPEST * _BLOCK_TOKENS * _CHARACTERS
    return "\n".join([text[:longest] for text in texts if type(text) is str])


def policy_from_spec(spec: ModelSpec) -> Policy | None:
    """The dispatch policy of a model; None if it has one replica."""
    if spec.replicas == 1:
        return None
    match spec.dispatch:
        case "lottery":
            return Lottery(spec.weights or (1.0,) * spec.replicas, random.Random(random.random()))  # noqa: S311  # no secret
        case "shortest_queue":
            return ShortestQueue()
        case "prefix_affinity":
            return PrefixAffinity()
