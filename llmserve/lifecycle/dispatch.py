"""Which replica of a model gets a request. Pure: replicas and their loads in, a replica out."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmserve.registry.config import ModelSpec

_CHARACTERS = 4  # of text in a token, about
_PROMPTS = ("system", "instructions", "messages", "prompt", "input")  # as engines read them

_BLOCK_TOKENS = 128  # a prefix is known in steps of so many
_DEEPEST = 64  # blocks of a prefix that are looked at
_KEPT_BLOCKS = 8192
_UNEVEN_TOKENS = 8192  # a known prefix may cost so many tokens more in flight,
_UNEVEN_RATIO = 1.5  # or this many times as many


@dataclass(slots=True)
class Load:
    """What a replica was given and has not finished."""

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
    """What of a request matters here."""

    model: str  # the public name: an adapter has a KV cache of its own
    texts: list[Text]
    tokens: int  # an estimate of prompt and answer

    @classmethod
    def from_body(cls, model: str, body: dict[str, Any], answer: int) -> DispatchRequest:
        """Each answer counts as `answer` tokens, whatever it may take; 0: it writes no text.

        How long it gets is not known, and what it takes of a replica is a place in the batch:
        with `max_tokens` in its stead, one that may be long keeps a dozen short requests from
        a replica that has room for them.
        """
        texts = _texts(body)
        tokens = answer * (_count(body.get("n")) or 1)
        for text in texts:
            tokens += len(text) // _CHARACTERS if type(text) is str else len(text)
        return cls(model, texts, tokens)


def _texts(body: dict[str, Any]) -> list[Text]:
    """The texts of a body in the order in which an engine reads them.

    A body has not been validated when it comes here: what is no text is passed over.
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
            said = value.get("content") or value.get("text") or value.get("output")
            if type(said) is str:
                texts.append(said)
            else:
                left.append(said)
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
        """One of the replicas that are ready, of which there is at least one."""
        ...

    def forget(self, number: int) -> None:
        """A replica has gone, and with it all that it had seen."""
        ...


class Lottery:
    """Shares by weight, in the long run."""

    def __init__(self, weights: Sequence[float], chance: random.Random) -> None:
        self._weights = weights
        self._chance = chance

    def choose(self, ready: Sequence[T], ask: DispatchRequest) -> T:
        weights = [self._weights[replica.number] for replica in ready]
        return self._chance.choices(ready, weights)[0]

    def forget(self, number: int) -> None: ...


class ShortestQueue:
    """The fewest tokens in flight, then the fewest requests, then in turn."""

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
    """A replica that has seen how a request begins, unless that makes load uneven.

    What a replica has seen stands for what is in its KV cache. A beginning is known by
    the hashes of its blocks, each with all before it, so that the longest known one is
    found block by block; several replicas can have seen it, and the shortest queue of
    those is taken. One that has seen it may be behind the shortest queue of all by the
    prefill that it saves, and by a margin: _UNEVEN_TOKENS or _UNEVEN_RATIO.
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
        """Who has seen the longest known beginning, and how many blocks that has."""
        here = sum(1 << replica.number for replica in ready)
        bits = known = 0
        # Whoever has seen a block has seen those before it.
        for block in blocks:
            seen = self._seen.get(block, 0) & here
            if not seen:
                break
            bits, known = seen, known + 1
        return [replica for replica in ready if bits >> replica.number & 1], known

    def _note(self, blocks: list[int], bit: int) -> None:
        seen = self._seen
        # The last block first: of a beginning, its end is forgotten first.
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
    """A hash for each whole block of a request's beginning, with all that is before it."""
    beginning = _beginning(ask.texts)
    size = _BLOCK_TOKENS * (_CHARACTERS if type(beginning) is str else 1)
    blocks: list[int] = []
    before = hash(ask.model)
    for end in range(size, min(len(beginning), _DEEPEST * size) + 1, size):
        block = beginning[end - size : end]
        before = hash((before, block if type(block) is str else repr(block)))
        blocks.append(before)
    return blocks


def _beginning(texts: list[Text]) -> Text:
    """Texts as one, as far as they matter; token ids are a prompt by themselves."""
    if texts and type(texts[0]) is list:
        return texts[0]
    longest = _DEEPEST * _BLOCK_TOKENS * _CHARACTERS
    return "\n".join([text[:longest] for text in texts if type(text) is str])


def policy_from_spec(spec: ModelSpec) -> Policy | None:
    """None where there is nothing to choose."""
    if spec.replicas == 1:
        return None
    match spec.dispatch:
        case "lottery":
            return Lottery(spec.weights or (1.0,) * spec.replicas, random.Random(random.random()))  # noqa: S311  # no secret
        case "shortest_queue":
            return ShortestQueue()
        case "prefix_affinity":
            return PrefixAffinity()
