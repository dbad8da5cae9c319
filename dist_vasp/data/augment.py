"""Augmentation: each epoch splits a user's items at random into halves A and B (DESIGN.md, sections
2 and 4), and may leave some out.

Pure functions of keys. Whether an interaction is in A depends on (seed, epoch, user key, item key)
and on the user's other items, never on the block, rank, worker or shard that the user is read in.

Shapes: U users, E interactions.
"""

from __future__ import annotations

import numpy as np

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)  # 2^64 over the golden ratio, splitmix64's increment
_MULTIPLIERS = (np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB))
_INPUT = 1  # the fifth word: a hash of five words is independent of the halves' four
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))

Word = int | np.ndarray


def hash64(*words: Word) -> np.ndarray:
    """Counter-based 64-bit hash of a sequence of words, elementwise over arrays.

    h(0) = number of words;  h(i) = mix(h(i-1) + (w(i) + 1) * gamma), where mix is the finaliser of splitmix64: each
    word picks the w-th number of the splitmix64 sequence that starts at the hash of the words before it. The order and
    the number of words matter.

    words: Python integers (taken modulo 2^64) or integer arrays; they broadcast. Returns uint64 of
    the broadcast shape, a 0-d array if every word is a scalar. Source: Steele, Lea, Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014; multipliers and shifts of Stafford's
    variant 13.
    """
    state: np.ndarray | np.uint64 = np.uint64(len(words))
    for word in words:
        state = _absorb(state, np.uint64(word & _MASK) if isinstance(word, int) else word)
    return np.asarray(state)


def _absorb(state: np.ndarray | np.uint64, word: np.ndarray | np.uint64) -> np.ndarray:
    """One step of hash64: the state after one more word.

    In place on one fresh buffer: E is large and this is the hot path.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        h = np.asarray(
            (np.asarray(word).astype(np.uint64, copy=False) + np.uint64(1)) * _GAMMA + state
        )
        for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
            h ^= h >> shift
            h *= multiplier
        h ^= h >> _SHIFTS[2]
    return h


def permutation(n: int, *words: Word) -> np.ndarray:
    """A random order of 0..n-1 that is a function of `words` alone. Returns (n,) int64.

    It sorts by a hash and does not draw from a numpy generator, whose numbers may change between
    numpy releases: a run that is resumed after an upgrade must see the same order.
    """
    return np.argsort(hash64(int(hash64(*words)), np.arange(n, dtype=np.uint64)), kind="stable")


def split_halves(
    user_keys: np.ndarray, indptr: np.ndarray, item_keys: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """True where an interaction falls in half A: the user's floor(n/2) items of smallest
    hash64(seed, epoch, user, item).

    user_keys (U,) uint64; indptr (U+1,) int64; item_keys (E,) uint64, the key of each interaction's
    item. Returns (E,) bool. Equal hashes are ranked by position in the row.

    A user's threshold is the (floor(n/2)+1)-th smallest of his hashes. All users' hashes are sorted
    at once, with the row's number in the upper bits in place of the hash's lowest ones; that is
    several times faster than an argsort. Where the bits that were cut off matter (two equal
    truncated hashes at the threshold) the row is ranked in full.
    """
    n_users = len(user_keys)
    lengths = np.diff(indptr)
    if len(item_keys) == 0:
        return np.zeros(0, bool)
    prefix = _absorb(
        _absorb(_absorb(np.uint64(4), np.uint64(seed & _MASK)), np.uint64(epoch & _MASK)), user_keys
    )
    hashes = _absorb(np.repeat(prefix, lengths), item_keys)

    row_bits = np.uint64(max(1, (n_users - 1).bit_length()))
    packed = hashes >> row_bits
    packed |= np.repeat(np.arange(n_users, dtype=np.uint64) << (np.uint64(64) - row_bits), lengths)
    ranked = np.sort(packed)  # row u's values stay within indptr[u]:indptr[u + 1]

    at = np.minimum(indptr[:-1] + lengths // 2, len(item_keys) - 1)
    threshold = ranked[at]  # of an empty row: unused
    in_a = packed < np.repeat(threshold, lengths)
    cut = (lengths >= 2) & (ranked[np.maximum(at - 1, 0)] == threshold)
    for row in np.flatnonzero(cut):
        start, stop = indptr[row], indptr[row + 1]
        in_a[start:stop] = False
        in_a[start + np.argsort(hashes[start:stop], kind="stable")[: (stop - start) // 2]] = True
    return in_a


def keep_inputs(
    user_keys: np.ndarray,
    indptr: np.ndarray,
    item_keys: np.ndarray,
    dropout: float,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """True where an interaction stays in the input: each is left out with probability `dropout`, by
    its hash alone.

    Arguments as in `split_halves`, of which the draw is independent. Returns (E,) bool. Source: the
    input dropout of Mult-DAE (Liang et al., arXiv 1802.05814, section 3.4), drawn per interaction
    and without the factor 1 / (1 - dropout): a history with fewer items is what the model meets,
    not a fainter one.
    """
    users = np.repeat(user_keys, np.diff(indptr))
    return hash64(seed, epoch, users, item_keys, _INPUT) >= np.uint64(int(dropout * 2.0**64))
