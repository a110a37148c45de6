// SPDX-License-Identifier: Apache-2.0
// The many activated values that GEMM 1 leaves PACKED, to the fp8 rows of GEMM 2. Few values are left as they are, and
// quantize_shuffle takes them.
//
// Constant put in front of this text:
//   MODE        TENSOR: one scale, of the maximum in partials; TOKEN: one per row

constexpr int COLUMNS = 4;  // that a thread takes at a time, of four rows: PACKED_WORDS vectors
constexpr int PARTS = LINE / int(sizeof(uint4));  // threads to a line: two for each quarter

struct Group { int row, count; };  // first row, and how many there are of it and behind it

// Where group `group` lies: that of the last expert whose first group is not behind it.
__device__ __forceinline__ Group find_group(int group, const int* expert_offsets, const int* expert_counts, int experts,
                                            int max_tokens) {
    const auto first_row = [&](int expert) { return max_tokens ? expert * max_tokens : expert_offsets[expert]; };
    int found = 0;
    for (int base = 0; base < experts; base += LANES) {
        const int expert = base + threadIdx.x % LANES;
        const bool before = expert < experts && group_of(first_row(expert), expert) <= group;
        found += __popc(__ballot_sync(FULL_WARP, before));
    }
    const int expert = found - 1, row = first_row(expert);
    const int within = (group - int(group_of(row, expert))) * GROUP_ROWS;
    return {row + within, expert_counts[expert] - within};
}

// A block takes a group (blockIdx.x, the last ones first: they are still in the L2 cache) and, if TENSOR, a stretch of its
// columns (blockIdx.y).
extern "C" __global__ void __launch_bounds__(MAX_ROW_THREADS) requantize(
    const uint4* x,                           // groups of cols columns, see packed.cuh
    int cols,                                 // a multiple of 16
    const int* expert_offsets,                // (experts + 1,), read unless padded
    const int* expert_counts,                 // (experts,)
    int experts,
    int max_tokens,                           // padded form: expert e's rows begin at e * max_tokens; else 0
    const float* partials,                    // TENSOR
    u8* __restrict__ out,                     // (rows, out_pitch), columns up to cols
    long long out_pitch,
    float* __restrict__ scale_out)            // (1,) or, if TOKEN, (rows,)
{
    start_next_kernel();  // nothing that it reads before its own wait comes from here
    const int index = gridDim.x - 1 - blockIdx.x;
    const Group group = find_group(index, expert_offsets, expert_counts, experts, max_tokens);
    wait_for_previous_kernel();

    const int part = threadIdx.x % PARTS, quarter = part / 2, step = MODE == TOKEN ? blockDim.x : cols;
    const uint4* of_group = x + index * packed_pitch(cols) / COLUMNS;
    const int begin = MODE == TOKEN ? threadIdx.x : blockIdx.y * blockDim.x + threadIdx.x;
    const auto line_of = [&](int i) { return of_group + (i / PARTS * PACKED_WORDS) * PARTS + part; };
    const auto load = [&](int i, float (&v)[COLUMNS][4]) {
        uint4 words[PACKED_WORDS];
#pragma unroll
        for (int w = 0; w < PACKED_WORDS; ++w) words[w] = line_of(i)[w * PARTS];
        const u32* of = reinterpret_cast<const u32*>(words);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) unpack({of[c], of[COLUMNS + c], of[2 * COLUMNS + c]}, v[c]);
    };
    const auto row_of = [&](int r) { return 2 * quarter + r % 2 + r / 2 * 8; };  // within the group

    float scale[4];
    if constexpr (MODE == TENSOR) {
        scale[0] = scale_of_amax(max_of_partials(partials));
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = scale[0];
    }
    if (group.count <= 0) return;
    if constexpr (MODE == TOKEN) {
        float largest[4] = {};
        for (int i = begin; i < cols; i += step) {
            float v[COLUMNS][4];
            load(i, v);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) largest[r] = fmaxf(largest[r], finite_magnitude(v[c][r]));
        }
        __shared__ int of_rows[GROUP_ROWS];
        if (threadIdx.x < GROUP_ROWS) of_rows[threadIdx.x] = 0;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            for (int other : {1, 8, 16}) largest[r] = fmaxf(largest[r], __shfl_xor_sync(FULL_WARP, largest[r], other));
            if (threadIdx.x % LANES == 2 * quarter) atomicMax(of_rows + row_of(r), __float_as_int(largest[r]));
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            scale[r] = scale_of_amax(__int_as_float(of_rows[row_of(r)]));
            if (threadIdx.x == 2 * quarter && row_of(r) < group.count) scale_out[group.row + row_of(r)] = scale[r];
        }
    }
    for (int i = begin; i < cols; i += step) {
        float v[COLUMNS][4];
        load(i, v);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Divisor by(scale[MODE == TENSOR ? 0 : r]);
            const u32 codes = encode_pair(by.divide(v[0][r]), by.divide(v[1][r])) |
                              encode_pair(by.divide(v[2][r]), by.divide(v[3][r])) << 16;
            u8* to = out + (group.row + row_of(r)) * out_pitch + i / PARTS * 8 + part % 2 * COLUMNS;
            if (row_of(r) < group.count) *reinterpret_cast<u32*>(to) = codes;
        }
        __syncwarp(0xffu << (threadIdx.x % LANES / PARTS * PARTS));  // those of these lines
        if (part < PACKED_WORDS) discard_line(line_of(i) - part + part * PARTS);
    }
}
