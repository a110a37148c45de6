// SPDX-License-Identifier: Apache-2.0
// GEMM 1's unscaled product to the fp8 rows of GEMM 2: activation_quantize, and amax_rows in front of it where one dynamic
// scale serves the whole tensor. Both gather the scales of the row and of its expert's weights, add the bias and apply
// the activation. Rows without an expert count for nothing and are left alone.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float
//   Bias        None | Half | Bfloat16 | float
//   MODE        where the scale of the result comes from, see activation_quantize
//   ACT         activation (enum Act)
//   VECS        vectors of eight columns per thread
//   ROW_THREADS threads of a block of activation_quantize, at most
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads, 8-byte stores
//   PER_CHANNEL one weight scale per column instead of one or two per expert

constexpr bool GATED = ACT <= SWIGLUOAI;
constexpr int IN_FLIGHT = 3;  // vectors of a thread of amax_rows that are loaded before the first is used

// What both kernels read. All of it is older than amax_rows.
struct Source {
    const In* x;               // (rows, x_pitch): gates from column 0, ups from up_column
    long long x_pitch;
    int up_column;
    const int* row_experts;    // (rows,), -1: no expert; null: expert 0
    const float* x_scale;      // [row * x_scale_row_stride + expert * x_scale_expert_stride]; null: 1
    int x_scale_row_stride, x_scale_expert_stride;
    float unit;                // what 1 in x stands for: the GEMM scales down to fit a half
    const float* w_scale;      // [expert * w_scale_stride + up * w_scale_up (+ col)]; null: 1
    int w_scale_stride, w_scale_up;
    const Bias* bias;          // (experts, 2 * cols), or (experts, cols) if not gated
    int cols;
};

__device__ __forceinline__ int expert_of(const Source& source, int row) {
    return source.row_experts ? source.row_experts[row] : 0;
}

__device__ __forceinline__ float row_scale_of(const Source& source, int row, int expert) {
    const long long index = (long long)row * source.x_scale_row_stride + expert * source.x_scale_expert_stride;
    return source.unit * pick(source.x_scale, index, 1.0f);
}

// Eight columns of the gates (up = 0) or the ups (up = 1): x * (row scale * weight scale) + bias.
__device__ __forceinline__ void load_scaled(const Source& source, int row, int expert, float row_scale, int col, int up,
                                            float (&v)[VECTOR]) {
    // Behind the end, the last columns once more: without a branch, all loads of a thread are on their way at once.
    if constexpr (IN_ALIGNED) col = min(col, source.cols - VECTOR);
    const int count = source.cols - col;
    load_vector<IN_ALIGNED>(source.x + row * source.x_pitch + up * source.up_column + col, count, v);
    const long long at = (long long)expert * source.w_scale_stride + up * source.w_scale_up;
    float scale[VECTOR], shift[VECTOR];
    if constexpr (PER_CHANNEL) load_vector<IN_ALIGNED>(source.w_scale + at + col, count, scale);
    const float expert_scale = PER_CHANNEL ? 1.0f : pick(source.w_scale, at, 1.0f);
    if constexpr (sizeof(Bias) > 1) {
        const long long columns = (GATED ? 2 : 1) * (long long)source.cols;
        load_vector<IN_ALIGNED>(source.bias + expert * columns + up * source.cols + col, count, shift);
    }
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        const float factor = row_scale * (PER_CHANNEL ? scale[j] : expert_scale);
        v[j] = sizeof(Bias) > 1 ? fmaf(v[j], factor, shift[j]) : v[j] * factor;
    }
}

// Eight activated columns, zeros from cols on; returns the larger of their largest finite magnitude and `largest`, biased.
__device__ __forceinline__ int load_activated(const Source& source, int row, int expert, float row_scale, int col, int largest,
                                              float (&v)[VECTOR]) {
    float up[VECTOR];
    load_scaled(source, row, expert, row_scale, col, 0, v);
    if constexpr (GATED) load_scaled(source, row, expert, row_scale, col, 1, up);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        v[j] = col + (IN_ALIGNED ? 0 : j) < source.cols ? activate<ACT>(v[j], GATED ? up[j] : 0.0f) : 0.0f;
        largest = max_biased(largest, v[j]);
    }
    return largest;
}

// The largest finite magnitude over all valid rows, one per block in partials. PARTIALS blocks.
extern "C" __global__ void amax_rows(Source source, int rows, float* __restrict__ partials)
{
    wait_for_previous_kernel();
    const u32 vectors = (source.cols + VECTOR - 1) / VECTOR, total = rows * vectors, step = gridDim.x * blockDim.x;
    int largest = 0;
    for (u32 first = blockIdx.x * blockDim.x + threadIdx.x; first < total; first += IN_FLIGHT * step) {
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) {
            const u32 i = first + k * step;
            if (i >= total) continue;
            const int row = i / vectors, col = (i - row * vectors) * VECTOR;
            const int expert = expert_of(source, row), any = max(expert, 0);  // no branch between the loads of a vector
            float v[VECTOR];
            const int with = load_activated(source, row, any, row_scale_of(source, row, any), col, largest, v);
            if (expert >= 0) largest = with;
        }
    }
    const float of_block = block_max(unbiased(largest));
    if (threadIdx.x == 0) partials[blockIdx.x] = of_block;
}

// One block takes one row (blockIdx.x) and, where no maximum over the row is needed, one stretch of its columns
// (blockIdx.y). The scale is, by MODE,
//   TENSOR      that of the maximum in partials, left in scale_out[0] too
//   STATIC      scale_in[expert * scale_expert_stride]
//   TOKEN       that of the row, left in scale_out[row]
extern "C" __global__ void __launch_bounds__(ROW_THREADS) activation_quantize(
    Source source,
    const float* partials,                    // TENSOR
    const float* __restrict__ scale_in,       // STATIC; null: scale_value
    float scale_value,
    int scale_expert_stride,
    int out_cols,                             // columns written: zeros from cols on
    u8* __restrict__ out,                     // (rows, out_pitch)
    long long out_pitch,
    float* __restrict__ scale_out)            // (1,) or, if TOKEN, (rows,)
{
    // Backwards: what amax_rows read last is still in the L2 cache.
    const int row = MODE == TENSOR ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x;
    const int expert = expert_of(source, row);
    const float row_scale = expert < 0 ? 0.0f : row_scale_of(source, row, expert);
    // If TENSOR, amax_rows is in front and all of the source older than that: it is read before that kernel is done.
    // Otherwise the GEMM is, and all but x is older.
    if constexpr (MODE != TENSOR) wait_for_previous_kernel();
    float v[VECS][VECTOR];
    int largest = 0;
    if (expert >= 0) {
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            const int col = (first + i * int(blockDim.x)) * VECTOR;
            largest = load_activated(source, row, expert, row_scale, col, largest, v[i]);
        }
    }
    if constexpr (MODE == TENSOR) wait_for_previous_kernel();

    float scale = 1.0f;
    if constexpr (MODE == TENSOR) {
        scale = scale_of_amax(max_of_partials(partials));
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = scale;
    }
    if (expert < 0) return;
    if constexpr (MODE == STATIC) scale = pick(scale_in, expert * scale_expert_stride, scale_value);
    if constexpr (MODE == TOKEN) {
        scale = scale_of_amax(block_max(unbiased(largest)));
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
