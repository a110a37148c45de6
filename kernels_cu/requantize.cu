// SPDX-License-Identifier: Apache-2.0
// The many activated values that GEMM 1 leaves PACKED, to the fp8 rows of GEMM 2. Few values are left as they are, and so are
// rows with a scale each that are too wide for two blocks to hold their groups: quantize_shuffle takes them.
//
// Constant put in front of this text:
//   MODE        TENSOR: one scale, that of the maximum in partials; TOKEN: that of each row's maximum

constexpr int COLUMNS = 4;  // of a piece, which has four rows: PACKED_WORDS vectors
constexpr int PARTS = LINE / int(sizeof(uint4));  // pieces to a line: two for each quarter

// The first row of a piece in its group, and from there on its row r of four.
__device__ __forceinline__ int first_row_of(int index) { return index % PARTS / 2 * 2; }
__device__ __forceinline__ constexpr int row_of(int r) { return r % 2 + r / 2 * 8; }

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

// Which vector of a group is the first of piece `index`; the piece's next ones are PARTS further on each. A group has as many
// pieces as columns: it has 16 rows, and a piece is COLUMNS columns of four of them.
__device__ __forceinline__ int place_of(int index) { return index / PARTS * (PACKED_WORDS * PARTS) + index % PARTS; }

struct Piece {
    uint4 words[PACKED_WORDS];
    Piece() = default;
    __device__ __forceinline__ Piece(const uint4* group, int index) {
#pragma unroll
        for (int w = 0; w < PACKED_WORDS; ++w) words[w] = group[place_of(index) + w * PARTS];
    }
    // v[column][r]: the value in row r of the four.
    __device__ __forceinline__ void values(float (&v)[COLUMNS][4]) const {
        const u32* of = reinterpret_cast<const u32*>(words);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) unpack({of[c], of[COLUMNS + c], of[2 * COLUMNS + c]}, v[c]);
    }
};

// A piece's codes; `out`: where those of the group's first row and the block's first column go.
__device__ __forceinline__ void store_piece(const Piece& piece, int index, const Divisor (&by)[4], int rows, u8* out,
                                            long long pitch) {
    float v[COLUMNS][4];
    piece.values(v);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int row = first_row_of(index) + row_of(r);
        const u32 codes = encode_pair(by[r].divide(v[0][r]), by[r].divide(v[1][r])) |
                          encode_pair(by[r].divide(v[2][r]), by[r].divide(v[3][r])) << 16;
        u8* to = out + row * pitch + index / PARTS * 8 + index % 2 * COLUMNS;
        if (row < rows) *reinterpret_cast<u32*>(to) = codes;
    }
}

// Once all lanes of its line have read or copied it.
__device__ __forceinline__ void discard_piece(const uint4* group, int index) {
    const int part = index % PARTS;
    if (part < PACKED_WORDS) discard_line(group + place_of(index) + part * (PARTS - 1));
}

// The largest magnitude of each row of this thread's pieces, all of which are in shared memory, in the whole group.
__device__ __forceinline__ void max_of_rows(const uint4* held, int pieces, float (&largest)[4]) {
    __shared__ int of_rows[GROUP_ROWS];  // biased
    if (threadIdx.x < GROUP_ROWS) of_rows[threadIdx.x] = 0;
    int mine[4] = {};
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
        float v[COLUMNS][4];
        Piece(held, i).values(v);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int r = 0; r < 4; ++r) mine[r] = max_biased(mine[r], v[c][r]);
    }
    __syncthreads();  // the zeros are there
    const int first_row = first_row_of(threadIdx.x);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        // Lanes of one quarter: two next to each other, in each line.
        mine[r] = max(mine[r], __shfl_xor_sync(FULL_WARP, mine[r], 1));
#pragma unroll
        for (int line = PARTS; line < LANES; line *= 2) mine[r] = max(mine[r], __shfl_xor_sync(FULL_WARP, mine[r], line));
        if (threadIdx.x % LANES < PARTS && threadIdx.x % 2 == 0) atomicMax(of_rows + first_row + row_of(r), mine[r]);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) largest[r] = unbiased(of_rows[first_row + row_of(r)]);
}

extern __shared__ uint4 held[];  // TOKEN: a group

// A block takes a group (blockIdx.x, the last ones first: they are still in the L2 cache). If TENSOR, it takes a stretch of
// its columns (blockIdx.y), a piece for each thread, in registers. If TOKEN, it has the group in shared memory, since it goes
// through it twice.
extern "C" __global__ void __launch_bounds__(MAX_ROW_THREADS) requantize(
    const uint4* x,                           // groups of cols columns, see packed.cuh
    int cols,                                 // a multiple of 16
    const Span* spans,                        // (experts,)
    int experts,
    const float* partials,                    // TENSOR
    u8* __restrict__ out,                     // (rows, out_pitch), columns up to cols
    long long out_pitch,
    float* __restrict__ scale_out)            // (1,) or, if TOKEN, (rows,)
{
    start_next_kernel();  // nothing that it reads before its own wait comes from here
    const int index = gridDim.x - 1 - blockIdx.x;
    const Span span = find_group(index, spans, experts);
    wait_for_previous_kernel();
    if (span.count <= 0 && (MODE == TOKEN || blockIdx.x > 0)) return;  // block 0 leaves the scale, whatever its rows

    const uint4* group = x + index * packed_pitch(cols) / COLUMNS;
    u8* const first = out + span.row * out_pitch;
    const bool worthwhile = gridDim.x * packed_pitch(cols) * int(sizeof(u32)) <= MOST_TO_DISCARD;
    if constexpr (MODE == TENSOR) {
        const int i = blockIdx.y * blockDim.x + threadIdx.x;
        const bool exists = span.count > 0 && i < cols;
        Piece piece;
        if (exists) piece = Piece(group, i);
        const float scale = scale_of_amax(max_of_partials(partials));
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = scale;
        const Divisor by(scale);
        if (exists) store_piece(piece, i, {by, by, by, by}, span.count, first, out_pitch);
        __syncwarp();
        if (exists && worthwhile) discard_piece(group, i);
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x)
#pragma unroll
            for (int w = 0; w < PACKED_WORDS; ++w)
                copy_chunk(held + place_of(i) + w * PARTS, group + place_of(i) + w * PARTS);
        close_group();
        wait_for_groups<0>();
        __syncwarp();  // all lanes of a line have copied it
        float largest[4];
        max_of_rows(held, cols, largest);
        const Divisor by[4] = {Divisor(scale_of_amax(largest[0])), Divisor(scale_of_amax(largest[1])),
                               Divisor(scale_of_amax(largest[2])), Divisor(scale_of_amax(largest[3]))};
        for (int i = threadIdx.x; i < cols; i += blockDim.x) {
            store_piece(Piece(held, i), i, by, span.count, first, out_pitch);
            if (worthwhile) discard_piece(group, i);
        }
        if (threadIdx.x >= PARTS || threadIdx.x % 2 > 0) return;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int row = first_row_of(threadIdx.x) + row_of(r);
            if (row < span.count) scale_out[span.row + row] = by[r].scale;
        }
    }
}
