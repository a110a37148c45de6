// SPDX-License-Identifier: Apache-2.0
// Types, conversions, vector access and reductions shared by every kernel. Pasted in front of each source before it is
// compiled (NVRTC sees one text, no include path, no CUDA header).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Half { u16 bits; };
struct Bfloat16 { u16 bits; };
struct Fp8 { u8 bits; };  // e4m3, no infinity, NaN is 0x7f / 0xff
struct None {};           // the type of an argument that this variant does not use

// Where the scale of quantised values comes from; quantize.cu and activation.cu say what each means there.
enum Mode { TENSOR, STATIC, TOKEN };
enum Act { SILU, GELU, GELU_TANH, SWIGLUOAI, SILU_NO_MUL, GELU_NO_MUL, RELU2_NO_MUL };

enum End { PRODUCT, ACTIVATED, PACKED, CODES };  // of a GEMM; gemm_sm90.cu says what each means

constexpr float FP8_MAX = 448.0f;
constexpr float TINY_AMAX = 1e-30f;  // a row of zeros still gets a usable scale
constexpr int LANES = 32;
[[maybe_unused]] constexpr int MAX_ROW_THREADS = 512;  // threads of a block that holds a row in registers
constexpr u32 FULL_WARP = 0xffffffffu;

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// ---- programmatic dependent launch ------------------------------------------------------------------------------
// start_next_kernel: the next kernel may start, once all blocks have said so or are done.
// wait_for_previous_kernel: returns when the previous kernel and all before it have finished.
// Three rules make chains of kernels safe:
//   1. Each block that does anything waits once.
//   2. Before it waits, it touches only memory that no kernel that may still run touches (what both only read does not count).
//      May still run: the previous kernel, and those before it too as long as each starts the next before it waits itself.
//   3. What the previous kernel writes is no `const __restrict__` parameter: loads of those may move to before the wait.
// Without the launch attribute the previous kernel is done anyway, and both instructions do nothing.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void only_wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
    only_wait_for_previous_kernel();
    start_next_kernel();
}

// ---- rows of experts -----------------------------------------------------------------------------------------------
// First row of an expert, and how many it has; a count of -1 while routing has not found out. Kernels that start meanwhile need
// nothing else of it before they wait, so both numbers are stored and loaded in one piece.
struct alignas(8) Span { int row, count; };

__device__ __forceinline__ void store_span(Span* to, Span span) {
    const u64 both = u64(u32(span.count)) << 32 | u32(span.row);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(both) : "memory");
}
__device__ __forceinline__ Span load_span(const Span* from) {
    u64 both;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(both) : "l"(from) : "memory");
    return {int(u32(both)), int(both >> 32)};
}

// ---- conversions ------------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(None) { return 0.0f; }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bfloat16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ float to_float(Fp8 x) {
    // The exponent field of e4m3 lands in that of a half; 2^8 corrects the bias, subnormals included.
    if ((x.bits & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000u);
    const float magnitude = to_float(Half{u16((x.bits & 0x7f) << 7)}) * 256.0f;
    return x.bits & 0x80 ? -magnitude : magnitude;
}

__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, Half& y) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
__device__ __forceinline__ void from_float(float x, Bfloat16& y) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

// Two floats to two e4m3 codes, `low` in the low byte: nearest even, saturating, NaN to 0x7f.
__device__ __forceinline__ u32 encode_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
#else
    const float values[2] = {low, high};
    u32 codes = 0;
    for (int i = 0; i < 2; ++i) {
        const u32 bits = __float_as_uint(values[i]);
        const u32 magnitude = bits & 0x7fffffffu;
        u32 code;
        if (magnitude > 0x7f800000u) code = 0x7f;
        else if (magnitude >= 0x43e00000u) code = 0x7e;  // 448 and beyond
        else if (magnitude < 0x3c800000u)                // below 2^-6: multiples of 2^-9
            code = u32(__float2int_rn(__uint_as_float(magnitude) * 512.0f));
        else
            code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20) - (120u << 3);
        if (magnitude <= 0x7f800000u) code |= (bits >> 24) & 0x80u;
        codes |= code << (8 * i);
    }
    return codes;
