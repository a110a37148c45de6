# SPDX-License-Identifier: Apache-2.0
"""The layer's own steps one by one, checked, then timed: ``python -m benchmarks.steps --out FILE.json``.

The launches are those of a call of the layer, on data of their own: ``scheme`` is where the scales come from, "tensor",
"token" or "static", or "none". The bytes are those that have to be moved at least: each input read once, each output
written once. A dynamic scale per tensor needs the input twice, which counts as time, not as bytes. ``floor_us`` is the
time of these bytes at the device's read and write rates; ``of_copy`` is their rate over that of a copy.

A timing replays a CUDA graph with the launches on one set of arrays after the other. The sets of a large step are at
least four times the L2 cache: ``l2`` is "cold". Those of a small one fit into a quarter of it: "warm".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import cupy_moe
from benchmarks import cases, timing
from benchmarks.expected import relative_error, rounded, silu_and_mul
from benchmarks.records import make_header, make_parser, save
from cupy_moe import launches
from cupy_moe.driver import Launch
from cupy_moe.launches import Maps, Matrix, RowScale, WeightScale

SHAPES, TOKENS = (cases.SHAPES[0], cases.SHAPES[2]), (64, 1024, 8192)
DEVICE = 0
MOST_SETS = 32
STATIC_AMAX = 8.0
ERROR_LIMIT = 1e-2
"""Relative Frobenius error; single codes may differ from those of torch's arithmetic."""
EXACT = ("route", "shuffle_rows", "gather_scales")
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Step:
    """Launches on one set of arrays; what they wrote, and what they should have, as numbers."""

    launches: list[Launch]
    read: tuple[torch.Tensor, ...]
    written: tuple[torch.Tensor, ...]
    got: Callable[[], torch.Tensor]
    want: Callable[[], torch.Tensor]
    scratch: torch.Tensor | None = None

    def __call__(self) -> None:
        """Enqueue on the current stream."""
        for launch in self.launches:
            launch(torch.cuda.current_stream().cuda_stream)

    def nbytes(self) -> tuple[int, int]:
        """Bytes read and bytes written."""
        return sum(x.nbytes for x in self.read), sum(x.nbytes for x in self.written)


