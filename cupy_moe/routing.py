# SPDX-License-Identifier: Apache-2.0
"""The tables that say which row of the expert-sorted arrays belongs to which token, slot and expert."""

from typing import Any, NamedTuple


class Routing(NamedTuple):
    """What `route` makes of the expert ids. All int32; rows = M * topk (token, slot) pairs, sorted by expert.

    Attributes
    ----------
    expert_offsets : (E + 1,)
        The rows of expert ``e`` are ``expert_offsets[e] : expert_offsets[e + 1]``. Rows from
        ``expert_offsets[E]`` on belong to dropped ids.
    expert_counts : (E,)
        Rows of each expert.
    dst2src_map : (rows,)
        Sorted row to token; -1 from ``expert_offsets[E]`` on.
    src2dst_map : (M, topk)
        (token, slot) to sorted row; -1 where the id was dropped.
    row_experts : (rows,)
        Sorted row to local expert; -1 from ``expert_offsets[E]`` on.
    """

    expert_offsets: Any
    expert_counts: Any
    dst2src_map: Any
    src2dst_map: Any
    row_experts: Any
