// SPDX-License-Identifier: Apache-2.0
// Hidden states to fp8 rows in expert order, with their scales: quantize_shuffle, and amax_tokens in front of it where one
// dynamic scale serves a whole tensor that is not small. quantize.cuh has the constants; and
//   FRESH       x comes from the kernel in front, as rows of experts, and so do the partials
//   ROW_THREADS threads of a block of quantize_shuffle, at most

// The largest finite magnitude of all tokens (or of all valid rows), one per block in partials. PARTIALS blocks.
extern "C" __global__ void amax_tokens(
    const In* x,                              // (tokens, cols)
    long long x_pitch,
    const int* src2dst_map,                   // (tokens, topk), read if WEIGHTED or valid_only
    const float* __restrict__ topk_weights,   // (tokens, topk), read if WEIGHTED
    int valid_only,                           // a token without a valid row does not count
    int in_front,                             // of all kernels of the call
    int tokens,
    int topk,
    int cols,
    float* __restrict__ partials)             // (PARTIALS,)
{
    // Otherwise routing is in front, and this runs beside it, if it can do without the map: x is older than that.
    const bool waits = in_front || WEIGHTED || valid_only;
    if (waits) wait_for_previous_kernel();
    else start_next_kernel();  // it reads nothing but x before its own wait
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    const float largest = block_max(max_of_tokens(x, x_pitch, tokens, cols, thread, threads, [&](u32 token, const auto& v) {
        if (!WEIGHTED && !valid_only) return max_of_vector(v);
        float largest = 0.0f;
        for (int slot = 0; slot < topk; ++slot) {
            const long long pair = (long long)token * topk + slot;
            if (src2dst_map[pair] < 0) continue;
            largest = fmaxf(largest, WEIGHTED ? max_of_vector(v, topk_weights[pair]) : max_of_vector(v));
        }
        return largest;
    }));
    if (threadIdx.x == 0) partials[blockIdx.x] = largest;
    if (!waits) wait_for_previous_kernel();
}

// The whole lines of what this warp has read of a token: `read` says that it has.
__device__ __forceinline__ void discard_lines(const In* x, int cols, float read) {
    constexpr int LINES = LANES * VECTOR * int(sizeof(In)) / LINE;  // of a vector of each lane
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x / LANES * LANES;
    const u64 end = reinterpret_cast<u64>(x + cols);
    for (int i = threadIdx.x % LANES; i < VECS * LINES; i += LANES) {
        const u64 begin = reinterpret_cast<u64>(x + (first + i / LINES * int(blockDim.x)) * VECTOR);
        const u64 line = (begin + LINE - 1) / LINE * LINE + i % LINES * LINE;
        if (line + LINE <= min(begin + LINES * LINE, end)) discard_line(reinterpret_cast<const void*>(line), read);
    }
}

// One block takes one token (blockIdx.x).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) quantize_shuffle(
    const In* x, long long x_pitch,
    const int* src2dst_map,                   // (tokens, topk): row or -1; null: row = token
    const int* row_experts,                   // (rows,), read if PER_EXPERT or FRESH; a row of expert -1 is left out
    const float* __restrict__ topk_weights, const float* partials, const float* __restrict__ scale_in, float scale_value,
    int scale_stride, int topk, int cols, int out_cols, u8* __restrict__ out, long long out_pitch,
    float* __restrict__ scale_out)
{
    start_next_kernel();  // what that reads before its own wait does not come from here
    // Backwards: what amax_tokens read last is still in the L2 cache.
    const int token = MODE == TENSOR ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int* rows = src2dst_map ? src2dst_map + (long long)token * topk : nullptr;
    bool wanted = true;
    if constexpr (FRESH) {
        wanted = row_experts[token] >= 0;  // older than the kernel in front
        wait_for_previous_kernel();
    }
    // Nobody else reads what GEMM 1 has left: it need not go to memory.
    const auto discard = [&](float read) {
        if constexpr (FRESH) {
            const bool worthwhile = gridDim.x * x_pitch * int(sizeof(In)) <= MOST_TO_DISCARD;
            if (wanted && worthwhile) discard_lines(x + token * x_pitch, cols, read);
        }
    };
    // Otherwise x is older than the kernel in front (routing or amax_tokens): it is read before that kernel is done.
    quantize_token<FRESH>(
        {x, x_pitch, topk_weights, partials, scale_in, scale_value, scale_stride, int(gridDim.x), topk, cols, out_cols, out,
         out_pitch, scale_out},
        token, blockIdx.x == 0, wanted, discard,
        [&] {
            if constexpr (!FRESH) wait_for_previous_kernel();
        },
        [&](int slot) { return !FRESH && rows ? rows[slot] : token; }, [&](int, int row) { return row_experts[row]; });
    if constexpr (MODE == TENSOR) {
        __syncwarp();  // all lanes have made their codes
        discard(0.0f);
    }
}
