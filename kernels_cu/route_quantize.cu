// SPDX-License-Identifier: Apache-2.0
// Routing and the codes of the hidden states in one launch, for no more (token, slot) pairs than a block has threads. The first
// block counts the pairs of the experts. Each other one takes a token (quantize.cuh) and finds its rows by itself, as how many
// pairs come before: none waits for another.

extern __shared__ int counts[];  // of the experts, in the first block

// The counts of the experts. This thread's pair is one of `expert`, or of none.
__device__ __forceinline__ void count_experts(int experts, int expert) {
    for (int i = threadIdx.x; i < experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    if (expert >= 0) atomicAdd(counts + expert, 1);
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(MAX_ROW_THREADS) route_quantize(
    const Id* ids, int pairs, int topk, int experts, const int* expert_map, int map_size, int* expert_offsets,
    int* expert_counts, int* dst2src_map, int* src2dst_map, int* row_experts, Tables tables, Span* spans, const In* x,
    long long x_pitch, const float* topk_weights, const float* scale_in, float scale_value, int scale_stride, int cols,
    int out_cols, u8* out, long long out_pitch, float* scale_out)
{
    const bool routes = blockIdx.x == 0;
    if (routes && blockIdx.y > 0) return;
    if (routes) forget_spans(spans, 0, experts);
    else wait_for_previous_kernel();
    const Shape shape = {ids, pairs, topk, experts, expert_map, map_size};
    const int pair = threadIdx.x, expert = pair < pairs ? local_expert(shape, pair) : -1;
    if (routes) {
        start_kernels_behind();
        count_experts(experts, expert);
        const Results to = {expert_offsets, expert_counts, dst2src_map, src2dst_map, row_experts};
        place_experts(shape, counts, 1, to, tables, spans, [](int, int) {});
        return;
    }
    // The order of the keys is that of the rows.
    constexpr int NO_ROW = 0x7fffffff;
    __shared__ int keys[MAX_ROW_THREADS], rows[MAX_ROW_THREADS];
    const int token = blockIdx.x - 1;
    const auto find_rows = [&] {
        keys[pair] = expert < 0 ? NO_ROW : expert * pairs + pair;
        __syncthreads();
        for (int slot = threadIdx.x / LANES; slot < topk; slot += blockDim.x / LANES) {
            const int mine = keys[token * topk + slot];
            int before = 0;
            for (int i = threadIdx.x % LANES; i < pairs; i += LANES) before += keys[i] < mine;
            before = __reduce_add_sync(FULL_WARP, before);
            if (threadIdx.x % LANES > 0) continue;
            const int row = rows[slot] = mine == NO_ROW ? -1 : before;
            if (blockIdx.y > 0) continue;
            src2dst_map[token * topk + slot] = row;
            if (row < 0) continue;
            dst2src_map[row] = token;
            row_experts[row] = mine / pairs;
        }
        __syncthreads();
    };
    quantize_token(
        {x, x_pitch, topk_weights, nullptr, scale_in, scale_value, scale_stride, int(gridDim.x) - 1, topk, cols, out_cols,
         out, out_pitch, scale_out},
        token, token == 0, true, find_rows, [&](int slot) { return rows[slot]; },
        [&](int slot, int) { return keys[token * topk + slot] / pairs; });
}