#endif
}

// ---- division by a scale ----------------------------------------------------------------------------------------
// x / s correctly rounded in three instructions where 1 / s is at hand: one Newton correction of x * (1 / s) (Markstein,
// "Computation of elementary functions on the IBM RISC System/6000", 1990). Zeros keep their sign by the signs chosen here.
// From 2^10 on, far beyond e4m3's range, the product alone gives the right code, and the correction would make infinity a NaN.
struct Divisor {
    float scale, reciprocal;
    __device__ explicit Divisor(float s) : scale(s), reciprocal(__frcp_rn(s)) {}
    __device__ __forceinline__ float divide(float x) const {
        const float q = x * reciprocal;
        return fabsf(q) < 1024.0f ? fmaf(fmaf(q, scale, -x), -reciprocal, q) : q;
    }
};

__device__ __forceinline__ float scale_of_amax(float amax) { return __fdiv_rn(fmaxf(amax, TINY_AMAX), FP8_MAX); }

constexpr float LARGEST = 3.402823466e38f;  // finite float
__device__ __forceinline__ float finite_magnitude(float x) {
    const float magnitude = fabsf(x);
    return magnitude <= LARGEST ? magnitude : 0.0f;  // false for NaN too
}

// A running maximum of finite magnitudes in two instructions: their bits, so biased that those of infinity and NaN are
// negative.
constexpr int MAGNITUDE_BIAS = 0x00800000;
__device__ __forceinline__ int max_biased(int largest, float x) {
    return max(largest, int((__float_as_uint(x) & 0x7fffffffu) + MAGNITUDE_BIAS));
}
__device__ __forceinline__ float unbiased(int largest) { return __uint_as_float(max(largest - MAGNITUDE_BIAS, 0)); }

// scales[index], or `value` where there are none.
__device__ __forceinline__ float pick(const float* scales, long long index, float value) {
    return scales ? scales[index] : value;
}

// ---- vectors of eight elements ----------------------------------------------------------------------------------
constexpr int VECTOR = 8;

// What is read once leaves the L1 cache to what is read again.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// What nobody reads again need not go from the L2 cache to memory: leaves LINE bytes, at a multiple of that, undetermined.
[[maybe_unused]] constexpr int LINE = 128;
// `read`: what the lanes of a warp have made of all that they loaded of the line, not NaN; so that nothing is discarded before.
__device__ __forceinline__ void discard_line(const void* p, float read = 0.0f) {
    asm volatile("{.reg .pred there; setp.num.f32 there, %1, %1; @there discard.global.L2 [%0], 128;}" ::"l"(p), "f"(read)
                 : "memory");
}

// Of more bytes than these, most have gone to memory before they are read: discarding takes longer than it saves.
[[maybe_unused]] constexpr long long MOST_TO_DISCARD = 192 << 20;

// Eight elements as they lie in memory. A thread that converts none before it has asked for all is not kept waiting between
// one load and the next.
template <typename T>
union Vector {
    uint4 words[(sizeof(T) * VECTOR + 15) / 16];
    uint2 half_word;
    T elements[VECTOR];

    __device__ __forceinline__ void values(float (&v)[VECTOR]) const {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) v[i] = to_float(elements[i]);
    }
};

// Those from p on. ALIGNED: one or two 16-byte loads (8 bytes of fp8), all eight exist. Otherwise element by element, zeros
// from `count` on. ONCE: nobody else reads them.
template <bool ALIGNED, bool ONCE = false, typename T>
__device__ __forceinline__ Vector<T> read_vector(const T* p, int count) {
    Vector<T> data;
    if constexpr (!ALIGNED) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) data.elements[i] = i < count ? p[i] : T{};
    } else if constexpr (sizeof(T) == 1) {
        data.half_word = *reinterpret_cast<const uint2*>(p);
    } else {
#pragma unroll
        for (int i = 0; i < int(sizeof(T) * VECTOR / 16); ++i) {
            const uint4* from = reinterpret_cast<const uint4*>(p) + i;
            data.words[i] = ONCE ? load_once(from) : *from;
        }
    }
    return data;
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void load_vector(const T* p, int count, float (&v)[VECTOR]) {
    read_vector<ALIGNED>(p, count).values(v);
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store_vector(T* p, int count, const float (&v)[VECTOR]) {
    if constexpr (ALIGNED) {
        union { uint4 words[sizeof(T) * VECTOR / 16]; T elements[VECTOR]; } data;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) from_float(v[i], data.elements[i]);
#pragma unroll
        for (int i = 0; i < int(sizeof(T) * VECTOR / 16); ++i) reinterpret_cast<uint4*>(p)[i] = data.words[i];
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            if (i < count) from_float(v[i], p[i]);
    }
}

