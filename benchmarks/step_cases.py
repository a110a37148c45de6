# SPDX-License-Identifier: Apache-2.0
"""The steps of the layer on data of their own for `benchmarks.steps`: launches, what they move, the right results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import cupy_moe
from benchmarks import cases
from benchmarks.expected import rounded, silu_and_mul
from cupy_moe import dispatch, gemms, launches
from cupy_moe.driver import Launch
from cupy_moe.launches import Maps, Matrix, RowScale, WeightScale

DEVICE = 0
STATIC_AMAX = 8.0
FP8 = torch.float8_e4m3fn
Arrays = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Step:
    """Launches on one set of arrays, what each of them reads and writes, and the result that is and that should be."""

    launches: list[Launch]
    moved: list[tuple[Arrays, Arrays]]
    got: Callable[[], torch.Tensor]
    want: Callable[[], torch.Tensor]

    def __call__(self) -> None:
        """Enqueue on the current stream."""
        for launch in self.launches:
            launch(torch.cuda.current_stream().cuda_stream)

    def nbytes(self, index: int) -> tuple[int, int]:
        """Bytes that a launch reads and writes."""
        read, written = self.moved[index]
        return sum(x.nbytes for x in read), sum(x.nbytes for x in written)


class Case:
    """A layer and a number of tokens: sizes, routing, and arrays for the steps."""

    def __init__(self, shape: cases.Shape, tokens: int, device: str = "cuda") -> None:
        self.experts, self.topk, self.hidden, self.inner = shape
        self.tokens, self.rows = tokens, tokens * self.topk
        self.random = torch.Generator(device).manual_seed(tokens)
        self.topk_weights, self.ids = cases.make_routing(tokens, self.topk, self.experts, self.random)
        self.routing = cupy_moe.route(self.ids, self.experts)
        self.owners = self.routing.row_experts.long()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An array full of a number that no step may read."""
        return torch.full(shape, -1, device=self.random.device).to(dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.random, device=self.random.device, dtype=dtype)

    def scales(self, per_token: bool, cols: int, up: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Scales of rows and of weights with ``cols`` columns, and both as the launches take them."""
        per_row = 1 + self.normal(self.rows if per_token else 1, dtype=torch.float32).abs() / 8
        weight = 1 + self.normal(self.experts, cols if per_token else 1, dtype=torch.float32).abs() / 8
        by_weight = WeightScale(weight.data_ptr(), weight.shape[1], up if per_token else 0, per_token)
        return per_row, weight, {"x_scale": RowScale(per_row.data_ptr(), int(per_token)), "w_scale": by_weight}

    def scaling(self, scheme: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Scales of a step's result, given or to be made, the partials, and what the launches are told of them."""
        scale, partials = self.empty(self.rows if scheme == "token" else 1, 1), self.empty(launches.PARTIALS)
        if scheme == "static":
            scale.fill_(STATIC_AMAX / cases.FP8_MAX)
        return scale, partials, {
            "scale": RowScale(value=float(scale)) if scheme == "static" else launches.UNSCALED,
            "partials": partials.data_ptr(), "scale_out": 0 if scheme == "static" else scale.data_ptr(),
        }

    def rounded(self, x: torch.Tensor, scheme: str) -> torch.Tensor:
        """``x`` as codes and scales of a scheme hold it."""
        return rounded(x, scheme == "token", torch.tensor(STATIC_AMAX).to(x.device) if scheme == "static" else None)


def matrix(x: torch.Tensor) -> Matrix:
    """An array as the launches take it."""
    return Matrix(x.data_ptr(), x.stride(0), str(x.dtype).removeprefix("torch.") if x.dtype != FP8 else "uint8")


def route(case: Case, scheme: str) -> Step:
    """Sort the (token, slot) pairs by expert."""
    made = [torch.empty_like(x) for x in case.routing]
    scratch = case.empty(dispatch.route_blocks(case.rows) * case.experts, dtype=torch.int32)
    steps = dispatch.route(
        DEVICE, case.tokens, dispatch.Pairs(
            case.ids.data_ptr(), "int32", case.topk, case.experts, Maps(*(x.data_ptr() for x in made)),
            scratch=scratch.data_ptr(),
        ),
    )

    def want() -> torch.Tensor:
        return torch.argsort(torch.argsort(case.ids.flatten(), stable=True)).float()

    maps, sums = (made[2], made[3], made[4]), (made[0], made[1])
    moved: list[tuple[Arrays, Arrays]] = [((case.ids,), (*sums, *maps))]
    if len(steps) > 1:
        moved = [((case.ids,), (scratch,)), ((case.ids, scratch), (*sums, *maps))]
    return Step(steps, moved, lambda: made[3].flatten().float(), want)


def quantize(case: Case, scheme: str) -> Step:
    """Hidden states to codes in expert order."""
    x, codes = case.normal(case.tokens, case.hidden), case.empty(case.rows, case.hidden, dtype=FP8)
    scale, partials, told = case.scaling(scheme)
    src2dst, owners = case.routing.src2dst_map, case.routing.row_experts
    steps = dispatch.quantize(
        DEVICE, scheme.upper(), matrix(x), case.tokens, case.hidden, matrix(codes), case.hidden, topk=case.topk,
        src2dst=src2dst.data_ptr(), row_experts=owners.data_ptr(), **told,
    )

    def want() -> torch.Tensor:
        return case.rounded(x[case.routing.dst2src_map.long()], scheme)

    moved = _behind_amax(len(steps), (x,), (src2dst,), partials, (codes, scale))
    return Step(steps, moved, lambda: codes.float() * scale, want)


def _behind_amax(
    launched: int, source: Arrays, also: Arrays, partials: torch.Tensor, written: Arrays
) -> list[tuple[Arrays, Arrays]]:
    """What the kernels read and write that make codes of ``source``: one, or two with an amax first."""
    if launched == 1:
        return [((*source, *also), written)]
    return [(source, (partials,)), ((*source, *also, partials), written)]


def requantize(case: Case, scheme: str) -> Step:
    """What GEMM 1 of the backend sm90 leaves, activated, to the codes of GEMM 2.

    They are lost when they have been read once.
    """
    codes, owners = case.empty(case.rows, case.inner, dtype=FP8), case.routing.row_experts
    scale, partials, told = case.scaling(scheme)
    if gemms.packs(case.rows, case.experts, case.inner, per_token=scheme == "token"):
        words, x = packed(case)
        spans = torch.stack([case.routing.expert_offsets[:-1], case.routing.expert_counts], dim=1)
        steps = [launches.requantize(
            DEVICE, scheme.upper(), Matrix(words.data_ptr(), case.inner, launches.PACKED), case.rows, spans.data_ptr(),
            case.experts, matrix(codes), partials=told["partials"], scale_out=told["scale_out"],
        )]
        read: Arrays = (words, spans)
    else:
        x = case.normal(case.rows, case.inner, dtype=torch.float32)
        words = x.clone()
        steps = dispatch.quantize(
            DEVICE, scheme.upper(), matrix(words), case.rows, case.inner, matrix(codes), case.inner,
            row_experts=owners.data_ptr(), fresh=True, **told,
        )
        read = (words, owners)
    partials.zero_()[0] = x.abs().amax()  # what the GEMM leaves too
    if scheme == "tensor":
        read = (*read, partials)
    return Step(steps, [(read, (codes, scale))], lambda: codes.float() * scale, lambda: case.rounded(x, scheme))


def packed(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Activated values as ``packed.cuh`` describes them, and those of the rows of experts as float32."""
    groups, columns = launches.packed_rows(case.rows, case.experts) // launches.GROUP_ROWS, case.inner // 8
    # Four rows of each quarter of a group: a pair, and the pair eight rows on.
    values = case.normal(2, 2, groups, columns, 4, 8, dtype=torch.float32).view(torch.int32) & -256
    three, fourth = values.flatten(0, 1)[:3], values[1, 1]
    words = torch.stack([word | (fourth >> (24 - 8 * i)) & 0xFF for i, word in enumerate(three)], dim=2)
    rows = values.permute(2, 0, 4, 1, 3, 5).reshape(-1, case.inner).view(torch.float32)
    offsets, row = case.routing.expert_offsets.long(), torch.arange(case.rows, device=rows.device)
    first = offsets[case.owners]
    return words, rows[(first // launches.GROUP_ROWS + case.owners) * launches.GROUP_ROWS + row - first]


def activation(case: Case, scheme: str) -> Step:
    """GEMM 1's product to the codes of GEMM 2."""
    product, codes = case.normal(case.rows, 2 * case.inner), case.empty(case.rows, case.inner, dtype=FP8)
    per_row, weight, scales = case.scales(scheme == "token", 2 * case.inner, case.inner)
    scale, partials, told = case.scaling(scheme)
    owners = case.routing.row_experts
    steps = launches.activation_quantize(
        DEVICE, scheme.upper(), "silu", True, matrix(product), case.rows, case.inner, case.inner, matrix(codes),
        case.inner, row_experts=owners.data_ptr(), **scales, **told,
    )

    def want() -> torch.Tensor:
        return case.rounded(silu_and_mul(product.float().mul_(per_row[:, None]).mul_(weight[case.owners])), scheme)

    moved = _behind_amax(len(steps), (product, per_row, weight, owners), (), partials, (codes, scale))
    return Step(steps, moved, lambda: codes.float() * scale, want)


def combine(case: Case, scheme: str) -> Step:
    """GEMM 2's product to the weighted sum of each token."""
    product, out = case.normal(case.rows, case.hidden), case.empty(case.tokens, case.hidden, dtype=torch.float16)
    per_row, weight, scales = case.scales(scheme == "token", case.hidden, 0)
    src2dst, owners = case.routing.src2dst_map, case.routing.row_experts
    step = launches.combine(
        DEVICE, matrix(product), case.rows, case.tokens, case.topk, case.hidden, matrix(out),
        src2dst=src2dst.data_ptr(), row_experts=owners.data_ptr(), topk_weights=case.topk_weights.data_ptr(), **scales,
    )

    def want() -> torch.Tensor:
        scaled = product.float().mul_(per_row[:, None]).mul_(weight[case.owners])
        return (scaled[src2dst.long()] * case.topk_weights[..., None]).sum(dim=1)

    read = (product, per_row, weight, src2dst, owners, case.topk_weights)
    return Step([step], [(read, (out,))], out.float, want)


def shuffle_rows(case: Case, scheme: str) -> Step:
    """Codes in expert order."""
    return _shuffle(case, case.normal(case.tokens, case.hidden).to(FP8).view(torch.uint8))


def gather_scales(case: Case, scheme: str) -> Step:
    """One float32 per token in expert order."""
    return _shuffle(case, case.normal(case.tokens, 1, dtype=torch.float32))


def _shuffle(case: Case, x: torch.Tensor) -> Step:
    source, out = case.routing.dst2src_map, torch.zeros((case.rows, x.shape[1]), dtype=x.dtype, device=x.device)
    row_bytes = x.stride(0) * x.element_size()
    step = launches.shuffle_rows(
        DEVICE, x.data_ptr(), row_bytes, case.tokens, source.data_ptr(), case.rows, row_bytes, out.data_ptr()
    )
    return Step([step], [((x, source), (out,))], out.float, lambda: x[source.long()].float())


def topk_softmax(case: Case, scheme: str) -> Step:
    """Router logits to weights and ids."""
    gating = case.normal(case.tokens, case.experts, dtype=torch.float32)
    weights, ids = torch.zeros_like(case.topk_weights), torch.zeros_like(case.ids)
    step = launches.topk_softmax(
        DEVICE, matrix(gating), case.tokens, case.experts, case.topk, False, weights.data_ptr(), ids.data_ptr()
    )

    def want() -> torch.Tensor:
        return torch.cat(torch.topk(torch.softmax(gating, dim=-1), case.topk, dim=-1), dim=1)

    return Step([step], [((gating,), (weights, ids))], lambda: torch.cat([weights, ids], dim=1), want)


STEPS: tuple[tuple[Callable[[Case, str], Step], tuple[str, ...]], ...] = (
    (topk_softmax, ("none",)),
    (route, ("none",)),
    (quantize, ("tensor", "token", "static")),
    (shuffle_rows, ("none",)),
    (gather_scales, ("none",)),
    (activation, ("tensor", "token", "static")),
    (requantize, ("tensor", "token")),
    (combine, ("tensor", "token")),
)
