// SPDX-License-Identifier: Apache-2.0
// The ends of a grouped GEMM: what a warp does with the sums of a finished tile, by the constants END, Out, Bias, ACT,
// ROW_SCALES, PER_CHANNEL and MEASURED of the kernel. The weights are the M side of the instructions, and the kernel puts them
// in such an order that each 16 rows of a fragment are
//   GATED       8 gates, then the 8 ups of the same channels: a thread holds both sides of a product
//   otherwise   8 even channels, then the 8 odd ones: a thread holds neighbours

constexpr bool GATED = END != PRODUCT && ACT <= SWIGLUOAI;

struct Epilogue {
    void* out;                 // (rows, pitch): Out or e4m3 codes
    long long pitch;
    int cols;                  // columns that exist; zeros up to out_cols unless PRODUCT
    int out_cols;
    float unit;                // PRODUCT: factor; else of x_scale, unless ROW_SCALES
    const float* x_scale;      // [row] if ROW_SCALES, else [expert * x_scale_expert_stride]; null: 1
    int x_scale_expert_stride;
    const float* w_scale;      // [expert * w_scale_stride + up * w_scale_up (+ col)]; null: 1
    int w_scale_stride, w_scale_up;
    const Bias* bias;          // (experts, 2 * cols), or (experts, cols) if not gated
    const float* scale_in;     // CODES: [expert * scale_expert_stride]; null: scale_value
    float scale_value;
    int scale_expert_stride;
    float* partials;           // MEASURED: (PARTIALS,)
};

// Scale and bias of one weight row; up: of its second half. Zeros where there is no such row: so is what is activated.
struct Channel {
    float scale, shift;
    __device__ __forceinline__ Channel(const Epilogue& end, int expert, int col, int up) : scale(0.0f), shift(0.0f) {
        if (col >= end.cols) return;
        scale = pick(end.w_scale, expert * end.w_scale_stride + up * end.w_scale_up + (PER_CHANNEL ? col : 0), 1.0f);
        if constexpr (sizeof(Bias) > 1) shift = to_float(end.bias[(expert * (GATED ? 2 : 1) + up) * end.cols + col]);
    }
    __device__ __forceinline__ float of(float x, float row_scale) const { return fmaf(x, row_scale * scale, shift); }
};

// What the end of a tile needs from memory, loaded before the multiplication so that nothing waits for it afterwards.
template <int COUNT>  // rows of the tile that a warp has, a multiple of 8
struct Scales {
    // That of row LANES * i + lane at i, or one for all, to be multiplied by unit.
    float rows[ROW_SCALES ? (COUNT + LANES - 1) / LANES : 1];
    Channel first, second;  // of this thread's pair of channels
    float code;             // of CODES
    __device__ __forceinline__ Scales(const Epilogue& end, const Place& at, int col)
        : first(end, at.expert, col, 0), second(end, at.expert, GATED ? col : col + 1, GATED),
          code(END == CODES ? pick(end.scale_in, at.expert * end.scale_expert_stride, end.scale_value) : 1.0f) {
        if constexpr (ROW_SCALES) {
#pragma unroll
            for (int i = 0; i < (COUNT + LANES - 1) / LANES; ++i) {
                const int within = LANES * i + threadIdx.x % LANES;
                rows[i] = 1.0f;
                if (within < at.count) rows[i] = end.x_scale[at.row + within];
            }
        } else {
            // By threads with a column alone: were it the same in all, it would go to a uniform register, and be waited for.
            rows[0] = 1.0f;
            if (col < end.cols) rows[0] = pick(end.x_scale, at.expert * end.x_scale_expert_stride, 1.0f);
        }
    }
    // That of row down + first, for a `down` known when this is compiled and a `first` below 8.
    __device__ __forceinline__ float of_row(int down, int first, float unit) const {
        return ROW_SCALES ? __shfl_sync(FULL_WARP, rows[down / LANES], down % LANES + first) : rows[0] * unit;
    }
};

