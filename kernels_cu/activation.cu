// SPDX-License-Identifier: Apache-2.0
// activation_quantize: GEMM 1's unscaled product to the fp8 rows of GEMM 2.
//
// Gathers the scales of the row and of its expert's weights, adds the bias, applies the activation and quantises, in one
// pass. One block takes one row (blockIdx.x) and, where no maximum over the row is needed, one stretch of its columns
// (blockIdx.y). Rows without an expert are left alone.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float
//   Bias        None | Half | Bfloat16 | float
//   MODE        as in quantize.cu; STATIC is scale_in[expert * scale_expert_stride]
//   ACT         activation (enum Act)
//   VECS        vectors of eight columns per thread
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads, 8-byte stores
//   PER_CHANNEL one weight scale per column instead of one or two per expert

constexpr bool GATED = ACT <= SWIGLUOAI;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678118654752f); }
__device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
// Comparisons instead of fminf: a NaN has to stay one.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float at_least(float x, float limit) { return x < limit ? limit : x; }

__device__ __forceinline__ float activate(float gate, float up) {
    if constexpr (ACT == SILU) return silu(gate) * up;
    if constexpr (ACT == GELU) return gelu(gate) * up;
    if constexpr (ACT == GELU_TANH) return gelu_tanh(gate) * up;
    if constexpr (ACT == SWIGLUOAI) {
        const float g = at_most(gate, 7.0f);
        return g * sigmoid(1.702f * g) * (at_least(at_most(up, 7.0f), -7.0f) + 1.0f);
    }
    if constexpr (ACT == SILU_NO_MUL) return silu(gate);
    if constexpr (ACT == GELU_NO_MUL) return gelu(gate);
    const float positive = at_least(gate, 0.0f);
    return positive * positive;
}

struct WeightScales {
    const float* scales;   // of this row's expert, or null
    int up_offset;         // from a gate's scale to its up's
    float row_scale;
};

// v = v * (row scale * weight scale) + bias, for eight columns of the gate half or the up half.
__device__ __forceinline__ void scale_half(float (&v)[VECTOR], int col, int count, int up, WeightScales by,
                                           const Bias* bias, int cols) {
    float scale[VECTOR], shift[VECTOR];
    if constexpr (PER_CHANNEL) {
        load_vector<IN_ALIGNED>(by.scales + up * by.up_offset + col, count, scale);
    } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) scale[j] = pick(by.scales, up * by.up_offset, 1.0f);
    }
    if constexpr (sizeof(Bias) > 1) load_vector<IN_ALIGNED>(bias + (long long)up * cols + col, count, shift);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        v[j] *= by.row_scale * scale[j];
        if constexpr (sizeof(Bias) > 1) v[j] += shift[j];
    }
}

extern "C" __global__ void activation_quantize(
    const In* __restrict__ x,                 // (rows, x_pitch): gates from column 0, ups from up_column
    long long x_pitch,
    int up_column,
    const int* __restrict__ row_experts,      // (rows,), -1: no expert; null: expert 0
    const float* __restrict__ x_scale,        // [row * x_scale_row_stride + expert * x_scale_expert_stride]; null: 1
    int x_scale_row_stride,
    int x_scale_expert_stride,
    float unit,                               // what 1 in x stands for: the GEMM scales down to fit a half
    const float* __restrict__ w_scale,        // w_scale[expert * w_scale_stride + up * w_scale_up (+ col)]; null: 1
    int w_scale_stride,
    int w_scale_up,
    const Bias* __restrict__ bias,            // (experts, 2 * cols), or (experts, cols) if not gated
    const float* __restrict__ scale_in,       // STATIC; null: scale_value
    float scale_value,
    int scale_expert_stride,
    float* amax,
    int cols,
    int out_cols,                             // columns written: zeros from cols on
    u8* __restrict__ out,                     // (rows, out_pitch)
    long long out_pitch,
    float* __restrict__ scale_out)            // (1,) or, if TOKEN, (rows,)
{
    wait_for_previous_kernel();
    const int row = blockIdx.x;
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x;
    const int expert = row_experts ? row_experts[row] : 0;
    float scale = 1.0f;
    if constexpr (MODE == FROM_AMAX) {
        scale = scale_of_amax(*amax);
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = scale;
    }
    if (expert < 0) return;

    const In* source = x + row * x_pitch;
    const Bias* expert_bias = sizeof(Bias) > 1 ? bias + (long long)expert * (GATED ? 2 : 1) * cols : nullptr;
    const WeightScales by = {w_scale ? w_scale + (long long)expert * w_scale_stride : nullptr, w_scale_up,
                             unit * pick(x_scale, row * x_scale_row_stride + expert * x_scale_expert_stride, 1.0f)};
    float v[VECS][VECTOR];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        const int col = (first + i * int(blockDim.x)) * VECTOR;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v[i][j] = 0.0f;
        if (col >= cols) continue;
        const int count = cols - col;
        float up[VECTOR];
        load_vector<IN_ALIGNED>(source + col, count, v[i]);
        if constexpr (GATED) load_vector<IN_ALIGNED>(source + up_column + col, count, up);
        scale_half(v[i], col, count, 0, by, expert_bias, cols);
        if constexpr (GATED) scale_half(up, col, count, 1, by, expert_bias, cols);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            v[i][j] = j < count ? activate(v[i][j], GATED ? up[j] : 0.0f) : 0.0f;
            if constexpr (MODE == AMAX || MODE == TOKEN) largest = fmaxf(largest, finite_magnitude(v[i][j]));
        }
    }
    if constexpr (MODE == AMAX || MODE == TOKEN) largest = block_max(largest);
    if constexpr (MODE == AMAX) {
        if (threadIdx.x == 0) atomic_raise(amax, largest);
        return;
    }
    if constexpr (MODE == STATIC) scale = pick(scale_in, expert * scale_expert_stride, scale_value);
    if constexpr (MODE == TOKEN) {
        scale = scale_of_amax(largest);
        if (threadIdx.x == 0) scale_out[row] = scale;
    }
    const Divisor divisor(scale);
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        const int col = (first + i * int(blockDim.x)) * VECTOR;
        if (col < out_cols)
            store_codes<OUT_ALIGNED>(out + row * out_pitch + col, out_cols - col, encode_vector(v[i], divisor));
    }
}
