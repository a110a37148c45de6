// SPDX-License-Identifier: Apache-2.0
// Hidden states to fp8 rows in expert order, with their scales: quantize_shuffle, and amax_tokens in front of it where one
// dynamic scale serves a whole tensor that is not small.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float | Fp8 (codes pass through unchanged, only scales are made)
//   MODE        where the scale comes from, see quantize_shuffle
//   VECS        vectors of eight columns per thread
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads, 8-byte stores
//   WEIGHTED    the router weight multiplies the input
//   PER_EXPERT  STATIC: one scale per expert instead of per tensor or token
//   ALONE       TENSOR without amax_tokens: each block finds the maximum of all tokens
//   FRESH       x comes from the kernel in front, as rows of experts, and so do the partials

constexpr int IN_FLIGHT = 4;  // vectors of a thread that are loaded before the first is used, where a maximum is looked for

__device__ __forceinline__ float max_of_vector(const float (&v)[VECTOR]) {
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) largest = fmaxf(largest, finite_magnitude(v[j]));
    return largest;
}

// The largest finite magnitude of what thread `thread` of `threads` side by side finds in all tokens, times factor(token).
template <typename Factor>
__device__ __forceinline__ float max_of_tokens(const In* x, long long x_pitch, u32 tokens, int cols, u32 thread, u32 threads,
                                               Factor factor) {
    const u32 vectors = (cols + VECTOR - 1) / VECTOR;
    // From one vector of a thread to its next: some tokens on, and some vectors.
    const u32 more_tokens = threads / vectors, more_vectors = threads % vectors;
    u32 token = thread / vectors, vector = thread % vectors;
    float largest = 0.0f;
    while (token < tokens) {
        float v[IN_FLIGHT][VECTOR];
        u32 of[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            // The last token once more behind the end: with a branch around each, loads wait for one another.
            of[i] = min(token, tokens - 1);
            const int col = vector * VECTOR;
            load_vector<IN_ALIGNED>(x + of[i] * x_pitch + col, cols - col, v[i]);
            vector += more_vectors;
            token += more_tokens + (vector >= vectors);
            if (vector >= vectors) vector -= vectors;
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            largest = fmaxf(largest, finite_magnitude(max_of_vector(v[i]) * factor(of[i])));
    }
    return largest;
}

// The largest finite magnitude of all tokens (or of all valid rows), one per block in partials. PARTIALS blocks.
extern "C" __global__ void amax_tokens(
    const In* __restrict__ x,                 // (tokens, cols)
    long long x_pitch,
    const int* src2dst_map,                   // (tokens, topk), read if WEIGHTED or valid_only
    const float* __restrict__ topk_weights,   // (tokens, topk), read if WEIGHTED
    int valid_only,                           // a token without a valid row does not count
    int tokens,
    int topk,
    int cols,
    float* __restrict__ partials)             // (PARTIALS,)
{
    // Without the map this runs beside the routing kernel in front: x is older than that.
    const bool needs_map = WEIGHTED || valid_only;
    start_next_kernel();  // it reads nothing but x before its own wait
    if (needs_map) wait_for_previous_kernel();
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    const float largest = block_max(max_of_tokens(x, x_pitch, tokens, cols, thread, threads, [&](u32 token) {
        float factor = needs_map ? 0.0f : 1.0f;
        for (int slot = 0; needs_map && slot < topk; ++slot) {
            const long long pair = (long long)token * topk + slot;
            if (src2dst_map[pair] >= 0) factor = fmaxf(factor, WEIGHTED ? fabsf(topk_weights[pair]) : 1.0f);
        }
        return factor;
    }));
    if (threadIdx.x == 0) partials[blockIdx.x] = largest;
    if (!needs_map) wait_for_previous_kernel();
}

// One block takes one token (blockIdx.x) and, where no maximum over the token is needed, one stretch of its columns
// (blockIdx.y): the token is read once and written to the row of each of its slots. The scale is, by MODE,
//   TENSOR      that of the maximum in partials, or of all tokens if ALONE, left in scale_out[0] too
//   STATIC      scale_in[expert] if PER_EXPERT, else scale_in[token * scale_stride]; left in scale_out[row] if not null
//   TOKEN       that of the row, left in scale_out[row]
// Fp8 input is always STATIC; with WEIGHTED the router weight goes into the row's scale.
extern "C" __global__ void __launch_bounds__(MAX_ROW_THREADS) quantize_shuffle(
    const In* x,                              // (tokens, cols)
    long long x_pitch,                        // elements from one token to the next
    const int* src2dst_map,                   // (tokens, topk): row or -1; null: row = token
    const int* row_experts,                   // (rows,), read if PER_EXPERT or FRESH; a row of expert -1 is left out
    const float* __restrict__ topk_weights,   // (tokens, topk), read if WEIGHTED
    const float* partials,                    // TENSOR
    const float* __restrict__ scale_in,       // STATIC; null: scale_value
    float scale_value,
    int scale_stride,
    int topk,
    int cols,
    int out_cols,                             // columns written: zeros from cols on
    u8* __restrict__ out,                     // (rows, out_pitch)
    long long out_pitch,
    float* __restrict__ scale_out)
{
    start_next_kernel();  // what that reads before its own wait does not come from here
    constexpr bool READY = sizeof(In) == 1;
    constexpr bool CODES_PER_SLOT = (WEIGHTED || PER_EXPERT) && !READY;
    // Backwards: what amax_tokens read last is still in the L2 cache.
    const int token = MODE == TENSOR ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x;
    const int* rows = src2dst_map ? src2dst_map + (long long)token * topk : nullptr;

    bool wanted = true;
    if constexpr (FRESH) {
        wanted = row_experts[token] >= 0;  // older than the kernel in front
        wait_for_previous_kernel();
        if (!wanted && blockIdx.x > 0) return;  // block 0 leaves the scale, whatever its row
    }
    // Otherwise x is older than the kernel in front (routing or amax_tokens): it is read before that kernel is done.
    float v[VECS][VECTOR];
    float largest = 0.0f;
    if constexpr (ALONE)
        largest = max_of_tokens(x, x_pitch, gridDim.x, cols, threadIdx.x, blockDim.x, [](u32) { return 1.0f; });
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        const int col = (first + i * int(blockDim.x)) * VECTOR;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v[i][j] = 0.0f;
        if (wanted && col < cols) load_vector<IN_ALIGNED>(x + token * x_pitch + col, cols - col, v[i]);
        if constexpr (MODE == TOKEN) largest = fmaxf(largest, max_of_vector(v[i]));
    }
    if constexpr (MODE == TOKEN || ALONE) largest = block_max(largest);

    uint2 codes[VECS];
    const auto encode = [&](float weight, float scale) {
        const Divisor by(scale);
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            float weighted[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) weighted[j] = v[i][j] * weight;
            codes[i] = encode_vector(weighted, by);
        }
    };
    float token_scale = 1.0f;
    if constexpr (MODE == TOKEN) token_scale = scale_of_amax(largest);
    if constexpr (MODE == STATIC && !PER_EXPERT)
        token_scale = pick(scale_in, (long long)token * scale_stride, scale_value);
    if constexpr (MODE != TENSOR && !CODES_PER_SLOT) encode(1.0f, READY ? 1.0f : token_scale);
    if constexpr (!FRESH) wait_for_previous_kernel();
    // Each lane has the row of a slot, loaded before anything is waited for.
    const auto row_of_lane = [&](int slot) {
        slot += threadIdx.x % LANES;
        return !rows ? token : slot < topk ? rows[slot] : -1;
    };
    int mine = row_of_lane(0);
    if constexpr (MODE == TENSOR) {
        token_scale = scale_of_amax(ALONE ? largest : max_of_partials(partials));
        if constexpr (!CODES_PER_SLOT) encode(1.0f, token_scale);
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = token_scale;
    }

    for (int slot = 0; slot < topk; ++slot) {
        if (slot > 0 && slot % LANES == 0) mine = row_of_lane(slot);
        const int row = __shfl_sync(FULL_WARP, mine, slot % LANES);
        if (row < 0 || !wanted) continue;
        const float weight = WEIGHTED ? topk_weights[(long long)token * topk + slot] : 1.0f;
        float scale = token_scale;
        if constexpr (PER_EXPERT) scale = scale_in[row_experts[row]];
        if constexpr (MODE == TOKEN && WEIGHTED) scale = scale_of_amax(finite_magnitude(largest * weight));
        if constexpr (CODES_PER_SLOT) encode(weight, scale);
        if (MODE != TENSOR && scale_out && blockIdx.y == 0 && threadIdx.x == 0)
            scale_out[row] = READY ? scale * weight : scale;
        u8* target = out + row * out_pitch;
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            const int col = (first + i * int(blockDim.x)) * VECTOR;
            if (col < out_cols) store_codes<OUT_ALIGNED>(target + col, out_cols - col, codes[i]);
        }
    }
}