__device__ __forceinline__ uint2 encode_vector(const float (&v)[VECTOR], Divisor by) {
    uint2 codes;
    codes.x = encode_pair(by.divide(v[0]), by.divide(v[1])) | encode_pair(by.divide(v[2]), by.divide(v[3])) << 16;
    codes.y = encode_pair(by.divide(v[4]), by.divide(v[5])) | encode_pair(by.divide(v[6]), by.divide(v[7])) << 16;
    return codes;
}

template <bool ALIGNED>
__device__ __forceinline__ void store_codes(u8* p, int count, uint2 codes) {
    if constexpr (ALIGNED) {
        *reinterpret_cast<uint2*>(p) = codes;
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            if (i < count) p[i] = u8((i < 4 ? codes.x : codes.y) >> (8 * (i & 3)));
    }
}

// ---- copies into shared memory ----------------------------------------------------------------------------------
// Sixteen bytes, or zeros.
__device__ __forceinline__ void copy_chunk(void* to, const void* from, bool exists = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
// A thread's copies from one close_group to the next are a group; until all of its groups but the last LEFT are there.
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// ---- reductions -------------------------------------------------------------------------------------------------
// The largest of the warp's magnitudes, in every lane: those are in the order of their bits.
__device__ __forceinline__ float warp_max(float magnitude) {
    return __uint_as_float(__reduce_max_sync(FULL_WARP, __float_as_uint(magnitude)));
}

// The largest of what each warp has, in every thread of the block. At most 1024 threads, all of which call it.
__device__ __forceinline__ float max_of_warps(float of_warp) {
    __shared__ float of_warps[LANES];
    if (threadIdx.x % LANES == 0) of_warps[threadIdx.x / LANES] = of_warp;
    __syncthreads();
    const int lane = threadIdx.x % LANES;
    return warp_max(lane < int(blockDim.x / LANES) ? of_warps[lane] : 0.0f);
}

// The same of what each thread has.
__device__ __forceinline__ float block_max(float magnitude) { return max_of_warps(warp_max(magnitude)); }

// The maximum of a tensor is found in two steps: each block of one kernel leaves its own maximum, and each warp of the next
// takes the largest of those. Nothing has to be zeroed first, and no order matters.
constexpr int PARTIALS = 256;  // blocks of the first kernel

// One warp reads for the block, all of whose threads call it: 64 warps of a multiprocessor at once would wait for one another.
// Meanwhile they do something else.
template <typename Meanwhile>
__device__ __forceinline__ float max_of_partials(const float* partials, Meanwhile meanwhile) {
    __shared__ float of_all;
    float4 mine[PARTIALS / 4 / LANES];
    if (threadIdx.x < LANES) {
#pragma unroll
        for (int i = 0; i < PARTIALS / 4 / LANES; ++i)
            mine[i] = reinterpret_cast<const float4*>(partials)[threadIdx.x + i * LANES];
    }
    meanwhile();
    if (threadIdx.x < LANES) {
        float x = 0.0f;
#pragma unroll
        for (const float4 four : mine) x = fmaxf(x, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
        x = warp_max(x);
        if (threadIdx.x == 0) of_all = x;
    }
    __syncthreads();
    return of_all;
}

__device__ __forceinline__ float max_of_partials(const float* partials) {
    return max_of_partials(partials, [] {});
}
