// SPDX-License-Identifier: Apache-2.0
// The ring of stages in shared memory through which both operands of grouped_gemm go, and the warp that fills it. Constants
// and tiles are those of gemm_sm90.cu.

constexpr int STEP = 128;  // columns of a stage, one row of the 128-byte swizzle
constexpr int CONSUMERS = 2 * CHANNELS;
constexpr bool IN_TURNS = WINDOW == 0;  // each consumer warpgroup has tiles of its own
constexpr int READERS = IN_TURNS ? 4 : CONSUMERS / LANES;  // warps that read a stage
constexpr int THREADS = CONSUMERS + 128;  // the producer's warpgroup has one busy warp, and gives its registers away
constexpr int WEIGHT_BYTES = CHANNELS * STEP, STAGE_BYTES = WEIGHT_BYTES + ROWS * STEP;

__device__ __forceinline__ int rank() { return CLUSTER > 1 ? rank_in_cluster() : 0; }

// Shared memory, from an address that is a multiple of 1024 on, where the swizzle begins anew.
struct Ring {
    u8* base;
    __device__ __forceinline__ u8* stage(int i) const { return base + i * STAGE_BYTES; }  // weights, then rows
    __device__ __forceinline__ u64* full(int i) const { return reinterpret_cast<u64*>(stage(STAGES)) + i; }  // barriers
    __device__ __forceinline__ u64* empty(int i) const { return full(STAGES) + i; }
    // What a stage belongs to; a count of 0 behind the last tile.
    __device__ __forceinline__ Place& place(int i) const { return reinterpret_cast<Place*>(empty(STAGES))[i]; }
    __device__ __forceinline__ Entry* entries() const { return reinterpret_cast<Entry*>(&place(STAGES)); }
};

// A stage of the ring, and the parity of the round: that of the barriers' phase.
struct RingState {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void skip(int stages) {
        stage += stages;
        parity ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};

// The blocks of a cluster go through the same tiles: block 0 makes a claim and sends both what it got. A producer has read the
// claims for all tiles that it has begun, and the ring keeps producers no more than STAGES tiles apart: of as many places and one
// more, taken in turns, none holds a claim that is still to be read when another comes.
struct alignas(16) Claim {
    u64 known;  // a barrier
    int before;  // claims that were made before
};
constexpr int CLAIMS = STAGES + 1;

// Clusters on tiles of the same weights or rows find these in the L2 cache if they are there at about the same time. Where it
// holds a small part of what they read, those with short tiles would run away: a cluster begins when two thirds have begun in
// its wave, or one has nothing left. That is for speed alone, and blocks that do not run yet may need the place of one that
// waits: nobody waits for ever. Who has waited in vain is not patient again in this launch.
__device__ __forceinline__ void keep_in_step(const Groups& groups, int tile, bool& patient) {
    constexpr int PATIENCE = 1 << 12;  // some milliseconds
    const int clusters = gridDim.x / CLUSTER, wave_end = (tile / clusters + 1) * clusters;
    const volatile int* claims = groups.claims;
    int left = patient ? PATIENCE : 0;
    while (left > 0 && claims[0] < wave_end - clusters / 3 && claims[1] == 0) --left;
    patient = __any_sync(FULL_WARP, left > 0);  // for all lanes alike, as elect() wants them
}

// By one warp. What only one lane does is behind elect(): always the same one.
__device__ __forceinline__ void produce(const Ring& ring, const TensorMap& weights, const TensorMap& rows, const Groups& groups,
                                        const Entry* entries, Claim* claims) {
    // Only boxes with existing rows; in a cluster each block copies every second one.
    const auto copy_rows_of = [&](int stage, const Place& at, int step) {
        u8* to = ring.stage(stage) + WEIGHT_BYTES;
#pragma unroll 1
        for (int i = rank() * BOX; i < at.count; i += CLUSTER * BOX)
            copy_rows<CLUSTER>(to + i * STEP, rows, step * STEP, at.row + i, ring.full(stage));
    };
    // The kernel in front makes the rows, not the weights: stages of those are on their way before its end.
    bool waited = false;
    int early = 0;
    const auto wait_for_rows = [&] {
        wait_for_previous_kernel();
        waited = true;
        if (!elect()) return;
        for (int stage = 0, step = 0; stage < early; ++stage) {
            copy_rows_of(stage, ring.place(stage), step);
            if (++step == groups.steps) step = 0;
        }
    };
    Walk at(entries, groups);
    RingState state;
    [[maybe_unused]] u32 begun = 0;
    [[maybe_unused]] bool patient = true;
    for (int tile = blockIdx.x / CLUSTER, next; at.seek(tile); tile = next) {
        at.channel_tile = at.channel_tile * CLUSTER + rank();
        // Weights that are read once leave the L2 cache to what is read again.
        const u64 policy = at.alone ? EVICT_FIRST : EVICT_UNCHANGED;
        int claimed = 0;
        [[maybe_unused]] Claim& claim = claims[begun % CLAIMS];
        if (rank() == 0 && elect()) claimed = atomicAdd(groups.claims, 1);
        if (CLUSTER > 1 && elect()) expect_bytes(&claim.known, sizeof(int));
        if constexpr (IN_STEP) keep_in_step(groups, tile, patient);
#pragma unroll 1
        for (int step = 0; step < groups.steps; ++step, state.next()) {
            if (!waited && early == EARLY) wait_for_rows();
            wait(ring.empty(state.stage), state.parity ^ 1);  // passes in the first round
            if (elect()) {
                ring.place(state.stage) = at;
                expect_bytes(ring.full(state.stage), WEIGHT_BYTES + (at.count + BOX - 1) / BOX * (BOX * STEP));
                copy_weights(ring.stage(state.stage), weights, step * STEP, at.channel_tile * (CHANNELS / 16), at.expert,
                             ring.full(state.stage), policy);
                if (waited) copy_rows_of(state.stage, at, step);
            }
            early += !waited;
            // Half a tile before it is needed: nothing waits for the claim, nor for its way to the other block.
            if (CLUSTER > 1 && step == groups.steps / 2 && rank() == 0 && elect())
#pragma unroll
                for (int to = 0; to < CLUSTER; ++to) send(&claim.before, claimed, &claim.known, to);
        }
        if constexpr (CLUSTER > 1) {
            wait(&claim.known, begun / CLAIMS & 1);
            claimed = elect() ? *const_cast<volatile int*>(&claim.before) : 0;
            ++begun;
        }
        // Not sooner: until here nothing waits for the claim. The other lanes have 0.
        next = gridDim.x / CLUSTER + __reduce_add_sync(FULL_WARP, claimed);
    }
    if (!waited) wait_for_rows();
    wait(ring.empty(state.stage), state.parity ^ 1);
    if (!elect()) return;
    ring.place(state.stage).count = 0;
    arrive(ring.full(state.stage));
    if (atomicAdd(groups.claims + 1, 1) == gridDim.x - 1) groups.claims[0] = groups.claims[1] = 0;
}
