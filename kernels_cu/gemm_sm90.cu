// SPDX-License-Identifier: Apache-2.0
// Grouped GEMM for Hopper: each expert's fp8 rows times its fp8 weights, with the activation in the end of GEMM 1.
//
// A tile is CHANNELS weight rows by ROWS rows of activations, and the weights are the M side of wgmma: ROWS can be as small
// as 16, so that a few rows cost no padding, and the same kernel serves many. One warp, the producer, keeps STAGES stages of
// both operands on their way into shared memory (TMA, 128 columns at a time); two consumer warpgroups multiply them, 64
// weight rows each. The tiles are numbered by a schedule that every block works out itself from the row counts of the
// experts; a block takes the next one that is left, so that none waits for another. Where rows are many, two blocks form a
// cluster and share them. docs/kernels.md has the pictures.
//
// The order of the weight rows in shared memory, which ends.cuh gives, is that of the tensor map.
//
// Constants put in front of this text:
//   ROWS        rows of activations per tile: N of wgmma
//   CHANNELS    weight rows per tile, 64 for each consumer warpgroup
//   STAGES      stages in shared memory
//   EARLY       of these, whose weights are asked for before there are rows
//   BOX         rows that a copy takes
//   CLUSTER     blocks to a cluster, 1 or 2: they take neighbouring stretches of weights, and each loads its share of the rows
//               for all
//   IN_STEP     clusters wait for one another before each tile
//   WINDOW      stages whose products the tensor cores add up, before float32 does
//   END         what happens to a finished tile:
//                   PRODUCT    the bare product, times unit
//                   ACTIVATED  scales, bias and activation; float32
//                   PACKED     the same, in the shorter form that packed.cuh gives
//                   CODES      the same, quantised with a given scale
//   Out         PRODUCT: Half | float
//   Bias        None | Half | Bfloat16 | float
//   ACT         activation (enum Act), used unless END is PRODUCT
//   ROW_SCALES  one scale of activations per row instead of one for all or per expert
//   PER_CHANNEL one weight scale per column instead of one or two per expert
//   MEASURED    ACTIVATED, PACKED: the largest magnitude of the block is left in partials
// and the functions wgmma for up to ROWS columns.

constexpr int STEP = 128;  // columns of a stage, one row of the 128-byte swizzle
constexpr int CONSUMERS = 2 * CHANNELS;
constexpr int THREADS = CONSUMERS + 128;  // the producer's warpgroup has one busy warp, and gives its registers away
constexpr int WEIGHT_BYTES = CHANNELS * STEP, STAGE_BYTES = WEIGHT_BYTES + ROWS * STEP;
constexpr int SUMS = ROWS / 2;  // of a thread
constexpr bool LARGE = ROWS > 48;  // a block takes all registers of a multiprocessor
constexpr bool OVERLAPPED = ROWS <= 96 && WINDOW == 1;  // registers are left for the products of two stages
static_assert(ROWS % 16 == 0, "half of the rows is a multiple of 8");
static_assert(!LARGE || CHANNELS == 128, "setmaxnreg counts two warpgroups");

__device__ __forceinline__ int rank() { return CLUSTER > 1 ? rank_in_cluster() : 0; }

// ---- multiplication ---------------------------------------------------------------------------------------------
// The last tile of an expert may have few rows: there are multiplications for one to all PIECES of a tile.
constexpr int PIECE = ROWS > 160 ? 32 : ROWS > 64 ? 16 : 8, PIECES = (ROWS + PIECE - 1) / PIECE;
__device__ constexpr int width(int pieces) { return pieces < PIECES ? pieces * PIECE : ROWS; }

// A K-major operand in the 128-byte swizzle, 8 rows (1024 bytes) from one group of rows to the next; the address counts 16
// bytes.
__device__ __forceinline__ u64 descriptor(u32 address) { return u64(address) | u64(1024 >> 4) << 32 | u64(1) << 62; }

// Until all products but the last COUNT are there.
template <int COUNT>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

// ---- the two roles ----------------------------------------------------------------------------------------------
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
};

// Clusters do not claim tiles, they take turns: one further along in every wave, since the last tiles of the experts, which
// may be short, often come in the rhythm of the waves.
__device__ __forceinline__ int tile_of_wave(int wave) {
    const int clusters = gridDim.x / CLUSTER;
    return wave * clusters + (blockIdx.x / CLUSTER + wave) % clusters;
}

