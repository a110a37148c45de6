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
//   WINDOW      stages whose products the tensor cores add up, before float32 does; 0: all of a tile. It needs no sums beside
//               the products then, and each consumer warpgroup has tiles of its own: one multiplies while the other ends a tile
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

constexpr int SUMS = ROWS / 2;  // of a thread, for each stretch of 64 weight rows
constexpr int STRETCHES = IN_TURNS ? 2 : 1;  // of a warpgroup
constexpr bool LARGE = ROWS > 48;  // a block takes all registers of a multiprocessor
[[maybe_unused]] constexpr bool OVERLAPPED = ROWS <= 96 && WINDOW == 1;  // registers are left for the products of two stages
static_assert(ROWS % 16 == 0, "half of the rows is a multiple of 8");
static_assert(!LARGE || CHANNELS == 128, "setmaxnreg counts two warpgroups");
static_assert(!IN_TURNS || (LARGE && END == PRODUCT), "shorter sums are not for what is encoded afterwards");

// ---- multiplication ---------------------------------------------------------------------------------------------
// A tile may have fewer rows: there are multiplications for one to all PIECES of a tile.
constexpr int PIECE = ROWS > 192 ? 32 : ROWS > 64 ? 16 : 8, PIECES = (ROWS + PIECE - 1) / PIECE;
__device__ constexpr int width(int pieces) { return pieces < PIECES ? pieces * PIECE : ROWS; }

// A K-major operand in the 128-byte swizzle, 8 rows (1024 bytes) from one group of rows to the next; the address counts 16
// bytes.
__device__ __forceinline__ u64 descriptor(u32 address) { return u64(address) | u64(1024 >> 4) << 32 | u64(1) << 62; }

// Until all products but the last COUNT are there.
template <int COUNT>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

// What the producer has written for the first stage of a tile. An arrival stands for what its own thread has read: the lane
// that will arrive at the barrier of this block reads for the warp; racecheck (tests/sanitize.py) follows nothing else.
__device__ __forceinline__ Place read_place(const Ring& ring, int stage) {
    Place at = {};
    // Not in a branch: the compiler would lose sight of the fact that all lanes find the same place, and tiles of 208 rows would
    // spill (tests/test_compile.py).
    asm volatile(
        "{\n\t.reg .pred reads;\n\tsetp.eq.u32 reads, %5, %6;\n\t@reads ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "+r"(at.expert), "+r"(at.channel_tile), "+r"(at.row), "+r"(at.count)
        : "r"(shared_address(&ring.place(stage))), "r"(threadIdx.x % LANES), "r"(rank()) : "memory");
    const auto of_all = [](int word) { return int(__reduce_or_sync(FULL_WARP, word)); };
    return {of_all(at.expert), of_all(at.channel_tile), of_all(at.row), of_all(at.count)};
}

// By each warp that has read it.
__device__ __forceinline__ void release(const Ring& ring, int stage) {
    const int lane = threadIdx.x % LANES;
    if (lane < CLUSTER) arrive_at<CLUSTER>(ring.empty(stage), lane);
}

// The products of a stage, the first COLS rows, on their way into `part`, or added to it.
template <int COLS, int SIZE>
__device__ __forceinline__ void start_products(float (&part)[STRETCHES][SIZE], const Ring& ring, const RingState& state,
                                               bool add) {
    wait(ring.full(state.stage), state.parity);
    const u8* weights = ring.stage(state.stage);
    constexpr int STRETCH = 64 * STEP;  // bytes
    const u32 a = shared_address(weights + (IN_TURNS ? 0 : threadIdx.x / 128 * STRETCH)) / 16;
    const u32 b = shared_address(weights + WEIGHT_BYTES) / 16;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < STEP / 32; ++k)
