"""Anchors: where two different texts say the same, and the monotone map of positions that follows (spec 3.2).

A teacher's own worked reasoning is longer than the student's, yet repeats parts of it ("8-3=5."). Interpolating from one
end to the other ignores that; an anchored map holds the shared parts exactly and interpolates only between them.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

PIECE = re.compile(r"\w+|\W")
"""Words, and every other character by itself."""


def anchors(src: str, dst: str) -> list[tuple[int, int]]:
    """Pairs (byte of dst, byte of src) at the ends of every shared run of pieces, from (0, 0) to both texts' ends.

    Both columns rise (not strictly). Without a shared piece only the ends are left, which is plain interpolation.
    """
    dst_pieces, src_pieces = PIECE.findall(dst), PIECE.findall(src)
    edges = [
        np.concatenate([[0], np.cumsum([len(piece.encode()) for piece in side])]).astype(int)
        for side in (dst_pieces, src_pieces)
    ]
    blocks = SequenceMatcher(None, dst_pieces, src_pieces, autojunk=False).get_matching_blocks()
    pairs = [(0, 0)]
    for block in blocks[:-1]:
        pairs.append((int(edges[0][block.a]), int(edges[1][block.b])))
        pairs.append((int(edges[0][block.a + block.size]), int(edges[1][block.b + block.size])))
    return [*pairs, (int(edges[0][-1]), int(edges[1][-1]))]


def warp(
    positions: ArrayLike, pairs: list[tuple[int, int]], jump: Literal["before", "after"] = "before"
) -> Float64[np.ndarray, "*positions"]:
    """Byte positions of dst as positions of src: linear between anchors, exact on shared runs, monotone.

    Where an anchor jumps (src has text that dst lacks), a position there takes the side before the jump, so that nothing
    of what comes after is read, or the side after it.
    """
    at, to = np.array(pairs, dtype=float).T
    wanted = np.asarray(positions, dtype=float)
    if jump == "before":
        right = np.searchsorted(at, wanted, side="left").clip(0, len(at) - 1)
        left = (right - 1).clip(0)
    else:
        left = (np.searchsorted(at, wanted, side="right") - 1).clip(0, len(at) - 1)
        right = (left + 1).clip(0, len(at) - 1)
    width = at[right] - at[left]
    share = np.where(width > 0, (wanted - at[left]) / np.where(width > 0, width, 1), 1.0 if jump == "before" else 0.0)
    return np.asarray(to[left] + share * (to[right] - to[left]))
