// SPDX-License-Identifier: Apache-2.0
// GEMM 1's unscaled product to the fp8 rows of GEMM 2: activation_quantize, and amax_rows in front of it where one dynamic
// scale serves the whole tensor. Both gather the scales of the row and of its expert's weights, add the bias and apply
// the activation. Rows without an expert count for nothing and are left alone.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float
//   Bias        None | Half | Bfloat16 | float
//   MODE        where the scale of the result comes from, see activation_quantize
//   ACT         activation (enum Act)
//   VECS        vectors of eight columns per thread
//   IN_SHARED   how many of those wait for the scale in shared memory, 32 bytes each, and not in registers
//   ROW_THREADS threads of a block of activation_quantize, at most
//   IN_ALIGNED, OUT_ALIGNED    16-byte loads, 8-byte stores
//   PER_CHANNEL one weight scale per column instead of one or two per expert

constexpr bool GATED = ACT <= SWIGLUOAI;
constexpr int SCAN_THREADS = 512, SCAN_BLOCKS = IN_ALIGNED ? 2 : 1;  // of amax_rows; blocks per multiprocessor, at least

// What both kernels read. All of it is older than amax_rows.
struct Source {
    const In* x;               // (rows, x_pitch): gates from column 0, ups from up_column
    long long x_pitch;
    int up_column;
    const int* row_experts;    // (rows,), -1: no expert; null: expert 0
    const float* x_scale;      // [row * x_scale_row_stride + expert * x_scale_expert_stride]; null: 1
    int x_scale_row_stride, x_scale_expert_stride;
    float unit;                // what 1 in x stands for: the GEMM scales down to fit a half
    const float* w_scale;      // [expert * w_scale_stride + up * w_scale_up (+ col)]; null: 1
    int w_scale_stride, w_scale_up;
    const Bias* bias;          // (experts, 2 * cols), or (experts, cols) if not gated
    int cols;
};

__device__ __forceinline__ int expert_of(const Source& source, int row) {
    return source.row_experts ? source.row_experts[row] : 0;
}

// Of a row, what one weight scale per expert and the row make of the gates and of the ups.
struct Factors { float gate, up; };

__device__ __forceinline__ float saturated(float x) { return x > LARGEST ? LARGEST : x; }

__device__ __forceinline__ Factors factors_of(const Source& source, int row, int expert) {
    const long long index = (long long)row * source.x_scale_row_stride + expert * source.x_scale_expert_stride;
    const float row_scale = source.unit * pick(source.x_scale, index, 1.0f);
    if constexpr (PER_CHANNEL) return {row_scale, row_scale};
    const float* of_expert = source.w_scale ? source.w_scale + (long long)expert * source.w_scale_stride : nullptr;
    return {row_scale * pick(of_expert, 0, 1.0f), row_scale * pick(of_expert, source.w_scale_up, 1.0f)};
}

// Eight columns of the gates (up = 0) or the ups (up = 1), and what they have of scales and bias.
struct Columns {
    Vector<In> x;
    Vector<float> scale;
    Vector<Bias> shift;

    __device__ __forceinline__ void load(const Source& source, int row, int expert, int col, int up) {
        // Behind the end, the last columns once more: without a branch, all loads of a thread are on their way at once.
        if constexpr (IN_ALIGNED) col = min(col, source.cols - VECTOR);
        const int count = source.cols - col;
        x = read_vector<IN_ALIGNED>(source.x + row * source.x_pitch + up * source.up_column + col, count);
        if constexpr (PER_CHANNEL)
            scale = read_vector<IN_ALIGNED>(
                source.w_scale + (long long)expert * source.w_scale_stride + up * source.w_scale_up + col, count);
        if constexpr (sizeof(Bias) > 1)
            shift = read_vector<IN_ALIGNED>(
                source.bias + expert * (GATED ? 2LL : 1LL) * source.cols + up * source.cols + col, count);
    }