// Clusters on tiles of the same weights or rows find these in the L2 cache if they are there at about the same time. Where rows
// are long it holds a small part of what they read, and clusters with short tiles would run away: a cluster begins when two
// thirds have begun in its wave, or one has nothing left. That is for speed alone, and blocks that do not run yet may need the
// place of one that waits: nobody waits for ever.
__device__ __forceinline__ void keep_in_step(const Groups& groups, int wave) {
    constexpr int PATIENCE = 1 << 12;  // some milliseconds
    const int clusters = gridDim.x / CLUSTER;
    if (rank() == 0 && elect()) atomicAdd(groups.claims, 1);
    const volatile int* claims = groups.claims;
    for (int i = 0; i < PATIENCE && claims[0] < wave * clusters - clusters / 3 && claims[1] == 0; ++i) {}
}

// By one warp. What only one lane does is behind elect(): always the same one.
__device__ __forceinline__ void produce(const Ring& ring, const TensorMap& weights, const TensorMap& rows, const Groups& groups,
                                        const Entry* entries) {
    // Those that exist, the blocks of a cluster in turns.
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
    int wave = 0;
    for (int tile = blockIdx.x / CLUSTER, next; at.seek(tile); tile = next) {
        at.channel_tile = at.channel_tile * CLUSTER + rank();
        // Weights that are read once leave the L2 cache to what is read again.
        const u64 policy = at.alone ? EVICT_FIRST : EVICT_UNCHANGED;
        int claimed = 0;
        if (CLUSTER == 1 && elect()) claimed = atomicAdd(groups.claims, 1);
        if constexpr (IN_STEP) keep_in_step(groups, wave + 1);
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
        }
        // Not sooner: until here nothing waits for the claim. The other lanes have 0.
        next = CLUSTER > 1 ? tile_of_wave(++wave) : gridDim.x + __reduce_add_sync(FULL_WARP, claimed);
    }
    if (!waited) wait_for_rows();
    wait(ring.empty(state.stage), state.parity ^ 1);
    if (!elect()) return;
    ring.place(state.stage).count = 0;
    arrive(ring.full(state.stage));
    if constexpr (CLUSTER == 1 || IN_STEP)
        if (atomicAdd(groups.claims + 1, 1) == gridDim.x - 1) groups.claims[0] = groups.claims[1] = 0;
}

