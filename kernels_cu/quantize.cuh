// SPDX-License-Identifier: Apache-2.0
// How a block quantises a token.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float | Fp8 (codes pass through unchanged, only scales are made)
//   MODE        where the scale comes from, see Quantization
//   VECS        vectors of eight columns per thread
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads, 8-byte stores
//   WEIGHTED    the router weight multiplies the input
//   PER_EXPERT  STATIC: one scale per expert instead of per tensor or token
//   ALONE       TENSOR without amax_tokens: each block finds the maximum of all tokens

__device__ __forceinline__ float max_of_vector(const float (&v)[VECTOR]) {
    int largest = 0;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) largest = max_biased(largest, v[j]);
    return unbiased(largest);
}

// The same of the elements times `weight`, which may make some of them infinite.
__device__ __forceinline__ float max_of_vector(const float (&v)[VECTOR], float weight) {
    float largest = fabsf(max_of_vector(v) * weight);
    if (largest <= LARGEST) return largest;
    largest = 0.0f;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) largest = fmaxf(largest, finite_magnitude(v[j] * weight));
    return largest;
}

// The largest max_of(token, vector) of what thread `thread` of `threads` side by side finds in all tokens.
template <typename MaxOf>
__device__ __forceinline__ float max_of_tokens(const In* x, long long x_pitch, u32 tokens, int cols, u32 thread, u32 threads,
                                               MaxOf max_of) {
    constexpr int IN_FLIGHT = 4;  // vectors of a thread that are loaded before the first is used
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
            largest = fmaxf(largest, max_of(of[i], v[i]));
    }
    return largest;
}

// Where the codes of a token go, and where their scale comes from, by MODE:
//   TENSOR      that of the maximum in partials, or of all tokens if ALONE, left in scale_out[0] too
//   STATIC      scale_in[expert] if PER_EXPERT, else scale_in[token * scale_stride]; left in scale_out[row] if not null
//   TOKEN       that of the row, left in scale_out[row]
// Fp8 input is always STATIC; with WEIGHTED the router weight goes into the row's scale.
struct Quantization {
    const In* x;                // (tokens, cols)
    long long x_pitch;          // elements from one token to the next
    const float* topk_weights;  // (tokens, topk), read if WEIGHTED
    const float* partials;      // TENSOR
    const float* scale_in;      // STATIC; null: scale_value
    float scale_value;
    int scale_stride;
    int tokens, topk, cols;
    int out_cols;               // columns written: zeros from cols on
    u8* out;                    // (rows, out_pitch)
    long long out_pitch;
    float* scale_out;
};

// A token, or a stretch of its columns (blockIdx.y) where no maximum over the token is needed: it is read once and written to
// the row of each of its slots. Between the two every thread calls find_rows(); then row_of(slot) is the row, or negative,
// and expert_of(slot, row) the expert. first_block: leaves the scale of all. wanted: otherwise there is nothing to write, but
// no load waits for that. ONE_SLOT: there is but one, so that codes need not be kept for the next. TOKEN: each warp calls
// once_read(the largest magnitude of what it has loaded) before it waits for the other warps.
template <bool ONE_SLOT, typename OnceRead, typename FindRows, typename RowOf, typename ExpertOf>
__device__ __forceinline__ void quantize_token(const Quantization& q, int token, bool first_block, bool wanted,
                                               OnceRead once_read, FindRows find_rows, RowOf row_of, ExpertOf expert_of) {
    constexpr bool READY = sizeof(In) == 1;
    constexpr bool CODES_PER_SLOT = (ONE_SLOT || WEIGHTED || PER_EXPERT) && !READY;
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x;
    float v[VECS][VECTOR];
    float largest = 0.0f;
    if constexpr (ALONE)
        largest = max_of_tokens(q.x, q.x_pitch, q.tokens, q.cols, threadIdx.x, blockDim.x,
                                [](u32, const float (&values)[VECTOR]) { return max_of_vector(values); });
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        const int col = (first + i * int(blockDim.x)) * VECTOR;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v[i][j] = 0.0f;
        if (col < q.cols) load_vector<IN_ALIGNED>(q.x + token * q.x_pitch + col, q.cols - col, v[i]);
        if constexpr (MODE == TOKEN) largest = fmaxf(largest, max_of_vector(v[i]));
    }
    if constexpr (MODE == TOKEN || ALONE) {
        largest = warp_max(largest);
        if constexpr (MODE == TOKEN) once_read(largest);
        largest = max_of_warps(largest);
    }

    const auto codes_of = [&](int i, float weight, const Divisor& by) {
        float weighted[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) weighted[j] = v[i][j] * weight;
        return encode_vector(weighted, by);
    };
    uint2 codes[VECS];
    const auto encode = [&](float scale) {
        const Divisor by(scale);
#pragma unroll
        for (int i = 0; i < VECS; ++i) codes[i] = codes_of(i, 1.0f, by);
    };
    float token_scale = 1.0f;
    if constexpr (MODE == TOKEN) token_scale = scale_of_amax(largest);
    if constexpr (MODE == STATIC && !PER_EXPERT)
        token_scale = pick(q.scale_in, (long long)token * q.scale_stride, q.scale_value);
    if constexpr (MODE != TENSOR && !CODES_PER_SLOT) encode(READY ? 1.0f : token_scale);
    find_rows();
    // Each lane has the row of a slot, loaded before anything is waited for.
    const auto row_of_lane = [&](int slot) {
        slot += threadIdx.x % LANES;
        return slot < q.topk ? row_of(slot) : -1;
    };
    int mine = row_of_lane(0);
    if constexpr (MODE == TENSOR) {
        token_scale = scale_of_amax(ALONE ? largest : max_of_partials(q.partials));
        if constexpr (!CODES_PER_SLOT) encode(token_scale);
        if (first_block && blockIdx.y == 0 && threadIdx.x == 0) q.scale_out[0] = token_scale;
    }

    const int slots = ONE_SLOT ? 1 : q.topk;
    for (int slot = 0; slot < slots; ++slot) {
        if (slot > 0 && slot % LANES == 0) mine = row_of_lane(slot);
        const int row = __shfl_sync(FULL_WARP, mine, slot % LANES);
        if (row < 0 || !wanted) continue;
        const float weight = WEIGHTED ? q.topk_weights[(long long)token * q.topk + slot] : 1.0f;
        float scale = token_scale;
        if constexpr (PER_EXPERT) scale = q.scale_in[expert_of(slot, row)];
        if constexpr (MODE == TOKEN && WEIGHTED) {
            float weighted = fabsf(largest * weight);
            if (!(weighted <= LARGEST)) {  // of some elements, perhaps not of all
                weighted = 0.0f;
#pragma unroll
                for (int i = 0; i < VECS; ++i) weighted = fmaxf(weighted, max_of_vector(v[i], weight));
                __syncthreads();  // other warps may still read what the block has found last
                weighted = block_max(weighted);
            }
            scale = scale_of_amax(weighted);
        }
        if (MODE != TENSOR && q.scale_out && blockIdx.y == 0 && threadIdx.x == 0)
            q.scale_out[row] = READY ? scale * weight : scale;
        u8* target = q.out + row * q.out_pitch;
        const Divisor by(scale);
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            const int col = (first + i * int(blockDim.x)) * VECTOR;
            // What is encoded here is on its way while the next is encoded.
            if (col < q.out_cols)
                store_codes<OUT_ALIGNED>(target + col, q.out_cols - col, CODES_PER_SLOT ? codes_of(i, weight, by) : codes[i]);
        }
    }
}
