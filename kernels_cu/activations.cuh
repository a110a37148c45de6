// SPDX-License-Identifier: Apache-2.0
// The activations of `enum Act` in float32, as cupy_moe/activations.py defines them.
//
// fmaf wherever a product meets a sum: the compiler might fuse them in one variant of a kernel and not in another.

// 1 / x to a unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// e to the x as a power of 2, with the errors of __expf, but 0 below 2^-126: three instructions less.
__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exponential(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// The complementary error function to 1.2e-7 of its value, apart from the rounding of the exponent: Chebyshev fit of Press et
// al., "Numerical Recipes in C", 2nd edition, section 6.2. erfcf is exacter, but takes registers that the end of a GEMM has
// not got.
__device__ __forceinline__ float complementary_error(float x) {
    const float z = fabsf(x), t = reciprocal(fmaf(0.5f, z, 1.0f));
    float p = 0.17087277f;
    p = fmaf(p, t, -0.82215223f);
    p = fmaf(p, t, 1.48851587f);
    p = fmaf(p, t, -1.13520398f);
    p = fmaf(p, t, 0.27886807f);
    p = fmaf(p, t, -0.18628806f);
    p = fmaf(p, t, 0.09678418f);
    p = fmaf(p, t, 0.37409196f);
    p = fmaf(p, t, 1.00002368f);
    p = fmaf(p, t, -1.26551223f);
    const float tail = exponential(fmaf(-z, z, p));
    return x < 0.0f ? fmaf(-t, tail, 2.0f) : t * tail;
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * complementary_error(x * -0.70710678118654752f); }
__device__ __forceinline__ float gelu_tanh(float x) {
    return x * sigmoid(1.5957691216057307f * fmaf(0.044715f * x * x, x, x));  // 1 + tanh(y) = 2 sigmoid(2y)
}
// Comparisons instead of fminf: a NaN has to stay one.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float at_least(float x, float limit) { return x < limit ? limit : x; }

template <Act ACT>
__device__ __forceinline__ float activate(float gate, float up) {
    if constexpr (ACT == SILU) return silu(gate) * up;
    if constexpr (ACT == GELU) return gelu(gate) * up;
    if constexpr (ACT == GELU_TANH) return gelu_tanh(gate) * up;
    if constexpr (ACT == SWIGLUOAI) {
        const float g = at_most(gate, 7.0f);
        return g * sigmoid(1.702f * g) * (at_least(at_most(up, 7.0f), -7.0f) + 1.0f);
    }
    if constexpr (ACT == SILU_NO_MUL) return silu(gate);
    if constexpr (ACT == GELU_NO_MUL) return gelu(gate);
    const float positive = at_least(gate, 0.0f);
    return positive * positive;
}
