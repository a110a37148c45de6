// SPDX-License-Identifier: Apache-2.0
// Grouped GEMM from compute capability 8.0 on: each expert's fp8 rows times its fp8 weights through mma.sync, with the
// activation in the end of GEMM 1. The same tiles, schedule and ends as gemm_sm90.cu, with what every such device has: all
// threads copy (cp.async) and all of them multiply.
//
// A tile is CHANNELS weight rows (M of mma) by ROWS rows of activations (N). Block b takes the tiles b, b + gridDim.x, ...
// and sees their stages, 128 columns each, as one sequence: while a stage is multiplied, the STAGES - 1 that follow are on
// their way, whichever tile they belong to. docs/kernels.md has the pictures.
//
// Constants put in front of this text:
//   ROWS        rows of activations per tile, a multiple of 16
//   STAGES      stages in shared memory
//   FP8         the tensor cores multiply e4m3 (from compute capability 8.9 on); otherwise float16, unpacked in registers
// and END, Out, Bias, ACT, ROW_SCALES, PER_CHANNEL and MEASURED as in gemm_sm90.cu.

constexpr int STEP = 128;      // columns of a stage
constexpr int CHANNELS = 128;
constexpr int THREADS = 256;   // eight warps: four along CHANNELS, two along ROWS
constexpr int GROUPS = 2;      // of 16 weight rows that a warp has
constexpr int APART = GATED ? 8 : 16;  // columns of the result from one group to the next
constexpr int WARP_ROWS = ROWS / 2, SUMS = WARP_ROWS / 2;  // of a warp; of a thread, for each group
constexpr int WEIGHT_BYTES = CHANNELS * STEP, STAGE_BYTES = WEIGHT_BYTES + ROWS * STEP;
static_assert(ROWS % 16 == 0);

struct Operands {
    const u8* weights;  // (experts, n, k)
    const u8* rows;     // (rows, pitch)
    int n, k, pitch;    // k and pitch are multiples of 16, n is one too, and of 32 if GATED
};

// ---- copies -----------------------------------------------------------------------------------------------------
// Where chunk `chunk` (16 bytes) of row `row` lies in a stage. Eight rows of one chunk, which ldmatrix reads at a time, fall
// into different banks.
__device__ __forceinline__ int place_of(int row, int chunk) { return row * STEP + (chunk ^ row % 8) * 16; }

// A stage to be copied; goes through those of this block's tiles.
struct Cursor {
    Walk at;
    int tile = blockIdx.x, step = 0;
    bool exists;
    __device__ Cursor(const Entry* entries, const Groups& groups) : at(entries, groups), exists(at.seek(blockIdx.x)) {}
    __device__ __forceinline__ void next(int steps) {
        if (++step < steps) return;
        step = 0;
        if (exists) exists = at.seek(tile += gridDim.x);
    }
};

// The weight rows of a stage, in the order that ends.cuh gives.
__device__ __forceinline__ void copy_weights(u8* stage, const Operands& of, const Cursor& from) {
    if (!from.exists) return;
    const int chunk = threadIdx.x % 8, column = from.step * STEP + chunk * 16;
#pragma unroll
    for (int row = threadIdx.x / 8; row < CHANNELS; row += THREADS / 8) {
        const int pair = from.at.channel_tile * (CHANNELS / 2) + row / 16 * 8 + row % 8, half = row / 8 % 2;
        const long long channel = (long long)from.at.expert * of.n + (GATED ? pair + half * (of.n / 2) : 2 * pair + half);
        const bool exists = pair < of.n / 2 && column < of.k;
        copy_chunk(stage + place_of(row, chunk), exists ? of.weights + channel * of.k + column : of.weights, exists);
    }
}

__device__ __forceinline__ void copy_rows(u8* stage, const Operands& of, const Cursor& from) {
    if (!from.exists) return;
    const int chunk = threadIdx.x % 8, column = from.step * STEP + chunk * 16;
#pragma unroll
    for (int row = threadIdx.x / 8; row < ROWS; row += THREADS / 8) {
        const bool exists = row < from.at.count && column < of.k;
        const u8* source = of.rows + (long long)(from.at.row + row) * of.pitch + column;
        copy_chunk(stage + WEIGHT_BYTES + place_of(row, chunk), exists ? source : of.rows, exists);
    }
}

// ---- multiplication ---------------------------------------------------------------------------------------------
// A thread's part of a fragment is one register of four codes for each 8 x 16-byte matrix that ldmatrix loads: row lane / 4,
// codes 4 * (lane % 4) and the next three. With 16-bit elements mma wants two of them there, so that a register of codes
// is just what a register of mma with e4m3 holds:
//   A, 16 x 32   rows 0-7, codes 0-15 | rows 8-15, codes 0-15 | rows 0-7, codes 16-31 | rows 8-15, codes 16-31
//   B, 32 x 8    codes 0-15 | codes 16-31
// For float16 each becomes two registers, codes 0 and 2 and codes 1 and 3, which stand for columns 2 * (lane % 4) and the
// next, and for those 8 further: another order along K than that in memory, but the same in A and B.
constexpr int WIDE = FP8 ? 1 : 2;
constexpr float UNIT = FP8 ? 1.0f : 65536.0f;  // of a product: unpacked operands are in units of 2^8

