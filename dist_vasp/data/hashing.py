"""Hash functions that decide something: orders, halves, keys of ids and checksums.

All of them are functions of their arguments alone. No random number generator of a library takes
part, because its numbers may change between releases.

Shapes: E elements, I items.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

_MASK = 0xFFFF_FFFF_FFFF_FFFF
GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)  # 2^64 over the golden ratio, splitmix64's increment
MULTIPLIERS = (np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))

Word = int | np.ndarray


def hash64(*words: Word) -> np.ndarray:
    """Return a counter-based 64-bit hash of a sequence of words, elementwise over arrays.

    h(0) = number of words;  h(i) = mix(h(i-1) + (w(i) + 1) * gamma), where mix is the finaliser of
    splitmix64: each word picks the w-th number of the splitmix64 sequence that starts at the hash
    of the words before it. The order and the number of words matter.

    words: Python integers (taken modulo 2^64) or integer arrays; they broadcast. Returns uint64 of
    the broadcast shape, a 0-d array if every word is a scalar. Source: Steele, Lea, Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014; multipliers and shifts of Stafford's
    variant 13.
    """
    state: np.ndarray | np.uint64 = np.uint64(len(words))
    for word in words:
        state = absorb(state, word)
    return np.asarray(state)


def absorb(state: np.ndarray | np.uint64, word: Word) -> np.ndarray:
    """Return the state of `hash64` after one more word."""
    if isinstance(word, int):
        word = np.asarray(np.uint64(word & _MASK))
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        h = np.asarray((word.astype(np.uint64, copy=False) + np.uint64(1)) * GAMMA + state)
        mix_in_place(h)
    return h


def mix_in_place(h: np.ndarray) -> None:
    """Apply the finaliser of splitmix64, a bijection of 64-bit words that spreads every bit."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        h ^= h >> shift
        h *= multiplier
    h ^= h >> SHIFTS[2]


def pair_hash(user_keys: np.ndarray, item_keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a 64-bit hash of (seed, user key, item key), (E,) uint64.

    data_tools splits interactions by it. It chains the words in another way than `hash64`, and
    prepared data depends on that.
    """

    def mix(words: np.ndarray) -> np.ndarray:
        h = words.copy()
        mix_in_place(h)
        return h

    with np.errstate(over="ignore"):
        state = mix(np.full(1, seed, np.uint64) + GAMMA)
        user = mix(mix(user_keys + GAMMA) ^ state)
        return mix((user + GAMMA) ^ mix(item_keys ^ GAMMA))


def permutation(n: int, *words: Word) -> np.ndarray:
    """Return a random order of 0..n-1 that is a function of `words` alone, (n,) int64."""
    return np.argsort(hash64(int(hash64(*words)), np.arange(n, dtype=np.uint64)), kind="stable")


def keys_of_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the uint64 key of every id: the id itself where it is an integer, else the first 8
    bytes of its BLAKE2b digest."""
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.cast(pa.int64())).astype(np.uint64)
    digests = b"".join(
        hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids.to_pylist()
    )
    return np.frombuffer(digests, dtype="<u8").copy()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def vocabulary_sha256(keys: np.ndarray) -> str:
    """Return the hash that identifies a vocabulary: the item keys (I,) uint64, in row order."""
    return sha256_of(np.ascontiguousarray(keys, dtype="<u8").tobytes())
