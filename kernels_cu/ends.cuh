// SPDX-License-Identifier: Apache-2.0
// The ends of a grouped GEMM: what a warp does with the sums of a finished tile, by the constants END, Out, Bias, ACT and
// PER_CHANNEL of the kernel. The weights are the M side of the instructions, and the kernel puts them in such an order that
// each 16 rows of a fragment are
//   GATED       8 gates, then the 8 ups of the same channels: a thread holds both sides of a product
//   otherwise   8 even channels, then the 8 odd ones: a thread holds neighbours

constexpr bool GATED = END != PRODUCT && ACT <= SWIGLUOAI;

struct Epilogue {
    void* out;                 // (rows, pitch): Out or e4m3 codes
    long long pitch;
    int cols;                  // columns that exist; zeros up to out_cols if CODES
    int out_cols;
    float unit;                // PRODUCT: factor; else of the row scales
    const float* x_scale;      // [row * x_scale_row_stride + expert * x_scale_expert_stride]; null: 1
    int x_scale_row_stride, x_scale_expert_stride;
    const float* w_scale;      // [expert * w_scale_stride + up * w_scale_up (+ col)]; null: 1
    int w_scale_stride, w_scale_up;
    const Bias* bias;          // (experts, 2 * cols), or (experts, cols) if not gated
    const float* scale_in;     // CODES: [expert * scale_expert_stride]; null: scale_value
    float scale_value;
    int scale_expert_stride;
    float* partials;           // ACTIVATED: (PARTIALS,)
};

// Scale and bias of one weight row; up: of its second half. Zeros where there is no such row: so is what is activated.
struct Channel {
    float scale, shift;
    __device__ __forceinline__ Channel(const Epilogue& end, int expert, int col, int up) : scale(0.0f), shift(0.0f) {
        if (col >= end.cols) return;
        scale = pick(end.w_scale, (long long)expert * end.w_scale_stride + up * end.w_scale_up + (PER_CHANNEL ? col : 0), 1.0f);
        if constexpr (sizeof(Bias) > 1)
            shift = to_float(end.bias[expert * (GATED ? 2 : 1) * (long long)end.cols + up * end.cols + col]);
    }
    __device__ __forceinline__ float of(float x, float row_scale) const { return fmaf(x, row_scale * scale, shift); }
};

// The scales of this thread's rows of a tile: row 8 * j + 2 * (lane % 4) + i at 2 * j + i.
template <int COUNT>
__device__ __forceinline__ void load_row_scales(const Epilogue& end, const Place& at, float (&scales)[COUNT]) {
    const int first = 2 * (threadIdx.x % 4);
    const float* from = end.x_scale ? end.x_scale + at.expert * end.x_scale_expert_stride : nullptr;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        const int within = 8 * (k / 2) + first + k % 2;
        scales[k] = end.unit;
        if (from && within < at.count) scales[k] *= from[(long long)(at.row + within) * end.x_scale_row_stride];
    }
}

// A warp's part of a finished tile: sixteen weight rows, the group `group` of the expert's, by all rows at `at`.
// sum[4 * j + 2 * h + i] is half h of this thread's pair of channels in row 8 * j + 2 * (lane % 4) + i. Returns the largest
// finite magnitude if ACTIVATED.
template <int SUMS>
__device__ __forceinline__ float finish(const Epilogue& end, const Place& at, int group, const float (&sum)[SUMS]) {
    const int lane = threadIdx.x % LANES, first_row = 2 * (lane % 4);
    const int pair = group * 8 + lane / 4, col = GATED ? pair : 2 * pair;
    float largest = 0.0f;
    if (col >= end.out_cols) return largest;
    float row_scales[SUMS / 2];
    if constexpr (END != PRODUCT) load_row_scales(end, at, row_scales);
    const Channel first(end, at.expert, col, 0), second(end, at.expert, GATED ? col : col + 1, GATED);
    const Divisor divisor(END == CODES ? pick(end.scale_in, at.expert * end.scale_expert_stride, end.scale_value) : 1.0f);
    const long long start = (at.row + first_row) * end.pitch + col;
    const int pitch = int(end.pitch);
#pragma unroll
    for (int k = 0; k < SUMS / 2; ++k) {
        // Rows that do not exist are calculated too: branches would keep the rows from overlapping.
        const int down = 8 * (k / 2) + k % 2, at_sum = 4 * (k / 2) + k % 2;
        const bool exists = first_row + down < at.count;
        const long long place = start + down * pitch;
        const float a = sum[at_sum], b = sum[at_sum + 2];
        if constexpr (END == PRODUCT) {
            struct alignas(2 * sizeof(Out)) Two { Out a, b; } two;
            from_float(a * end.unit, two.a);
            from_float(b * end.unit, two.b);
            if (exists) *reinterpret_cast<Two*>(static_cast<Out*>(end.out) + place) = two;
        } else {
            const float scaled = first.of(a, row_scales[k]), other = second.of(b, row_scales[k]);
            const float x = activate<ACT>(scaled, other), y = GATED ? 0.0f : activate<ACT>(other, 0.0f);
            if constexpr (END == ACTIVATED) {
                const float magnitude = fmaxf(finite_magnitude(x), finite_magnitude(y));
                largest = fmaxf(largest, exists ? magnitude : 0.0f);
                float* to = static_cast<float*>(end.out) + place;
                if (GATED && exists) *to = x;
                if (!GATED && exists) *reinterpret_cast<float2*>(to) = make_float2(x, y);
            } else {
                u8* to = static_cast<u8*>(end.out) + place;
                const u32 codes = encode_pair(divisor.divide(x), divisor.divide(y));
                if (GATED && exists) *to = u8(codes);
                if (!GATED && exists) *reinterpret_cast<u16*>(to) = u16(codes);
            }
        }
    }
    return largest;
}