// Four rows of a group, of one column, or of two neighbours if not GATED.
__device__ __forceinline__ void store_packed(u32* to, const float (&first)[4], const float (&second)[4], bool exists) {
    u32 a[PACKED_WORDS], b[PACKED_WORDS];
    pack(first, a);
    pack(second, b);
#pragma unroll
    for (int i = 0; i < PACKED_WORDS; ++i) {
        if (GATED && exists) to[i * LANES] = a[i];
        if (!GATED && exists) *reinterpret_cast<uint2*>(to + i * LANES) = make_uint2(a[i], b[i]);
    }
}

// A warp's part of a finished tile: sixteen weight rows by COUNT rows from at.row on, of which at.count exist (none if that
// is negative). Takes those from FROM to TO, multiples of 8, of 16 if PACKED. Column `col` of the result is where this thread's
// pair of channels begins; sum[4 * j + 2 * h + i] is half h of the pair in row 8 * j + 2 * (lane % 4) + i. Returns the largest
// finite magnitude if MEASURED.
template <int COUNT, int FROM = 0, int TO = COUNT>
__device__ __forceinline__ float finish(const Epilogue& end, const Place& at, const Scales<COUNT>& scales, int col,
                                        const float (&sum)[COUNT / 2]) {
    const int first_row = 2 * (threadIdx.x % 4), rows = col < end.out_cols ? at.count - first_row : 0;
    int largest = 0;  // biased
    const Divisor divisor(scales.code);
    constexpr int SIZE = END == PRODUCT ? sizeof(Out) : END == ACTIVATED ? sizeof(float) : 1;
    u8* const start = static_cast<u8*>(end.out) + ((at.row + first_row) * end.pitch + col) * SIZE;
    const u32 pitch = u32(end.pitch) * SIZE;
    [[maybe_unused]] const long long group_pitch = packed_pitch(end.pitch);
    [[maybe_unused]] u32* words = static_cast<u32*>(end.out) + (group_of(at.row, at.expert) + FROM / GROUP_ROWS) * group_pitch +
                                  col / 8 * (PACKED_WORDS * LANES) + 4 * first_row + col % 8;
    [[maybe_unused]] float first[4], second[4];
#pragma unroll
    for (int k = FROM / 4; k < TO / 4; ++k) {
        // Rows that do not exist are calculated too, and what is not stored has no branch: all rows overlap.
        const int down = 8 * (k / 2) + k % 2, at_sum = 4 * (k / 2) + k % 2;
        const bool exists = down < rows;
        [[maybe_unused]] u8* const to = start + u64(pitch) * down;
        const float a = sum[at_sum], b = sum[at_sum + 2];
        if constexpr (END == PRODUCT) {
            struct alignas(2 * sizeof(Out)) Two { Out a, b; } two;
            from_float(a * end.unit, two.a);
            from_float(b * end.unit, two.b);
            if (exists) *reinterpret_cast<Two*>(to) = two;
        } else {
            const float row_scale = scales.of_row(down, first_row, end.unit);
            const float scaled = scales.first.of(a, row_scale), other = scales.second.of(b, row_scale);
            const float x = activate<ACT>(scaled, other), y = GATED ? 0.0f : activate<ACT>(other, 0.0f);
            if (MEASURED && exists) {
                largest = max_biased(largest, x);
                if (!GATED) largest = max_biased(largest, y);
            }
            if constexpr (END == PACKED) {
                // Rows come as they lie in a group: two of each eight.
                first[k % 4] = x;
                second[k % 4] = y;
                if (k % 4 == 3) {
                    store_packed(words, first, second, 8 * (k / 2 - 1) < rows);
                    words += group_pitch;
                }
            } else if constexpr (END == ACTIVATED) {
                if (GATED && exists) *reinterpret_cast<float*>(to) = x;
                if (!GATED && exists) *reinterpret_cast<float2*>(to) = make_float2(x, y);
            } else {
                const u32 codes = encode_pair(divisor.divide(x), divisor.divide(y));
                if (GATED && exists) *to = u8(codes);
                if (!GATED && exists) *reinterpret_cast<u16*>(to) = u16(codes);
            }
        }
    }
    return unbiased(largest);
}
