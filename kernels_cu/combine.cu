// SPDX-License-Identifier: Apache-2.0
// combine: GEMM 2's unscaled product back to tokens.
//
// out[token] = sum over slots, in slot order, of weight * (x[row] * (row scale * weight scale) + bias), in float32. One
// block takes one token (blockIdx.x) and one stretch of its columns (blockIdx.y). A slot without a row adds nothing.
//
// Constants put in front of this text:
//   In, Out     Half | Bfloat16 | float
//   Bias        None | Half | Bfloat16 | float
//   TOPK        slots per token
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads and stores
//   PER_CHANNEL one weight scale per column instead of one per expert
//   MOST        slots whose loads are on their way together

constexpr int IN_FLIGHT = TOPK < MOST ? TOPK : MOST;

struct alignas(16) Slot { int row, expert; float weight, factor; };  // expert -1: no row, and row 0 is loaded instead

extern "C" __global__ void combine(
    const In* x,                              // (rows, x_pitch); made by the kernel in front
    long long x_pitch,
    int rows,
    const int* __restrict__ src2dst_map,      // (tokens, TOPK): row, or outside 0 .. rows - 1; null: row = token
    const int* __restrict__ row_experts,      // (rows,); null: expert 0
    const float* __restrict__ topk_weights,   // (tokens, TOPK); null: weights of 1
    const float* __restrict__ x_scale,        // [row * x_scale_row_stride + expert * x_scale_expert_stride]; null: 1
    int x_scale_row_stride,
    int x_scale_expert_stride,
    float unit,                               // what 1 in x stands for: the GEMM scales down to fit a half
    const float* __restrict__ w_scale,        // w_scale[expert * w_scale_stride (+ col)]; null: 1
    int w_scale_stride,
    const Bias* __restrict__ bias,            // (experts, cols)
    int skip_padding,                         // a token without any row is not written
    int cols,
    Out* __restrict__ out,                    // (tokens, out_pitch)
    long long out_pitch)
{
    const int token = blockIdx.x;
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int count = cols - col;

    // Each slot's indices and scales first, so that the rows' loads wait for none of them, and once for the block, so that
    // registers are left for the rows. The kernel in front makes x, and did not start the next one before it had waited
    // itself: everything but x is older and read before its end.
    __shared__ Slot slots[TOPK];
    bool any = false;
    for (int slot = threadIdx.x; slot < TOPK; slot += blockDim.x) {
        const long long pair = (long long)token * TOPK + slot;
        const int row = src2dst_map ? src2dst_map[pair] : token;
        const float weight = topk_weights ? topk_weights[pair] : 1.0f;
        const bool valid = row >= 0 && row < rows;
        const int expert = !valid ? -1 : row_experts ? row_experts[row] : 0;
        float factor = 0.0f;
        if (expert >= 0) {
            const long long index = (long long)row * x_scale_row_stride + expert * x_scale_expert_stride;
            factor = unit * pick(x_scale, index, 1.0f);
            if constexpr (!PER_CHANNEL) factor *= pick(w_scale, (long long)expert * w_scale_stride, 1.0f);
            any = true;
        }
        slots[slot] = {valid ? row : 0, expert, weight, factor};
    }
    any = __syncthreads_or(any);
    // What the columns have, of some slots: no kernel makes it.
    float scale[IN_FLIGHT][VECTOR], shift[IN_FLIGHT][VECTOR];
    const auto load_columns = [&](int first) {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            if (first + i >= TOPK) continue;
            const long long expert = max(slots[first + i].expert, 0);
            if constexpr (PER_CHANNEL) load_vector<IN_ALIGNED>(w_scale + expert * w_scale_stride + col, count, scale[i]);
            if constexpr (sizeof(Bias) > 1) load_vector<IN_ALIGNED>(bias + expert * cols + col, count, shift[i]);
        }
    };
    if (any && col < cols) load_columns(0);
    wait_for_previous_kernel();
    if (col >= cols) return;

    float sum[VECTOR] = {};
#pragma unroll
    for (int first = 0; any && first < TOPK; first += IN_FLIGHT) {
        float v[IN_FLIGHT][VECTOR];
        if (first > 0) load_columns(first);
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            if (first + i >= TOPK) continue;
            const Slot slot = slots[first + i];  // no branch without a row: loads would wait for one another
            load_vector<IN_ALIGNED, PER_CHANNEL>(x + slot.row * x_pitch + col, count, v[i]);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            if (first + i >= TOPK || slots[first + i].expert < 0) continue;
            const Slot slot = slots[first + i];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float by = PER_CHANNEL ? slot.factor * scale[i][j] : slot.factor;
                const float scaled = sizeof(Bias) > 1 ? fmaf(v[i][j], by, shift[i][j]) : v[i][j] * by;
                sum[j] = fmaf(slot.weight, scaled, sum[j]);
            }
        }
    }
    if (any || !skip_padding) store_vector<OUT_ALIGNED>(out + token * out_pitch + col, count, sum);
}
