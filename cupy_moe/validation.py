# SPDX-License-Identifier: Apache-2.0
"""Checks of data, for ``validate=True``: they read the arrays and so wait for the device."""

from __future__ import annotations

from typing import Any

from cupy_moe import arrays, e4m3
from cupy_moe.spec import LayerSpec, Operand


def check_map(spec: LayerSpec) -> None:
    """Raise ValueError for an entry of ``expert_map`` that is neither -1 nor an expert."""
    if not spec.expert_map:
        return
    with arrays.numeric_scope(spec.library, spec.device):
        mapped = spec.library.to_numeric(spec.expert_map.array)
        wrong = (mapped < -1) | (mapped >= spec.num_experts)
        if wrong.any():
            expert = int(wrong.argmax())
            raise ValueError(
                f"expert_map: expected -1 to {spec.num_experts - 1}; global expert {expert} has {int(mapped[expert])}"
            )


def check_tokens(spec: LayerSpec, hidden_states: Any, topk_ids: Any, **_: Any) -> None:
    """Raise ValueError for an id that is out of range or a value that is not finite, naming the first such token."""
    library = spec.library
    with arrays.numeric_scope(library, spec.device):
        ids = library.to_numeric(topk_ids)
        limit = spec.expert_map.info.shape[0] if isinstance(spec.expert_map, Operand) else spec.num_experts
        wrong = ((ids < 0) | (ids >= limit)).any(axis=1)
        if wrong.any():
            token = int(wrong.argmax())
            raise ValueError(f"topk_ids: expected ids from 0 to {limit - 1}; token {token} has {ids[token].tolist()}")
        wrong = _not_finite(library.to_numeric(hidden_states))
        if wrong.any():
            raise ValueError(f"hidden_states: expected finite values; token {int(wrong.argmax())} has NaN or infinity")


def check_padded(spec: LayerSpec, hidden_states: Any, expert_num_tokens: Any) -> None:
    """Raise ValueError for a number of tokens that is out of range or a value that is not finite in a token."""
    library = spec.library
    with arrays.numeric_scope(library, spec.device):
        counts, hidden = library.to_numeric(expert_num_tokens), library.to_numeric(hidden_states)
        limit = hidden.shape[1]
        wrong = (counts < 0) | (counts > limit)
        if wrong.any():
            expert = int(wrong.argmax())
            raise ValueError(f"expert_num_tokens: expected 0 to {limit}; expert {expert} has {int(counts[expert])}")
        for expert, count in enumerate(counts.tolist()):
            wrong = _not_finite(hidden[expert, :count])
            if wrong.any():
                raise ValueError(
                    f"hidden_states: expected finite values; token {int(wrong.argmax())} of expert {expert} has NaN or "
                    "infinity"
                )


def _not_finite(hidden: Any) -> Any:
    values = e4m3.decode(hidden) if e4m3.is_fp8(hidden) else hidden.astype("float32")
    return ~(abs(values) < float("inf")).all(axis=1)
