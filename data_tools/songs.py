"""Names for a synthetic catalogue: its planted tastes are genres, and its items are songs.

Every song belongs to the genre of its first taste, and every artist to one genre. The names depend
on the seed alone.
"""

from __future__ import annotations

import numpy as np

from data_tools.synthesize import N_TASTES, Catalogue

_SONGS_OF_AN_ARTIST = 6
_GENRES = """jazz blues soul funk disco house techno trance dub reggae ska punk metal grunge folk
country bluegrass gospel opera baroque tango samba flamenco ambient"""
_FIRST = """Amber Blue Copper Distant Electric Fallen Golden Hidden Iron Jade Little Midnight
Northern Open Paper Quiet Red Silver Velvet Wild"""
_BANDS = """Avenue Bells Coasts Dancers Engines Foxes Gardens Horses Islands Kites Lanterns Mirrors
Owls Pilots Rivers Sparrows Tigers Wolves"""
_SONGS = """Afternoon Bridge Candle Delta Echo Fire Ghost Harbor Island Journey Letter Morning Night
Ocean Promise Rain Shadow Train Valley Winter"""


def titles(users: int, items: int, interactions: int, seed: int) -> dict[int, str]:
    """Return a title for every item id of the catalogue that `synthesize` draws.

    A title is `SONG by ARTIST (GENRE)`.
    """
    genres, nouns = _GENRES.split(), _SONGS.split()
    artists = [f"{word} {band}" for word in _FIRST.split() for band in _BANDS.split()]
    names = [f"{word} {noun}" for word in _FIRST.split() for noun in nouns]
    assert len(genres) == N_TASTES
    drawn = Catalogue.draw(users, items, interactions, seed)
    rng = np.random.default_rng([seed, 2])
    order = rng.permutation(len(artists))
    named: dict[int, str] = {}
    n_artists = 0
    for taste, genre in enumerate(genres):
        rows = np.flatnonzero(drawn.tastes.first == taste)
        for start in range(0, len(rows), _SONGS_OF_AN_ARTIST):
            artist = artists[order[n_artists % len(artists)]]
            n_artists += 1
            songs = rng.permutation(len(names))
            for row, song in zip(rows[start : start + _SONGS_OF_AN_ARTIST], songs, strict=False):
                named[int(drawn.item_ids[row])] = f"{names[song]} by {artist} ({genre})"
    return named
