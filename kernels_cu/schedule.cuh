// SPDX-License-Identifier: Apache-2.0
// The tiles of a grouped GEMM, ROWS rows of activations or fewer each: how many, in what order, and where each of them lies.
// Every block works that out itself from the row counts of the experts; the host never reads them.

struct Groups {
    const Span* spans;  // (experts,)
    int experts;
    int channel_tiles;  // tiles along the weight rows of one expert
    int steps;          // stages along K
    // {tiles, blocks done}, 0 between launches. Tiles are those taken beyond the first of each block or cluster, or begun: who
    // begins one takes the next.
    int* claims;
};

// An expert: the number of its first tile, its rows, and how many tiles those make. Behind the last expert one without rows,
// with the number of tiles in all.
struct alignas(16) Entry { int first_tile, row, count, row_tiles; };

// By one warp, as soon as routing knows the spans.
__device__ __forceinline__ void make_schedule(const Groups& groups, Entry* entries) {
    constexpr int PER_LANE = 4;  // neighbours, all of whose spans are on their way together
    const int lane = threadIdx.x % LANES;
    int tiles = 0;
    for (int base = 0; base < groups.experts; base += LANES * PER_LANE) {
        const int first = base + lane * PER_LANE;
        Span span[PER_LANE];
        for (bool known = false; !known;) {
            known = true;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i)
                span[i] = first + i < groups.experts ? load_span(groups.spans + first + i) : Span{0, 0};
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) known &= span[i].count >= 0;
        }
        int mine = 0, row_tiles[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) mine += row_tiles[i] = (u32(span[i].count) + ROWS - 1) / ROWS;
        int inclusive = mine;
#pragma unroll
        for (int offset = 1; offset < LANES; offset *= 2) {
            const int left = __shfl_up_sync(FULL_WARP, inclusive, offset);
            if (lane >= offset) inclusive += left;
        }
        int before = tiles + (inclusive - mine) * groups.channel_tiles;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            if (first + i < groups.experts) entries[first + i] = {before, span[i].row, span[i].count, row_tiles[i]};
            before += row_tiles[i] * groups.channel_tiles;
        }
        tiles += __shfl_sync(FULL_WARP, inclusive, LANES - 1) * groups.channel_tiles;
    }
    if (lane == 0) entries[groups.experts] = {tiles, 0, 0, 0};
    __syncwarp();
}

// Where a tile lies.
struct alignas(16) Place { int expert, channel_tile, row, count; };

// Goes through the tiles; a warp does so together. All row tiles of a stretch of weights have consecutive numbers, so that the
// weights come from memory once.
struct Walk : Place {
    const Entry* entries;
    int experts;
    bool alone;  // no other tile has these weights

    __device__ Walk(const Entry* entries, const Groups& groups) : entries(entries), experts(groups.experts) { expert = 0; }
    // Moves on to a tile, whose numbers only grow; false behind the last one.
    __device__ bool seek(int tile) {
        // The last entry that begins no later: each lane looks at one, as often as all of them do.
        for (int begun = LANES; begun == LANES && expert < experts;) {
            const Entry& of_lane = entries[min(expert + int(threadIdx.x % LANES), experts)];
            begun = __popc(__ballot_sync(FULL_WARP, of_lane.first_tile <= tile));
            expert = min(expert + begun - 1, experts);
        }
        const Entry here = entries[expert];
        if (here.count == 0) return false;
        alone = here.row_tiles == 1;
        const u32 within = tile - here.first_tile, row_tiles = here.row_tiles;
        channel_tile = alone ? within : within / row_tiles;
        // As few tiles as can be, and all alike, in whole groups: a short one would load its weights for few rows.
        const u32 groups = alone ? ROWS / GROUP_ROWS : (here.count + row_tiles * GROUP_ROWS - 1) / (row_tiles * GROUP_ROWS);
        const int rows = groups * GROUP_ROWS, skipped = (within - channel_tile * row_tiles) * rows;
        row = here.row + skipped;
        count = min(here.count - skipped, rows);
        return true;
    }
};