    // x * (row scale * weight scale) + bias
    __device__ __forceinline__ void scaled(float factor, float (&v)[VECTOR]) const {
        float by[VECTOR], add[VECTOR];
        x.values(v);
        if constexpr (PER_CHANNEL) scale.values(by);
        if constexpr (sizeof(Bias) > 1) shift.values(add);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const float all = PER_CHANNEL ? factor * by[j] : factor;
            v[j] = sizeof(Bias) > 1 ? fmaf(v[j], all, add[j]) : v[j] * all;
        }
    }
};

// Eight columns before their activation.
struct Unactivated {
    Columns gate, up;

    __device__ __forceinline__ void load(const Source& source, int row, int expert, int col) {
        gate.load(source, row, expert, col, 0);
        if constexpr (GATED) up.load(source, row, expert, col, 1);
    }

    // Eight activated columns; returns the larger of their largest finite magnitude and `largest`, biased.
    __device__ __forceinline__ int activated(Factors by, int largest, float (&v)[VECTOR]) const {
        float ups[VECTOR];
        // Or the zeros of tokens beside a huge one would be NaN. Not where the factors are made: loads would wait for them.
        by = {saturated(by.gate), saturated(by.up)};
        gate.scaled(by.gate, v);
        if constexpr (GATED) up.scaled(by.up, ups);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            v[j] = activate<ACT>(v[j], GATED ? ups[j] : 0.0f);
            largest = max_biased(largest, v[j]);
        }
        return largest;
    }
};

// The largest finite magnitude over all valid rows, one per block in partials. PARTIALS blocks.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS, SCAN_BLOCKS) amax_rows(
    Source source, int rows, float* __restrict__ partials)
{
    wait_for_previous_kernel();
    const u32 vectors = (source.cols + VECTOR - 1) / VECTOR, total = rows * vectors, step = gridDim.x * blockDim.x;
    struct Taken {
        Unactivated columns;
        Factors by;
        bool counts;
    };
    const auto take = [&](u32 i) {
        i = min(i, total - 1);  // the last one once more: no branch between the loads
        const int row = i / vectors, expert = expert_of(source, row), any = max(expert, 0);
        Taken taken;
        taken.columns.load(source, row, any, (i - row * vectors) * VECTOR);
        taken.by = factors_of(source, row, any);
        taken.counts = expert >= 0;
        return taken;
    };
    int largest = 0;
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    for (Taken next = take(i); i < total; i += step) {
        const Taken now = next;
        next = take(i + step);  // on its way meanwhile
        float v[VECTOR];
        const int with = now.columns.activated(now.by, largest, v);
        if (now.counts) largest = with;
    }
    const float of_block = block_max(unbiased(largest));
    if (threadIdx.x == 0) partials[blockIdx.x] = of_block;
}

// Activated vectors of a thread: the first ones in registers, the others in shared memory.
struct Activated {
    static constexpr int IN_REGISTERS = VECS - IN_SHARED;
    float first[IN_REGISTERS][VECTOR];

    static __device__ __forceinline__ float4& half_of(int i, int half) {  // beside that of the next thread
        extern __shared__ float4 others[];
        return others[(2 * (i - IN_REGISTERS) + half) * blockDim.x + threadIdx.x];
    }

    template <typename Make>
    __device__ __forceinline__ void make(Make make_one) {
#pragma unroll
        for (int i = 0; i < IN_REGISTERS; ++i) make_one(i, first[i]);
#pragma unroll 1
        for (int i = IN_REGISTERS; i < VECS; ++i) {
            float v[VECTOR];
            make_one(i, v);
            half_of(i, 0) = {v[0], v[1], v[2], v[3]};
            half_of(i, 1) = {v[4], v[5], v[6], v[7]};
        }
    }

