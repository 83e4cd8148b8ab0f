from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import BodyTooLarge, RequestError, UnsupportedEncoding
from llmserve.http.content_coding import ALLOWED, coding_of, decode

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def streamed_zstd(data: bytes) -> bytes:
    """Without the size of its content."""
    packer = zstandard.ZstdCompressor().compressobj()
    return packer.compress(data) + packer.flush()


PACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress),
    "streamed zstd": ("zstd", streamed_zstd),
}
each_packed = pytest.mark.parametrize(("coding", "pack"), PACKED.values(), ids=PACKED)
DATA = st.builds(lambda piece, n: piece * n, st.binary(max_size=50), st.sampled_from([0, 1, 9999]))


@each_packed
@given(DATA)
def test_decode_gives_what_was_packed(
    coding: str, pack: Callable[[bytes], bytes], data: bytes
) -> None:
    assert decode(coding, pack(data), 10 * MIB) == data


@each_packed
def test_decode_random_bytes_gives_them(coding: str, pack: Callable[[bytes], bytes]) -> None:
    data = os.urandom(3 * MIB)
    assert decode(coding, pack(data), 3 * MIB) == data


@each_packed
def test_decode_a_bomb_stops_at_the_limit(coding: str, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(bytes(256 * MIB))
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge, match=r"server\.max_body, 1048576 bytes"):
            decode(coding, bomb, MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB


@each_packed
@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_decode_data_that_ends_early_is_refused(
    coding: str, pack: Callable[[bytes], bytes], cut: int
) -> None:
    whole = pack(b"some words " * 100)
    with pytest.raises(RequestError) as caught:
        decode(coding, whole[:cut], MIB)
    assert caught.value.code == "invalid_encoding"
    assert coding in caught.value.message


@pytest.mark.parametrize("coding", ALLOWED)
@given(st.binary(min_size=1, max_size=60))
def test_decode_any_bytes_is_data_or_a_refusal(coding: str, data: bytes) -> None:
    refusal = ""
    try:
        decode(coding, data, MIB)
    except RequestError as error:
        refusal = error.message
    assert refusal.isprintable()


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_decode_takes_frames_one_after_another(coding: str) -> None:
    pack = PACKED[coding][1]
    assert decode(coding, pack(b"one ") + pack(b"two"), MIB) == b"one two"


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_decode_a_million_frames_is_refused(coding: str) -> None:
    with pytest.raises(RequestError, match="1000 frames"):
        decode(coding, PACKED[coding][1](b"") * 2000, MIB)


def test_decode_zstd_with_a_large_window_is_refused() -> None:
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    data = packer.compress(os.urandom(MIB)) + packer.flush()
    with pytest.raises(RequestError):
        decode("zstd", data, 10 * MIB)


@pytest.mark.parametrize(
    ("value", "coding"),
    [
        (b"gzip", "gzip"),
        (b"x-gzip", "x-gzip"),
        (b" ZSTD ", "zstd"),
        (b"identity", None),
        (b"identity, gzip", "gzip"),
        (b"", None),
    ],
)
def test_coding_of_a_header_is_its_name(value: bytes, coding: str | None) -> None:
    assert coding_of([(b"host", b"a"), (b"content-encoding", value)]) == coding


@pytest.mark.parametrize("value", [b"br", b"gzip, gzip", b"gzip\xff", b"compress", b"a" * 5000])
def test_coding_of_any_other_header_is_refused(value: bytes) -> None:
    with pytest.raises(UnsupportedEncoding) as caught:
        coding_of([(b"content-encoding", value)])
    assert caught.value.headers() == {"accept-encoding": "gzip, deflate, zstd"}
    assert len(caught.value.message) < 300
    assert value[:4].decode("latin-1") in caught.value.message


def test_coding_of_two_headers_is_refused() -> None:
    with pytest.raises(UnsupportedEncoding):
        coding_of([(b"content-encoding", b"gzip"), (b"content-encoding", b"zstd")])