// The products of a stage, the first COLS rows, on their way into `part`, or added to it.
template <int COLS>
__device__ __forceinline__ void start_products(float (&part)[COLS / 2], const Ring& ring, const RingState& state, bool add) {
    wait(ring.full(state.stage), state.parity);
    const u8* weights = ring.stage(state.stage);
    const u32 a = shared_address(weights + threadIdx.x / 128 * (64 * STEP)) / 16;
    const u32 b = shared_address(weights + WEIGHT_BYTES) / 16;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < STEP / 32; ++k) wgmma(part, descriptor(a + 2 * k), descriptor(b + 2 * k), add || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void release(const Ring& ring, int stage) {
    const int lane = threadIdx.x % LANES;
    if (lane < CLUSTER) arrive_at<CLUSTER>(ring.empty(stage), lane);
}

// Adds the products in `part`, the last ones of `stage`, once no more than UNDER_WAY later stages are not there.
template <int UNDER_WAY, int COLS>
__device__ __forceinline__ void add_products(float (&sum)[SUMS], float (&part)[COLS / 2], const Ring& ring, int stage) {
    wait_for_products<UNDER_WAY>();
    release(ring, stage);
#pragma unroll
    for (int i = 0; i < COLS / 2; ++i) asm volatile("" : "+f"(part[i])::"memory");
#pragma unroll
    for (int i = 0; i < COLS / 2; ++i) sum[i] += part[i];
}

// The accumulators of the tensor cores hold fewer bits than float32: each window of stages is added to the sum on its own.
// If OVERLAPPED, the products of the next stage are under way while those of one are added.
template <int COLS>
__device__ __forceinline__ void multiply_tile(float (&sum)[SUMS], const Ring& ring, RingState& state, int steps) {
    const auto take = [&] {
        const int stage = state.stage;
        state.next();
        return stage;
    };
    if constexpr (OVERLAPPED) {
        float part[2][COLS / 2];
        start_products<COLS>(part[0], ring, state, false);
        int before = take();
        for (int left = steps - 1;; left -= 2) {
            if (left == 0) return add_products<0, COLS>(sum, part[0], ring, before);
            start_products<COLS>(part[1], ring, state, false);
            add_products<1, COLS>(sum, part[0], ring, before);
            before = take();
            if (left == 1) return add_products<0, COLS>(sum, part[1], ring, before);
            start_products<COLS>(part[0], ring, state, false);
            add_products<1, COLS>(sum, part[1], ring, before);
            before = take();
        }
    } else {
        int left = steps;
        do {  // there is a stage, as the compiler should know: it would keep zeros at hand
            float part[COLS / 2];
            start_products<COLS>(part, ring, state, false);
            int before = take();
#pragma unroll
            for (int i = 1; i < WINDOW; ++i) {
                if (i >= left) break;
                start_products<COLS>(part, ring, state, true);
                wait_for_products<1>();
                release(ring, before);
                before = take();
            }
            add_products<0, COLS>(sum, part, ring, before);
            left -= WINDOW;
        } while (left > 0);
    }
}

// With as few columns as hold `count` rows, which make MOST pieces or fewer and LEAST or more. Each comparison is on the way to
// the first product: whole tiles take one.
template <int LEAST = 1, int MOST = PIECES>
__device__ __forceinline__ void multiply_rows(float (&sum)[SUMS], const Ring& ring, RingState& state, int steps, int count) {
    if constexpr (LEAST == MOST) {
        multiply_tile<width(LEAST)>(sum, ring, state, steps);
    } else {
        constexpr int LESS = MOST == PIECES ? PIECES - 1 : (LEAST + MOST) / 2;
        if (count > width(LESS)) multiply_rows<LESS + 1, MOST>(sum, ring, state, steps, count);
        else multiply_rows<LEAST, LESS>(sum, ring, state, steps, count);
    }
}

// Raises `largest` to the bits of the largest finite magnitude of the results if MEASURED.
__device__ __forceinline__ void consume(const Ring& ring, const Groups& groups, const Epilogue& end, u32* largest) {
    for (RingState state;;) {
        wait(ring.full(state.stage), state.parity);
        const Place at = ring.place(state.stage);
        if (at.count == 0) return;
        const int pair = at.channel_tile * (CHANNELS / 2) + threadIdx.x / LANES * 8 + threadIdx.x % LANES / 4;
        const int col = GATED ? pair : 2 * pair;
        const Scales<ROWS> scales(end, at, col);
        float sum[SUMS] = {};
        multiply_rows(sum, ring, state, groups.steps, at.count);
        // Beside an end of half the rows the largest tile would be short of registers.
        constexpr int HALF = (ROWS / 2 + 15) / 16 * 16;
        const bool all = ROWS > 192 || at.count > HALF;
        const float mine = all ? finish(end, at, scales, col, sum) : finish<ROWS, HALF>(end, at, scales, col, sum);
        if constexpr (MEASURED) {
            const u32 of_warp = __float_as_uint(warp_max(mine));
            if (threadIdx.x % LANES == 0) atomicMax(largest, of_warp);
        }
    }
}

extern __shared__ u8 dynamic_shared[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER) grouped_gemm(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows, Groups groups, Epilogue end)
{
    const Ring ring = {dynamic_shared + (-shared_address(dynamic_shared) & 1023)};
    Entry* entries = ring.entries();
    __shared__ u32 block_largest;

    const bool producer = threadIdx.x / LANES == CONSUMERS / LANES;
    if (producer) make_schedule(groups, entries);
    if (threadIdx.x == 0) {
        prefetch_map(weights);
        prefetch_map(rows);
        block_largest = 0;
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(ring.full(i), 1);
            init_barrier(ring.empty(i), CLUSTER * CONSUMERS / LANES);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (CLUSTER > 1) sync_cluster();
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        // In all 3 * 168 registers for each thread of three warpgroups: 40 + 2 * 232. Smaller tiles take what they need, and
        // blocks of the kernels around this one run beside them.
        if constexpr (LARGE) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (producer) produce(ring, weights, rows, groups, entries);
        __syncwarp();
    } else {
        if constexpr (LARGE) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous_kernel();
        consume(ring, groups, end, &block_largest);
    }
    if constexpr (CLUSTER > 1) sync_cluster();  // the other block may still arrive here
    if constexpr (MEASURED) {
        __syncthreads();
        for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < PARTIALS; i += gridDim.x * THREADS)
            end.partials[i] = i == int(blockIdx.x) ? __uint_as_float(block_largest) : 0.0f;
    }
}
