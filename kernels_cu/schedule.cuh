// SPDX-License-Identifier: Apache-2.0
// The tiles of a grouped GEMM, ROWS rows of activations each: how many, in what order, and where each of them lies. Every
// block works that out itself from the row counts of the experts; the host never reads them.

struct Groups {
    const Span* spans;  // (experts,)
    int experts;
    int channel_tiles;  // tiles along the weight rows of one expert
    int steps;          // stages along K
    int* claims;        // {tiles taken, beyond the first of each block unless in clusters; blocks done}, 0 between launches
};

// An expert with rows; the last entry is the end, with the number of tiles in all.
struct alignas(16) Entry { int first_tile, expert, row, count; };

// By one warp, as soon as routing knows the spans.
__device__ __forceinline__ void make_schedule(const Groups& groups, Entry* entries) {
    const int lane = threadIdx.x % LANES;
    int tiles = 0, used = 0;
    for (int base = 0; base < groups.experts; base += LANES) {
        const int expert = base + lane;
        Span span = {0, 0};
        if (expert < groups.experts) span = wait_for_span(groups.spans + expert);
        const int mine = (span.count + ROWS - 1) / ROWS * groups.channel_tiles;
        int inclusive = mine;
        for (int offset = 1; offset < LANES; offset *= 2) {
            const int left = __shfl_up_sync(FULL_WARP, inclusive, offset);
            if (lane >= offset) inclusive += left;
        }
        const u32 with_rows = __ballot_sync(FULL_WARP, mine > 0);
        if (mine > 0)
            entries[used + __popc(with_rows & ((1u << lane) - 1))] = {tiles + inclusive - mine, expert, span.row, span.count};
        tiles += __shfl_sync(FULL_WARP, inclusive, LANES - 1);
        used += __popc(with_rows);
    }
    if (lane == 0) entries[used] = {tiles, 0, 0, 0};
}

// Where a tile lies.
struct alignas(16) Place { int expert, channel_tile, row, count; };

// Goes through the tiles. All row tiles of a stretch of weights have consecutive numbers, so that the weights come from memory
// once.
struct Walk : Place {
    const Entry* entry;

    __device__ explicit Walk(const Entry* entries) : entry(entries) {}
    // Moves on to a tile, whose numbers only grow; false behind the last one.
    __device__ bool seek(int tile) {
        while (entry->count > 0 && tile >= entry[1].first_tile) ++entry;
        const Entry here = *entry;
        if (here.count == 0) return false;
        const int within = tile - here.first_tile, row_tiles = (here.count + ROWS - 1) / ROWS;
        channel_tile = within / row_tiles;
        const int skipped = (within - channel_tile * row_tiles) * ROWS;
        expert = here.expert;
        row = here.row + skipped;
        count = min(here.count - skipped, ROWS);
        return true;
    }
};
