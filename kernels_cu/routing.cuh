// SPDX-License-Identifier: Apache-2.0
// What routing is made of, in kernels of its own (route.cu) and beside the quantisation of few tokens (route_quantize.cu).
//
// Constants put in front of this text:
//   Id          int | long long: the type of topk_ids

// Where the grouped GEMMs find the rows of each expert: operand i of expert e starts at base[i] + row * pitch[i] (bytes),
// written to pointers[i * experts + e]. A base of null: no table is wanted.
struct Tables { long long* pointers; char* base[4]; long long pitch[4]; };

struct Shape {
    const Id* ids;
    int pairs, topk, experts;
    const int* expert_map;  // null: ids are local
    int map_size;
};

// The local expert of an id, -1 if that is invalid in any way.
__device__ __forceinline__ int local_expert(const Shape& shape, Id id) {
    if (shape.expert_map) {
        if (id < 0 || id >= shape.map_size) return -1;
        id = shape.expert_map[id];
    }
    return id >= 0 && id < shape.experts ? int(id) : -1;
}

// Sum over the lanes up to and including this one.
__device__ __forceinline__ int warp_inclusive_sum(int x) {
    for (int offset = 1; offset < LANES; offset *= 2) {
        const int left = __shfl_up_sync(FULL_WARP, x, offset);
        if (int(threadIdx.x % LANES) >= offset) x += left;
    }
    return x;
}

// The kernels behind may start once the spans are unknown again: none of them takes those of an earlier call for this one's.
// The last warp sees to that, which has no pairs if there is room: what it waits for, no other does.
__device__ __forceinline__ bool is_last_warp() { return threadIdx.x / LANES == blockDim.x / LANES - 1; }
__device__ __forceinline__ void forget_spans(Span* spans, int first, int end) {
    if (spans && is_last_warp())
#pragma unroll 1
        for (int i = first + threadIdx.x % LANES; i < end; i += LANES) store_span(spans + i, {0, -1});
}
__device__ __forceinline__ void start_kernels_behind() {
    if (!is_last_warp()) return;
    __threadfence();
    __syncwarp();
    start_next_kernel();
}

// Exclusive sum over the threads of the block, plus `carry`; carry grows by the block's sum.
__device__ __forceinline__ int block_exclusive_sum(int x, int& carry) {
    __shared__ int warp_sums[LANES];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int inclusive = warp_inclusive_sum(x);
    __syncthreads();  // the previous call's sums have been read
    if (lane == LANES - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    const int sums = warp_inclusive_sum(lane < warps ? warp_sums[lane] : 0);
    const int before = __shfl_sync(FULL_WARP, sums, max(warp - 1, 0));
    const int result = carry + (warp ? before : 0) + inclusive - x;
    carry += __shfl_sync(FULL_WARP, sums, LANES - 1);
    return result;
}

// Where routing writes, beside the spans and tables.
struct Results { int *expert_offsets, *expert_counts, *dst2src_map, *src2dst_map, *row_experts; };

__device__ __forceinline__ void write_expert(int expert, int experts, int row, int count, Span* spans, int* expert_counts,
                                             const Tables& tables) {
    if (spans) store_span(spans + expert, {row, count});
    expert_counts[expert] = count;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (tables.base[i]) tables.pointers[i * experts + expert] = (long long)(tables.base[i] + row * tables.pitch[i]);
}

// What belongs to the experts, by block 0 of `blocks`, and the rows behind the last valid one, by all of them. Each expert's
// first row is told to visit(expert, row), by one thread. All threads of a block call this; their counts are written.
template <typename Visit>
__device__ __forceinline__ void place_experts(const Shape& shape, const int* counts, int blocks, const Results& to,
                                              const Tables& tables, Span* spans, Visit visit) {
    int total = 0;
    for (int base = 0; base < shape.experts; base += blockDim.x) {
        const int expert = base + threadIdx.x, count = expert < shape.experts ? counts[expert] : 0;
        const int row = block_exclusive_sum(count, total);
        if (expert >= shape.experts) continue;
        visit(expert, row);
        if (blockIdx.x > 0) continue;
        to.expert_offsets[expert] = row;
        write_expert(expert, shape.experts, row, count, spans, to.expert_counts, tables);
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) to.expert_offsets[shape.experts] = total;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = total + thread; i < shape.pairs; i += blocks * blockDim.x) to.dst2src_map[i] = to.row_experts[i] = -1;
}