class Case:
    """A layer and a number of tokens: sizes, routing, and arrays for the steps."""

    def __init__(self, shape: cases.Shape, tokens: int, device: str = "cuda") -> None:
        self.experts, self.topk, self.hidden, self.inner = shape
        self.tokens, self.rows = tokens, tokens * self.topk
        self.random = torch.Generator(device).manual_seed(tokens)
        self.topk_weights, self.ids = cases.make_routing(tokens, self.topk, self.experts, self.random)
        self.routing = cupy_moe.route(self.ids, self.experts)
        self.owners = self.routing.row_experts.long()
        self.partials = self.empty(launches.PARTIALS)

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

    def scaling(self, scheme: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """Scales of a step's result, given or to be made, and what the launches are told of them."""
        scale = self.empty(self.rows if scheme == "token" else 1, 1)
        if scheme == "static":
            scale.fill_(STATIC_AMAX / cases.FP8_MAX)
        return scale, {
            "scale": RowScale(value=float(scale)) if scheme == "static" else launches.UNSCALED,
            "partials": self.partials.data_ptr(), "scale_out": 0 if scheme == "static" else scale.data_ptr(),
        }  # fmt: skip

    def rounded(self, x: torch.Tensor, scheme: str) -> torch.Tensor:
        """``x`` as codes and scales of a scheme hold it."""
        return rounded(x, scheme == "token", torch.tensor(STATIC_AMAX).to(x.device) if scheme == "static" else None)


def matrix(x: torch.Tensor) -> Matrix:
    """An array as the launches take it."""
    return Matrix(x.data_ptr(), x.stride(0), str(x.dtype).removeprefix("torch.") if x.dtype != FP8 else "uint8")


def route(case: Case, scheme: str) -> Step:
    """Sort the (token, slot) pairs by expert."""
    made = [torch.empty_like(x) for x in case.routing]
    scratch = case.empty(launches.route_blocks(case.rows) * case.experts, dtype=torch.int32)
    steps = launches.route(
        DEVICE, case.ids.data_ptr(), "int32", case.tokens, case.topk, case.experts,
        Maps(*(x.data_ptr() for x in made)), scratch=scratch.data_ptr(),
    )  # fmt: skip

    def want() -> torch.Tensor:
        return torch.argsort(torch.argsort(case.ids.flatten(), stable=True)).float()

    return Step(steps, (case.ids,), tuple(made), lambda: made[3].flatten().float(), want, scratch)


def quantize(case: Case, scheme: str) -> Step:
    """Hidden states to codes in expert order."""
    x, codes = case.normal(case.tokens, case.hidden), case.empty(case.rows, case.hidden, dtype=FP8)
    scale, told = case.scaling(scheme)
    src2dst, owners = case.routing.src2dst_map, case.routing.row_experts
    steps = launches.quantize(
        DEVICE, scheme.upper(), matrix(x), case.tokens, case.hidden, matrix(codes), case.hidden, topk=case.topk,
        src2dst=src2dst.data_ptr(), row_experts=owners.data_ptr(), **told,
    )  # fmt: skip

    def want() -> torch.Tensor:
        return case.rounded(x[case.routing.dst2src_map.long()], scheme)

    return Step(steps, (x, src2dst), (codes, scale), lambda: codes.float() * scale, want)


def activation(case: Case, scheme: str) -> Step:
    """GEMM 1's product to the codes of GEMM 2."""
    product, codes = case.normal(case.rows, 2 * case.inner), case.empty(case.rows, case.inner, dtype=FP8)
    per_row, weight, scales = case.scales(scheme == "token", 2 * case.inner, case.inner)
    scale, told = case.scaling(scheme)
    owners = case.routing.row_experts
    steps = launches.activation_quantize(
        DEVICE, scheme.upper(), "silu", True, matrix(product), case.rows, case.inner, case.inner, matrix(codes),
        case.inner, row_experts=owners.data_ptr(), **scales, **told,
    )  # fmt: skip

    def want() -> torch.Tensor:
        return case.rounded(silu_and_mul(product.float().mul_(per_row[:, None]).mul_(weight[case.owners])), scheme)

    read = (product, per_row, weight, owners)
    return Step(steps, read, (codes, scale), lambda: codes.float() * scale, want)


def combine(case: Case, scheme: str) -> Step:
    """GEMM 2's product to the weighted sum of each token."""
    product, out = case.normal(case.rows, case.hidden), case.empty(case.tokens, case.hidden, dtype=torch.float16)
    per_row, weight, scales = case.scales(scheme == "token", case.hidden, 0)
    src2dst, owners = case.routing.src2dst_map, case.routing.row_experts
    step = launches.combine(
        DEVICE, matrix(product), case.rows, case.tokens, case.topk, case.hidden, matrix(out),
        src2dst=src2dst.data_ptr(), row_experts=owners.data_ptr(), topk_weights=case.topk_weights.data_ptr(), **scales,
    )  # fmt: skip

    def want() -> torch.Tensor:
        scaled = product.float().mul_(per_row[:, None]).mul_(weight[case.owners])
        return (scaled[src2dst.long()] * case.topk_weights[..., None]).sum(dim=1)

    read = (product, per_row, weight, src2dst, owners, case.topk_weights)
    return Step([step], read, (out,), out.float, want)


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
    return Step([step], (x, source), (out,), out.float, lambda: x[source.long()].float())


def topk_softmax(case: Case, scheme: str) -> Step:
    """Router logits to weights and ids."""
    gating = case.normal(case.tokens, case.experts, dtype=torch.float32)
    weights, ids = torch.zeros_like(case.topk_weights), torch.zeros_like(case.ids)
    step = launches.topk_softmax(
        DEVICE, matrix(gating), case.tokens, case.experts, case.topk, False, weights.data_ptr(), ids.data_ptr()
    )

    def want() -> torch.Tensor:
        return torch.cat(torch.topk(torch.softmax(gating, dim=-1), case.topk, dim=-1), dim=1)

    return Step([step], (gating,), (weights, ids), lambda: torch.cat([weights, ids], dim=1), want)


STEPS: tuple[tuple[Callable[[Case, str], Step], tuple[str, ...]], ...] = (
    (topk_softmax, ("none",)),
    (route, ("none",)),
    (quantize, ("tensor", "token", "static")),
    (shuffle_rows, ("none",)),
    (gather_scales, ("none",)),
    (activation, ("tensor", "token", "static")),
    (combine, ("tensor", "token")),
)


def sets_of(nbytes: int, l2: int) -> tuple[int, str]:
    """How many sets of arrays of a step to use in turn, and the state of the L2 cache that they make."""
    cold = max(2, -(-4 * l2 // nbytes))
    return (cold, "cold") if cold <= MOST_SETS else (max(2, min(MOST_SETS, l2 // 4 // nbytes)), "warm")


def measure(build: Callable[[Case, str], Step], case: Case, scheme: str, rates: dict[str, float]) -> dict[str, Any]:
    """Check and time one step."""

    def prepared() -> Step:
        step = build(case, scheme)
        for launch in step.launches[1:]:
            launch.overlapping()  # as in a call; the first one has to wait for the set in front
        return step

    first = prepared()
    first()
    torch.cuda.synchronize()
    error = relative_error(first.got(), first.want())
    torch.cuda.empty_cache()
    read, written = first.nbytes()
    count, l2 = sets_of(read + written, timing.l2_bytes())
    sets = [first, *(prepared() for _ in range(count - 1))]

    def call() -> None:
        for step in sets:
            step()

    graph, _ = timing.capture(call)
    timed = timing.time_warm(graph.replay, hold=True, replays=timing.fitting_replays(graph.replay)).per(count)
    moved_s = (read + written) / (timed.us * 1e-6)
    return {
        "step": build.__name__, "kernels": [launch.kernel.name for launch in first.launches], "scheme": scheme,
        "mode": "graph", "l2": l2, **asdict(timed),
        "floor_us": 1e6 * (read / rates["read_bytes_s"] + written / rates["write_bytes_s"]), "err": error,
        "bytes_read": read, "bytes_written": written, "bytes_s": moved_s, "of_copy": moved_s / rates["copy_bytes_s"],
    }  # fmt: skip


def main() -> int:
    """Run all steps; the exit status is 1 if one failed its check."""
    options = make_parser("benchmarks.steps", __doc__).parse_args()
    header = make_header("benchmarks.steps", sys.argv[1:], out=options.out, commit=options.commit)
    records: list[dict[str, Any]] = []
    failed = False
    for shape in SHAPES:
        for tokens in TOKENS:
            case = Case(shape, tokens)
            common = {
                "device": header["device"], "impl": "cupy_moe", "backend": "kernels_cu", "shape": list(shape),
                "M": tokens, "routing": "uniform",
            }  # fmt: skip
            for build, schemes in STEPS:
                for scheme in schemes:
                    record = common | measure(build, case, scheme, header["rates"])
                    records.append(record)
                    right = record["err"] <= (0 if build.__name__ in EXACT else ERROR_LIMIT)
                    failed |= not right
                    print(
                        f"{shape} M {tokens:5} {build.__name__:13} {scheme:6} {record['l2']} {record['us']:8.2f} us "
                        f"{record['bytes_s'] / 1e9:7.0f} GB/s {record['of_copy']:5.2f} of a copy, error "
                        f"{record['err']:.1e}{'' if right else ' IS TOO LARGE'}", flush=True,
                    )  # fmt: skip
                    torch.cuda.empty_cache()
    save(options.out, header, records)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
