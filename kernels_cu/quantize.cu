// SPDX-License-Identifier: Apache-2.0
// quantize_shuffle: hidden states to fp8 rows in expert order, with their scales.
//
// One block takes one token (blockIdx.x) and, where no maximum over the token is needed, one stretch of its columns
// (blockIdx.y): the token is read once and written to the row of each of its slots.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float | Fp8 (codes pass through unchanged, only scales are made)
//   MODE        where the scale comes from, see below
//   VECS        vectors of eight columns per thread
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads, 8-byte stores
//   WEIGHTED    the router weight multiplies the input
//   PER_EXPERT  STATIC: one scale per expert instead of per tensor or token
//
// MODE
// AMAX       raises *amax to the largest finite magnitude and writes nothing else
// FROM_AMAX  dynamic per tensor: the scale of *amax, left in scale_out[0]
// STATIC     scale_in[expert] if PER_EXPERT, else scale_in[token * scale_stride]; scale_out[row] if not null
// TOKEN      dynamic per token: the scale of each row, in scale_out[row]
// Fp8 input is always STATIC; with WEIGHTED the router weight goes into the row's scale.

extern "C" __global__ void quantize_shuffle(
    const In* __restrict__ x,                 // (tokens, cols)
    long long x_pitch,                        // elements from one token to the next
    const int* __restrict__ src2dst_map,      // (tokens, topk): row or -1; null: row = token
    const int* __restrict__ row_experts,      // (rows,), read if PER_EXPERT
    const float* __restrict__ topk_weights,   // (tokens, topk), read if WEIGHTED
    const float* __restrict__ scale_in,       // STATIC; null: scale_value
    float scale_value,
    int scale_stride,
    float* amax,                              // AMAX, FROM_AMAX
    int amax_of_valid,                        // AMAX: a token without a valid row does not count
    int topk,
    int cols,
    int out_cols,                             // columns written: zeros from cols on
    u8* __restrict__ out,                     // (rows, out_pitch)
    long long out_pitch,
    float* __restrict__ scale_out)
{
    wait_for_previous_kernel();
    constexpr bool READY = sizeof(In) == 1;
    constexpr bool CODES_PER_SLOT = (WEIGHTED || PER_EXPERT) && !READY;
    const int token = blockIdx.x;
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x;
    const int* rows = src2dst_map ? src2dst_map + (long long)token * topk : nullptr;

    float v[VECS][VECTOR];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        const int col = (first + i * int(blockDim.x)) * VECTOR;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v[i][j] = 0.0f;
        if (col < cols) load_vector<IN_ALIGNED>(x + token * x_pitch + col, cols - col, v[i]);
        if constexpr (MODE == AMAX || MODE == TOKEN)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) largest = fmaxf(largest, finite_magnitude(v[i][j]));
    }
    if constexpr (MODE == AMAX || MODE == TOKEN) largest = block_max(largest);
    if constexpr (MODE == AMAX && !WEIGHTED) {
        bool counts = !amax_of_valid;
        for (int slot = 0; slot < topk && !counts; ++slot) counts = rows[slot] >= 0;
        if (counts && threadIdx.x == 0) atomic_raise(amax, largest);
        return;
    }

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
    if constexpr (MODE == FROM_AMAX) token_scale = scale_of_amax(*amax);
    if constexpr (MODE == TOKEN) token_scale = scale_of_amax(largest);
    if constexpr (MODE == STATIC && !PER_EXPERT) token_scale = pick(scale_in, (long long)token * scale_stride, scale_value);
    if constexpr (!CODES_PER_SLOT && MODE != AMAX) encode(1.0f, READY ? 1.0f : token_scale);
    if (MODE == FROM_AMAX && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = token_scale;

    for (int slot = 0; slot < topk; ++slot) {
        const int row = rows ? rows[slot] : token;
        if (row < 0) continue;
        const float weight = WEIGHTED ? topk_weights[(long long)token * topk + slot] : 1.0f;
        if constexpr (MODE == AMAX) {
            if (threadIdx.x == 0) atomic_raise(amax, finite_magnitude(largest * weight));
            continue;
        }
        float scale = token_scale;
        if constexpr (PER_EXPERT) scale = scale_in[row_experts[row]];
        if constexpr (MODE == TOKEN && WEIGHTED) scale = scale_of_amax(largest * fabsf(weight));
        if constexpr (CODES_PER_SLOT) encode(weight, scale);
        if (MODE != FROM_AMAX && scale_out && blockIdx.y == 0 && threadIdx.x == 0)
            scale_out[row] = READY ? scale * weight : scale;
        u8* target = out + row * out_pitch;
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            const int col = (first + i * int(blockDim.x)) * VECTOR;
            if (col < out_cols) store_codes<OUT_ALIGNED>(target + col, out_cols - col, codes[i]);
        }
    }
}