    template <typename Use>
    __device__ __forceinline__ void use(Use use_one) const {
#pragma unroll
        for (int i = 0; i < IN_REGISTERS; ++i) use_one(i, first[i]);
#pragma unroll IN_ALIGNED ? VECS : 1
        for (int i = IN_REGISTERS; i < VECS; ++i) {
            const float4 low = half_of(i, 0), high = half_of(i, 1);
            use_one(i, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w});
        }
    }
};

// Blocks per multiprocessor, at least: two where shared memory is for that and registers do, since one waits for its maximum
// while the other loads; one of more threads has all registers. 0: for the compiler, which would take more of them with 1.
constexpr bool TWO_ROWS = IN_SHARED > 0 && Activated::IN_REGISTERS <= 2 && sizeof(In) == 2 && sizeof(Bias) == 1 && IN_ALIGNED;
constexpr int ROW_BLOCKS = TWO_ROWS ? 2 : ROW_THREADS > MAX_ROW_THREADS ? 1 : 0;

// One block takes one row (blockIdx.x) and, where no maximum over the row is needed, one stretch of its columns
// (blockIdx.y). The scale is, by MODE,
//   TENSOR      that of the maximum in partials, left in scale_out[0] too
//   STATIC      scale_in[expert * scale_expert_stride]
//   TOKEN       that of the row, left in scale_out[row]
extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS) activation_quantize(
    Source source,
    const float* partials,                    // TENSOR
    const float* __restrict__ scale_in,       // STATIC; null: scale_value
    float scale_value,
    int scale_expert_stride,
    int out_cols,                             // columns written: zeros from cols on
    u8* __restrict__ out,                     // (rows, out_pitch)
    long long out_pitch,
    float* __restrict__ scale_out)            // (1,) or, if TOKEN, (rows,)
{
    // Backwards: what amax_rows read last is still in the L2 cache.
    const int row = MODE == TENSOR ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int expert = expert_of(source, row), any = max(expert, 0);
    const Factors by = factors_of(source, row, any);
    const int first = blockIdx.y * blockDim.x * VECS + threadIdx.x;
    const auto col_of = [&](int i) { return (first + i * int(blockDim.x)) * VECTOR; };
    // If TENSOR, amax_rows is in front and all of the source older than that: it is read before that kernel is done.
    // Otherwise the GEMM is, and all but x is older.
    if constexpr (MODE != TENSOR) wait_for_previous_kernel();
    // All columns of a thread are loaded at once, or those of a whole row while the ones before are activated.
    constexpr int AHEAD = MODE == TOKEN ? 1 : VECS;
    Unactivated columns[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) columns[i].load(source, row, any, col_of(i));
    Activated activated;
    int largest = 0;
    const auto activate_all = [&] {
        activated.make([&](int i, float (&v)[VECTOR]) {
            const Unactivated now = columns[MODE == TOKEN ? 0 : i];
            if constexpr (MODE == TOKEN) columns[0].load(source, row, any, col_of(i + 1));
            largest = now.activated(by, largest, v);
        });
    };

    float scale = 1.0f;
    if constexpr (MODE == TENSOR) {
        wait_for_previous_kernel();
        scale = scale_of_amax(max_of_partials(partials, activate_all));
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) scale_out[0] = scale;
    } else {
        activate_all();
    }
    if (expert < 0) return;
    if constexpr (MODE == STATIC) scale = pick(scale_in, expert * scale_expert_stride, scale_value);
    if constexpr (MODE == TOKEN) {
        scale = scale_of_amax(block_max(unbiased(largest)));
        if (threadIdx.x == 0) scale_out[row] = scale;
    }
    const Divisor divisor(scale);
    activated.use([&](int i, const float (&v)[VECTOR]) {
        const int col = col_of(i);
        const uint2 codes = col < source.cols ? encode_vector(v, divisor) : uint2{0, 0};
        if (col < out_cols) store_codes<OUT_ALIGNED>(out + row * out_pitch + col, out_cols - col, codes);
    });
}
