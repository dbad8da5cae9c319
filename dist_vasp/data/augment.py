"""Augmentation: each epoch splits a user's items at random into halves A and B (DESIGN.md, sections
2 and 4), and may leave some out.

Pure functions of keys. Whether an interaction is in A depends on (seed, epoch, user key, item key)
and on the user's other items, never on the block, rank, worker or shard that the user is read in.

Shapes: U users, E interactions.
"""

from __future__ import annotations

import numpy as np

from dist_vasp.data.hashing import absorb, hash64

_INPUT = 1  # the fifth word: a hash of five words is independent of the halves' four


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
    prefix = absorb(absorb(absorb(np.uint64(4), seed), epoch), user_keys)
    hashes = absorb(np.repeat(prefix, lengths), item_keys)  # hash64(seed, epoch, user, item)

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
