"""Augmentation: split each user's items at random into halves A and B, and drop some inputs.

These are functions of keys. Whether an interaction is in A depends on (seed, epoch, user key, item
key) and on the user's other items, never on the block, rank, worker or shard that the user is read
in (DESIGN.md, sections 2 and 4).

Shapes: U users, E interactions.
"""

from __future__ import annotations

import numpy as np

from dist_vasp.data.hashing import absorb, hash64

_DROPOUT = 1  # a fifth word, so that the hash is independent of the one for the halves


def split_halves(
    user_keys: np.ndarray, indptr: np.ndarray, item_keys: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """Return which interactions are in half A, (E,) bool.

    Of a user's n items, half A holds the floor(n/2) with the smallest hash64(seed, epoch, user,
    item); equal hashes are ranked by position in the row. user_keys (U,) uint64; indptr (U+1,)
    int64; item_keys (E,) uint64, the key of each interaction's item.

    A user's threshold is the (floor(n/2)+1)-th smallest hash. The hashes of all users are sorted
    together, which is several times faster than an argsort: the row number replaces the lowest bits
    of the hash and is put above the others. Where two truncated hashes at the threshold are equal,
    the row is ranked again by its full hashes.
    """
    n_users = len(user_keys)
    lengths = np.diff(indptr)
    if len(item_keys) == 0:
        return np.zeros(0, bool)
    prefix = absorb(absorb(absorb(np.uint64(4), seed), epoch), user_keys)
    hashes = absorb(np.repeat(prefix, lengths), item_keys)  # hash64(seed, epoch, user, item)

    row_bits = np.uint64(max(1, (n_users - 1).bit_length()))
    packed = hashes >> row_bits
    packed |= np.repeat(np.arange(n_users, dtype=np.uint64) << (np.uint64(64) - row_bits), lengths)
    ranked = np.sort(packed)  # row u's values stay within indptr[u]:indptr[u + 1]

    at = np.minimum(indptr[:-1] + lengths // 2, len(item_keys) - 1)
    threshold = ranked[at]  # not used for empty rows
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
    """Return which interactions stay in the input, (E,) bool; each is dropped with probability
    `dropout`.

    The draw depends on the hash of the interaction, and is independent of `split_halves`, whose
    arguments it shares. Source: the input dropout of Mult-DAE (Liang et al., arXiv 1802.05814,
    section 3.4), drawn per interaction. There is no factor 1 / (1 - dropout), because inputs are
    binary in serving, too.
    """
    users = np.repeat(user_keys, np.diff(indptr))
    return hash64(seed, epoch, users, item_keys, _DROPOUT) >= np.uint64(int(dropout * 2.0**64))
