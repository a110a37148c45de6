// SPDX-License-Identifier: Apache-2.0
// combine: GEMM 2's unscaled product back to tokens.
//
// out[token] = sum over slots, in slot order, of weight * (x[row] * (row scale * weight scale) + bias), in float32. One
// block takes TOKENS tokens (from TOKENS * blockIdx.x on) and one stretch of their columns (blockIdx.y). A slot without a row adds
// nothing.
//
// Constants put in front of this text:
//   In, Out     Half | Bfloat16 | float
//   Bias        None | Half | Bfloat16 | float
//   TOPK        slots per token
//   TOKENS      tokens of a block: with many of them, what their slots say is waited for once
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads and stores
//   PER_CHANNEL one weight scale per column instead of one per expert
//   MOST        slots whose loads are on their way together

constexpr int PAIRS = TOKENS * TOPK, IN_FLIGHT = PAIRS < MOST ? PAIRS : MOST;

// expert -1: no row, and row 0 is loaded instead. The unit is in the weight and not in the factor: unit times scale could
// overflow.
struct alignas(16) Slot { int row, expert; float weight, factor; };

// Adds to the sum what a slot's row has in eight columns, with the scales and the bias of these.
__device__ __forceinline__ void add_row(float (&sum)[VECTOR], const Slot& slot, const Vector<In>& x, const Vector<float>& scale,
                                        const Vector<Bias>& shift, float per_unit) {
    float v[VECTOR], by[VECTOR], add[VECTOR];
    x.values(v);
    if constexpr (PER_CHANNEL) scale.values(by);
    if constexpr (sizeof(Bias) > 1) shift.values(add);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        const float factor = PER_CHANNEL ? slot.factor * by[j] : slot.factor;
        const float scaled = sizeof(Bias) > 1 ? fmaf(v[j], factor, add[j] * per_unit) : v[j] * factor;
        sum[j] = fmaf(slot.weight, scaled, sum[j]);
    }
}

extern "C" __global__ void combine(
    const In* x,                              // (rows, x_pitch); made by the kernel in front
    long long x_pitch,
    int rows,
    int tokens,
    const int* __restrict__ src2dst_map,      // (tokens, TOPK): row, or outside 0 .. rows - 1; null: row = token
    const int* __restrict__ row_experts,      // (rows,); null: expert 0
    const float* __restrict__ topk_weights,   // (tokens, TOPK); null: weights of 1
    const float* __restrict__ x_scale,        // [row * x_scale_row_stride + expert * x_scale_expert_stride]
    int x_scale_row_stride,
    int x_scale_expert_stride,
    float x_scale_value,                      // where that is null
    float unit,                               // what 1 in x stands for, a power of two: the GEMM scales down to fit a half
    const float* __restrict__ w_scale,        // w_scale[expert * w_scale_stride (+ col)]; null: 1
    int w_scale_stride,
    const Bias* __restrict__ bias,            // (experts, cols)
    int skip_padding,                         // a token without any row is not written
    int cols,
    Out* __restrict__ out,                    // (tokens, out_pitch)
    long long out_pitch)
{
    const int first_token = blockIdx.x * TOKENS;
    const int col = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int count = cols - col;

    // Each slot's indices and scales first, so that the rows' loads wait for none of them, and once for the block, so that
    // registers are left for the rows. The kernel in front makes x, and did not start the next one before it had waited
    // itself: everything but x is older and read before its end.
    __shared__ Slot slots[PAIRS];
    bool any = false;
    for (int slot = threadIdx.x; slot < PAIRS; slot += blockDim.x) {
        const int token = first_token + slot / TOPK;
        const long long pair = (long long)first_token * TOPK + slot;
        const int row = token >= tokens ? -1 : src2dst_map ? src2dst_map[pair] : token;
        const bool valid = row >= 0 && row < rows;
        const float weight = valid && topk_weights ? topk_weights[pair] : 1.0f;
        const int expert = !valid ? -1 : row_experts ? row_experts[row] : 0;
        float factor = 0.0f;
        if (expert >= 0) {
            const long long index = (long long)row * x_scale_row_stride + expert * x_scale_expert_stride;
            factor = pick(x_scale, index, x_scale_value);
            if constexpr (!PER_CHANNEL) factor *= pick(w_scale, (long long)expert * w_scale_stride, 1.0f);
            any = true;
        }
        slots[slot] = {valid ? row : 0, expert, weight * unit, factor};
    }
    any = __syncthreads_or(any);
    // What the columns have, of some slots: no kernel makes it.
    Vector<float> scale[IN_FLIGHT];
    Vector<Bias> shift[IN_FLIGHT];
    const auto load_columns = [&](int first) {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT && first + i < PAIRS; ++i) {
            const long long expert = max(slots[first + i].expert, 0);
            if constexpr (PER_CHANNEL) scale[i] = read_vector<IN_ALIGNED>(w_scale + expert * w_scale_stride + col, count);
            if constexpr (sizeof(Bias) > 1) shift[i] = read_vector<IN_ALIGNED>(bias + expert * cols + col, count);
        }
    };
    if (any && col < cols) load_columns(0);
    wait_for_previous_kernel();
    if (col >= cols) return;

    const float per_unit = __frcp_rn(unit);
    float sum[VECTOR] = {};
    bool empty = true;  // of the token so far
#pragma unroll
    for (int first = 0; first < PAIRS; first += IN_FLIGHT) {
        Vector<In> x_of[IN_FLIGHT];
        if (any) {
            if (first > 0) load_columns(first);
#pragma unroll
            for (int i = 0; i < IN_FLIGHT && first + i < PAIRS; ++i)  // without a row too: loads behind a branch wait
                x_of[i] = read_vector<IN_ALIGNED, PER_CHANNEL>(x + slots[first + i].row * x_pitch + col, count);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT && first + i < PAIRS; ++i) {
            const Slot slot = slots[first + i];
            if (slot.expert >= 0) add_row(sum, slot, x_of[i], scale[i], shift[i], per_unit);
            empty = empty && slot.expert < 0;
            if ((first + i) % TOPK < TOPK - 1) continue;
            const int token = first_token + (first + i) / TOPK;
            if (token < tokens && !(empty && skip_padding))
                store_vector<OUT_ALIGNED>(out + token * out_pitch + col, count, sum);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[j] = 0.0f;
            empty = true;
        }
    }
}
