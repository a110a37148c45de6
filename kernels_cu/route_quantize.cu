// SPDX-License-Identifier: Apache-2.0
// Routing and the codes of the hidden states in one launch, for not too many (token, slot) pairs. The first block counts the
// pairs of the experts. Each other one takes a token (quantize.cuh) and finds its rows by itself, as how many pairs come
// before: none waits for another. In mode TENSOR amax_tokens is in front unless ALONE.
//
// Constants put in front of this text, beside those of routing.cuh and quantize.cuh:
//   IDS         pairs whose experts a thread loads at a time

constexpr bool BEHIND_AMAX = MODE == TENSOR && !ALONE;
constexpr int NO_ROW = 0x7fffffff;

// In the first block the counts of the experts. In the others a key for each pair, up to a multiple of KEYS; then the rows of
// the token. The order of the keys is that of the rows.
constexpr int KEYS = 4 * LANES;
extern __shared__ int4 dynamic_shared[];

// The ids of some pairs, `step` apart, which are loaded together.
struct Some {
    Id ids[IDS];
    __device__ __forceinline__ void load(const Shape& shape, int first, int step) {
#pragma unroll
        for (int i = 0; i < IDS; ++i) ids[i] = first + i * step < shape.pairs ? shape.ids[first + i * step] : Id(-1);
    }
    // Calls visit(pair, expert) for those in front of `end`, and for all others that far.
    template <typename Visit>
    __device__ __forceinline__ void visit_all(const Shape& shape, int first, int step, int end, Visit visit) {
        while (first < end) {
#pragma unroll
            for (int i = 0; i < IDS; ++i)
                if (first + i * step < end) visit(first + i * step, local_expert(shape, ids[i]));
            load(shape, first += IDS * step, step);
        }
    }
};

// The pairs of each expert. The last warp has something else to do.
__device__ __forceinline__ void count_experts(const Shape& shape, int* counts) {
    Some some;
    const int first = is_last_warp() ? shape.pairs : threadIdx.x, step = blockDim.x - LANES;
    some.load(shape, first, step);
    for (int i = threadIdx.x; i < shape.experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    some.visit_all(shape, first, step, shape.pairs, [&](int, int expert) { if (expert >= 0) atomicAdd(counts + expert, 1); });
    __syncthreads();
}

// How many keys are smaller than `mine`; by one warp.
__device__ __forceinline__ int keys_before(const int4* keys, int pairs, int mine) {
    int before = 0;
#pragma unroll 4
    for (int i = threadIdx.x % LANES; i * 4 < pairs; i += LANES) {
        const int4 four = keys[i];
        before += (four.x < mine) + (four.y < mine) + (four.z < mine) + (four.w < mine);
    }
    return __reduce_add_sync(FULL_WARP, before);
}

extern "C" __global__ void __launch_bounds__(MAX_ROW_THREADS, 1) route_quantize(
    const Id* ids, int pairs, int topk, int experts, const int* expert_map, int map_size, int* expert_offsets,
    int* expert_counts, int* dst2src_map, int* src2dst_map, int* row_experts, Tables tables, Span* spans, const In* x,
    long long x_pitch, const float* topk_weights, const float* partials, const float* scale_in, float scale_value,
    int scale_stride, int cols, int out_cols, u8* out, long long out_pitch, float* scale_out)
{
    const bool routes = blockIdx.x == 0;
    if (routes && blockIdx.y > 0) return;
    Shape shape = {ids, pairs, topk, experts, expert_map, map_size};
    int* const numbers = reinterpret_cast<int*>(dynamic_shared);
    // amax_tokens waits for all that is older before it lets this kernel start: only the partials are left to wait for.
    if constexpr (!BEHIND_AMAX) only_wait_for_previous_kernel();
    if (routes) {
        forget_spans(spans, 0, experts);
        start_kernels_behind();
        count_experts(shape, numbers);
        const Results to = {expert_offsets, expert_counts, dst2src_map, src2dst_map, row_experts};
        place_experts(shape, numbers, 1, to, tables, spans, [](int, int) {});
        if constexpr (BEHIND_AMAX) only_wait_for_previous_kernel();
        return;
    }
    start_next_kernel();
    const int token = blockIdx.x - 1, keys = (pairs + KEYS - 1) / KEYS * KEYS;
    int* const rows = numbers + keys;
    Some some;
    some.load(shape, threadIdx.x, blockDim.x);
    const auto make_keys = [&] {
        // No address in it sooner: the loads in front would wait for the id. For speed alone, no test sees it.
        asm volatile("" : "+l"(shape.expert_map));
        some.visit_all(shape, threadIdx.x, blockDim.x, keys, [&](int pair, int expert) {
            numbers[pair] = expert < 0 ? NO_ROW : expert * pairs + pair;
        });
    };
    // Several ids and a part of the token are too much for the registers.
    if constexpr (IDS > 1) make_keys();
    const auto find_rows = [&] {
        if constexpr (IDS == 1) make_keys();
        __syncthreads();
        for (int slot = threadIdx.x / LANES; slot < topk; slot += blockDim.x / LANES) {
            const int mine = numbers[token * topk + slot], before = keys_before(dynamic_shared, pairs, mine);
            if (threadIdx.x % LANES == 0) rows[slot] = mine == NO_ROW ? -1 : before;
        }
        __syncthreads();
        for (int slot = threadIdx.x; slot < topk && blockIdx.y == 0; slot += blockDim.x) {
            const int row = rows[slot];
            src2dst_map[token * topk + slot] = row;
            if (row < 0) continue;
            dst2src_map[row] = token;
            row_experts[row] = numbers[token * topk + slot] / pairs;
        }
        if constexpr (BEHIND_AMAX) only_wait_for_previous_kernel();
    };
    quantize_token<false>(
        {x, x_pitch, topk_weights, partials, scale_in, scale_value, scale_stride, int(gridDim.x) - 1, topk, cols, out_cols,
         out, out_pitch, scale_out},
        token, token == 0, true, [](float) {}, find_rows, [&](int slot) { return rows[slot]; },
        [&](int slot, int) { return numbers[token * topk + slot] / pairs; });
}