#pragma unroll
        for (int i = 0; i < STRETCHES; ++i)
            wgmma(reinterpret_cast<float (&)[COLS / 2]>(part[i]), descriptor(a + i * (STRETCH / 16) + 2 * k),
                  descriptor(b + 2 * k), add || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Adds the products in `part`, the last ones of `stage`, once no more than UNDER_WAY later stages are not there.
template <int UNDER_WAY, int COLS>
__device__ __forceinline__ void add_products(float (&sum)[1][SUMS], float (&part)[1][COLS / 2], const Ring& ring, int stage) {
    wait_for_products<UNDER_WAY>();
    release(ring, stage);
    // To the compiler, products are there once they have been asked for: it must not read them in front of this.
#pragma unroll
    for (int i = 0; i < COLS / 2; ++i) asm volatile("" : "+f"(part[0][i])::"memory");
#pragma unroll
    for (int i = 0; i < COLS / 2; ++i) sum[0][i] += part[0][i];
}

// Shared memory beside the ring.
struct Shared {
    u32 largest;  // MEASURED: bits of the largest finite magnitude
    // IN_TURNS, of each consumer warpgroup: a barrier where the other one says that the tensor cores are free, and whether that
    // has found no more tiles.
    u64 turn[2];
    bool ended[2];
};

// Of a consumer warpgroup, IN_TURNS: the tiles are those of both, one after another.
struct Turn {
    Shared& shared;
    const int mine = threadIdx.x / 128;
    u32 parity = mine ^ 1;  // the first one need not wait for its first turn
    // False behind the last tile.
    __device__ __forceinline__ bool wait_for() {
        wait(shared.turn + mine, parity);
        parity ^= 1;
        // Read by the lane that arrives, as a place is.
        const bool over = threadIdx.x % LANES == 0 && *const_cast<volatile bool*>(shared.ended + mine);
        return !__any_sync(FULL_WARP, over);
    }
    __device__ __forceinline__ void pass_on(bool ended) {
        if (threadIdx.x % LANES > 0) return;
        *const_cast<volatile bool*>(shared.ended + (mine ^ 1)) = ended;
        arrive(shared.turn + (mine ^ 1));
    }
};

// The accumulators of the tensor cores hold fewer bits than float32: each window of stages is added to the sum on its own.
// If OVERLAPPED, the products of the next stage are under way while those of one are added. IN_TURNS the sum is the window.
template <int COLS>
__device__ __forceinline__ void multiply_tile(float (&sum)[STRETCHES][SUMS], const Ring& ring, RingState& state, int steps,
                                              Turn& turn) {
    const auto take = [&] {
        const int stage = state.stage;
        state.next();
        return stage;
    };
    if constexpr (IN_TURNS) {
        int before = 0;
        // Neither unrolled nor without the zeros in front: the compiler would run out of registers, and wait for each product.
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            start_products<COLS>(sum, ring, state, true);
            wait_for_products<1>();
            if (step > 0) release(ring, before);
            before = take();
        }
        turn.pass_on(false);
        wait_for_products<0>();
        release(ring, before);
        // As in add_products.
#pragma unroll
        for (int i = 0; i < COLS / 2; ++i) asm volatile("" : "+f"(sum[0][i]), "+f"(sum[1][i])::"memory");
    } else if constexpr (OVERLAPPED) {
        float part[2][1][COLS / 2];
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
            float part[1][COLS / 2];
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
__device__ __forceinline__ void multiply_rows(float (&sum)[STRETCHES][SUMS], const Ring& ring, RingState& state, int steps,
                                              int count, Turn& turn) {
    if constexpr (LEAST == MOST) {
        multiply_tile<width(LEAST)>(sum, ring, state, steps, turn);
    } else {
        constexpr int LESS = MOST == PIECES ? PIECES - 1 : (LEAST + MOST) / 2;
        if (count > width(LESS)) multiply_rows<LESS + 1, MOST>(sum, ring, state, steps, count, turn);
        else multiply_rows<LEAST, LESS>(sum, ring, state, steps, count, turn);
    }
}

// The end of a tile from row FROM on, END_ROWS at a time and no more than there are. Returns the largest finite magnitude if
// MEASURED.
constexpr int END_ROWS = IN_TURNS ? 32 : ROWS > 192 ? ROWS : (ROWS / 2 + 15) / 16 * 16;
template <int FROM = 0>
__device__ __forceinline__ float finish_rows(const Epilogue& end, const Place& at, const Scales<ROWS>& scales, int col,
                                             const float (&sum)[STRETCHES][SUMS]) {
    constexpr int TO = FROM + END_ROWS < ROWS ? FROM + END_ROWS : ROWS;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < STRETCHES; ++i)
        largest = fmaxf(largest, finish<ROWS, FROM, TO>(end, at, scales, col + 64 * i, sum[i]));
    if constexpr (TO < ROWS)
        if (at.count > TO) largest = fmaxf(largest, finish_rows<TO>(end, at, scales, col, sum));
    return largest;
}

__device__ __forceinline__ void consume(const Ring& ring, const Groups& groups, const Epilogue& end, Shared& shared) {
    Turn turn{shared};
    RingState state;
    if (IN_TURNS && turn.mine > 0) state.skip(groups.steps);
    while (!IN_TURNS || turn.wait_for()) {
        wait(ring.full(state.stage), state.parity);
        const Place at = read_place(ring, state.stage);
        if (at.count == 0) {
            if constexpr (IN_TURNS) turn.pass_on(true);
            return;
        }
        const int pair = at.channel_tile * (CHANNELS / 2) + threadIdx.x / LANES % READERS * 8 + threadIdx.x % LANES / 4;
        const int col = GATED ? pair : 2 * pair;
        const Scales<ROWS> scales(end, at, col);
        float sum[STRETCHES][SUMS] = {};
        multiply_rows(sum, ring, state, groups.steps, at.count, turn);
        if constexpr (IN_TURNS) state.skip(groups.steps);
        const float mine = finish_rows(end, at, scales, col, sum);
        if constexpr (MEASURED) {
            const u32 of_warp = __float_as_uint(warp_max(mine));
            if (threadIdx.x % LANES == 0) atomicMax(&shared.largest, of_warp);
        }
    }
}

static_assert(sizeof(Shared) + (CLUSTER > 1) * CLAIMS * sizeof(Claim) <= 192, "sm90.SHARED_BYTES leaves as much");

extern __shared__ u8 dynamic_shared[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER) grouped_gemm(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows, Groups groups, Epilogue end)
{
    const Ring ring = {dynamic_shared + (-shared_address(dynamic_shared) & 1023)};
    Entry* entries = ring.entries();
    __shared__ Shared shared;
    __shared__ Claim claims[CLAIMS];

    const bool producer = threadIdx.x / LANES == CONSUMERS / LANES;
    if (producer) make_schedule(groups, entries);
    if (threadIdx.x == 0) {
        prefetch_map(weights);
        prefetch_map(rows);
        shared.largest = 0;
        if constexpr (IN_TURNS) {
            for (u64& turn : shared.turn) init_barrier(&turn, READERS);
            shared.ended[0] = shared.ended[1] = false;
        }
        if constexpr (CLUSTER > 1)
            for (Claim& claim : claims) init_barrier(&claim.known, 1);
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(ring.full(i), 1);
            init_barrier(ring.empty(i), CLUSTER * READERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (CLUSTER > 1) sync_cluster();
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        // In all 3 * 168 registers for each thread of three warpgroups: 40 + 2 * 232. Smaller tiles take what they need, and
        // blocks of the kernels around this one run beside them.
        if constexpr (LARGE) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (producer) produce(ring, weights, rows, groups, entries, claims);
        __syncwarp();
    } else {
        if constexpr (LARGE) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous_kernel();
        consume(ring, groups, end, shared);
    }
    if constexpr (CLUSTER > 1) sync_cluster();  // the other block may still arrive here
    if constexpr (MEASURED) {
        __syncthreads();
        for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < PARTIALS; i += gridDim.x * THREADS)
            end.partials[i] = i == int(blockIdx.x) ? __uint_as_float(shared.largest) : 0.0f;
    }
}
