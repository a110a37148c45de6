// SPDX-License-Identifier: Apache-2.0
// The many activated values that GEMM 1 leaves PACKED, to the fp8 rows of GEMM 2, with one scale for all. Few values are left
// as they are, and so are those that have a scale per row, for which they would be read twice: quantize_shuffle takes them.

constexpr int COLUMNS = 4;  // that a thread takes at a time, of four rows: PACKED_WORDS vectors
constexpr int PARTS = LINE / int(sizeof(uint4));  // threads to a line: two for each quarter

// Where group `group` lies: that of the last expert whose first group is not behind it.
__device__ __forceinline__ Span find_group(int group, const Span* spans, int experts) {
    int found = 0;
    for (int base = 0; base < experts; base += LANES) {
        const int expert = base + threadIdx.x % LANES;
        const bool before = expert < experts && group_of(spans[expert].row, expert) <= group;
        found += __popc(__ballot_sync(FULL_WARP, before));
    }
    const Span span = spans[found - 1];
    const int within = (group - int(group_of(span.row, found - 1))) * GROUP_ROWS;
    return {span.row + within, span.count - within};
}

// A block takes a group (blockIdx.x, the last ones first: they are still in the L2 cache) and a stretch of its columns
// (blockIdx.y), a thread four rows of COLUMNS columns.
extern "C" __global__ void __launch_bounds__(MAX_ROW_THREADS) requantize(
    const uint4* x,                           // groups of cols columns, see packed.cuh
    int cols,                                 // a multiple of 16
    const Span* spans,                        // (experts,)
    int experts,
    const float* partials,                    // the maximum is among them
    u8* __restrict__ out,                     // (rows, out_pitch), columns up to cols
    long long out_pitch,
    float* __restrict__ scale_out)            // (1,)
{
    start_next_kernel();  // nothing that it reads before its own wait comes from here
    const int index = gridDim.x - 1 - blockIdx.x;
    const Span group = find_group(index, spans, experts);
    wait_for_previous_kernel();
    if (group.count <= 0 && blockIdx.x > 0) return;  // block 0 leaves the scale, whatever its rows

    const int part = threadIdx.x % PARTS, quarter = part / 2;
    const int piece = blockIdx.y * blockDim.x + threadIdx.x;  // of which there are as many as columns
    const bool exists = group.count > 0 && piece < cols;
    const uint4* line = x + index * packed_pitch(cols) / COLUMNS + piece / PARTS * PACKED_WORDS * PARTS + part;
    uint4 words[PACKED_WORDS];
#pragma unroll
    for (int w = 0; w < PACKED_WORDS; ++w) words[w] = exists ? line[w * PARTS] : make_uint4(0, 0, 0, 0);
    const float scale = scale_of_amax(max_of_partials(partials));
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = scale;

    float v[COLUMNS][4];
    const u32* of = reinterpret_cast<const u32*>(words);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) unpack({of[c], of[COLUMNS + c], of[2 * COLUMNS + c]}, v[c]);
    const Divisor by(scale);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int row = 2 * quarter + r % 2 + r / 2 * 8;  // within the group
        const u32 codes = encode_pair(by.divide(v[0][r]), by.divide(v[1][r])) |
                          encode_pair(by.divide(v[2][r]), by.divide(v[3][r])) << 16;
        u8* to = out + (group.row + row) * out_pitch + piece / PARTS * 8 + part % 2 * COLUMNS;
        if (exists && row < group.count) *reinterpret_cast<u32*>(to) = codes;
    }
    __syncwarp();  // all of it has been read
    if (exists && part < PACKED_WORDS) discard_line(line - part + part * PARTS);
}