// The codes in the high bytes of both halves as float16. The exponent field of e4m3 lands in that of a half; the code of
// NaN carries into the bit above, and becomes one.
__device__ __forceinline__ u32 unpack(u32 codes) {
    const u32 magnitude = codes & 0x7f007f00u;
    const u32 nan = (magnitude + 0x01000100u) & 0x80008000u;
    return (codes & 0x80008000u) | (magnitude | nan) >> 1;
}

// Four matrices, the rows of matrix i where the lanes 8 * i to 8 * i + 7 say.
__device__ __forceinline__ void load_matrices(u32 (&to)[4 * WIDE], const u8* row) {
    u32 codes[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(codes[0]), "=r"(codes[1]), "=r"(codes[2]), "=r"(codes[3]) : "r"(shared_address(row)) : "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (FP8) {
            to[i] = codes[i];
        } else {
            to[2 * i] = unpack(codes[i] << 8);
            to[2 * i + 1] = unpack(codes[i]);
        }
    }
}

// 16 x 8 sums of 32 products each.
__device__ __forceinline__ void multiply(float (&sum)[4], const u32* a, const u32* b) {
#pragma unroll
    for (int half = 0; half < WIDE; ++half, a += 4, b += 2) {
        if constexpr (FP8) {
            asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        } else {  // a: codes 0 and 2 of rows 0-7, codes 1 and 3 of these, the same of rows 8-15
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                : "r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
}

// The accumulators of fp8 tensor cores may hold fewer bits than float32: each 64 columns are added to the sum on their own.
__device__ __forceinline__ void multiply_add(float (&sum)[GROUPS][SUMS], const u8* stage) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int channel = warp % 4 * (16 * GROUPS), row = warp / 4 * WARP_ROWS;
#pragma unroll 1  // more at a time than this, and ptxas loads ahead until it runs out of registers
    for (int first = 0; first < STEP / 16; first += 4) {  // of four chunks
        u32 a[GROUPS][2][4 * WIDE], b[4 * WIDE];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int k = 0; k < 2; ++k)
                load_matrices(a[group][k], stage + place_of(channel + 16 * group + lane % 16, first + 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < WARP_ROWS / 8; ++j) {
            load_matrices(b, stage + WEIGHT_BYTES + place_of(row + 8 * j + lane % 8, first + lane / 8));
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
                float part[4] = {};
                multiply(part, a[group][0], b);
                multiply(part, a[group][1], b + 2 * WIDE);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[group][4 * j + i] = fmaf(part[i], UNIT, sum[group][4 * j + i]);
            }
        }
    }
}

// ---- a block ----------------------------------------------------------------------------------------------------
// Where this warp's rows of a tile lie; beyond the expert's last one their count is 0 or less.
__device__ __forceinline__ Place rows_of_warp(Place at) {
    const int first_row = threadIdx.x / (4 * LANES) * WARP_ROWS;
    at.row += first_row;
    at.count -= first_row;
    return at;
}

extern __shared__ __align__(128) u8 dynamic_shared[];  // the stages, then the schedule

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_gemm_mma(Operands operands, Groups groups, Epilogue end) {
    const auto stage = [](int i) { return dynamic_shared + i * STAGE_BYTES; };
    Entry* entries = reinterpret_cast<Entry*>(stage(STAGES));
    if (threadIdx.x < LANES) make_schedule(groups, entries);
    __syncthreads();

    // The kernel in front makes the rows, not the weights: those of the first stages are on their way before its end.
    Cursor weights(entries, groups), next(entries, groups);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i, weights.next(groups.steps)) copy_weights(stage(i), operands, weights);
    wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i, next.next(groups.steps)) {
        copy_rows(stage(i), operands, next);
        close_group();
    }

    float largest = 0.0f;
    int read = 0, free = STAGES - 1;
    Walk at(entries, groups);
    for (int tile = blockIdx.x; at.seek(tile); tile += gridDim.x) {
        const Place mine = rows_of_warp(at);
        const int pair = at.channel_tile * (CHANNELS / 2) + threadIdx.x / LANES % 4 * (8 * GROUPS) + threadIdx.x % LANES / 4;
        const int col = GATED ? pair : 2 * pair;
        const Scales<WARP_ROWS> scales[GROUPS] = {{end, mine, col}, {end, mine, col + APART}};
        float sum[GROUPS][SUMS] = {};
        for (int step = 0; step < groups.steps; ++step) {
            wait_for_groups<STAGES - 2>();
            __syncthreads();  // what every thread has copied is there, and all have read the stage in front
            copy_weights(stage(free), operands, next);
            copy_rows(stage(free), operands, next);
            close_group();
            next.next(groups.steps);
            multiply_add(sum, stage(read));
            free = read;
            read = read + 1 == STAGES ? 0 : read + 1;
        }
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
            largest = fmaxf(largest, finish(end, mine, scales[group], col + group * APART, sum[group]));
    }
    if constexpr (MEASURED) {
        largest = block_max(largest);
        for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < PARTIALS; i += gridDim.x * THREADS)
            end.partials[i] = i == int(blockIdx.x) ? largest : 0.0f;
    }
}
